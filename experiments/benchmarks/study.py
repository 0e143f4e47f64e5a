"""A whole study on the digits: its trials trained together, against the same study trained one run at a time.

    python experiments/benchmarks/study.py --check --json experiments/results/study/cpu.json

``gammaopt.tuning.tune`` runs the study, from its first Sobol point to its report. After each batch of cells that its
workers have trained together, as many other processes train a tenth of the batch, evenly spaced, with ``train``, one
run after another: the same cells, a moment later, on a machine as busy. The time of the tenth is scaled to its batch.
What is no training (Optuna, its database, the report) takes the same in both; ours is charged with starting its
workers, while the other ones are started, and have made the batches of the tuning seeds, before the clock is.
Also told: how far apart the two trainers' online accuracies are on the cells that both trained.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from _paired import argument_parser, write_json

from gammaopt.online import RunRecord
from gammaopt.tuning import StudyPlan, tune
from gammaopt.tuning import _tune as tune_module
from gammaopt.tuning._folder import Cell
from gammaopt.tuning._workers import Workers

BAR = 4.0
PRESETS = {
    "smoke": StudyPlan("digits", steps=10, trials=4, seeds=1, confirm_seeds=2),
    "cpu": StudyPlan("digits", trials=200),
}


class Paired(Workers):
    """Workers that train every cell together, and let others train some of the same cells one at a time."""

    def __init__(self, plan: StudyPlan, jobs: int, share: int, checkpoints: Path) -> None:
        super().__init__(plan, jobs, checkpoints=checkpoints)
        self._alone = Workers(plan, jobs, stack=0)
        self._every = share
        self.cells = self.shared = 0
        self.ours = self.theirs = self.spent = 0.0
        self.apart: list[float] = []
        # Started, and with the batches of the tuning seeds in memory: these few seconds would be scaled as well.
        warm = [Cell(1.0, plan.base_lr * (1 + i / 100), seed) for seed in plan.tuning_seeds for i in range(2 * jobs)]
        start = time.perf_counter()
        list(self._alone.run(warm))
        self.spent += time.perf_counter() - start

    def run(self, cells: Iterable[Cell]) -> Iterator[RunRecord]:
        """Train together, then a share one at a time, each against the clock."""
        cells = list(cells)
        start = time.perf_counter()
        records = list(super().run(cells))
        between = time.perf_counter()
        some = spaced(cells, self._jobs * max(1, round(len(cells) / self._every / self._jobs)))
        alone = list(self._alone.run(some))
        end = time.perf_counter()
        self.cells, self.shared = self.cells + len(cells), self.shared + len(some)
        self.ours += between - start
        self.theirs += (end - between) * len(cells) / max(1, len(some))
        self.spent += end - between
        found = {(record.gamma, record.lr, record.seed): record.prequential_accuracy for record in records}
        self.apart += [abs(found[r.gamma, r.lr, r.seed] - r.prequential_accuracy) for r in alone]
        yield from records

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._alone.__exit__(*error)


def spaced(cells: Sequence[Cell], count: int) -> list[Cell]:
    """``count`` of the cells at even distances, or all if there are no more."""
    count = min(count, len(cells))
    return [cells[int((i + 0.5) * len(cells) / count)] for i in range(count)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes of either side")
    parser.add_argument("--every", type=int, default=10, help="one cell in this many is trained one at a time too")
    options = parser.parse_args(argv)
    row = measure(PRESETS[options.preset], options.jobs, options.every)
    print(
        f"{'':15} seconds  run-steps/s of training\n{'together':15} {row['ours']:7.1f} {row['ours_run_steps']:12,.0f}"
    )
    print(f"{'one at a time':15} {row['one_at_a_time']:7.1f} {row['one_at_a_time_run_steps']:12,.0f}", end="")
    print(f"  (from {row['runs_one_at_a_time']} of {row['runs']} runs, spread over every batch)")
    print(f"{row['trials']} trials: {row['factor']:.2f} × faster, at least {BAR:g} × wanted; training alone ", end="")
    print(f"{row['training_factor']:.2f} ×, {options.jobs} processes")
    print(f"online accuracies of the two, median distance {100 * row['median_distance']:.3f} points")
    missed = [f"{row['factor']:.2f} × against {BAR:g} ×"] if row["factor"] < BAR else []
    write_json(options, {"jobs": options.jobs, "rows": [row]}, missed)


def measure(plan: StudyPlan, jobs: int, every: int) -> dict[str, Any]:
    """Run the study, both ways at once."""
    made: list[Paired] = []

    def workers(plan: StudyPlan, jobs: int, *, checkpoints: Path) -> Paired:
        made.append(Paired(plan, jobs, every, checkpoints))
        return made[0]

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(tune_module, "Workers", workers):
        start = time.perf_counter()
        tune(plan, Path(folder) / "study", jobs=jobs)
        whole = time.perf_counter() - start
    paired = made[0]
    ours = whole - paired.spent
    alone = ours - paired.ours + paired.theirs
    run_steps = paired.cells * plan.recipe().steps
    return {
        "name": "digits",
        "trials": plan.trials,
        "runs": paired.cells,
        "runs_one_at_a_time": paired.shared,
        "ours": ours,
        "one_at_a_time": alone,
        "factor": alone / ours,
        "bar": BAR,
        "training_factor": paired.theirs / paired.ours,
        "ours_run_steps": run_steps / paired.ours,
        "one_at_a_time_run_steps": run_steps / paired.theirs,
        "median_distance": statistics.median(paired.apart),
    }


if __name__ == "__main__":
    main()
