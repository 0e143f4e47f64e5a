"""Do networks of other γ and other seeds learn the same function? Agreement through time, and kernels at the end.

    python experiments/agreement.py --preset cpu

MLPs of width 64 in mean-field form learn augmented digits (MSE, SGD, one pass, float64) at the law's rate. At each of a
dozen log-spaced steps the functions of all pairs across γ (same seed) and across seeds (same γ) are compared on
held-out samples by cosine. Lazy networks of one seed share one kernel, rich ones share their features: both agree among
themselves more than with each other. Across seeds, the random kernels of lazy networks differ, and learned features
differ less. The NTK's alignment with the targets is told at the start and at the end against γ. Intervals are Student's
t over seeds, by the jackknife over seeds for comparisons across them, as pairs share seeds.
Writes results/agreement/PRESET.json and .png and prints predicted | measured | interval | holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from _experiment import Claim, Found, Place, above, kept, run, t_interval
from _intervals import pairs_interval
from _sweep import on_all_cores
from matplotlib.figure import Figure
from torch import Tensor, nn

from gammaopt import SGD
from gammaopt.diagnostics import agreements, kernel_target_alignment, ntk
from gammaopt.online import MLP, Recipe
from gammaopt.online._device import seeded
from gammaopt.online._losses import CRITERIA, squared_target
from gammaopt.online.record import log_spaced
from gammaopt.online.train import fresh_model


@dataclass(frozen=True)
class Preset:
    """How much to run; the first two γ are lazy, the last two rich."""

    gammas: tuple[float, ...] = (0.03, 0.1, 1.0, 10.0, 100.0, 1000.0)
    rate: float = 6.0
    seeds: int = 4
    steps: int = 2000
    times: int = 12
    width: int = 64
    batch_size: int = 32
    held_out: int = 1024
    kernel_samples: int = 96


PRESETS = {
    "smoke": Preset(
        gammas=(0.1, 0.3, 10.0, 30.0), seeds=2, steps=40, times=3, width=16, held_out=64, kernel_samples=16
    ),
    "cpu": Preset(),
    "gpu": Preset(seeds=8, steps=10_000, times=20, width=512, held_out=4096, kernel_samples=256),
    "paper": Preset(seeds=4, steps=20_000, times=20, width=1024, batch_size=128, held_out=4096, kernel_samples=256),
}


@dataclass(frozen=True)
class Training:
    """One run, whose weights are kept at ``times``."""

    preset: Preset
    gamma: float
    seed: int
    path: Path
    place: Place


def recipe_of(preset: Preset, place: Place) -> Recipe:
    stream = place.stream
    build = partial(MLP, math.prod(stream.shape), stream.classes, width=preset.width, depth=3)
    return Recipe(
        build,
        stream,
        "mse",
        "sgd",
        preset.steps,
        preset.batch_size,
        depth=3.0,
        device=place.device,
        dtype=torch.float64,
    )


def fresh(preset: Preset, gamma: float, seed: int, place: Place) -> nn.Module:
    """The network that a run starts from."""
    recipe = recipe_of(preset, place)
    with seeded("cpu", seed):
        return fresh_model(recipe, gamma, recipe.stream.batches(seed, 0, 1, 2)[0][0])


def times(preset: Preset) -> list[int]:
    return log_spaced(preset.steps, preset.times)


def train(job: Training) -> None:
    """Train one network, and keep its weights at the preset's times."""
    if job.path.exists():
        return
    recipe = recipe_of(job.preset, job.place)
    model = fresh(job.preset, job.gamma, job.seed, job.place)
    optimizer = SGD(model.parameters(), lr=job.preset.rate)
    states, wanted = [], set(times(job.preset))
    slice_of = 50
    for start in range(0, job.preset.steps, slice_of):
        inputs, targets = recipe.stream.batches(
            job.seed, start, min(start + slice_of, job.preset.steps), recipe.batch_size
        )
        for i in range(len(inputs)):
            x, y = inputs[i].to(recipe.device, recipe.dtype), targets[i].to(recipe.device)
            optimizer.zero_grad()
            CRITERIA["mse"](model(x), y).backward()
            optimizer.step()
            if start + i + 1 in wanted:
                states.append({name: p.detach().cpu().clone() for name, p in model.named_parameters()})
    job.path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = job.path.with_suffix(".partial")
    torch.save(states, partial_path)
    partial_path.replace(job.path)


def measure(preset: Preset, place: Place) -> Found:
    """Train all networks, then compare their functions."""
    preset = replace(preset, steps=place.steps(preset.steps, preset.batch_size))
    jobs = [
        Training(preset, gamma, seed, place.file(f"{gamma:g}-{seed}.pt", preset), place)
        for gamma in preset.gammas
        for seed in range(preset.seeds)
    ]
    on_all_cores(train, jobs, 1 if place.device != "cpu" else place.cores)
    found = kept(place.file("compared.json", preset), partial(compare, preset, place, jobs))
    claims = claims_of(preset, found)
    lazy, rich = (fmean(found["across_seeds"][f"{gamma:g}"][-1]) for gamma in (preset.gammas[0], preset.gammas[-2]))
    than = "more" if rich > lazy else "no more"
    meaning = (
        f"Rich networks of different seeds agree {than} than lazy ones: the cosine of their functions at the end is "
        f"{rich:.3f} at γ = {preset.gammas[-2]:g} and {lazy:.3f} at γ = {preset.gammas[0]:g}."
    )
    return Found(claims, meaning, picture(preset, found), found)


