"""Tables of real runs over (γ, c, seed), which let a study be repeated hundreds of times without training anything.

    python experiments/benchmarks/surrogates.py --only digits-mse

Trains the grid of each table with ``train_many`` and writes results/surrogates/NAME.json: prequential accuracy of each
cell and seed, whether it diverged, and the online accuracy in time. ``seeds`` is one line of rates at γ = 1 over many
seeds, for the false positives; the others are planes, for the trials that a search needs and for the pruners. Rates
are c in η = c·s(γ), in octaves around the task's base rate, and reach from where nothing is learned to where every
run diverges.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from _paired import machine_and_date
from numpy.typing import NDArray

from gammaopt import EtaLaw
from gammaopt._laws import Loss
from gammaopt.online import Recipe, Run, get_task, train_many
from gammaopt.online.train import FAMILIES

FOLDER = Path(__file__).parents[1] / "results" / "surrogates"
GAMMAS = tuple(10.0 ** (k / 3 - 2) for k in range(16))  # 0.01 … 1,000, three to a decade
OCTAVES = (-9, -8, -7, -6, *(k / 2 - 5 for k in range(21)), 6, 7)


@dataclass(frozen=True)
class Table:
    """One table: its recipe, the rate at its centre, and its grid."""

    name: str
    recipe: Callable[[], Recipe]
    base_lr: float
    gammas: tuple[float, ...]
    octaves: tuple[float, ...]
    seeds: int


def bundled(name: str, loss: Loss, steps: int) -> Recipe:
    """The bundled task, with a budget of its own."""
    task = get_task(name)
    return Recipe(task.build, task.stream(), loss, steps=steps, batch_size=task.batch_size, depth=task.depth)


TABLES = (
    Table("digits-mse", partial(bundled, "digits", "mse", 500), 16.0, GAMMAS, OCTAVES, 3),
    Table("digits-cross_entropy", partial(bundled, "digits", "cross_entropy", 500), 2.0, GAMMAS, OCTAVES, 3),
    Table("parity-mse", partial(bundled, "parity", "mse", 1000), 4.0, GAMMAS, OCTAVES, 3),
    Table(
        "seeds", partial(bundled, "digits", "cross_entropy", 300), 2.0, (1.0,), tuple(k / 4 - 5 for k in range(33)), 64
    ),
)


@dataclass(frozen=True)
class Surrogate:
    """A table that has been read: scores (γ, octave, seed), accuracy in time (γ, octave, report), diverged cells."""

    name: str
    loss: str
    steps: int
    depth: float
    base_lr: float
    gammas: NDArray[np.float64]
    octaves: NDArray[np.float64]
    scores: NDArray[np.float64]
    diverged: NDArray[np.bool_]
    curve_steps: tuple[int, ...]
    curves: NDArray[np.float64]

    @cached_property
    def law(self) -> EtaLaw:
        """The law of its task."""
        return EtaLaw(self.depth, "sgd", self.loss)  # type: ignore[arg-type]

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """Scores averaged over the seeds; what a cell that diverged on one of them earned until then counts."""
        return np.asarray(self.scores.mean(-1))

    def at(self, gamma: float, octave: float) -> tuple[float, bool]:
        """Mean score at any point, linear in log γ and log c between cells and constant beyond, and if it diverges."""
        i, u = _between(np.log2(self.gammas), np.log2(gamma))
        j, v = _between(self.octaves, octave)
        weights = np.outer([1 - u, u], [1 - v, v])
        corner = np.s_[i : i + 2, j : j + 2]
        nearest = i + round(u), j + round(v)
        return float((weights * self.mean[corner]).sum()), bool(self.diverged[nearest])


def _between(knots: NDArray[np.float64], x: float) -> tuple[int, float]:
    """The interval of ``knots`` that x lies in, and where in it, from 0 to 1."""
    i = int(np.clip(np.searchsorted(knots, x) - 1, 0, len(knots) - 2))
    return i, float(np.clip((x - knots[i]) / (knots[i + 1] - knots[i]), 0.0, 1.0))


def read(name: str, folder: Path = FOLDER) -> Surrogate:
    """The table of a task, as it was measured."""
    data = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    arrays: dict[str, Any] = {key: np.array(data[key]) for key in ("gammas", "octaves", "scores", "diverged", "curves")}
    plain: dict[str, Any] = {key: data[key] for key in ("name", "loss", "steps", "depth", "base_lr")}
    return Surrogate(**plain, **arrays, curve_steps=tuple(data["curve_steps"]))


def measure(table: Table) -> dict[str, Any]:
    """Train every cell and seed of the table together."""
    recipe = table.recipe()
    cells = [(gamma, table.base_lr * 2.0**octave) for gamma in table.gammas for octave in table.octaves]
    runs = [Run(gamma, lr, seed) for seed in range(table.seeds) for gamma, lr in cells]
    records = train_many(recipe, runs)
    steps = max((record.curve.steps for record in records), key=len)
    shape = (table.seeds, len(table.gammas), len(table.octaves))
    curves = np.array([_padded(record.curve.accuracy, len(steps)) for record in records]).reshape(*shape, -1)
    scores = np.array([record.prequential_accuracy for record in records]).reshape(shape)
    diverged = np.array([record.diverged_at is not None for record in records]).reshape(shape)
    return {
        **machine_and_date(),
        "name": table.name,
        "stream": recipe.stream.name,
        "loss": recipe.loss,
        "optimizer": FAMILIES[recipe.optimizer],
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "depth": recipe.depth,
        "base_lr": table.base_lr,
        "gammas": list(table.gammas),
        "octaves": list(table.octaves),
        "scores": np.moveaxis(scores, 0, -1).round(5).tolist(),
        "diverged": diverged.any(0).tolist(),
        "curve_steps": list(steps),
        "curves": curves.mean(0).round(4).tolist() if len(table.gammas) > 1 else [],
    }


def _padded(values: Sequence[float], length: int) -> list[float]:
    """A diverged run answers nothing right after it did."""
    return [*values, *[0.0] * (length - len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[table.name for table in TABLES], action="append", help="measure this table")
    parser.add_argument("--results", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    for table in TABLES:
        if options.only is None or table.name in options.only:
            content = measure(table)
            path = options.results / f"{table.name}.json"
            path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
            print(f"{path}: {len(table.gammas) * len(table.octaves)} cells × {table.seeds} seeds")


if __name__ == "__main__":
    main()
