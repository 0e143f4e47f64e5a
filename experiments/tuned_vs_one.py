"""Does tuned γ beat γ = 1 at the same budget? The three-arm study of many tasks, confirmed on fresh seeds.

    python experiments/tuned_vs_one.py --preset cpu

Each row is a study of `gammaopt tune`: a search over γ and rate, one of the same number of trials over the rate at
γ = 1, and paired runs of both choices on fresh seeds. "Confirmed" means that the paired 95 % interval of prequential
accuracy lies above 0, against γ = 1 at the rate that it chose and at each of the four beside it, and that the largest
of their five p-values is below 0.05 after Holm's correction over all studies. "Worse" asks the same below 0. Every
study is in the table, whatever its verdict. A stopped run goes on where it stopped: the studies live in --work.
There is no preset paper: the tasks' data are made here. The largest preset is gpu.
Writes results/tuned_vs_one/PRESET.json and .png and prints predicted | measured | interval | holds, and the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _experiment import Claim, Found, Place, run
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gammaopt.report import gamma_curve_on
from gammaopt.tuning import Confirmation, StudyPlan, TuneResult, holm, tune

Study = dict[str, Any]  # of a StudyPlan
WANTED = 4  # tasks on which tuned γ is confirmed better

# Of networks that train one by one. The CNN's best γ lies below the 0.01 at which a study's range begins by default,
# and such a range takes float64, in which a convolution costs several times as much: only the CNN has it.
SMALL = {"trials": 14, "seeds": 2, "confirm_seeds": 10, "gamma_range": (0.01, 10.0)}
LAZY = {**SMALL, "gamma_range": (0.001, 10.0)}
CPU: tuple[Study, ...] = (
    {"task": "digits", "loss": "cross_entropy", "steps": 300},
    {"task": "digits", "loss": "cross_entropy", "steps": 1000},
    {"task": "digits", "loss": "mse", "steps": 1000},
    {"task": "digits", "loss": "cross_entropy", "optimizer": "adam", "steps": 1000},
    {"task": "parity", "loss": "mse", "steps": 1000},
    {"task": "hermite", "loss": "cross_entropy", "steps": 1000},
    {"task": "photos-cnn", "loss": "cross_entropy", "steps": 200, **LAZY},
    {"task": "photos-vit", "loss": "cross_entropy", "steps": 200, **SMALL},
    {"task": "photos-resnet18", "loss": "cross_entropy", "steps": 100, **SMALL},
)


@dataclass(frozen=True)
class Preset:
    """The studies to run."""

    studies: tuple[Study, ...]


def _longer(study: Study, times: int) -> Study:
    return {**study, "steps": times * study["steps"], "trials": 48, "seeds": 3, "confirm_seeds": 16}


PRESETS = {
    "smoke": Preset(
        tuple({"task": task, "steps": 30, "trials": 4, "seeds": 1, "confirm_seeds": 2} for task in ("digits", "parity"))
    ),
    "cpu": Preset(CPU),
    "gpu": Preset(tuple(_longer(study, 10) for study in CPU)),
}


def measure(preset: Preset, place: Place) -> Found:
    """Run every study, and put them into one table."""
    results = []
    for study in preset.studies:
        plan = StudyPlan(**study, device=place.device)
        jobs = (place.cores or 1) if place.device == "cpu" else 1
        results.append(tune(plan, place.work / plan.folder, jobs=jobs))
        print(results[-1].in_words(), flush=True)
    adjusted = holm([result.p_value for result in results])
    verdicts = [verdict(result, p_value) for result, p_value in zip(results, adjusted, strict=True)]
    confirmed = verdicts.count("confirmed")
    tasks = {result.plan.names()["task"] for result, told in zip(results, verdicts, strict=True) if told == "confirmed"}
    wanted = min(WANTED, len({result.plan.names()["task"] for result in results}))
    claims = [
        Claim(
            "tasks on which tuned γ is confirmed better",
            f"≥ {wanted}",
            len(tasks),
            None,
            len(tasks) >= wanted,
            "" if len(tasks) >= wanted else f"confirmed on {', '.join(sorted(tasks)) or 'none'}",
        )
    ]
    for result, told in zip(results, verdicts, strict=True):
        low, high = result.confirm.ci95
        claims.append(
            Claim(
                f"points gained by tuned γ, {name_of(result)}", "> 0", 100 * result.confirm.mean_difference,
                (100 * low, 100 * high), told == "confirmed",
                "" if told == "confirmed" else reason(result, told),
            )
        )  # fmt: skip
    meaning = (
        f"Tuned γ beats γ = 1 in {confirmed} of {len(results)} studies at an equal budget of trials, on fresh seeds "
        "and after Holm's correction"
    )
    if confirmed:
        won = [result for result, told in zip(results, verdicts, strict=True) if told == "confirmed"]
        best = max(won, key=lambda result: result.confirm.mean_difference)
        meaning += (
            f"; most on {name_of(best)}, by {100 * best.confirm.mean_difference:.1f} points at "
            f"γ = {best.arms['tuned'].gamma:.2g}"
        )
    return Found(
        claims, f"{meaning}.", picture(results, verdicts),
        {"studies": [result.to_dict() for result in results], "holm": adjusted}, table(results, verdicts, adjusted),
    )  # fmt: skip


def table(results: Sequence[TuneResult], verdicts: Sequence[str], adjusted: Sequence[float]) -> str:
    """Markdown: one row for each study, in points of accuracy; p is Holm's, for all of them together."""
    rows = [
        "| task | γ̂ | rate | γ = 1's rate | γ = 1 | tuned | difference (95 %) | least, at rates beside | p "
        "| at the end (95 %) | verdict |",
        "|---" * 11 + "|",
    ]
    for result, told, p_value in zip(results, verdicts, adjusted, strict=True):
        tuned, one = result.arms["tuned"], result.arms["one_equal_budget"]
        rows.append(
            f"| {name_of(result)} | {tuned.gamma:.3g} | {tuned.effective_lr:.2g} | {one.effective_lr:.2g} "
            f"| {100 * one.confirmed_score:.1f} % | {100 * tuned.confirmed_score:.1f} % "
            f"| {points(result.confirm)} | {least(result)} | {p_value:.1g} "
            f"| {points(result.confirm_final or result.confirm)} | {told} |"
        )
    return "\n".join(rows)


