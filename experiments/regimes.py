"""What γ does to a run, in numbers: sharpness at the end, the edge of stability, catapults, silent alignment.

    python experiments/regimes.py --preset cpu

An MLP in mean-field form learns a staircase of parities by gradient descent on all its samples, float64, MSE. Rates are
η = c·s(γ); sharpness is λ_max in the coordinates in which all rates are equal, those of the law. Claims:

  sharpness    at the end of descents that stay below the edge, λ_max ∝ γ^(−2) for small γ and γ^(−2/L) for γ ≥ 1
  edge         at a larger rate sharpness × rate rises to 2 and stays there, where those descents would go beyond
  catapult     at γ = 0.01 and a large rate the loss rises above its start, the sharpness falls, and then it converges;
               at γ = 100 at no rate up to the largest that trains
  alignment    at γ = 100 the NTK turns to the targets while the loss is on its plateau; at γ = 0.01 it stays

Writes results/regimes/PRESET.json and .png beside this file and prints what | claimed | measured | holds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from _sweep import LEARNED, on_all_cores, parser, slope, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gammaopt import SGD, EtaLaw
from gammaopt.diagnostics import Measurement, Monitor, dynamics
from gammaopt.diagnostics._monitor import EDGE
from gammaopt.online import MLP, Recipe, RunRecord, Staircase
from gammaopt.online._device import seeded
from gammaopt.online._losses import CRITERIA
from gammaopt.online.record import six_digits
from gammaopt.online.train import fresh_model
from gammaopt.report import draw_alignment, draw_edge

STREAM = Staircase(bits=16, terms=3)
LAZY_GAMMA, RICH_GAMMA = 0.01, 100.0
LAZY_UP_TO = 0.03  # above it deep networks bend
LAZY_BAR, RICH_BAR = 0.2, 0.15  # of the exponents
EDGE_BAR = 0.1  # of 2
PLATEAU = 0.95  # of the start: the loss has not moved by more than 5 %
DIVERGED = 1e3  # of the start


@dataclass(frozen=True)
class Preset:
    """How much to run; rates c in η = c·s(γ)."""

    width: int = 64
    samples: int = 128
    seeds: int = 2
    depths: tuple[int, ...] = (2, 3)
    gammas: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1000.0)
    lazy_rate: float = 1.0
    rich_rate: float = 0.2
    until: float = 0.02  # of the first loss, where a descent has ended
    steps: int = 4000  # of a descent, at most
    edge_gammas: tuple[float, ...] = (10.0, 100.0)
    edge_rate: float = 0.6
    edge_steps: int = 500
    edge_per_decade: int = 10
    lazy_rates: tuple[float, ...] = (1.5, 4.0, 6.0, 8.0)
    rich_rates: tuple[float, ...] = (0.3, 0.6, 1.2, 2.4, 4.8)
    catapult_steps: int = 150
    aligning_rate: float = 0.3
    aligning_steps: int = 200
    cores: int | None = None


PRESETS = {
    "smoke": Preset(
        width=32, samples=64, seeds=1, depths=(3,), gammas=(0.003, 0.03, 1.0, 100.0), until=0.05, steps=400,
        edge_gammas=(100.0,), edge_steps=250, edge_per_decade=4, lazy_rates=(6.0,), rich_rates=(0.6,),
        catapult_steps=80, aligning_rate=0.4, aligning_steps=60, cores=1,
    ),
    "cpu": Preset(),
}  # fmt: skip


class Descent(NamedTuple):
    """One run: γ, c, seed, depth, and when to stop; ``measures`` of the monitor along it."""

    preset: Preset
    gamma: float
    rate: float
    seed: int = 0
    depth: int = 3
    steps: int = 1000
    until: float = 0.0
    measures: tuple[Any, ...] = ()
    per_decade: int = 12


class Descended(NamedTuple):
    """What a run was: its record, its measurements, and λ_max at its end if it did not diverge."""

    record: RunRecord
    measured: list[Measurement]
    end_sharpness: float | None

    @property
    def loss(self) -> list[float]:
        """Of the first one."""
        curve = self.record.curve.loss
        return [value / curve[0] for value in curve]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "regimes", PRESETS).parse_args(arguments)
    preset = PRESETS[options.preset]
    ends = measure_sharpness(preset)
    parts = {
        "sharpness": ends,
        "edge": measure_edge(preset, ends["points"]),
        "catapult": measure_catapults(preset),
        "alignment": measure_alignment(preset),
    }
    rows = [row for part in parts.values() for row in part.pop("rows")]
    path = write(options.results, options.preset, {"preset": asdict(preset), "rows": rows, **parts})
    picture(parts).savefig(path.with_suffix(".png"), dpi=110)
    print("| what | claimed | measured | holds |\n" + "|---" * 4 + "|")
    for row in rows:
        print(f"| {row['what']} | {row['claimed']} | {row['measured']:.3g} | {'yes' if row['holds'] else 'no'} |")


def descend(run: Descent) -> Monitor:
    """Gradient descent on one batch, watched; the monitor has the model."""
    preset = run.preset
    build = partial(MLP, STREAM.shape[0], 1, width=preset.width, depth=run.depth)
    recipe = Recipe(build, STREAM, "mse", steps=max(1, run.steps), depth=run.depth, dtype=torch.float64)
    x, y = (part[0].double() for part in STREAM.batches(run.seed, 0, 1, preset.samples))
    with seeded("cpu", run.seed):
        model = fresh_model(recipe, run.gamma, x)
    optimizer, criterion = SGD(model.parameters(), lr=run.rate), CRITERIA["mse"]
    monitor = Monitor(
        model, optimizer, "mse", (x, y),
        share=None, measures=run.measures, per_decade=run.per_decade, kernel_samples=preset.samples, seed=run.seed,
    )  # fmt: skip
    first = math.nan
    for step in range(run.steps):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        monitor(loss)
        value = float(loss.detach())
        first = value if step == 0 else first
        if not value < DIVERGED * first or value < run.until * first:
            break
    return monitor


def descended(run: Descent) -> Descended:
    """:func:`descend`, in numbers."""
    monitor = descend(run)
    record = monitor.finish()
    last = None
    if record.diverged_at is None:
        at_end = monitor.measure().sharpness_lr
        last = None if at_end is None else at_end / record.effective_lr
    return Descended(record, monitor.measurements, last)


def measure_sharpness(preset: Preset) -> dict[str, Any]:
    """λ_max at the end of descents over γ, for each depth, and its slopes."""
    sides = [(gamma, preset.lazy_rate if gamma < 1 else preset.rich_rate) for gamma in preset.gammas]
    runs = [
        Descent(preset, gamma, rate, seed, depth, preset.steps, preset.until, ("sharpness",), per_decade=1)
        for depth in preset.depths
        for gamma, rate in sides
        for seed in range(preset.seeds)
    ]
    done = on_all_cores(descended, runs, preset.cores)
    points = []
    for depth in preset.depths:
        for gamma, _ in sides:
            mine = [end for run, end in zip(runs, done, strict=True) if (run.depth, run.gamma) == (depth, gamma)]
            logs = [math.log10(end.end_sharpness) for end in mine if end.end_sharpness]
            points.append(
                {
                    "depth": depth,
                    "gamma": gamma,
                    "log10_sharpness": round(statistics.mean(logs), 4),
                    "largest_sharpness_lr": round(max(end.measured[-1].sharpness_lr or 0.0 for end in mine), 3),
                    "loss": round(max(end.loss[-1] for end in mine), 4),
                    "steps": round(statistics.mean(end.record.steps for end in mine)),
                }
            )
    rows = []
    for depth in preset.depths:
        for side, gammas, claimed, bar in (
            (f"γ ≤ {LAZY_UP_TO:g}", [g for g in preset.gammas if g <= LAZY_UP_TO], -2.0, LAZY_BAR),
            ("γ ≥ 1", [g for g in preset.gammas if g >= 1], -2.0 / depth, RICH_BAR),
        ):
            chosen = [point for point in points if point["depth"] == depth and point["gamma"] in gammas]
            measured, error = slope(
                [math.log10(point["gamma"]) for point in chosen], [point["log10_sharpness"] for point in chosen]
            )
            below = all(point["largest_sharpness_lr"] < EDGE[0] for point in chosen)
            rows.append(
                _row(
                    f"exponent of the sharpness, L = {depth}, {side}", f"{claimed:.2f} ± {bar:g}", measured,
                    abs(measured - claimed) <= bar and below, error=round(error, 4),
                )
            )  # fmt: skip
    return {"rows": rows, "points": points}


def measure_edge(preset: Preset, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sharpness × rate late in descents at a large rate, and what it would be without an edge."""
    runs = [
        Descent(
            preset,
            gamma,
            preset.edge_rate,
            seed,
            steps=preset.edge_steps,
            measures=("sharpness",),
            per_decade=preset.edge_per_decade,
        )
        for gamma in preset.edge_gammas
        for seed in range(preset.seeds)
    ]
    done = on_all_cores(descended, runs, preset.cores)
    rows, curves = [], {}
    for gamma in preset.edge_gammas:
        mine = [end for run, end in zip(runs, done, strict=True) if run.gamma == gamma]
        late = [
            statistics.median(one.sharpness_lr or 0.0 for one in end.measured if one.step >= preset.edge_steps / 3)
            for end in mine
        ]
        free = next(10 ** p["log10_sharpness"] for p in points if (p["depth"], p["gamma"]) == (3, gamma))
        beyond = free * EtaLaw(3).lr(preset.edge_rate, gamma)
        measured = statistics.mean(late)
        rows.append(
            _row(
                f"sharpness × rate late, γ = {gamma:g}", f"2 ± {EDGE_BAR:g}", measured,
                all(abs(one - 2) <= EDGE_BAR for one in late) and beyond > 2 + EDGE_BAR,
                seeds=[round(one, 3) for one in late], without_edge=round(beyond, 2),
            )
        )  # fmt: skip
        curves[f"γ = {gamma:g}"] = _plain(mine[0])
    return {"rows": rows, "curves": curves}


