"""Online loss across γ: the plateau against γ^(1−2/L), the stairs of a large γ, and the curves in rescaled time.

    python experiments/loss_curves.py --preset cpu

MLPs of width 64 in mean-field form learn augmented digits (MSE, SGD, one pass, float64) at the law's rate η = c·s(γ),
c the same for every γ. A large γ falls in two stairs: first the best constant answer, which takes a tenth of the loss
of ten classes, then the images. The plateau ends where the online loss has fallen by a twentieth for good, half of that
stair. Its exponent over γ ≥ 100 is a slope for each seed, with Student's interval over the seeds. For L = 2 it grows
like log γ, so what is left after dividing by that has exponent 0. Curves of γ ≥ 100 are put on one axis t/plateau(γ),
the law's plateau and no fitted one, and the spread between them is told before and after (0: one curve), with how far
down the losses have come in the times that all of them have. Cells are kept in --work, so a killed run goes on.
Writes results/loss_curves/PRESET.json and .png and prints predicted | measured | interval | holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from _experiment import Claim, Found, Place, above, below, known, near, run, t_interval
from _intervals import seeds_slope
from _sweep import local_slopes, steps_done
from matplotlib import colormaps
from matplotlib.figure import Figure

from gammaopt import EtaLaw
from gammaopt.diagnostics import Collapse, Grid, collapse, dynamics, portrait
from gammaopt.online import MLP, Recipe, RunRecord
from gammaopt.report import draw_collapse, draw_dynamics

TOLERANCE = 0.1  # of the plateaus' exponents
RICH = 100.0  # the smallest γ whose plateau counts: below, f is not small against γ where the plateau ends
MOVED = 0.05  # of the loss: half of the first stair
SECOND = 0.3  # of it: in the midst of the second
Curves = dict[float, list[RunRecord]]  # γ → a record for each seed


@dataclass(frozen=True)
class Preset:
    """How much to run; ``steps`` and the largest γ of each depth, two γ to a decade."""

    depths: tuple[int, ...] = (2, 3, 4, 5)
    steps: tuple[int, ...] = (500, 2500, 6000, 8000)
    decades: tuple[int, ...] = (5, 5, 5, 4)
    rate: float = 6.0
    seeds: int = 4
    width: int = 64
    batch_size: int = 32


PRESETS = {
    "smoke": Preset(depths=(3,), steps=(600,), decades=(3,), seeds=1, width=16),
    "cpu": Preset(),
    "gpu": Preset(steps=(1500, 8000, 20_000, 40_000), rate=2.0, seeds=16, width=256),
    "paper": Preset(steps=(5000, 25_000, 60_000, 80_000), rate=2.0, seeds=4, width=1024, batch_size=128),
}


def measure(preset: Preset, place: Place) -> Found:
    """Curves of each depth over γ, and those of the staircase."""
    of_depth = {
        depth: train(preset, place, depth, steps, decades)
        for depth, steps, decades in zip(preset.depths, preset.steps, preset.decades, strict=True)
    }
    claims = [claim for depth, curves in of_depth.items() for claim in plateau_claims(depth, curves)]
    classes = place.stream.classes
    claims += [
        claim for depth, curves in of_depth.items() if depth > 2 for claim in stair_claims(depth, curves, classes)
    ]
    plateaus = {str(depth): {f"{g:g}": _plateaus(of) for g, of in curves.items()} for depth, curves in of_depth.items()}
    return Found(claims, meaning(of_depth, claims), picture(of_depth), {"plateaus": plateaus})


def meaning(of_depth: dict[int, Curves], claims: Sequence[Claim]) -> str:
    """How the plateau of the deepest network grows, and whether the curves are one in rescaled time."""
    deepest = max(of_depth)
    largest = max(of_depth[deepest])
    first, last = (fmean(_plateaus(of_depth[deepest][gamma])) for gamma in (RICH, largest))
    if len(known(first, last)) < 2:
        return f"At L = {deepest} not every run of γ = {RICH:g} and {largest:g} leaves its plateau in the steps given."
    spreads = [claim.holds for claim in claims if claim.what.startswith("spread")]
    one_curve = "; in rescaled time the curves of each depth come together" * (bool(spreads) and all(spreads))
    return (
        f"At L = {deepest} the plateau grows {last / first:.1f} × from γ = {RICH:g} to {largest:g}, predicted "
        f"{(largest / RICH) ** (1 - 2 / deepest):.1f} ×{one_curve}."
    )


def train(preset: Preset, place: Place, depth: int, steps: int, decades: int) -> Curves:
    """Runs of one depth at the law's rate."""
    stream = place.stream
    build = partial(MLP, math.prod(stream.shape), stream.classes, width=preset.width, depth=depth)
    recipe = Recipe(
        build, stream, "mse", "sgd", place.steps(steps, preset.batch_size), preset.batch_size,
        depth=float(depth), device=place.device, dtype=torch.float64,
    )  # fmt: skip
    grid = Grid.log((1.0, 10.0**decades, 2 * decades + 1), (preset.rate, preset.rate, 1), preset.seeds)
    made = portrait(recipe, grid, place.work / f"L{depth}", on_progress=steps_done(f"L = {depth}"))
    return _by_gamma(made.records)


