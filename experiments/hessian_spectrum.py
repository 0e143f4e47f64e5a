"""The Hessian across γ: twenty eigenvalues lazy and rich, λ_max at the end, and sharpness × rate against 2.

    python experiments/hessian_spectrum.py --preset cpu

Spectra: an MLP on augmented digits (MSE, gradient descent on one batch of 256), the twenty largest eigenvalues at the
start, after a twentieth of the steps and at the end. A lazy network has as many outliers as there are classes: the
NTK's largest eigenvalue, that of the mean input, comes once for each output. Their number is where two neighbours of
the twenty are furthest apart.
Sharpness: descents on a staircase of parities that stay below the edge end at λ_max ∝ γ^(−2) for small γ and
γ^(−2/L) for γ ≥ 1. At a larger rate sharpness × rate rises to 2 and stays there, where those descents would go beyond.
Intervals are Student's t over seeds, of a slope for each.
Writes results/hessian_spectrum/PRESET.json and .png and prints predicted | measured | interval | holds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _descent import Descent, descended, measured, plain
from _experiment import Claim, Found, Place, above, below, kept, near, number, run, t_interval
from _intervals import seeds_slope
from _sweep import local_slopes, on_all_cores
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gammaopt import SGD, EtaLaw, wrap
from gammaopt._errors import UsageError
from gammaopt.diagnostics import hessian_eigenvalues
from gammaopt.diagnostics._monitor import EDGE
from gammaopt.online import MLP
from gammaopt.online._device import seeded
from gammaopt.online._losses import CRITERIA
from gammaopt.report import draw_edge

LAZY_UP_TO = 0.03  # above it deep networks bend
LAZY_BAR, RICH_BAR = 0.2, 0.15  # of the exponents
EDGE_BAR = 0.1  # of 2


@dataclass(frozen=True)
class Preset:
    """How much to run; rates c in η = c·s(γ)."""

    width: int = 64
    samples: int = 128
    seeds: int = 3
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
    spectrum_gammas: tuple[float, ...] = (0.01, 1.0, 100.0)
    spectrum_samples: int = 256
    spectrum_rate: float = 10.0
    eigenvalues: int = 20
    spectrum_steps: int = 600


PRESETS = {
    "smoke": Preset(
        width=32, samples=64, seeds=1, depths=(3,), gammas=(0.003, 0.03, 1.0, 100.0), until=0.05, steps=400,
        edge_gammas=(100.0,), edge_steps=250, edge_per_decade=4, spectrum_gammas=(0.01,), spectrum_samples=64,
        spectrum_steps=20,
    ),
    "cpu": Preset(),
    "gpu": Preset(width=256, samples=512, seeds=8, depths=(2, 3, 4, 5), spectrum_samples=2048, spectrum_steps=2000),
    "paper": Preset(width=1024, samples=512, seeds=4, depths=(2, 3, 4, 5), spectrum_samples=2048, spectrum_steps=3000),
}  # fmt: skip


def measure(preset: Preset, place: Place) -> Found:
    """Spectra, sharpness at the end, and the edge."""
    spectra = kept(place.file("spectra.json", preset), partial(measure_spectra, preset, place))
    ends = kept(place.file("sharpness.json", preset), partial(measure_sharpness, preset, place))
    edge = kept(place.file("edge.json", preset), partial(measure_edge, preset, place, ends["points"]))
    claims = [
        *spectra_claims(spectra["spectra"][0], spectra["classes"]),
        *sharpness_claims(preset, ends["points"]),
        *map(Claim.from_dict, edge["claims"]),
    ]
    parts = {
        "spectra": {key: spectra[key] for key in ("spectra", "classes")},
        "sharpness": {"points": ends["points"]},
        "edge": {"curves": edge["curves"]},
    }

    def measured_of(start: str) -> list[float | None]:
        return [one.measured for one in claims if one.what.startswith(start)]

    lazy, rich = (number(one, ".2f") for one in measured_of("exponent of the sharpness")[:2])
    meaning = (
        f"The sharpness falls like γ^{lazy} where training is lazy and γ^{rich} where it is rich at "
        f"L = {preset.depths[0]}; a lazy network has {number(measured_of('outliers')[0], '.0f')} outliers for "
        f"{spectra['classes']} classes, and late in a run of large γ sharpness × rate is "
        f"{number(measured_of('sharpness × rate late')[-1], '.2f')}."
    )
    return Found(claims, meaning, picture(parts), parts)


def measure_spectra(preset: Preset, place: Place) -> dict[str, Any]:
    """Twenty eigenvalues at the start, early and at the end of descents on digits."""
    tasks = [(preset, gamma, place) for gamma in preset.spectrum_gammas]
    spectra = on_all_cores(spectrum, tasks, place.cores if place.device == "cpu" else 1)
    return {"spectra": spectra, "classes": place.stream.classes}


def spectra_claims(lazy: dict[str, Any], classes: int) -> list[Claim]:
    """How many outliers the spectrum of a lazy network has."""
    claims = []
    for when in ("start", "end"):
        ratios = [a / b for a, b in pairwise(lazy[when])]
        count = 1 + max(range(len(ratios)), key=ratios.__getitem__)
        told, why = f"γ = {lazy['gamma']:g}, at the {when}", f"the widest gap is {max(ratios):.3g} × after {count}"
        claims.append(near(f"outliers, {told}", classes, 0.5, float(count), why=why))
        claims.append(above(f"eigenvalue {classes} over the next, {told}", 3, ratios[classes - 1], why=why))
    return claims


def spectrum(task: tuple[Preset, float, Place]) -> dict[str, Any]:
    """Of one γ."""
    preset, gamma, place = task
    stream, device = place.stream, place.device
    x, y = (part[0] for part in stream.batches(0, 0, 1, preset.spectrum_samples))
    x, y = x.to(device, torch.float64), torch.nn.functional.one_hot(y, stream.classes).to(device, torch.float64)
    with seeded("cpu", 0):
        net = MLP(math.prod(stream.shape), stream.classes, width=preset.width, depth=3).double().to(device)
        model = wrap(net, gamma, depth=3.0, parametrization="mean_field")
    optimizer, criterion = SGD(model.parameters(), lr=preset.spectrum_rate), CRITERIA["mse"]
    found: dict[str, Any] = {"gamma": gamma}
    early = preset.spectrum_steps // 20
    for when, steps in (("start", 0), ("early", early), ("end", preset.spectrum_steps - early)):
        for _ in range(steps):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        k = max(preset.eigenvalues, stream.classes + 10)  # more than the outliers that are predicted
        values = hessian_eigenvalues(model, "mse", [(x, y)], k=k).values
        found[when] = [float(f"{value:.5g}") for value in values.tolist()]
        found[f"{when}_loss"] = float(criterion(model(x), y).detach())
    return found


def measure_sharpness(preset: Preset, place: Place) -> dict[str, Any]:
    """λ_max at the end of descents over γ, for each depth."""
    sides = [(gamma, preset.lazy_rate if gamma < 1 else preset.rich_rate) for gamma in preset.gammas]
    runs = [
        Descent(
            preset.width,
            preset.samples,
            gamma,
            rate,
            seed,
            depth,
            preset.steps,
            preset.until,
            ("sharpness",),
            1,
            place.device,
        )
        for depth in preset.depths
        for gamma, rate in sides
        for seed in range(preset.seeds)
    ]
    done = on_all_cores(descended, runs, place.cores)
    points: list[dict[str, Any]] = []
    for depth in preset.depths:
        for gamma, _ in sides:
            mine = [end for run, end in zip(runs, done, strict=True) if (run.depth, run.gamma) == (depth, gamma)]
            logs = [math.log10(end.end_sharpness) for end in mine if end.end_sharpness]
            if len(logs) < len(mine):
                raise UsageError(
                    f"{len(mine) - len(logs)} descents at γ = {gamma:g}, L = {depth} diverged; lower the rate"
                )
            points.append(
                {
                    "depth": depth,
                    "gamma": gamma,
                    "log10_sharpness": round(statistics.mean(logs), 4),
                    "of_seeds": [round(log, 4) for log in logs],
                    "largest_sharpness_lr": round(max(end.measured[-1].sharpness_lr or 0.0 for end in mine), 3),
                    "loss": round(max(end.loss[-1] for end in mine), 4),
                    "steps": round(statistics.mean(end.record.steps for end in mine)),
                }
            )
    return {"points": points}


def sharpness_claims(preset: Preset, points: Sequence[dict[str, Any]]) -> list[Claim]:
    """The exponents of λ_max on both sides of γ, and that the edge of stability did not set them."""
    claims = []
    for depth in preset.depths:
        for side, gammas, claimed, bar in (
            (f"γ ≤ {LAZY_UP_TO:g}", [g for g in preset.gammas if g <= LAZY_UP_TO], -2.0, LAZY_BAR),
            ("γ ≥ 1", [g for g in preset.gammas if g >= 1], -2.0 / depth, RICH_BAR),
        ):
            chosen = [point for point in points if point["depth"] == depth and point["gamma"] in gammas]
            at = [math.log10(point["gamma"]) for point in chosen]
            lines = [(at, [point["of_seeds"][seed] for point in chosen]) for seed in range(preset.seeds)]
            found, interval = seeds_slope(lines)
            logs = [point["log10_sharpness"] for point in chosen]
            what = f"exponent of the sharpness, L = {depth}, {side}"
            why = local_slopes([point["gamma"] for point in chosen], logs)
            claims.append(near(what, claimed, bar, found, interval, why))
    free = max(point["largest_sharpness_lr"] for point in points)
    return [*claims, below("largest sharpness × rate of these descents", EDGE[0], free)]


def measure_edge(preset: Preset, place: Place, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sharpness × rate late in descents at a large rate, and what it would be without an edge."""
    runs = [
        Descent(
            preset.width,
            preset.samples,
            gamma,
            preset.edge_rate,
            seed,
            steps=preset.edge_steps,
            measures=("sharpness",),
            per_decade=preset.edge_per_decade,
            device=place.device,
        )
        for gamma in preset.edge_gammas
        for seed in range(preset.seeds)
    ]
    done = on_all_cores(descended, runs, place.cores)
    claims, curves = [], {}
    for gamma in preset.edge_gammas:
        mine = [end for run, end in zip(runs, done, strict=True) if run.gamma == gamma]
        late = [
            statistics.median(one.sharpness_lr or 0.0 for one in end.measured if one.step >= preset.edge_steps / 3)
            for end in mine
        ]
        free = next(10 ** p["log10_sharpness"] for p in points if (p["depth"], p["gamma"]) == (3, gamma))
        beyond = free * EtaLaw(3).lr(preset.edge_rate, gamma)
        claims.append(
            near(f"sharpness × rate late, γ = {gamma:g}", 2, EDGE_BAR, statistics.mean(late), t_interval(late))
        )
        claims.append(above(f"what it would be without an edge, γ = {gamma:g}", 2 + EDGE_BAR, beyond))
        curves[f"γ = {gamma:g}"] = plain(mine[0])
    return {"claims": [asdict(claim) for claim in claims], "curves": curves}