def measure_catapults(preset: Preset) -> dict[str, Any]:
    """Loss over its start at small and large γ over rates; which of them rose and came back."""
    runs = [
        Descent(preset, gamma, rate, seed, steps=preset.catapult_steps, measures=("sharpness",), per_decade=2)
        for gamma, rates in ((LAZY_GAMMA, preset.lazy_rates), (RICH_GAMMA, preset.rich_rates))
        for rate in rates
        for seed in range(preset.seeds)
    ]
    done = on_all_cores(descended, runs, preset.cores)
    cells: list[dict[str, Any]] = []
    for run, end in zip(runs, done, strict=True):
        found = dynamics(end.record)
        first, last = end.measured[0].sharpness_lr, end.measured[-1].sharpness_lr
        cells.append(
            {
                "gamma": run.gamma,
                "rate": run.rate,
                "seed": run.seed,
                "diverged": found.diverged_at is not None,
                "catapult": None if found.catapult is None else round(found.catapult.height, 3),
                "final": None if found.diverged_at is not None else round(found.final, 5),
                "sharpness_lr": [None if one is None else round(one, 3) for one in (first, last)],
                "steps": list(end.record.curve.steps),
                "loss": [round(one, 6) for one in end.loss],
            }
        )
    return {"rows": catapult_rows(preset, cells), "cells": cells}