def _by_gamma(records: Sequence[RunRecord]) -> Curves:
    found: Curves = {}
    for record in records:
        found.setdefault(record.gamma, []).append(record)
    return dict(sorted(found.items()))


def _plateaus(records: Sequence[RunRecord], moved: float = MOVED) -> list[float]:
    """Steps on the plateau of each seed; ``nan`` where it never ended."""
    ends = [dynamics(record, moved=moved).plateau for record in records]
    return [math.nan if end is None else end for end in ends]


def plateau_claims(depth: int, curves: Curves) -> list[Claim]:
    """The exponent of the plateau, and the collapse in rescaled time."""
    rich = [gamma for gamma in curves if gamma >= RICH * (1 - 1e-6)]
    logs = np.log10([_plateaus(curves[gamma]) for gamma in rich])  # (γ, seed); NaN: still there
    if depth == 2:
        logs -= np.log10(np.log(rich))[:, None]
    at = np.log10(rich)
    left = np.isfinite(logs)
    lines = [(at[on].tolist(), logs[on, seed].tolist()) for seed, on in enumerate(left.T) if on.sum() > 1]
    found, interval = seeds_slope(lines)
    what = "plateau over log γ" if depth == 2 else "plateau"
    claims = [
        near(
            f"{what}, exponent, γ ≥ {RICH:g}, L = {depth}", 1 - 2 / depth, TOLERANCE, found, interval,
            why=local_slopes(rich, logs.mean(axis=1).tolist()),
        )
    ]  # fmt: skip
    if not left.all():
        why = "at γ = " + ", ".join(f"{gamma:.0f}" for gamma, own in zip(rich, left, strict=True) if not own.all())
        claims.append(Claim(f"runs still on their plateau, L = {depth}", "0", float((~left).sum()), None, False, why))
    if depth > 2:
        together = [_collapsed(depth, curves, rich, seed) for seed in range(logs.shape[1])]
        ratios = [one.spread / one.before if one.before else math.nan for one in together]
        lowest = float(np.mean([one.curves[:, -1].mean() for one in together]))
        told = f"of the loss from 1 to {lowest:.2g}, L = {depth}"
        second = np.log10([fmean(_plateaus(curves[gamma], SECOND)) for gamma in rich])
        why = f"the second stair, {local_slopes(rich, second.tolist())}"
        claims.append(
            below(f"spread in rescaled time over in steps, {told}", 0.5, fmean(ratios), t_interval(ratios), why)
        )
    return claims


def _collapsed(depth: int, curves: Curves, gammas: Sequence[float], seed: int) -> Collapse:
    """Curves of one seed in units of the law's plateau."""
    law = EtaLaw(depth)
    return collapse([curves[g][seed] for g in gammas], [law.plateau_steps(g, at_one=1.0) for g in gammas])