def compare(preset: Preset, place: Place, jobs: Sequence[Training]) -> dict[str, Any]:
    """Cosines of all pairs at all times, and alignments at both ends.

    ``across_gammas["a b"]`` is (time, seed), ``across_seeds["a"]`` (time, pair of seeds), ``alignment["a"]`` (start and
    end, seed).
    """
    x, _ = (part[0] for part in place.stream.batches(0, 0, 1, preset.held_out, "held_out"))
    x = x.to(place.device, torch.float64)
    states = {(job.gamma, job.seed): torch.load(job.path, weights_only=True) for job in jobs}
    models = {key: fresh(preset, *key, place) for key in states}
    starts = {key: _aligned(preset, place, model) for key, model in models.items()}
    across_gammas: dict[str, list[list[float]]] = {}
    across_seeds: dict[str, list[list[float]]] = {}
    for at in range(len(times(preset))):
        for key, model in models.items():
            _load(model, states[key][at])
        pairs = agreements(models, x)
        for a, b in itertools.combinations(preset.gammas, 2):
            cosines = [pairs[(a, seed), (b, seed)].cosine for seed in range(preset.seeds)]
            across_gammas.setdefault(f"{a:g} {b:g}", []).append(cosines)
        for gamma in preset.gammas:
            seeds = itertools.combinations(range(preset.seeds), 2)
            cosines = [pairs[(gamma, a), (gamma, b)].cosine for a, b in seeds]
            across_seeds.setdefault(f"{gamma:g}", []).append(cosines)
    ends = {key: _aligned(preset, place, model) for key, model in models.items()}
    return {
        "times": times(preset),
        "across_gammas": across_gammas,
        "across_seeds": across_seeds,
        "alignment": {
            f"{gamma:g}": [[of[gamma, seed] for seed in range(preset.seeds)] for of in (starts, ends)]
            for gamma in preset.gammas
        },
    }


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])


def _aligned(preset: Preset, place: Place, model: nn.Module) -> float:
    """The NTK's centred alignment with the one-hot targets of held-out samples."""
    stream = place.stream
    x, y = (part[0] for part in stream.batches(0, 0, 1, preset.kernel_samples, "held_out"))
    targets = squared_target(torch.zeros(len(y), stream.classes, dtype=torch.float64), y)
    kernel = ntk(model, x.to(place.device, torch.float64)).cpu()
    return kernel_target_alignment(kernel, targets)


def claims_of(preset: Preset, found: dict[str, Any]) -> list[Claim]:
    """Who agrees with whom at the end."""
    lazy, lazier = preset.gammas[1], preset.gammas[0]
    rich, richer = preset.gammas[-2], preset.gammas[-1]
    end = {pair: values[-1] for pair, values in found["across_gammas"].items()}
    across = end[f"{lazy:g} {rich:g}"]
    claims = []
    for a, b in ((lazier, lazy), (rich, richer)):
        gained = [same - other for same, other in zip(end[f"{a:g} {b:g}"], across, strict=True)]
        what = f"cosine of γ = {a:g} with {b:g} at the end, over that of {lazy:g} with {rich:g} ({fmean(across):.3f})"
        claims.append(above(what, 0.0, fmean(gained), t_interval(gained)))
    gained = [
        b - a
        for a, b in zip(found["across_seeds"][f"{lazier:g}"][-1], found["across_seeds"][f"{rich:g}"][-1], strict=True)
    ]
    what = f"cosine between seeds at the end, γ = {rich:g} over γ = {lazier:g}"
    claims.append(above(what, 0.0, fmean(gained), pairs_interval(gained, preset.seeds)))
    start, ends = found["alignment"][f"{rich:g}"]
    gained = [b - a for a, b in zip(start, ends, strict=True)]
    claims.append(above(f"NTK's alignment gained in training, γ = {rich:g}", 0.1, fmean(gained), t_interval(gained)))
    lazy_ends = found["alignment"][f"{lazier:g}"][1]
    gained = [b - a for a, b in zip(lazy_ends, ends, strict=True)]
    what = f"alignment at the end, γ = {rich:g} over γ = {lazier:g}"
    claims.append(above(what, 0.0, fmean(gained), t_interval(gained)))
    return claims


def picture(preset: Preset, found: dict[str, Any]) -> Figure:
    """Cosine across γ through time, across seeds through time, and alignment against γ."""
    figure = Figure(figsize=(13, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    lazier, lazy, rich, richer = (preset.gammas[i] for i in (0, 1, -2, -1))
    for a, b in dict.fromkeys([(lazier, lazy), (lazy, rich), (rich, richer)]):
        _band(left, found["times"], found["across_gammas"][f"{a:g} {b:g}"], f"γ = {a:g} and {b:g}")
    left.set(title="same seed, two γ", xlabel="step", ylabel="cosine of the functions", xscale="log")
    for gamma in preset.gammas:
        _band(middle, found["times"], found["across_seeds"][f"{gamma:g}"], f"γ = {gamma:g}")
    middle.set(title="same γ, two seeds", xlabel="step", ylabel="cosine of the functions", xscale="log")
    for at, told in enumerate(("start", "end")):
        values = np.array([found["alignment"][f"{gamma:g}"][at] for gamma in preset.gammas])
        right.errorbar(preset.gammas, values.mean(1), values.std(1), marker="o", label=told, capsize=2)
    right.set(
        title="NTK's alignment with the targets", xlabel="feature-learning strength γ", ylabel="alignment", xscale="log"
    )
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _band(axes: Any, steps: Iterable[int], values: Sequence[Sequence[float]], label: str) -> None:
    data = np.array(values)
    (line,) = axes.plot(list(steps), data.mean(1), "o-", markersize=3, label=label)
    axes.fill_between(list(steps), data.min(1), data.max(1), alpha=0.15, color=line.get_color())


def main(argv: Sequence[str] | None = None) -> Path:
    return run("agreement", __doc__, PRESETS, measure, argv)


if __name__ == "__main__":
    main()
