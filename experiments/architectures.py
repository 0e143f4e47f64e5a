"""The exponent of the stable edge of the paper's architectures on photographs: predicted 2/L_eff for SGD, γ ≥ 1.

    python experiments/architectures.py --preset cpu

CNN, ResNet-18 (batch norm) and ViT (pre-LayerNorm), small, in mean-field form, on the stream ``photos``: MSE, one pass.
At each γ the largest rate that trains is found by bisection: it ends with less loss than a constant answer has. The
exponent is the slope of its logarithm in log γ, the mean over seeds with Student's 95 % interval: all edges of a seed
are those of one network on one stream, so it has one slope. L_eff is what
gammaopt.effective_depth measures at initialisation. The CNN is homogeneous, so there theory speaks: 2/L_eff = 2/depth.
A normalised network is not, and its row says how far the law goes with the L_eff that ``wrap`` measures. Edges are kept
in --work, so a killed run goes on. The slopes between neighbouring γ are told too: a power law has the same everywhere.
Effective depth and knee at the start are told of networks too that are not trained here: an MLP, and each architecture
with and without its normalisation.
Writes results/architectures/PRESET.json and .png and prints predicted | measured | interval | holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from _experiment import Claim, Found, Place, near, run
from _intervals import seeds_slope
from _sweep import EdgeJob, neighbour_slopes, powers_in_words, stable_edges
from matplotlib.figure import Figure
from torch import Tensor, nn

from gammaopt import EtaLaw, effective_depth, knee, wrap
from gammaopt.online import Photos, Recipe, Stream, build_model

TOLERANCE = 0.2
STREAM = Photos(scale=(1.0, 1.25), colour=0.1, brightness=0.05, noise=0.03)  # easy: a few hundred steps learn it


Knobs = tuple[tuple[str, Any], ...]
LOOKED_AT = 4  # seeds whose effective depth and knee are told


class Look(NamedTuple):
    """A network whose effective depth and knee are told.

    ``reason`` is told where it names the place of a measurement; no other is known, and none is told. All are part of
    the preset, and so of the name that its edges are kept under.
    """

    title: str
    model: str
    knobs: Knobs
    norm: str = "own"  # "added" after each hidden layer, "removed", or its "own"
    reason: str = "not trained"


PLAIN_RESNET = (("width", 4), ("depth", 2), ("norm", "none"))
LOOKED = (
    Look("MLP", "mlp", (("width", 64), ("depth", 3)), reason="measured on digits by depth.py"),
    Look("MLP with layer norm", "mlp", (("width", 64), ("depth", 3)), "added"),
    Look("CNN with batch norm", "cnn", (("width", 8), ("depth", 3)), "added"),
    Look("ViT without normalisation", "vit", (("width", 32), ("depth", 2), ("patch", 8)), "removed"),
    Look("ResNet-18 without normalisation", "resnet18", PLAIN_RESNET, reason="not trained: its plateau is too long"),
)


@dataclass(frozen=True)
class Case:
    """One network; its edges are looked for between two decades of c = η/s(γ)."""

    title: str
    model: str
    knobs: Knobs
    rates: tuple[float, float]
    steps: int
    batch_size: int
    normalised: bool
    seeds: int = 3


@dataclass(frozen=True)
class Preset:
    """How much to run."""

    cases: tuple[Case, ...]
    gammas: tuple[float, ...] = (1.0, 30.0, 1000.0)
    tolerance: float = 0.1  # decades
    looked_at: tuple[Look, ...] = LOOKED
    learned: float = 0.88  # of the loss of f = 0; the best constant answer to ten classes has 0.9


PRESETS = {
    "smoke": Preset(
        looked_at=LOOKED[:1],
        cases=(Case("CNN", "cnn", (("width", 4), ("depth", 3)), (-1.0, 1.2), 20, 8, False, seeds=1),),
        gammas=(1.0, 10.0, 30.0),
        tolerance=0.4,
        learned=1.0,  # a few steps tell nothing but a divergence
    ),
    "cpu": Preset(
        cases=(
            Case("CNN", "cnn", (("width", 8), ("depth", 3)), (-1.0, 1.2), 300, 16, False),
            Case("ViT", "vit", (("width", 32), ("depth", 2), ("patch", 8)), (-1.0, 1.2), 300, 16, True),
            Case("ResNet-18", "resnet18", (("width", 4), ("depth", 2)), (-1.0, 2.0), 150, 16, True),
        ),
    ),
    "gpu": Preset(
        cases=(
            Case("CNN", "cnn", (("width", 64), ("depth", 4)), (-1.5, 1.5), 2000, 64, False, seeds=3),
            Case("ViT", "vit", (("width", 128), ("depth", 4), ("patch", 4)), (-1.5, 1.5), 2000, 64, True, seeds=3),
            Case("ResNet-18", "resnet18", (("width", 32), ("depth", 2)), (-1.5, 2.0), 1000, 64, True, seeds=3),
            Case(
                "ResNet-18 without normalisation",
                "resnet18",
                (("width", 32), ("depth", 2), ("norm", "none")),
                (-2.0, 2.0),
                5000,
                64,
                False,
                seeds=3,
            ),
        ),
        gammas=(1.0, 10.0, 100.0, 1000.0),
    ),
    "paper": Preset(
        cases=(
            Case("CNN", "cnn", (("width", 128), ("depth", 4)), (-1.5, 1.5), 10_000, 128, False),
            Case("ViT", "vit", (("width", 256), ("depth", 4), ("patch", 4)), (-1.5, 1.5), 10_000, 128, True),
            Case("ResNet-18", "resnet18", (("width", 64), ("depth", 2)), (-1.5, 2.0), 5000, 128, True),
        ),
        gammas=(1.0, 10.0, 100.0, 1000.0),
    ),
}


def crops(place: Place) -> Stream:
    """The photographs, or the images of a data set."""
    return STREAM if place.data is None else place.stream


def measure(preset: Preset, place: Place) -> Found:
    """Effective depths, stable edges over γ and seeds, and their slopes: one row for each network."""
    rows = measure_rows(preset, place)
    claims = [claim(found) for found in rows]
    return Found(claims, meaning(rows, claims), picture(rows), {"rows": rows}, table(preset, crops(place), rows))


def claim(found: dict[str, Any]) -> Claim:
    """The exponent of one network."""
    theory = "no theory: normalised" if found["normalised"] else "homogeneous"
    what = f"stable edge, {found['network']}, L_eff = {found['depth']:.2f} ({theory})"
    why = powers_in_words(found["gammas"], found["slopes"])
    interval = found["interval"] and tuple(found["interval"])
    return near(what, found["predicted"], TOLERANCE, found["measured"], interval, why)


def meaning(rows: Sequence[dict[str, Any]], claims: Sequence[Claim]) -> str:
    """One sentence on how many exponents are those of the effective depth."""
    told = ", ".join(f"{found['network']} γ^{found['measured']:.2f} (γ^{found['predicted']:.2f})" for found in rows)
    held = sum(claim.holds for claim in claims)
    return (
        f"The largest rate that trains follows 2/L_eff, in brackets, within {TOLERANCE:g} in {held} of {len(claims)} "
        f"of the paper's architectures: {told}."
    )


def measure_rows(preset: Preset, place: Place) -> list[dict[str, Any]]:
    """The rows of the result."""
    depths = {case: mean_depth(case, crops(place)) for case in preset.cases}
    jobs = {
        name_of(case, gamma, seed): edge_job(preset, place, case, depths[case], gamma, seed)
        for case in preset.cases
        for seed in range(case.seeds)
        for gamma in preset.gammas
    }
    edges = stable_edges(jobs, place.file("edges.jsonl", preset), place.cores)
    rows = []
    for case in preset.cases:
        found = [[edges[name_of(case, gamma, s)] for s in range(case.seeds)] for gamma in preset.gammas]
        steps = place.steps(case.steps, case.batch_size)
        rows.append({**row(case, depths[case], preset.gammas, found, preset.tolerance / 2), "steps": steps})
    return rows


def name_of(case: Case, gamma: float, seed: int) -> str:
    """What an edge is kept under: all that it depends on in a preset."""
    return json.dumps([case.model, case.knobs, case.rates, case.steps, case.batch_size, gamma, seed])


def edge_job(preset: Preset, place: Place, case: Case, depth: float, gamma: float, seed: int) -> EdgeJob:
    """The search for one edge."""
    stream = crops(place)
    build = partial(build_model, case.model, stream.shape, stream.classes, **dict(case.knobs))
    steps = place.steps(case.steps, case.batch_size)
    recipe = Recipe(build, stream, "mse", "sgd", steps, case.batch_size, depth=depth, device=place.device)
    return EdgeJob(recipe, gamma, seed, *case.rates, preset.learned, preset.tolerance)


def fresh(model: str, knobs: Knobs, stream: Stream, seed: int, norm: str = "own") -> nn.Module:
    """The network of a seed in mean-field form."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net: nn.Module = build_model(model, stream.shape, stream.classes, **dict(knobs))
        if norm == "added":
            net = with_norm(net)
        elif norm == "removed":
            without_norm(net)
        return wrap(net, 1.0, depth=1.0, parametrization="mean_field")