def catapult_rows(preset: Preset, cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claims on catapults, of runs that end below ``LEARNED`` of their start: others diverged, or died."""
    trained = [cell for cell in cells if not cell["diverged"] and cell["final"] < LEARNED]
    lazy = [cell for cell in trained if cell["gamma"] == LAZY_GAMMA and cell["catapult"]]
    rich = [cell for cell in trained if cell["gamma"] == RICH_GAMMA]
    seeds = {cell["seed"] for cell in lazy}
    height = max((cell["catapult"] for cell in lazy), default=0.0)
    fell = max((cell["sharpness_lr"][1] / cell["sharpness_lr"][0] for cell in lazy), default=math.inf)
    thrown = sum(cell["catapult"] is not None for cell in rich)
    return [
        _row(
            f"highest catapult over the start, γ = {LAZY_GAMMA:g}", "> 1.3 in every seed", height,
            len(seeds) == preset.seeds,
        ),
        _row(f"sharpness after its catapults over before, γ = {LAZY_GAMMA:g}", "< 1", fell, fell < 1),
        _row(f"catapults in {len(rich)} runs that train, γ = {RICH_GAMMA:g}", "0", thrown, thrown == 0 and bool(rich)),
    ]  # fmt: skip


def measure_alignment(preset: Preset) -> dict[str, Any]:
    """Kernels along runs at both ends of γ; how far they turned while the loss had not moved."""
    runs = [
        Descent(
            preset, gamma, rate, seed, steps=preset.aligning_steps, measures=("ntk", "features"), per_decade=20
        )
        for gamma, rate in ((LAZY_GAMMA, preset.lazy_rate), (RICH_GAMMA, preset.aligning_rate))
        for seed in range(preset.seeds)
    ]  # fmt: skip
    done = on_all_cores(descended, runs, preset.cores)
    lazy, rich = done[: preset.seeds], done[preset.seeds :]
    gains, shares, dropped = [], [], []
    for end in rich:
        first = end.measured[0]
        waiting = [one for one in end.measured if one.loss >= PLATEAU * first.loss]
        gains.append((waiting[-1].alignment or 0.0) - (first.alignment or 0.0))
        best = max(one.alignment or 0.0 for one in end.measured)
        shares.append(gains[-1] / (best - (first.alignment or 0.0)))
        dropped.append(end.loss[-1])
    kept = min(end.measured[-1].kernel_kept or 0.0 for end in lazy)
    rows = [
        _row(
            f"alignment gained on the plateau, γ = {RICH_GAMMA:g}", "> 0.1 in every seed", min(gains),
            min(gains) > 0.1 and max(dropped) < 0.5,
            share_of_all=[round(one, 3) for one in shares], loss_at_the_end=[round(one, 4) for one in dropped],
        ),
        _row(
            f"alignment of the kernel with its start, γ = {LAZY_GAMMA:g}", "> 0.95", kept, kept > 0.95,
            loss_at_the_end=[round(end.loss[-1], 4) for end in lazy],
        ),
    ]  # fmt: skip
    return {"rows": rows, "rich": _plain(rich[0]), "lazy": _plain(lazy[0])}


def _row(what: str, claimed: str, measured: float, holds: bool, **more: Any) -> dict[str, Any]:
    return {"what": what, "claimed": claimed, "measured": round(measured, 4), "holds": bool(holds), **more}


def _plain(end: Descended) -> list[dict[str, float]]:
    """Its measurements for JSON."""
    return [
        {"step": one.step, **{k: six_digits(v) for k, v in one.numbers().items() if k != "seconds"}}
        for one in end.measured
    ]


def picture(parts: dict[str, Any]) -> Figure:
    """The four claims, a panel each."""
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    _draw_sharpness(first, parts["sharpness"]["points"])
    draw_edge({label: _measured(each) for label, each in parts["edge"]["curves"].items()}, second)
    second.set_title("progressive sharpening to the edge", fontsize=10)
    _draw_catapults(third, parts["catapult"]["cells"])
    draw_alignment(_measured(parts["alignment"]["rich"]), fourth)
    fourth.set_title(f"silent alignment, γ = {RICH_GAMMA:g}", fontsize=10)
    return figure


def _measured(every: Sequence[dict[str, Any]]) -> list[Measurement]:
    return [Measurement(seconds=0.0, **one) for one in every]


def _draw_sharpness(axes: Axes, points: Sequence[dict[str, Any]]) -> None:
    for i, depth in enumerate(sorted({point["depth"] for point in points})):
        mine = [point for point in points if point["depth"] == depth]
        gammas, logs = [point["gamma"] for point in mine], [point["log10_sharpness"] for point in mine]
        axes.plot(gammas, [10**log for log in logs], "o", color=f"C{i}", label=f"L = {depth}")
        for side, power in ((lambda g: g <= LAZY_UP_TO, -2.0), (lambda g: g >= 1, -2.0 / depth)):
            chosen = [(g, log) for g, log in zip(gammas, logs, strict=True) if side(g)]
            level = statistics.mean(log - power * math.log10(g) for g, log in chosen)
            axes.plot([g for g, _ in chosen], [10**level * g**power for g, _ in chosen], "-", color=f"C{i}", lw=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("feature-learning strength γ")
    axes.set_ylabel("λ_max at the end")
    axes.set_title("lines: γ⁻² and γ^(−2/L) through their points", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)


def _draw_catapults(axes: Axes, cells: Sequence[dict[str, Any]]) -> None:
    for gamma, colour, dash in ((LAZY_GAMMA, "#b5433a", "-"), (RICH_GAMMA, "#2f6690", "--")):
        mine = [cell for cell in cells if cell["gamma"] == gamma and cell["seed"] == 0 and not cell["diverged"]]
        for i, cell in enumerate(mine):
            alpha = 0.35 + 0.65 * (i + 1) / len(mine)
            label = f"γ = {gamma:g}, c = {cell['rate']:g}"
            axes.plot(cell["steps"], cell["loss"], dash, color=colour, alpha=alpha, lw=1.4, label=label)
    axes.axhline(1, color="#9aa5ad", lw=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss over its start")
    axes.set_title("catapults at small γ, none at large", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, ncols=2)


if __name__ == "__main__":
    main()
