"""The exponent of the best rate of a pre-LayerNorm residual MLP: predicted 2/L_eff for SGD, γ ≥ 1.

    python experiments/residual.py --preset cpu

Its depth is no number of layers: the last normalisation undoes the scale of all before it, so that L_eff, measured by
gammaopt.effective_depth, is about 2 however many blocks there are. Augmented digits, MSE, mean-field form, one pass.
For each γ the best rate is the vertex of a parabola through log held-out loss on a grid of rates; the exponent is the
slope of log η* in log γ, with Student's 95 % interval.
Writes results/residual/PRESET.json and .png beside this file and prints predicted | measured | interval | holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _experiment import Claim, Found, Place, near, run
from _intervals import slope_interval
from _sweep import best_rates, even, local_slopes
from matplotlib.figure import Figure
from torch import Tensor, nn

from gammaopt import EtaLaw, effective_depth, wrap
from gammaopt.online import Recipe, Stream

TOLERANCE = 0.15


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
    why = local_slopes([math.log10(gamma) for gamma in row["gammas"]], row["log10_best"])
    return near(what, row["predicted"], TOLERANCE, row["measured"], row["interval"], why)


def meaning(rows: Sequence[dict[str, Any]], claims: Sequence[Claim]) -> str:
    """One sentence on whether the exponents are those of the effective depth."""
    if all(claim.holds for claim in claims):
        start = "The exponent of a normalised residual network is that of its effective depth"
    else:
        missed = sum(not claim.holds for claim in claims)
        start = f"2/L_eff is not the exponent of {missed} of {len(claims)} normalised residual networks"
    told = "; ".join(
        f"{2 * row['blocks'] + 2} weight layers: γ^{row['measured']:.2f} (γ^{row['predicted']:.2f} by 2/L_eff, "
        f"γ^{2 / (2 * row['blocks'] + 2):.2f} by the number of layers)"
        for row in rows
    )
    return f"{start}: {told}."


def row(preset: Preset, place: Place, blocks: int) -> dict[str, Any]:
    """Effective depth, best rates over γ and their slope, for one number of blocks."""
    stream = place.stream
    build = partial(network, stream.shape, stream.classes, blocks, preset.width)
    depth = sum(measured_depth(build(), stream, seed) for seed in range(preset.seeds)) / preset.seeds
    recipe = Recipe(build, stream, "mse", "sgd", preset.steps, depth=depth, device=place.device)
    logs = best_rates(
        recipe, preset.gammas, even(*preset.rates), preset.seeds, place.file(f"{blocks}.jsonl", preset), place.cores
    )
    law = EtaLaw(depth)
    best = [c + math.log10(law.factor(gamma)) for c, gamma in zip(logs, preset.gammas, strict=True)]
    measured, interval = slope_interval([math.log10(gamma) for gamma in preset.gammas], best)
    return {
        "blocks": blocks,
        "depth": round(depth, 4),
        "gammas": list(preset.gammas),
        "log10_best": [round(rate, 3) for rate in best],
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