def with_norm(net: nn.Module) -> nn.Sequential:
    """A plain network with batch norm after each convolution, layer norm after each linear layer but the readout."""
    layers: list[nn.Module] = []
    for layer in list(net.children())[:-1]:
        layers.append(layer)
        if isinstance(layer, nn.Conv2d):
            layers.append(nn.BatchNorm2d(layer.out_channels, track_running_stats=False))
        elif isinstance(layer, nn.Linear):
            layers.append(nn.LayerNorm(layer.out_features))
    return nn.Sequential(*layers, list(net.children())[-1])


def without_norm(net: nn.Module) -> None:
    """Takes each layer norm out, in place."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, nn.Identity())


def images(stream: Stream, seed: int) -> Tensor:
    """128 of them."""
    return stream.batches(seed, 0, 1, 128)[0][0]


def mean_depth(case: Case, stream: Stream) -> float:
    """L_eff in mean-field form, over ``LOOKED_AT`` networks, on 128 crops each."""
    nets = [fresh(case.model, case.knobs, stream, seed) for seed in range(LOOKED_AT)]
    return fmean(effective_depth(net, images(stream, seed)) for seed, net in enumerate(nets))


def table(preset: Preset, stream: Stream, measured: Sequence[dict[str, Any]]) -> str:
    """Markdown: effective depth and knee at the start, lowest … highest of some seeds, and the measured exponents.

    A knee in mean-field form is no bend that was measured: edges are for γ ≥ 1. knee.py measures bends.
    """
    rows = [
        "| network, mean-field form | L_eff | knee γ_c | exponent by 2/L_eff | measured |",
        "|---|---|---|---|---|",
    ]
    known = {found["network"]: f"{found['measured']:.2f}" for found in measured}
    trained = [Look(case.title, case.model, case.knobs) for case in preset.cases]
    for look in (*trained, *(look for look in preset.looked_at if look.title not in known)):
        made = [fresh(look.model, look.knobs, stream, seed, look.norm) for seed in range(LOOKED_AT)]
        depths = [effective_depth(net, images(stream, seed)) for seed, net in enumerate(made)]
        knees = [knee(net, images(stream, seed)) for seed, net in enumerate(made)]
        size = ", ".join(f"{name} {value}" for name, value in look.knobs if name != "norm")  # the title tells the norm
        elsewhere = look.reason if look.reason.startswith("measured") else "not measured"
        rows.append(
            f"| {look.title}, {size} | {min(depths):.2f} … {max(depths):.2f} | {min(knees):.2f} … {max(knees):.2f} "
            f"| {EtaLaw(fmean(depths)).rich:.2f} | {known.get(look.title, elsewhere)} |"
        )
    bends = "Bends are not measured here, as all edges are for γ ≥ 1; knee.py measures those of an MLP and a CNN."
    return "\n".join([*rows, "", bends])


def row(
    case: Case, depth: float, gammas: Sequence[float], edges: list[list[float]], reach: float = 0.0
) -> dict[str, Any]:
    """One network's exponent and its interval over seeds; an edge is known within ± ``reach``."""
    x = [math.log10(gamma) for gamma in gammas]
    measured, interval = seeds_slope([(x, list(own)) for own in zip(*edges, strict=True)], reach)
    return {
        "network": case.title,
        "knobs": dict(case.knobs),
        "steps": case.steps,
        "batch_size": case.batch_size,
        "normalised": case.normalised,
        "seeds": case.seeds,
        "depth": round(depth, 4),
        "gammas": list(gammas),
        "log10_edges": [[round(edge, 3) for edge in own] for own in edges],
        "predicted": round(EtaLaw(depth).rich, 4),
        "measured": round(measured, 4),
        "slopes": slopes(gammas, edges),
        "interval": interval and [round(end, 4) for end in interval],
    }


