"""Does tuned γ beat γ = 1 at the same budget? The three-arm study of each bundled task, confirmed on fresh seeds.

    python experiments/tuned_vs_one.py --preset cpu

Writes results/tuned_vs_one/PRESET.json and .png beside this file and prints the table. A stopped run goes on where it
stopped: the studies live in runs/experiments/tuned_vs_one/PRESET. Every study is in the table, whatever its verdict.
"""

from __future__ import annotations

import os
from pathlib import Path

from _sweep import parser, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gammaopt.report import gamma_curve_on
from gammaopt.tuning import StudyPlan, TuneResult, holm, tune

TASKS = [("digits", "cross_entropy"), ("digits", "mse")]
PRESETS = {
    "smoke": {"steps": 30, "trials": 4, "seeds": 1, "confirm_seeds": 2},  # seconds; shows that it runs, nothing more
    "cpu": {"gamma_range": (0.01, 100.0)},  # otherwise the defaults of `gammaopt tune`
}


def main() -> None:
    arguments = parser(__doc__, "tuned_vs_one", PRESETS)
    arguments.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes to train in")
    arguments.add_argument("--runs", type=Path, default=Path("runs") / "experiments" / "tuned_vs_one")
    options = arguments.parse_args()

    results = []
    for task, loss in TASKS:
        plan = StudyPlan(task, loss, **PRESETS[options.preset])  # type: ignore[arg-type]
        results.append(tune(plan, options.runs / options.preset / plan.folder, jobs=options.jobs))
        print(results[-1].in_words(), flush=True)

    path = write(
        options.results,
        options.preset,
        {
            "studies": [result.to_dict() for result in results],
            "holm": holm([result.confirm.p_value for result in results]),
        },
    )
    picture(results).savefig(path.with_suffix(".png"), dpi=110)
    print("\n" + table(results))


def table(results: list[TuneResult]) -> str:
    """Markdown: one row for each study, in points of accuracy; p is Holm's, for all of them together."""
    rows = ["| task | tuned γ | γ = 1 | tuned | difference (95 %) | p | at the end | verdict |", "|---" * 8 + "|"]
    adjusted = holm([result.confirm.p_value for result in results])
    for result, p_value in zip(results, adjusted, strict=True):
        tuned, one, confirm = result.arms["tuned"], result.arms["one_equal_budget"], result.confirm
        low, high = confirm.ci95
        at_end = result.confirm_final or confirm
        rows.append(
            f"| {_name(result, '-')} | {tuned.gamma:.2g} "
            f"| {100 * one.confirmed_score:.1f} % | {100 * tuned.confirmed_score:.1f} % "
            f"| {100 * confirm.mean_difference:+.2f} ({100 * low:+.2f} … {100 * high:+.2f}) | {p_value:.1g} "
            f"| {100 * at_end.mean_difference:+.2f} | {verdict(result, p_value)} |"
        )
    return "\n".join(rows)


def verdict(result: TuneResult, adjusted: float) -> str:
    """A study's verdict among the others: a difference that Holm's p no longer shows is "not confirmed"."""
    shown = result.verdict not in ("confirmed", "worse") or adjusted <= 0.05
    return result.verdict if shown else "not confirmed"


def _name(result: TuneResult, space: str) -> str:
    names = result.plan.names()
    return f"{names['task']}, {names['loss'].replace('_', space)}"


def picture(results: list[TuneResult]) -> Figure:
    """Accuracy against γ, one panel for each study."""
    figure = Figure(figsize=(5.6 * len(results), 3.9), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, len(results), squeeze=False)[0])
    for axes, result in zip(panels, results, strict=True):
        gamma_curve_on(axes, result)
        axes.set_title(f"{_name(result, ' ')}: {result.verdict}", fontsize=10)
    return figure


if __name__ == "__main__":
    main()
