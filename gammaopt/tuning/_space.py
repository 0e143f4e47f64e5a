r"""The search space in the law's own coordinates: log₂ γ and log₂ c, where η = c·η*(γ).

In raw (γ, η) the good rates lie on a bent ridge that spans ten decades; in these coordinates they lie in one column.
The range of c is the same for every γ, γ = 1 included: five octaves on either side of the task's base rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

OCTAVES = 5.0
EDGE = 0.03  # a best value this near to the end of its range says that the range is too small
GAMMA, RATE = "log2_gamma", "log2_c"


@dataclass(frozen=True)
class Space:
    """Ranges of the coordinates.

    Attributes:
        gamma_range: lowest and highest γ, or ``None`` for γ = 1 alone.
        base_lr: the rate at c = 1 and γ = 1.
    """

    gamma_range: tuple[float, float] | None
    base_lr: float

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Coordinate → (low, high)."""
        rate = {RATE: (-OCTAVES, OCTAVES)}
        if self.gamma_range is None:
            return rate
        low, high = self.gamma_range
        return {GAMMA: (math.log2(low), math.log2(high)), **rate}

    def cell(self, coordinates: dict[str, float]) -> tuple[float, float]:
        """(γ, lr) of a point; ``lr`` is what the optimizer is given, the rate at γ = 1."""
        return 2.0 ** coordinates.get(GAMMA, 0.0), self.base_lr * 2.0 ** coordinates[RATE]

    def points(self, count: int, seed: int) -> list[dict[str, float]]:
        """``count`` start points: a scrambled Sobol sequence, whose first points already cover the space."""
        from scipy.stats import qmc

        ranges = self.ranges()
        sobol = qmc.Sobol(len(ranges), rng=seed)
        unit = sobol.random_base2(max(0, math.ceil(math.log2(count))))[:count] if count else []
        return [
            {name: low + (high - low) * float(u) for (name, (low, high)), u in zip(ranges.items(), row, strict=True)}
            for row in unit
        ]

    def at_edge(self, coordinates: dict[str, float]) -> list[str]:
        """Names of the coordinates in which a point lies at the end of its range."""
        return [
            name
            for name, (low, high) in self.ranges().items()
            if min(coordinates[name] - low, high - coordinates[name]) < EDGE * (high - low)
        ]
