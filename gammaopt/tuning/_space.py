r"""The search space in the law's own coordinates: log₂ γ and log₂ c, where η = c·η*(γ).

In raw (γ, η) the good rates lie on a bent ridge that spans ten decades; in these coordinates they lie in one column.
The range of c is the same for every γ, γ = 1 included: five octaves on either side of the task's base rate.

γ is searched from 0.01 up to what the budget can train: a plateau of at most a tenth of the T steps,

    γ_max(T/10) = (T/10 / T₁)^(L/(L−2)),    T₁ = the plateau at γ = 1; at least 10, at most 1,000
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

from gammaopt._laws import EtaLaw

OCTAVES = 5.0
LOWEST_GAMMA, LEAST_HIGH, MOST_HIGH = 0.01, 10.0, 1000.0
PLATEAU_SHARE = 0.1  # of the budget: a longer plateau costs more than a better γ brings
EDGE = 0.03  # a best value this near to the end of its range says that the range is too small
GAMMA, RATE = "log2_gamma", "log2_c"


@dataclass(frozen=True)
class Space:
    """Ranges of the coordinates.

    Attributes:
        gamma_range: lowest and highest γ, or ``None`` for γ = 1 alone.
        base_lr: the rate at c = 1 and γ = 1.
        octaves: how far on either side of ``base_lr`` rates are searched.
    """

    gamma_range: tuple[float, float] | None
    base_lr: float
    octaves: float = OCTAVES

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Coordinate → (low, high)."""
        rate = {RATE: (-self.octaves, self.octaves)}
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

    def digest(self, start: list[dict[str, float]]) -> str:
        """Eight hex digits that name the ranges and the start points: the grid hash of a study."""
        content = [self.ranges(), self.base_lr, start]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=4).hexdigest()

    def at_edge(self, coordinates: dict[str, float]) -> list[str]:
        """Names of the coordinates in which a point lies at the end of its range."""
        return [
            name
            for name, (low, high) in self.ranges().items()
            if min(coordinates[name] - low, high - coordinates[name]) < EDGE * (high - low)
        ]


def trainable_gammas(law: EtaLaw, steps: int, plateau_steps: float) -> tuple[float, float]:
    """The range of γ that a budget of ``steps`` is worth searching, from T₁ = ``plateau_steps`` at γ = 1.

    Example:
        >>> trainable_gammas(EtaLaw(depth=3), steps=1000, plateau_steps=20)
        (0.01, 125.0)
    """
    most = PLATEAU_SHARE * steps
    high = law.gamma_max(most, plateau_steps) if most >= plateau_steps else LEAST_HIGH
    return LOWEST_GAMMA, float(f"{min(MOST_HIGH, max(LEAST_HIGH, high)):.4g}")