def stair_claims(depth: int, curves: Curves, classes: int) -> list[Claim]:
    """The first stair of a large γ is the best constant answer: a tenth of the loss, for ten classes alike.

    Of one-hot targets of n classes the best constant leaves 1 − 1/n of their mean square.
    """
    gamma = stairs_gamma(curves)
    found = [dynamics(record, start=start_of(record)).drops for record in curves[gamma]]
    told = f"γ = {gamma:g}, L = {depth}"
    sizes, fewest = [drops[0].size if drops else 0.0 for drops in found], min(map(len, found))
    second = [drops[1].size if len(drops) > 1 else 0.0 for drops in found]
    why = "" if fewest >= 2 else "stairs of each seed " + ", ".join(str(len(drops)) for drops in found)
    return [
        Claim(f"stairs, {told}, fewest over seeds", "≥ 2", float(fewest), None, fewest >= 2, why),
        near(f"size of the first stair, {told}", 1 / classes, 0.2 / classes, fmean(sizes), t_interval(sizes)),
        above(f"size of the second stair, {told}", 0.1, fmean(second), t_interval(second)),
    ]


def stairs_gamma(curves: Curves) -> float:
    """A γ that is large and yet climbs all its stairs in the budget: the middle one of those from 100."""
    rich = [gamma for gamma in curves if gamma >= RICH * (1 - 1e-6)]
    return rich[len(rich) // 2]


def start_of(record: RunRecord) -> float:
    """Loss of f = 0: the first batch's, at which one-hot targets give the same for every batch."""
    return record.curve.loss[0]


def picture(of_depth: dict[int, Curves]) -> Figure:
    """Curves of the depth nearest 4; the plateaus of all; rescaled; the stairs."""
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    axes = figure.subplots(2, 2)
    depth = min(of_depth, key=lambda one: abs(one - 4))
    curves = of_depth[depth]
    colours = [colormaps["viridis"](shade) for shade in np.linspace(0.1, 0.9, len(curves))]
    for colour, (gamma, records) in zip(colours, curves.items(), strict=True):
        mean = np.mean([record.curve.loss for record in records], axis=0)
        axes[0, 0].plot(records[0].curve.steps, mean / mean[0], color=colour, label=f"γ = {gamma:.3g}")
    axes[0, 0].set(xscale="log", xlabel="step", ylabel="online loss / start", title=f"L = {depth}, at the law's rate")
    axes[0, 0].legend(frameon=False, fontsize=8)
    for i, (level, found) in enumerate(of_depth.items()):
        gammas = np.array([gamma for gamma in found if gamma >= 1])
        means = np.array([fmean(_plateaus(found[gamma])) for gamma in gammas])
        axes[0, 1].plot(gammas, means, "o", color=f"C{i}", label=f"L = {level}")
        rich = gammas >= RICH * (1 - 1e-6)
        shape = np.log(gammas[rich]) if level == 2 else gammas[rich] ** (1 - 2 / level)
        axes[0, 1].plot(gammas[rich], shape * np.exp(np.mean(np.log(means[rich] / shape))), color=f"C{i}")
    axes[0, 1].set(
        xscale="log", yscale="log", xlabel="feature-learning strength γ", ylabel="steps on the plateau",
        title="points measured; lines γ^(1−2/L), log γ for L = 2",
    )  # fmt: skip
    axes[0, 1].legend(frameon=False, fontsize=8)
    rich_gammas = [gamma for gamma in curves if gamma >= RICH * (1 - 1e-6)]
    draw_collapse(_collapsed(depth, curves, rich_gammas, 0), [f"γ = {gamma:.3g}" for gamma in rich_gammas], axes[1, 0])
    gamma = stairs_gamma(curves)
    draw_dynamics(curves[gamma][0], axes[1, 1], found=dynamics(curves[gamma][0], moved=MOVED))
    axes[1, 1].set_title(f"plateau and stairs, L = {depth}, γ = {gamma:,.0f}", fontsize=10)
    for one in axes.flat:
        one.grid(alpha=0.25)
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    return run("loss_curves", __doc__, PRESETS, measure, argv)


if __name__ == "__main__":
    main()