def picture(parts: dict[str, Any]) -> Figure:
    """Spectra, sharpness at the end, and the edge."""
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    for i, found in enumerate(parts["spectra"]["spectra"]):
        for when, dash in (("start", "--"), ("early", ":"), ("end", "-")):
            scaled = [value / found[when][0] for value in found[when]]
            label = f"γ = {found['gamma']:g}, {when}"
            first.plot(range(1, len(scaled) + 1), scaled, dash, marker="o", markersize=3, color=f"C{i}", label=label)
    first.axvline(parts["spectra"]["classes"] + 0.5, color="grey", linewidth=0.8, linestyle=":")
    first.set(yscale="log", xlabel="k", ylabel="λ_k over λ_1", title="largest eigenvalues; dotted: one for each class")
    first.grid(alpha=0.25)
    first.legend(frameon=False, fontsize=8)
    _draw_sharpness(second, parts["sharpness"]["points"])
    draw_edge({label: measured(each) for label, each in parts["edge"]["curves"].items()}, third)
    third.set_title("sharpness × rate along runs of large γ", fontsize=10)
    return figure


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


def main(argv: Sequence[str] | None = None) -> Path:
    return run("hessian_spectrum", __doc__, PRESETS, measure, argv)


if __name__ == "__main__":
    main()