def least(result: TuneResult) -> str:
    """The smallest difference at all rates of γ = 1; it is 0 where they are of both signs."""
    smallest = 100 * result.smallest_difference
    return f"{smallest:+.2f}" if smallest else "both signs"


def points(confirm: Confirmation) -> str:
    """A difference and its 95 % interval, in points of accuracy."""
    low, high = confirm.ci95
    return f"{100 * confirm.mean_difference:+.2f} ({100 * low:+.2f} … {100 * high:+.2f})"


def reason(result: TuneResult, told: str) -> str:
    """Why a study is not confirmed, in a few words."""
    if told != result.verdict:
        return f"{result.verdict} alone, not after Holm's correction"
    sentence = result.in_words().partition(" points of")[0]
    return sentence[0].lower() + sentence[1:]


def verdict(result: TuneResult, adjusted: float) -> str:
    """A study's verdict among the others: a difference that Holm's p no longer shows is "not confirmed"."""
    shown = result.verdict not in ("confirmed", "worse") or adjusted <= 0.05
    return result.verdict if shown else "not confirmed"


def name_of(result: TuneResult) -> str:
    """Task, loss, optimizer and budget."""
    names = result.plan.names()
    loss = names["loss"].replace("_", "-")
    optimizer = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}[names["optimizer"]]
    return f"{names['task']}, {loss}, {optimizer}, {result.plan.run_budget().steps} steps"


def picture(results: Sequence[TuneResult], verdicts: Sequence[str]) -> Figure:
    """Accuracy against γ, one panel for each study: trials, and the fresh seeds of tuned γ (red) and γ = 1 (blue)."""
    columns = min(3, len(results))
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows + 0.4), layout="constrained")
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, result, told in zip(panels, results, verdicts, strict=False):
        gamma_curve_on(axes, result)
        legend = axes.get_legend()
        if legend is not None:
            legend.remove()  # it would cover what it names; one stands below for all panels
        tuned, one = result.arms["tuned"], result.arms["one_equal_budget"]
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 100 * min(one.scores + tuned.scores) - 0.05 * (high - low)), high)
        scores = (
            f"{100 * tuned.confirmed_score:.1f} % at γ = {tuned.gamma:.2g}, {100 * one.confirmed_score:.1f} % at γ = 1"
        )
        axes.set_title(f"{name_of(result)}\n{scores}: {told}", fontsize=9)
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    names = ("a trial over γ", "a trial at γ = 1", "tuned γ on fresh seeds", "γ = 1 on fresh seeds")
    figure.legend(panels[0].get_legend_handles_labels()[0], names, loc="outside lower center", ncols=4, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    return run("tuned_vs_one", __doc__, PRESETS, measure, argv)


if __name__ == "__main__":
    main()
