"""What a run does before its loss falls: catapults at small and at large γ, and how far the kernel turns.

    python experiments/catapult_silent_alignment.py --preset cpu

Gradient descent on one batch of a staircase of parities, MSE, float64, an MLP in mean-field form at η = c·s(γ).

  catapult     at γ = 0.01 and a large rate the loss rises above its start, the sharpness falls, and then it converges;
               at γ = 100 at no rate up to the largest that trains
  alignment    at γ = 100 the NTK turns to the targets while the loss is on its plateau; at γ = 0.01 it stays

A seed without a catapult has height 1, that of the start. Intervals are Student's t over seeds.
There is no preset paper: the staircase is made here, no data set could take its place. The largest preset is gpu.
Writes results/catapult_silent_alignment/PRESET.json and .png and prints predicted | measured | interval | holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from _descent import Descent, descended, measured, plain
from _experiment import Claim, Found, Place, above, below, kept, number, run, t_interval
from _sweep import LEARNED, on_all_cores
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gammaopt.diagnostics import dynamics
from gammaopt.report import draw_alignment

LAZY_GAMMA, RICH_GAMMA = 0.01, 100.0
PLATEAU = 0.95  # of the start: the loss has not moved by more than 5 %


@dataclass(frozen=True)
class Preset:
    """How much to run; rates c in η = c·s(γ)."""

    width: int = 64
    samples: int = 128
    seeds: int = 3
    lazy_rate: float = 1.0
    lazy_rates: tuple[float, ...] = (1.5, 4.0, 6.0, 8.0)
    rich_rates: tuple[float, ...] = (0.3, 0.6, 1.2, 2.4, 4.8)
    catapult_steps: int = 150
    aligning_rate: float = 0.3
    aligning_steps: int = 200


PRESETS = {
    "smoke": Preset(
        width=32, samples=64, seeds=1, lazy_rates=(6.0,), rich_rates=(0.6,), catapult_steps=80, aligning_rate=0.4,
        aligning_steps=60,
    ),
    "cpu": Preset(),
    "gpu": Preset(width=256, samples=512, seeds=8, aligning_steps=400),
}  # fmt: skip


def measure(preset: Preset, place: Place) -> Found:
    """Catapults, then alignment."""
    thrown = kept(place.file("catapult.json", preset), partial(measure_catapults, preset, place))
    turned = kept(place.file("alignment.json", preset), partial(measure_alignment, preset, place))
    claims = [*catapult_claims(preset, thrown["cells"]), *map(Claim.from_dict, turned["claims"])]
    parts = {
        "catapult": {"cells": thrown["cells"]}, "alignment": {side: turned[side] for side in ("rich", "lazy")}
    }  # fmt: skip
    return Found(claims, in_words(claims), picture(parts), parts)


def in_words(claims: Sequence[Claim]) -> str:
    """What the claims say together, each only where it holds."""

    def of(start: str) -> Claim:
        return next(one for one in claims if one.what.startswith(start))

    height, flatter, none, gained = of("highest"), of("sharpness after"), of("catapults in"), of("alignment gained")
    if height.holds:
        back = f"comes back{' flatter' * flatter.holds}"
        lazy = f"a catapult takes the loss to {number(height.measured)} times its start, and it {back}"
    else:
        lazy = f"no catapult is shown, the loss goes to {number(height.measured)} times its start in the seeds' mean"
    thrown = "no run has one" if none.holds else f"{number(none.measured)} runs have one"
    rich = "no run trains" if none.measured is None else thrown
    return (
        f"At γ = {LAZY_GAMMA:g} {lazy}; at γ = {RICH_GAMMA:g} {rich}, and the kernel's alignment with the targets "
        f"{'rises' if gained.holds else 'moves'} by {number(gained.measured, '.2f')} before the loss moves."
    )


def measure_catapults(preset: Preset, place: Place) -> dict[str, Any]:
    """Loss over its start at small and large γ over rates; which of them rose and came back."""
    runs = [
        Descent(
            preset.width,
            preset.samples,
            gamma,
            rate,
            seed,
            steps=preset.catapult_steps,
            measures=("sharpness",),
            per_decade=2,
            device=place.device,
        )
        for gamma, rates in ((LAZY_GAMMA, preset.lazy_rates), (RICH_GAMMA, preset.rich_rates))
        for rate in rates
        for seed in range(preset.seeds)
    ]
    done = on_all_cores(descended, runs, place.cores)
    cells: list[dict[str, Any]] = []
    for one, end in zip(runs, done, strict=True):
        found = dynamics(end.record)
        first, last = end.measured[0].sharpness_lr, end.measured[-1].sharpness_lr
        cells.append(
            {
                "gamma": one.gamma,
                "rate": one.rate,
                "seed": one.seed,
                "diverged": found.diverged_at is not None,
                "catapult": None if found.catapult is None else round(found.catapult.height, 3),
                "final": None if found.diverged_at is not None else round(found.final, 5),
                "sharpness_lr": [None if value is None else round(value, 3) for value in (first, last)],
                "steps": list(end.record.curve.steps),
                "loss": [round(value, 6) for value in end.loss],
            }
        )
    return {"cells": cells}


def catapult_claims(preset: Preset, cells: Sequence[dict[str, Any]]) -> list[Claim]:
    """The claims on catapults, of runs that end below ``LEARNED`` of their start: others diverged, or died."""
    trained = [cell for cell in cells if not cell["diverged"] and cell["final"] < LEARNED]
    lazy = [cell for cell in trained if cell["gamma"] == LAZY_GAMMA and cell["catapult"]]
    rich = [cell for cell in trained if cell["gamma"] == RICH_GAMMA]
    highest = [max((c["catapult"] for c in lazy if c["seed"] == seed), default=1.0) for seed in range(preset.seeds)]
    fell = max((cell["sharpness_lr"][1] / cell["sharpness_lr"][0] for cell in lazy), default=math.inf)
    thrown = sum(cell["catapult"] is not None for cell in rich)
    logs = t_interval([math.log(height) for height in highest])
    between = None if logs is None else (math.exp(logs[0]), math.exp(logs[1]))
    middle = math.exp(fmean(map(math.log, highest)))
    without = f"{highest.count(1.0)} of {len(highest)} seeds have no catapult" if 1.0 in highest else ""
    where = ", ".join(sorted({f"c = {cell['rate']:g}" for cell in rich if cell["catapult"] is not None}))
    return [
        above(
            f"highest catapult over the start, γ = {LAZY_GAMMA:g}, geometric mean of seeds", 1.3, middle, between,
            without,
        ),
        below(
            f"sharpness after a catapult over before, γ = {LAZY_GAMMA:g}, largest", 1.0, fell,
            why="" if lazy else "no run has a catapult",
        ),
        Claim(
            f"catapults in {len(rich)} runs that train, γ = {RICH_GAMMA:g}", "0", float(thrown) if rich else None, None,
            thrown == 0 and bool(rich), f"at {where}" if thrown else "" if rich else "no run trains",
        ),
    ]  # fmt: skip


def measure_alignment(preset: Preset, place: Place) -> dict[str, Any]:
    """Kernels along runs at both ends of γ; how far they turned while the loss had not moved."""
    runs = [
        Descent(
            preset.width, preset.samples, gamma, rate, seed, steps=preset.aligning_steps,
            measures=("ntk", "features"), per_decade=20, device=place.device,
        )
        for gamma, rate in ((LAZY_GAMMA, preset.lazy_rate), (RICH_GAMMA, preset.aligning_rate))
        for seed in range(preset.seeds)
    ]  # fmt: skip
    done = on_all_cores(descended, runs, place.cores)
    lazy, rich = done[: preset.seeds], done[preset.seeds :]
    gains, shares, dropped = [], [], []
    for end in rich:
        first = end.measured[0]
        waiting = [one for one in end.measured if one.loss >= PLATEAU * first.loss]
        gains.append((waiting[-1].alignment or 0.0) - (first.alignment or 0.0))
        rise = max(one.alignment or 0.0 for one in end.measured) - (first.alignment or 0.0)
        shares.append(gains[-1] / rise if rise > 0 else math.nan)  # where nothing is ever gained there is no share
        dropped.append(end.loss[-1])
    stayed = [end.measured[-1].kernel_kept or 0.0 for end in lazy]
    claims = [
        above(f"alignment gained on the plateau, γ = {RICH_GAMMA:g}", 0.1, fmean(gains), t_interval(gains)),
        above(
            "its share of all that is ever gained",
            0.3,
            fmean(shares),
            t_interval(shares),
            "a run's alignment never rises" if any(map(math.isnan, shares)) else "",
        ),
        below(f"loss at the end over the start, γ = {RICH_GAMMA:g}", 0.5, max(dropped)),
        above(f"alignment of the kernel with its start, γ = {LAZY_GAMMA:g}", 0.95, fmean(stayed), t_interval(stayed)),
        below(f"loss at the end over the start, γ = {LAZY_GAMMA:g}", 0.8, max(end.loss[-1] for end in lazy)),
    ]
    found = {"rich": plain(rich[0]), "lazy": plain(lazy[0])}
    return {"claims": [asdict(claim) for claim in claims], **found}


def picture(parts: dict[str, Any]) -> Figure:
    """Catapults, and the kernel's alignment along a rich run."""
    figure = Figure(figsize=(12, 4.3), layout="constrained")
    first, second = figure.subplots(1, 2)
    _draw_catapults(first, parts["catapult"]["cells"])
    draw_alignment(measured(parts["alignment"]["rich"]), second)
    second.set_title(f"the kernel's alignment along a run, γ = {RICH_GAMMA:g}", fontsize=10)
    return figure


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
    axes.set_title("loss over its start, at several rates", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, ncols=2)


def main(argv: Sequence[str] | None = None) -> Path:
    return run("catapult_silent_alignment", __doc__, PRESETS, measure, argv)


if __name__ == "__main__":
    main()
