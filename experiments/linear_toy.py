"""The deep linear network, closed form and simulated: every exponent of the law from one scalar equation.

    python experiments/linear_toy.py --preset cpu

Scalar network h = w₁⋯w_L, all w = 1 at the start, f = (h − 1)/γ, target y = 1, loss ½(f − y)². The layers stay equal,
so gradient descent is w ← w − η·(f − y)·w^(L−1)/γ, and these are exact:

    sharpness at the end      λ = L·(1 + γ)^(2−2/L)/γ²                         ∝ γ^(−2), γ^(−2/L)
    time to half the target   t = γ·∫ dw / (w^(L−1)·(y − f(w))), f from 0 to ½   ∝ γ (L > 2), γ·log γ (L = 2)

so that a rate near 2/λ takes steps ∝ γ^(1−2/L). The largest rate that trains is simulated: ∝ γ² and γ^(2/L); with the
sign of the gradient, which is Adam without memory, ∝ γ and γ^(1/L); and the smallest that trains in T steps ∝ γ/T.
Under the logistic loss with one label in ten wrong, the largest rate at which the weights stay is ∝ γ for γ ≤ 1.
The matrix network is a linear MLP of width 32 in mean-field form that learns a linear function of normal inputs online:
its stable edge has the same exponents. How far descent is from the two closed forms is in the result, under "checks".
There is no preset paper: the functions that are learned are made here, no data set could take their place. The largest
preset is gpu.
Source: Atanasov et al., ICLR 2025 (arXiv 2410.04642), the linear toy model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _experiment import Claim, Found, Place, near, number, run
from _intervals import Interval, seeds_slope, slope_interval
from _sweep import local_slopes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from gammaopt._errors import UsageError
from gammaopt._fit import critical_rates
from gammaopt.diagnostics import Grid, portrait
from gammaopt.online import Hermite, Recipe

Array = NDArray[np.float64]
TOLERANCE = 0.05  # of the scalar network's exponents
MATRIX_TOLERANCE = 0.1
LAZY, RICH = (1e-4, 1e-2), (1e2, 1e4)  # where the powers stand alone
REACH = 0.005  # decades: how close an edge is known
TRAINED = 0.5  # of the first loss
WRONG_LABELS = 0.1


@dataclass(frozen=True)
class Preset:
    """How much to run."""

    depths: tuple[int, ...] = (2, 3, 4, 5)
    steps: int = 3000
    sign_steps: int = 300
    points: int = 5  # γ on each side
    budgets: tuple[int, ...] = (300, 1000, 3000)
    matrix_depths: tuple[int, ...] = (2, 3, 4)
    matrix_gammas: tuple[float, float, int] = (0.0001, 1000.0, 15)
    matrix_rates: tuple[float, float, int] = (0.01, 10.0, 25)
    matrix_steps: int = 300
    matrix_seeds: int = 4


PRESETS = {
    "smoke": Preset(
        depths=(3,), steps=1000, points=3, budgets=(300, 1000), matrix_depths=(3,), matrix_gammas=(0.001, 100.0, 11),
        matrix_rates=(0.05, 10.0, 8), matrix_steps=60, matrix_seeds=1,
    ),
    "cpu": Preset(),
    "gpu": Preset(points=9, matrix_rates=(0.01, 10.0, 49), matrix_seeds=8, matrix_steps=1000),
}  # fmt: skip


def gradient(depth: int, gamma: Array, w: Array) -> Array:
    """Of ½(f − 1)² in each layer's weight."""
    made: Array = ((w**depth - 1) / gamma - 1) * w ** (depth - 1) / gamma
    return made


def logistic_gradient(depth: int, gamma: Array, w: Array) -> Array:
    """Of the logistic loss with a share of wrong labels."""
    f = np.clip((w**depth - 1) / gamma, -700, 700)
    made: Array = (1 / (1 + np.exp(-f)) - (1 - WRONG_LABELS)) * w ** (depth - 1) / gamma
    return made


