"""The exponent of the best rate of a pre-LayerNorm residual MLP: predicted 2/L_eff for SGD, γ ≥ 1.

    python experiments/residual.py --preset cpu

Its depth is no number of layers: the last normalisation undoes the scale of all before it, so that L_eff, measured by
gammaopt.effective_depth, is about 2 however many blocks there are. Augmented digits, MSE, mean-field form, one pass.
For each γ and seed the best rate is the vertex of a parabola through log held-out loss on a grid of rates; the exponent
is the slope of log η* in log γ, the mean over seeds with Student's 95 % interval. A best rate at the end of the grid is
none, and how many there are is in the result.
Writes results/residual/PRESET.json and .png beside this file and prints predicted | measured | interval | holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _experiment import Claim, Found, Place, near, run
from _intervals import seeds_slope
from _sweep import best_rates, even, local_slopes
from matplotlib.figure import Figure
from torch import Tensor, nn

from gammaopt import EtaLaw, effective_depth, wrap
from gammaopt._errors import UsageError
from gammaopt.online import Recipe, Stream

TOLERANCE = 0.15
BATCH_SIZE = 32


@dataclass(frozen=True)
class Preset:
    """How much to run; rates in decades of c = η/s(γ)."""

    blocks: tuple[int, ...] = (2,)
    width: int = 64
    gammas: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    rates: tuple[float, float, int] = (-0.8, 1.2, 11)
    seeds: int = 4
    steps: int = 300


PRESETS = {
    "smoke": Preset(blocks=(1,), width=16, gammas=(1.0, 30.0), rates=(-1.0, 1.0, 5), seeds=1, steps=60),
    "cpu": Preset(),
    "gpu": Preset(blocks=(2, 6), width=256, seeds=8, steps=1000),
    "paper": Preset(blocks=(2, 6), width=1024, seeds=2, steps=3000),
}


class Block(nn.Module):
    """x + W₂ ReLU(W₁ LayerNorm(x)), four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The stream, and what the block adds to it."""
        return x + torch.as_tensor(self.down(torch.relu(self.up(self.norm(x)))))


def network(shape: tuple[int, ...], classes: int, blocks: int, width: int) -> nn.Sequential:
    body = [Block(width) for _ in range(blocks)]
    first, last = nn.Linear(math.prod(shape), width), nn.Linear(width, classes)
    return nn.Sequential(nn.Flatten(), first, *body, nn.LayerNorm(width), last)


def measure(preset: Preset, place: Place) -> Found:
    """One row for each number of blocks."""
    rows = [row(preset, place, blocks) for blocks in preset.blocks]
    claims = [claim(row) for row in rows]
    return Found(claims, meaning(rows, claims), picture(rows), {"rows": rows})


def claim(row: dict[str, Any]) -> Claim:
    """The exponent of one number of blocks."""
    what = f"best rate, {row['blocks']} blocks, L_eff = {row['depth']:.2f}"
    why = local_slopes(row["gammas"], row["log10_best"])
    return near(what, row["predicted"], TOLERANCE, row["measured"], row["interval"], why)


def meaning(rows: Sequence[dict[str, Any]], claims: Sequence[Claim]) -> str:
    """One sentence on whether the exponents are those of the effective depth."""
    if all(claim.holds for claim in claims):
        start = "The exponent of a normalised residual network is that of its effective depth"
    else:
        missed = sum(not claim.holds for claim in claims)
        start = f"2/L_eff is not the exponent of {missed} of {len(claims)} normalised residual networks"
    told = "; ".join(
        f"{layers(row)} weight layers: γ^{row['measured']:.2f} (γ^{row['predicted']:.2f} by 2/L_eff{contrast(row)})"
        for row in rows
    )
    return f"{start}: {told}."


def layers(row: dict[str, Any]) -> int:
    """Those with weights."""
    return 2 * int(row["blocks"]) + 2


def contrast(row: dict[str, Any]) -> str:
    """The exponent by the number of layers, where the interval excludes it."""
    by_number, interval = 2 / layers(row), row["interval"]
    excluded = interval is not None and not interval[0] <= by_number <= interval[1]
    return f", not γ^{by_number:.2f} by the number of layers" if excluded else ""


def row(preset: Preset, place: Place, blocks: int) -> dict[str, Any]:
    """Effective depth, best rates over γ and their slope, for one number of blocks."""
    stream = place.stream
    build = partial(network, stream.shape, stream.classes, blocks, preset.width)
    depth = sum(measured_depth(build(), stream, seed) for seed in range(preset.seeds)) / preset.seeds
    steps = place.steps(preset.steps, BATCH_SIZE)
    recipe = Recipe(build, stream, "mse", "sgd", steps, BATCH_SIZE, depth=depth, device=place.device)
    of_seeds = best_rates(
        recipe, preset.gammas, even(*preset.rates), preset.seeds, place.file(f"{blocks}.jsonl", preset), place.cores
    )
    return row_of(blocks, depth, preset.gammas, of_seeds)


def row_of(blocks: int, depth: float, gammas: Sequence[float], of_seeds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The exponent of log₁₀ c of best rates, (seed, γ), NaN where a seed has none.

    Raises:
        UsageError: if at some γ no seed has one, or no seed has two.
    """
    law = EtaLaw(depth)
    rates = [[c + math.log10(law.factor(gamma)) for c, gamma in zip(own, gammas, strict=True)] for own in of_seeds]
    there = [[rate for rate in at if math.isfinite(rate)] for at in zip(*rates, strict=True)]
    lines = []
    for own in rates:
        on = [(math.log10(gamma), rate) for gamma, rate in zip(gammas, own, strict=True) if math.isfinite(rate)]
        lines.append(([x for x, _ in on], [y for _, y in on]))
    measured, interval = seeds_slope(lines)
    if not all(there) or not math.isfinite(measured):
        raise UsageError(f"{blocks} blocks: too few best rates of a seed lie inside the grid; widen its rates")
    best = [fmean(own) for own in there]
    return {
        "blocks": blocks,
        "depth": round(depth, 4),
        "gammas": list(gammas),
        "log10_best": [round(rate, 3) for rate in best],
        "log10_best_of_seeds": [[round(rate, 3) for rate in own] for own in rates],
        "outside": sum(not math.isfinite(rate) for own in rates for rate in own),
        "predicted": law.rich,
        "measured": round(measured, 4),
        "interval": interval and tuple(round(end, 4) for end in interval),
    }


def measured_depth(net: nn.Module, stream: Stream, seed: int) -> float:
    """L_eff in mean-field form, drawn from ``seed``."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        wrap(net, 1.0, depth=1.0, parametrization="mean_field")
    return effective_depth(net, stream.batches(seed, 0, 1, 256)[0][0])


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Best rate against γ, with the predicted line through the mean of the points."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        rates = [10**rate for rate in row["log10_best"]]
        logs = [math.log10(gamma) for gamma in row["gammas"]]
        level = sum(row["log10_best"]) / len(logs) - row["predicted"] * sum(logs) / len(logs)
        label = f"{row['blocks']} blocks, L_eff = {row['depth']:.2f}: measured {row['measured']:.2f}"
        (points,) = axes.plot(row["gammas"], rates, "o", label=label)
        line = [10 ** (level + row["predicted"] * log) for log in logs]
        axes.plot(row["gammas"], line, color=points.get_color(), label=f"2/L_eff = {row['predicted']:.2f}, predicted")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("feature-learning strength γ")
    axes.set_ylabel("best rate η*")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    return run("residual", __doc__, PRESETS, measure, argv)


if __name__ == "__main__":
    main()
