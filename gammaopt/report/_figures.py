"""The three figures of a study: accuracy against γ, the (γ, η) plane, and the loss in time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gammaopt.tuning._record import Record
from gammaopt.tuning._result import TuneResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TUNED, ONE, FAINT = "#b5433a", "#2f6690", "#9aa5ad"
SIZE = (7.2, 4.0)
SHOWN_POINTS = 20.0  # of accuracy below the best, in the figures


def new_figure() -> tuple[Figure, Axes]:
    """A figure with one plain pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    return figure, plain(figure.add_subplot())


def _unit(result: TuneResult) -> str:
    return result.metric.replace("_", " ") + (" in %" if result.plan.scale == 100 else "")


def _frame(result: TuneResult, scores: list[float]) -> tuple[float, float]:
    """The lowest and the highest score shown: far-off bad trials say little and would flatten the rest."""
    merits = [result.plan.merit(score) for score in scores]
    best = max(merits)
    if result.plan.scale == 100:
        ends = max(min(merits) - 1, best - SHOWN_POINTS), best + 1
    else:
        worst = float(np.percentile(merits, 25))  # of no known unit: the better three quarters
        margin = 0.05 * (best - worst) or 1.0
        ends = worst - margin, best + margin
    low, high = sorted(map(result.plan.merit, ends))
    return low, high


def plain(axes: Axes) -> Axes:
    """Axes without a frame at top and right, over a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return axes


def gamma_curve(result: TuneResult) -> Figure:
    """Accuracy against γ: every trial of the search, and the paired fresh seeds of tuned γ and γ = 1."""
    figure, axes = new_figure()
    gamma_curve_on(axes, result)
    return figure


def gamma_curve_on(axes: Axes, result: TuneResult) -> None:
    """Draw :func:`gamma_curve` on given axes."""
    plain(axes)
    searched, scale = [t for t in result.trials if not t.diverged], result.plan.scale
    for arm, colour, label in (("tuned", TUNED, "trials over γ"), ("one_equal_budget", ONE, "trials at γ = 1")):
        mine = [t for t in searched if t.arm == arm]
        axes.scatter(
            [t.gamma for t in mine], [scale * t.score for t in mine], s=14, color=colour, alpha=0.35, lw=0, label=label
        )
    tuned, one = result.arms["tuned"], result.arms["one_equal_budget"]
    for a, b in zip(one.scores, tuned.scores, strict=True):
        axes.plot([1.0, tuned.gamma], [scale * a, scale * b], color=FAINT, lw=0.8, marker=".", ms=4, zorder=3)
    for arm_, colour, label in ((tuned, TUNED, f"γ = {tuned.gamma:.3g}"), (one, ONE, "γ = 1")):
        axes.plot(
            [arm_.gamma], [scale * arm_.confirmed_score], "D", ms=8, color=colour, zorder=4, mec="white",
            label=f"{label}, {len(arm_.scores)} fresh seeds: {result.shown(arm_.confirmed_score)}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("feature-learning strength γ")
    axes.set_ylabel(_unit(result))
    # Trials may leave the frame below, and are counted there.
    scores = [scale * t.score for t in searched] + [scale * s for arm_ in (tuned, one) for s in arm_.scores]
    low, high = _frame(result, scores)
    axes.set_ylim(low, high)
    maximised = result.plan.direction == "maximize"
    outside = sum(not low <= scale * t.score <= high for t in searched)
    title = f"{outside} trials lie {'below' if maximised else 'above'} the frame"
    legend = axes.legend(framealpha=0.9, edgecolor="none", fontsize=8, loc="lower right", title=title, title_fontsize=8)
    if not maximised:  # where bad scores would be
        legend.set_loc("upper right")


def plane(result: TuneResult) -> Figure:
    """The trials in the (γ, η) plane with the law's line through the best rate found at γ = 1."""
    figure, axes = new_figure()
    stable = [t for t in result.trials if not t.diverged]
    diverged = [t for t in result.trials if t.diverged]
    colours = [result.plan.scale * t.score for t in stable] or [0.0, SHOWN_POINTS]
    low, high = _colours(result, colours)
    maximised = result.plan.direction == "maximize"
    drawn = axes.scatter(
        [t.gamma for t in stable], [t.effective_lr for t in stable], c=colours[: len(stable)], s=34,
        cmap="viridis" if maximised else "viridis_r", lw=0.4, edgecolors="white", zorder=3, vmin=low, vmax=high,
    )  # fmt: skip
    if diverged:
        axes.plot(
            [t.gamma for t in diverged], [t.effective_lr for t in diverged], "x", color="#444444", ms=5,
            label="diverged", zorder=3,
        )  # fmt: skip
    law, anchor = result.plan.law, result.arms["one_equal_budget"]
    gammas = np.geomspace(min(result.plan.gamma_range[0], 1.0), max(result.plan.gamma_range[1], 1.0), 200)
    label = f"law: η ∝ γ^{law.lazy:g} below 1, γ^{law.rich:.3g} above"
    axes.plot(gammas, [law.lr(anchor.lr, float(g)) for g in gammas], color=TUNED, lw=1.6, label=label, zorder=2)
    for name, marker in (("tuned", "*"), ("one_equal_budget", "P")):
        arm = result.arms[name]
        axes.plot(
            [arm.gamma], [arm.effective_lr], marker, ms=11, color="none", mec=TUNED, mew=1.4, ls="none", zorder=4,
            label=f"chosen at γ = {arm.gamma:.3g}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("feature-learning strength γ")
    axes.set_ylabel("learning rate η")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.colorbar(drawn, ax=axes, label=_unit(result), extend="min" if maximised else "max")
    return figure


def _colours(result: TuneResult, scores: list[float]) -> tuple[float, float]:
    """The ends of the colours: the best score, and the worst that is told from worse ones."""
    best = max(map(result.plan.merit, scores))
    points = result.plan.scale == 100
    low, high = sorted(map(result.plan.merit, (best, best - SHOWN_POINTS))) if points else _frame(result, scores)
    return low, high


def loss_curves(result: TuneResult) -> Figure:
    """The runs in time on the fresh seeds: mean and standard deviation, tuned γ against γ = 1."""
    figure, axes = new_figure()
    for name, colour in (("one_equal_budget", ONE), ("tuned", TUNED)):
        arm = result.arms[name]
        steps, mean, spread = _mean_curve(result.runs[name])
        diverged = any(run.diverged_at for run in result.runs[name])
        nothing = ": diverged at once" if diverged else ": reported nothing"
        label = f"γ = {arm.gamma:.3g}, η = {arm.effective_lr:.3g}" + ("" if len(steps) else nothing)
        axes.plot(steps, mean, color=colour, lw=1.8, label=label)
        axes.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.18, lw=0)
    axes.set_xscale("log")
    axes.set_xlim(1, int(result.plan.steps or 1) + 1)  # also where every run diverged at once and nothing is drawn
    axes.set_xlabel("step")
    axes.set_ylabel(result.plan.curve)
    if result.plan.scale == 100:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _mean_curve(runs: tuple[Record, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean loss and standard deviation over runs, at the steps that all of them have."""
    curves = [dict(zip(run.curve.steps, run.curve.loss, strict=True)) for run in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    losses = np.array([[curve[step] for step in steps] for curve in curves]).reshape(len(runs), len(steps))
    return np.array(steps), losses.mean(0), losses.std(0)