def descend(
    depth: int,
    gamma: Array,
    eta: Array,
    steps: int,
    *,
    sign: bool = False,
    start: Array | float = 1.0,
    slope_of: Callable[[int, Array, Array], Array] = gradient,
) -> tuple[Array, Array]:
    """The last weight from w = 1 of a run for each (γ, η), not finite where it blew up, and its late ½(f − 1)².

    The loss is the largest of the last ten steps, over that of the start.
    """
    w = np.ones(np.broadcast_shapes(gamma.shape, eta.shape)) * start
    late = np.zeros_like(w)
    with np.errstate(all="ignore"):
        for step in range(steps):
            move = slope_of(depth, gamma, w)
            w = w - eta * (np.sign(move) if sign else move)
            if step >= steps - 10:
                late = np.maximum(late, ((w**depth - 1) / gamma - 1) ** 2)
    return w, np.where(np.isfinite(w), late, np.inf)


def _trains(depth: int, steps: int, gamma: Array, eta: Array) -> NDArray[np.bool_]:
    """Whether each run ends below half of its first loss."""
    made: NDArray[np.bool_] = descend(depth, gamma, eta, steps)[1] < TRAINED
    return made


def _signs_train(depth: int, steps: int, gamma: Array, eta: Array) -> NDArray[np.bool_]:
    """Whether most runs with the gradient's sign do.

    Their weights lie on a lattice of step η, so one start says where the lattice lies; 15 starts within a step are
    averaged over.
    """
    starts = np.linspace(-0.5, 0.5, 15).reshape(-1, 1, 1) * eta
    late = descend(depth, gamma[None], np.broadcast_to(eta, starts.shape), steps, sign=True, start=1 + starts)[1]
    made: NDArray[np.bool_] = np.median(late, axis=0) < TRAINED
    return made


def _stays(depth: int, steps: int, gamma: Array, eta: Array) -> NDArray[np.bool_]:
    """Whether the weight under the logistic loss stays within a factor of two of what the best f needs."""
    w, _ = descend(depth, gamma, eta, steps, slope_of=logistic_gradient)
    wanted = (1 + gamma * np.log((1 - WRONG_LABELS) / WRONG_LABELS)) ** (1 / depth)
    with np.errstate(all="ignore"):
        made: NDArray[np.bool_] = (w > wanted / 2) & (w < 2 * wanted)
        return made


def edge(good: Callable[[Array, Array], NDArray[np.bool_]], gammas: Array, centre: Array, upper: bool) -> Array:
    """log₁₀ of the largest (or smallest) good rate within two decades of ``centre``, to a hundredth of a decade."""
    step = -2 * REACH if upper else 2 * REACH
    logs = np.log10(centre)[:, None] - np.sign(step) * 2 + step * np.arange(400)
    found = good(gammas[:, None], 10.0**logs)
    if not found.any(axis=1).all() or found[:, 0].any():
        raise UsageError("an edge lies outside the rates tried, two decades around the law's; move their centre")
    at: Array = logs[np.arange(len(gammas)), found.argmax(axis=1)]
    return at - step / 2


def exponent(x: Array, logs: Array, reach: float = 0.0, name: str = "γ") -> tuple[float, Interval | None, str]:
    """Slope of log₁₀ against log₁₀ x, its 95 % interval and the slopes between neighbours; see ``slope_interval``."""
    y = [float(log) for log in logs]
    return *slope_interval([float(log) for log in np.log10(x)], y, reach), local_slopes(x.tolist(), y, name)


def end_sharpness(depth: int, gamma: Array) -> Array:
    """λ at f = y: closed form."""
    made: Array = depth * (1 + gamma) ** (2 - 2 / depth) / gamma**2
    return made


