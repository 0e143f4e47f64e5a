"""The picture of a phase portrait, and its exponents beside the predicted ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gammaopt._errors import UsageError
from gammaopt._fit import ALIVE, FEWEST, Interval, Of, critical_rates, fit_slopes
from gammaopt.diagnostics._portrait import Portrait, predicted_trained_edge

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

CHANCE_LOSS = 1.0  # relative to the loss of f = 0, the top of the scale
DIVERGED, HATCH = "#b5433a", "////"
DEAD, DEAD_HATCH, DARK = "#d9d4c5", "...", "#440154"  # light dots, for these cells are at the scales' dark end
EDGES = (("γ²", 2.0, ":"), ("γ", 1.0, "--"))


@dataclass(frozen=True)
class ExponentRow:
    """One exponent of a portrait: measured, with its 95 % interval, beside the predicted one.

    ``interval`` is ``None`` where there is one point for each of three γ: resampling them can't tell one.
    """

    budget: int
    what: str
    side: str
    predicted: float
    measured: float
    interval: Interval | None


def exponents(portrait: Portrait) -> list[ExponentRow]:
    """The slopes of the best rate and of the stable edge on both sides of the knee, for each budget.

    A side with fewer than three γ whose rate lies inside the grid gives no row.
    """
    rows = []
    law = portrait.law
    for budget in portrait.budgets:
        for of, what in (("best", "best rate"), ("edge", "stable edge")):
            rows += _rows(portrait, budget, of, what, law.knee)  # type: ignore[arg-type]
    return rows


def _rows(portrait: Portrait, budget: int, of: Of, what: str, knee: float) -> list[ExponentRow]:
    law = portrait.law
    try:
        slopes = fit_slopes(critical_rates(portrait.at(budget), of), bend=knee)
    except UsageError:
        return []
    varied = len(slopes.points) > FEWEST
    rows = []
    if slopes.lazy is not None and slopes.lazy_interval is not None:
        rows.append(ExponentRow(budget, what, "γ ≤ 1", law.lazy, slopes.lazy, slopes.lazy_interval if varied else None))
    if slopes.rich is not None and slopes.rich_interval is not None:
        rows.append(ExponentRow(budget, what, "γ ≥ 1", law.rich, slopes.rich, slopes.rich_interval if varied else None))
    return rows


def draw_portrait(portrait: Portrait) -> Figure:
    """Final loss and accuracy in the (γ, η) plane, a column for each budget.

    Diverged cells are hatched. Dotted ones lie above the stable edge too: the run blew up without a number overflowing,
    its units died, and it ends at about the loss of f = 0.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    classes = any(record.final_accuracy > 0 for record in portrait.records)
    planes = {budget: _planes(portrait, budget, classes) for budget in portrait.budgets}
    rows, columns = 2 if classes else 1, len(planes)
    figure = Figure(figsize=(1.2 + 4.4 * columns, 0.9 + 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    labels = ("log₁₀ held-out loss\nover that of f = 0", "held-out accuracy in %")
    for row, colours in enumerate(("viridis_r", "viridis")[:rows]):
        finite = np.concatenate([np.ravel(planes[budget][row]) for budget in planes])
        finite = finite[np.isfinite(finite)]
        span = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        for column, (budget, values) in enumerate(planes.items()):
            mesh = _draw_plane(axes[row, column], portrait, values[row], _dead(portrait, budget), colours, span)
            _edges(axes[row, column], portrait, budget)
        figure.colorbar(mesh, ax=axes[row, -1], label=labels[row])
        axes[row, 0].set_ylabel("learning rate η")
    for column, budget in enumerate(planes):
        axes[0, column].set_title(f"{budget:,} steps")
        axes[-1, column].set_xlabel("feature-learning strength γ")
    named = {}
    for axis in axes.flat:
        handles, names = axis.get_legend_handles_labels()
        named.update(dict(zip(names, handles, strict=True)))
    if any(record.diverged_at is not None for record in portrait.records):
        named["diverged"] = Patch(facecolor="none", edgecolor=DIVERGED, hatch=HATCH)
    if any(_dead(portrait, budget).any() for budget in planes):
        dots = Patch(facecolor=DARK, edgecolor=DEAD, hatch=DEAD_HATCH, linewidth=0.0)
        named["blew up: loss no better than f = 0"] = dots
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _planes(portrait: Portrait, budget: int, classes: bool) -> list[NDArray[np.float64]]:
    """(γ, rate) means over the seeds: loss in decades below that of f = 0, and accuracy; NaN where one diverged."""
    arrays = portrait.arrays(budget)
    loss = np.log10(np.clip(arrays["relative_loss"], 1e-12, CHANCE_LOSS)).mean(-1)
    accuracy = 100 * np.where(arrays["diverged"] > 0, np.nan, arrays["accuracy"]).mean(-1)
    return [loss, accuracy] if classes else [loss]


def _dead(portrait: Portrait, budget: int) -> NDArray[np.bool_]:
    """(γ, rate) cells that ended without a number overflowing, at a rate above the largest stable one."""
    losses = portrait.arrays(budget)["relative_loss"].mean(-1)
    rates = np.asarray(portrait.grid.rates)
    largest = np.where(losses < ALIVE, rates, -math.inf).max(1, keepdims=True)
    dead: NDArray[np.bool_] = np.isfinite(losses) & np.isfinite(largest) & (rates > largest)
    return dead


def _corners(values: Sequence[float]) -> NDArray[np.float64]:
    """Cell borders half-way, in log, between neighbours."""
    logs: NDArray[np.float64] = np.log(values)
    middle = (logs[1:] + logs[:-1]) / 2 if len(logs) > 1 else logs + 0.5
    borders: NDArray[np.float64] = np.concatenate([[2 * logs[0] - middle[0]], middle, [2 * logs[-1] - middle[-1]]])
    return np.exp(borders if len(logs) > 1 else np.array([logs[0] - 0.5, logs[0] + 0.5]))


def _draw_plane(
    axes: Axes,
    portrait: Portrait,
    values: NDArray[np.float64],
    dead: NDArray[np.bool_],
    colours: str,
    span: tuple[float, float],
) -> QuadMesh:
    from matplotlib.collections import PolyCollection

    grid, law = portrait.grid, portrait.law
    x, c = _corners(grid.gammas), _corners(grid.rates)
    scale = np.array([law.factor(gamma) for gamma in x]) if grid.unit == "law" else np.ones(len(x))
    eta = scale[:, None] * c[None, :]
    gammas = np.broadcast_to(x[:, None], eta.shape)
    mesh = axes.pcolormesh(
        gammas, eta, np.ma.masked_invalid(values), cmap=colours, vmin=span[0], vmax=span[1], rasterized=True
    )
    corner = np.stack([gammas, eta], axis=-1)
    for marked, colour, hatch in ((np.isnan(values), DIVERGED, HATCH), (dead, DEAD, DEAD_HATCH)):
        cells = [
            [corner[i, j], corner[i, j + 1], corner[i + 1, j + 1], corner[i + 1, j]] for i, j in np.argwhere(marked)
        ]
        axes.add_collection(
            PolyCollection(cells, facecolor="none", edgecolor=colour, hatch=hatch, linewidth=0.0), autolim=False
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    return mesh


def _edges(axes: Axes, portrait: Portrait, budget: int) -> None:
    """The predicted edges, each through the one measured nearest γ = 1."""
    law = portrait.law
    low, high = min(portrait.grid.gammas), max(portrait.grid.gammas)
    upper = _anchor({p.gamma: p.lr for p in critical_rates(portrait.at(budget), "edge")})
    if upper is not None:
        gamma, eta = upper
        lazy = np.geomspace(low, min(gamma, high), 50)
        if low < gamma:
            for name, power, dash in EDGES:
                axes.plot(lazy, eta * (lazy / gamma) ** power, "k" + dash, lw=1.2, label=f"stable edge ∝ {name}")
        rich = np.geomspace(max(gamma, low), high, 50)
        if gamma < high:
            rising = f"γ^({'2' if law.optimizer == 'sgd' else '1'}/{law.depth:.3g})"
            axes.plot(rich, eta * (rich / gamma) ** law.rich, "k-", lw=1.2, label=f"stable edge ∝ {rising}")
    lower = _anchor(portrait.trained_edge(budget))
    if lower is not None:
        gamma, eta = lower
        every = np.geomspace(low, high, 100)
        relative = np.array([predicted_trained_edge(law, g) for g in every]) / predicted_trained_edge(law, gamma)
        axes.plot(every, eta * relative, "w-", lw=1.6)
        axes.plot(every, eta * relative, color="#2f6690", lw=1.0, label="not trained yet below")


def _anchor(edges: dict[float, float]) -> tuple[float, float] | None:
    if not edges:
        return None
    gamma = min(edges, key=lambda g: abs(math.log(g)))
    return gamma, edges[gamma]