def slopes(gammas: Sequence[float], edges: Sequence[Sequence[float]]) -> list[float]:
    """Exponents between neighbouring γ, of the seeds' mean log₁₀ edges: where they differ, no one power is the law."""
    return [round(one, 2) for one in neighbour_slopes(gammas, [fmean(own) for own in edges])]


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Stable edge against γ, a point for each seed, with the predicted line through their mean."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for entry in rows:
        xs = [gamma for gamma, own in zip(entry["gammas"], entry["log10_edges"], strict=True) for _ in own]
        ys = [edge for own in entry["log10_edges"] for edge in own]
        label = f"{entry['network']}, L_eff = {entry['depth']:.2f}: measured {entry['measured']:.2f}"
        (points,) = axes.plot(xs, [10**y for y in ys], "o", label=label)
        level = sum(ys) / len(ys) - entry["predicted"] * sum(map(math.log10, xs)) / len(xs)
        line = [10 ** (level + entry["predicted"] * math.log10(gamma)) for gamma in entry["gammas"]]
        told = f"2/L_eff = {entry['predicted']:.2f}, predicted"
        axes.plot(entry["gammas"], line, color=points.get_color(), linewidth=1, label=told)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("feature-learning strength γ")
    axes.set_ylabel("largest rate η that trains")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    return run("architectures", __doc__, PRESETS, measure, argv)


if __name__ == "__main__":
    main()