def half_time(depth: int, gamma: float) -> float:
    """Gradient flow's time to f = ½: the integral, by Gauss-Legendre in log w."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    top = np.log1p(gamma / 2) / depth
    u = (nodes + 1) / 2 * top
    w = np.exp(u)
    return float(gamma * top / 2 * (weights * w / (w ** (depth - 1) * (1 - (w**depth - 1) / gamma))).sum())


def simulated_half_time(depth: int, gamma: float) -> float:
    """The same from gradient descent with steps a five hundredth of the stable ones, linear between steps."""
    eta = 0.002 / end_sharpness(depth, np.array(gamma))
    w, f, before, step = 1.0, 0.0, 0.0, 0
    while f < 0.5:
        before = f
        w = float(w - eta * gradient(depth, np.array(gamma), np.array(w)))
        f, step = (w**depth - 1) / gamma, step + 1
    return float((step - 1 + (0.5 - before) / (f - before)) * eta)


def scalar_claims(preset: Preset, depth: int) -> tuple[list[Claim], dict[str, list[float]]]:
    """Every exponent of the scalar network of one depth, and its edges for the picture."""
    lazy, rich = (np.geomspace(*side, preset.points) for side in (LAZY, RICH))
    sgd = partial(_trains, depth, preset.steps)
    sign = partial(_signs_train, depth, preset.sign_steps)
    logistic = partial(_stays, depth, preset.steps)
    named = f"L = {depth}"
    claims, edges = [], {}
    for what, good, gammas, centre, predicted in (
        ("stable edge, γ ≪ 1", sgd, lazy, lazy**2, 2.0),
        ("stable edge, γ ≫ 1", sgd, rich, rich ** (2 / depth), 2 / depth),
        ("stable edge, logistic loss, γ ≪ 1", logistic, lazy, lazy, 1.0),
        ("stable edge, sign, γ ≪ 1", sign, lazy, lazy, 1.0),
        ("stable edge, sign, γ ≫ 1", sign, rich, rich ** (1 / depth), 1 / depth),
    ):
        logs = edge(good, gammas, centre, upper=True)
        edges[what] = [*gammas, *logs]
        claims.append(near(f"{what}, {named}", predicted, TOLERANCE, *exponent(gammas, logs, REACH)))
    for side, gammas, predicted in (("γ ≪ 1", lazy, -2.0), ("γ ≫ 1", rich, -2 / depth)):
        logs = np.log10(descended_sharpness(preset, depth, gammas))
        claims.append(near(f"sharpness at the end, {side}, {named}", predicted, TOLERANCE, *exponent(gammas, logs)))
    times = np.array([half_time(depth, gamma) for gamma in rich])
    shown = times / np.log(rich) if depth == 2 else times
    told = "time to half over log γ" if depth == 2 else "time to half"
    claims.append(near(f"{told}, γ ≫ 1, {named}", 1.0, TOLERANCE, *exponent(rich, np.log10(shown))))
    return claims, edges


def descended_sharpness(preset: Preset, depth: int, gammas: Array) -> Array:
    """λ of the weights that descent at half of the stable rate ends with."""
    w, _ = descend(depth, gammas, 1 / end_sharpness(depth, gammas), 5 * preset.steps)
    made: Array = depth * w ** (2 * depth - 2) / gammas**2
    return made


def checks(preset: Preset, depth: int) -> dict[str, float]:
    """Relative distances of descent from the closed forms: no predictions, they say that the simulation is right."""
    gammas = np.concatenate([np.geomspace(*side, preset.points) for side in (LAZY, RICH)])
    sharpness = descended_sharpness(preset, depth, gammas) / end_sharpness(depth, gammas)
    time = simulated_half_time(depth, RICH[0]) / half_time(depth, RICH[0])
    return {"sharpness at the end": float(np.abs(sharpness - 1).max()), "time to half": abs(time - 1)}


def lower_edge(preset: Preset, depth: int) -> list[Claim]:
    """The smallest rate that trains: ∝ γ at a budget, ∝ 1/T at a γ."""
    gammas = np.geomspace(*RICH, preset.points)
    logs = {
        steps: edge(partial(_trains, depth, steps), gammas, gammas / steps, upper=False) for steps in preset.budgets
    }
    in_gamma = exponent(gammas, logs[max(preset.budgets)], REACH)
    budgets = np.array(preset.budgets, float)
    in_budget = exponent(budgets, np.array([logs[steps].mean() for steps in preset.budgets]), REACH, "T")
    return [
        near(f"smallest rate that trains, in γ, L = {depth}", 1.0, 2 * TOLERANCE, *in_gamma),
        near(f"smallest rate that trains, in the budget, L = {depth}", -1.0, 2 * TOLERANCE, *in_budget),
    ]


def linear_mlp(inputs: int, width: int, depth: int) -> nn.Sequential:
    """A linear network of ``depth`` layers, one output."""
    sizes = [inputs, *[width] * (depth - 1), 1]
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)))


def matrix_claims(preset: Preset, place: Place, depth: int) -> list[Claim]:
    """The matrix network's stable edge, online on a linear target."""
    recipe = Recipe(
        partial(linear_mlp, 16, 32, depth), Hermite(16, ((1,),)), "mse", "sgd", preset.matrix_steps,
        depth=float(depth), device=place.device, dtype=torch.float64,
    )  # fmt: skip
    grid = Grid.log(preset.matrix_gammas, preset.matrix_rates, preset.matrix_seeds)
    made = portrait(recipe, grid, place.work / f"matrix-L{depth}")
    points = critical_rates(made.records, "edge")
    claims = []
    for told, chosen, predicted in (
        ("γ ≤ 0.003", [point for point in points if point.gamma < 0.004], 2.0),
        ("γ ≥ 1", [point for point in points if point.gamma > 0.99], 2 / depth),
    ):
        # A seed's edges at all γ are those of one network: one slope for each seed.
        lines = [
            ([math.log(p.gamma) for p in own], [math.log(p.lr) for p in own])
            for own in ([p for p in chosen if p.seed == seed] for seed in sorted({p.seed for p in chosen}))
        ]
        found, interval = seeds_slope(lines, max((p.reach for p in chosen), default=0.0))
        why = local_slopes([p.gamma for p in chosen], [math.log10(p.lr) for p in chosen])
        what = f"matrix network, stable edge, {told}, L = {depth}"
        claims.append(near(what, predicted, MATRIX_TOLERANCE, found, interval, why))
    return claims


