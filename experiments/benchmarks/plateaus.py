"""T₁ of the bundled tasks: how many steps their accuracy stays at chance, as T₁·γ^(1−2/L).

    python experiments/benchmarks/plateaus.py --json experiments/results/plateaus/cpu.json

Read off the tables of real runs in results/surrogates (see surrogates.py). At each γ from 10 to 1,000, where the law's
power is alone, the best rate's curve, averaged over the seeds, leaves its plateau where it stays a tenth of the way
from chance to all right, interpolated in log step; T₁ is the geometric mean of those steps over γ^(1−2/L). These are
the ``plateau_steps`` of the tasks, rounded to whole steps. Told beside it: the plateau at γ = 1, and the smallest and
largest T₁ that single γ give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from _paired import argument_parser, write_json
from numpy.typing import NDArray
from surrogates import Surrogate, read

TABLES = ("digits-mse", "digits-cross_entropy", "parity-mse")
CHANCE = {"digits": 1 / 10, "parity": 1 / 2}
MOVED = 0.1
RICH = 10.0  # the smallest γ that T₁ is taken from


def left_at(surrogate: Surrogate, index: int) -> float:
    """The step at which the best rate of a γ leaves chance for good."""
    valid = np.where(surrogate.diverged[index], -1.0, surrogate.mean[index])
    chance = CHANCE[surrogate.name.partition("-")[0]]
    return leaves(surrogate.curve_steps, surrogate.curves[index, valid.argmax()], chance + MOVED * (1 - chance))


def leaves(steps: Sequence[int], curve: NDArray[np.float64], level: float) -> float:
    """Where a curve rises above ``level`` for good, linear in log step; ``inf`` if it does not."""
    last = int(np.flatnonzero(np.append(True, curve < level))[-1]) - 1  # the last report below it
    if last == len(curve) - 1:
        return math.inf
    if last < 0:
        return float(steps[0])
    share = (level - curve[last]) / (curve[last + 1] - curve[last])
    return float(steps[last] ** (1 - share) * steps[last + 1] ** share)


def measure(name: str) -> dict[str, Any]:
    """T₁ of one table."""
    surrogate = read(name)
    growth = np.array([surrogate.law.plateau_steps(gamma, 1.0) for gamma in surrogate.gammas])
    left = np.array([left_at(surrogate, index) for index in range(len(surrogate.gammas))])
    each = (left / growth)[surrogate.gammas >= RICH * (1 - 1e-9)]
    return {
        "name": name,
        "plateau_steps": float(np.exp(np.log(each).mean())),
        "range": [float(each.min()), float(each.max())],
        "at_one": float(left[np.abs(np.log(surrogate.gammas)).argmin()]),
        "gammas": surrogate.gammas.tolist(),
        "left_at": [step if math.isfinite(step) else None for step in left.tolist()],
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = argument_parser(__doc__).parse_args(argv)
    rows = [measure(name) for name in TABLES]
    print(f"{'':22}   T₁   of single γ     plateau at γ = 1")
    for row in rows:
        low, high = row["range"]
        print(f"{row['name']:22} {row['plateau_steps']:5.1f}   {low:4.1f} – {high:4.1f}   {row['at_one']:10.1f}")
    write_json(options, {"rows": rows}, [])


if __name__ == "__main__":
    main()