def measure(preset: Preset, place: Place) -> Found:
    """All claims, depth by depth."""
    claims: list[Claim] = []
    edges = {}
    for depth in preset.depths:
        found, edges[depth] = scalar_claims(preset, depth)
        claims += found
        if depth > 2:
            claims += lower_edge(preset, depth)
    for depth in preset.matrix_depths:
        claims += matrix_claims(preset, place, depth)
    data = {
        "edges": {str(depth): found for depth, found in edges.items()},
        "checks": {str(depth): checks(preset, depth) for depth in preset.depths},
    }
    return Found(claims, meaning(claims), picture(edges), data)


def meaning(claims: Sequence[Claim]) -> str:
    """One sentence on how many exponents are as predicted, and which are not."""
    held, missed = sum(claim.holds for claim in claims), [claim for claim in claims if not claim.holds]
    told = "; ".join(f"{claim.what}: {number(claim.measured, '.2f')} instead of {claim.predicted}" for claim in missed)
    return f"A deep linear network has {held} of {len(claims)} exponents of the law{' but not ' * bool(missed)}{told}."


def picture(edges: dict[int, dict[str, list[float]]]) -> Figure:
    """The simulated edges on the predicted lines."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, rule in zip(figure.subplots(1, 2), ("", ", sign"), strict=True):
        kinds = f"stable edge{rule}, γ ≪ 1", f"stable edge{rule}, γ ≫ 1"
        sign = "sign" in kinds[0]
        for i, (depth, found) in enumerate(edges.items()):
            for kind in kinds:
                half = len(found[kind]) // 2
                gammas, logs = np.array(found[kind][:half]), np.array(found[kind][half:])
                power = (1.0 if sign else 2.0) if "≪" in kind else (1 if sign else 2) / depth
                axes.plot(gammas, 10**logs, "o", color=f"C{i}", markersize=4)
                level = float(np.mean(logs - power * np.log10(gammas)))
                label = f"L = {depth}" if "≫" in kind else None
                axes.plot(gammas, 10**level * gammas**power, color=f"C{i}", linewidth=1, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("feature-learning strength γ")
        axes.set_ylabel("largest rate η that trains")
        axes.set_title("sign descent: γ and γ^(1/L)" if sign else "gradient descent: γ² and γ^(2/L)", fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    return run("linear_toy", __doc__, PRESETS, measure, argv)


if __name__ == "__main__":
    main()
