"""A picture for each diagnostic: spectra, kernels in time, agreement, the dynamics of a loss and a monitored run.

Each function draws what the diagnostic of that name returned, on ``axes`` if given, else on a figure of its own, and
returns the figure: ``draw_spectrum(found).savefig("spectrum.png")``. Colours of several curves go from dark to light in
the order given, so that γ in ascending order reads as a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from gammaopt._errors import UsageError, one_of, positive
from gammaopt.diagnostics._agreement import Agreement
from gammaopt.diagnostics._dynamics import Collapse, Dynamics, dynamics, relative_curve
from gammaopt.diagnostics._monitor import EDGE, Measurement, Monitor
from gammaopt.diagnostics._spectrum import Eigenvalues, SpectralDensity
from gammaopt.report._figures import FAINT, ONE, SIZE, TUNED, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Of = Literal["cosine", "labels", "distance"]
Measurements = Monitor | Sequence[Measurement]
Item = TypeVar("Item")

EDGE_OF_STABILITY = 2.0
TITLE_CHARACTERS = 90  # of a line above a page of panels
SHOWN_DECADES = 7  # of a density below its peak, and of kernel eigenvalues, float64 noise lying deeper, twice as many
OF_TITLES = {"cosine": "cosine of f", "labels": "share of equal labels", "distance": "distance of f"}
KERNEL_LINES = (
    ("alignment", "NTK with the targets", TUNED, "-"),
    ("feature_alignment", "features with the targets", TUNED, "--"),
    ("kernel_kept", "NTK with that of the start", ONE, "-"),
)


def draw_spectrum(found: Eigenvalues | Mapping[str, Eigenvalues], axes: Axes | None = None) -> Figure:
    r"""The leading eigenvalues by rank, those below 0 as open marks at \|λ\|, with their Ritz residuals as bars.

    Args:
        found: of :func:`gammaopt.diagnostics.hessian_eigenvalues`, or several by label.
        axes: to draw on.
    """
    figure, axes = _on(axes)
    named = _named(found)
    for colour, (label, each) in zip(_colours(len(named)), named.items(), strict=True):
        rank = np.arange(1, len(each.values) + 1)
        size = np.abs(each.values)
        bars = np.minimum(each.residuals, 0.9 * size), each.residuals  # none leaves a log axis below
        axes.errorbar(rank, size, yerr=bars, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
        axes.plot(rank, size, color=colour, lw=0.8, alpha=0.5)
        for chosen, face in ((each.values > 0, colour), (each.values < 0, "white")):
            axes.plot(rank[chosen], size[chosen], "o", ms=5, mfc=face, mec=colour, ls="none")
        axes.plot([], [], "o-", ms=5, color=colour, label=label or "λ > 0")
    if any((each.values < 0).any() for each in named.values()):
        axes.plot([], [], "o", ms=5, mfc="white", mec=FAINT, ls="none", label="λ < 0")
    axes.set_yscale("log")
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("rank")
    axes.set_ylabel("eigenvalue |λ|")
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_density(found: SpectralDensity, axes: Axes | None = None, *, width: float | None = None) -> Figure:
    """The density of eigenvalues on a log axis, where single outliers show beside the bulk.

    Args:
        found: of :func:`gammaopt.diagnostics.spectral_density`.
        axes: to draw on.
        width: standard deviation of the Gaussian that each node becomes, in units of λ; 1/200 of the range by default.
    """
    figure, axes = _on(axes)
    low, high = float(found.nodes.min()), float(found.nodes.max())
    width = positive("width", ((high - low) / 200 or 1.0) if width is None else width)
    grid = np.linspace(low - 5 * width, high + 5 * width, 2000)
    density = found.smoothed(grid, width)
    bottom = float(density.max()) / 10**SHOWN_DECADES
    axes.fill_between(grid, np.maximum(density, bottom), bottom, color=ONE, alpha=0.25, lw=0)
    axes.plot(grid, np.maximum(density, bottom), color=ONE, lw=1.2)
    axes.axvline(0, color=FAINT, lw=0.8)
    axes.set_yscale("log")
    axes.set_ylim(bottom=bottom)
    axes.set_xlabel("eigenvalue λ")
    axes.set_ylabel("density")
    return figure


def draw_ntk(values: Any, axes: Axes | None = None) -> Figure:
    """Eigenvalues of an NTK by rank, on log axes; what is 0 up to rounding is left out.

    Args:
        values: (n,) of :func:`gammaopt.diagnostics.ntk_eigenvalues`, or several by label.
        axes: to draw on.
    """
    figure, axes = _on(axes)
    named = _named(values)
    for colour, (label, each) in zip(_colours(len(named)), named.items(), strict=True):
        size = np.asarray(getattr(each, "cpu", lambda each=each: each)(), dtype=float)
        shown = size > size.max(initial=0.0) / 10 ** (2 * SHOWN_DECADES)
        axes.plot(np.arange(1, len(size) + 1)[shown], size[shown], ".-", color=colour, lw=1, ms=4, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("rank")
    axes.set_ylabel("eigenvalue of the NTK")
    if any(named):
        axes.legend(frameon=False, fontsize=8)
    return figure


def draw_alignment(measured: Measurements, axes: Axes | None = None) -> Figure:
    """Kernels along a run: alignment with the targets and with the first kernel, beside the loss.

    In silent alignment the solid line rises while the grey one, the loss over its start, is still on its plateau.

    Args:
        measured: a :class:`gammaopt.diagnostics.Monitor`, or its measurements.
        axes: to draw on.

    Raises:
        UsageError: if no kernel was measured.
    """
    figure, axes = _on(axes)
    every = _measurements(measured)
    drawn, lowest = 0, -0.02
    for name, label, colour, dash in KERNEL_LINES:
        steps, values = _series(every, name)
        if len(steps):
            drawn, lowest = drawn + 1, min([lowest, *values])
            axes.plot(steps, values, dash, color=colour, lw=1.6, marker=".", ms=4, label=label)
    if not drawn:
        raise UsageError("no kernel was measured; give the monitor measures=('ntk',) or ('features',)")
    steps, loss = _series(every, "loss")
    axes.plot(steps, np.minimum(loss / loss[0], 1.25), color=FAINT, lw=1.4, label="loss over its start")
    _steps_from_zero(axes, every)
    axes.set_ylabel("centred alignment")
    axes.set_ylim(bottom=lowest, top=1.3)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
    return figure


def draw_edge(measured: Measurements | Mapping[str, Measurements], axes: Axes | None = None) -> Figure:
    """Sharpness × rate along one or several runs, against the edge of stability at 2.

    Args:
        measured: a monitor, or its measurements, or several by label.
        axes: to draw on.

    Raises:
        UsageError: if it was not measured, as for optimizers other than SGD.

    Example:
        >>> run = [Measurement(step, 0.1, loss=1.0, sharpness_lr=0.2 * step) for step in (0, 1, 3, 10)]
        >>> [str(line.get_label()) for line in draw_edge({"γ = 3": run}).axes[0].lines]
        ['γ = 3', 'edge of stability']
    """
    figure, axes = _on(axes)
    several: dict[str, Measurements] = _named(measured)
    named = {label: _measurements(each) for label, each in several.items()}
    for colour, (label, each) in zip(_colours(len(named)), named.items(), strict=True):
        steps, values = _series(each, "sharpness_lr")
        if not len(steps):
            raise UsageError("sharpness × rate was not measured; it takes SGD, and measures=('sharpness',)")
        axes.plot(steps, values, color=colour, lw=1.6, marker=".", ms=4, label=label or "sharpness × rate")
    axes.axhspan(*EDGE, color=FAINT, alpha=0.2, lw=0)
    axes.axhline(EDGE_OF_STABILITY, color="#444444", lw=1, ls="--", label="edge of stability")
    _steps_from_zero(axes, [one for each in named.values() for one in each])
    axes.set_ylabel("sharpness × learning rate")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_agreement(
    pairs: Mapping[tuple[Any, Any], Agreement], axes: Axes | None = None, *, of: Of = "cosine"
) -> Figure:
    """How far each pair of models agrees, as a matrix.

    Args:
        pairs: of :func:`gammaopt.diagnostics.agreements`.
        axes: to draw on.
        of: ``"cosine"``, ``"labels"`` or ``"distance"``.
    """
    one_of("of", of, get_args(Of))
    figure, axes = _on(axes)
    keys = list(dict.fromkeys(key for pair in pairs for key in pair))
    own = 0.0 if of == "distance" else 1.0
    matrix = np.full((len(keys), len(keys)), own)
    for (a, b), found in pairs.items():
        i, j = keys.index(a), keys.index(b)
        matrix[i, j] = matrix[j, i] = getattr(found, of)
    finite = matrix[np.isfinite(matrix)]
    low, high = (0.0, float(finite.max()) or 1.0) if of == "distance" else (min(0.0, float(finite.min())), 1.0)
    image = axes.imshow(matrix, cmap="viridis_r" if of == "distance" else "viridis", vmin=low, vmax=high)
    for i, j in np.ndindex(*matrix.shape):
        bright = (matrix[i, j] - low) / (high - low) > 0.6
        dark_ink = bright != (of == "distance")
        axes.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=8, color="k" if dark_ink else "w")
    labels = [f"{key:g}" if isinstance(key, float) else str(key) for key in keys]
    axes.set_xticks(range(len(keys)), labels)
    axes.set_yticks(range(len(keys)), labels)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=OF_TITLES[of])
    return figure


def draw_dynamics(
    curve: Any, axes: Axes | None = None, *, found: Dynamics | None = None, start: float | None = None
) -> Figure:
    """A loss curve with its plateau shaded, its drops numbered by size, its catapult and its divergence marked.

    Args:
        curve: as for :func:`gammaopt.diagnostics.dynamics`.
        axes: to draw on.
        found: what was read in the curve; :func:`gammaopt.diagnostics.dynamics` of it by default.
        start: ℓ(0), as for it.

    Example:
        >>> draw_dynamics(([1, 10, 100, 1000], [1.0, 1.0, 0.1, 0.1])).axes[0].get_ylabel()
        'loss over its start'
    """
    figure, axes = _on(axes)
    found = dynamics(curve, start=start) if found is None else found
    steps, relative = relative_curve(curve, start=start)
    shown = np.isfinite(relative) & (relative > 0)
    axes.plot(steps[shown], relative[shown], color=ONE, lw=1.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(1, color=FAINT, lw=0.8)
    if found.diverged_at is None:
        end = steps[-1] if found.plateau is None else found.plateau
        what = "plateau" if found.catapult is None else "until it stays below its start"
        axes.axvspan(steps[0], end, color=FAINT, alpha=0.18, lw=0, label=f"{what}, {end:.3g} steps")
    else:
        axes.axvline(found.diverged_at, color=TUNED, lw=1.4, label=f"diverged at step {found.diverged_at:g}")
    if found.catapult is not None:
        peak = found.catapult
        axes.plot(
            [peak.step], [peak.height], "^", color=TUNED, ms=8, label=f"catapult to {peak.height:.3g} × the start"
        )
    for i, drop in enumerate(found.drops):
        label = "drops, in shares of the start" if i == 0 else "_"  # one entry of the legend for all
        axes.vlines(drop.step, max(drop.after, relative[shown].min()), drop.before, color=TUNED, lw=2.2, label=label)
        middle = float(np.sqrt(max(drop.after, relative[shown].min()) * drop.before))
        axes.annotate(
            f"{drop.size:.0%}", (drop.step, middle), xytext=(5, 0), textcoords="offset points", fontsize=8, color=TUNED
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss over its start")
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def draw_collapse(found: Collapse, labels: Sequence[str] = (), axes: Axes | None = None) -> Figure:
    """Several curves in rescaled time, with the spread between them in the title.

    Args:
        found: of :func:`gammaopt.diagnostics.collapse`.
        labels: of the curves, in their order.
        axes: to draw on.
    """
    if labels and len(labels) != len(found.curves):
        raise UsageError(f"{len(labels)} labels for {len(found.curves)} curves; give one for each")
    figure, axes = _on(axes)
    for i, (colour, row) in enumerate(zip(_colours(len(found.curves)), found.curves, strict=True)):
        axes.plot(found.times, row, color=colour, lw=1.6, label=labels[i] if labels else None)
    axes.set_xscale("log")
    axes.set_xlabel("rescaled time")
    axes.set_ylabel("loss over its start")
    axes.set_title(f"spread {found.spread:.2f}, in steps {found.before:.2f}", fontsize=9)
    if labels:
        axes.legend(frameon=False, fontsize=8)
    return figure


def draw_monitor(measured: Measurements) -> Figure:
    """A monitored run on one page: the loss, the edge of stability and the kernels, as far as they were measured.

    Args:
        measured: a monitor, whose verdict becomes the title, or its measurements.
    """
    from matplotlib.figure import Figure

    every = _measurements(measured)
    panels: list[Callable[[Axes], object]] = [lambda axes: _draw_loss(axes, every)]
    if len(_series(every, "sharpness_lr")[0]):
        panels.append(lambda axes: draw_edge(every, axes))
    if any(len(_series(every, name)[0]) for name, *_ in KERNEL_LINES):
        panels.append(lambda axes: draw_alignment(every, axes))
    figure = Figure(figsize=(SIZE[0], 0.5 + 2.4 * len(panels)), layout="constrained")
    every_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, draw in zip(every_axes, panels, strict=True):
        draw(axes)
    for axes in every_axes[:-1]:
        axes.set_xlabel("")
    if isinstance(measured, Monitor):
        figure.suptitle("\n".join(wrap(measured.verdict(), TITLE_CHARACTERS)), fontsize=9)
    return figure


def _draw_loss(axes: Axes, every: Sequence[Measurement]) -> None:
    plain(axes)
    steps, loss = _series(every, "loss")
    axes.plot(steps, loss, color=ONE, lw=1.6, marker=".", ms=4)
    if (loss > 0).all():
        axes.set_yscale("log")
    axes.set_ylabel("loss")
    _steps_from_zero(axes, every)
    steps, accuracy = _series(every, "accuracy")
    if len(steps):
        beside = axes.twinx()
        beside.plot(steps, 100 * accuracy, color=TUNED, lw=1.4, marker=".", ms=4)
        beside.set_ylim(0, 105)
        beside.set_ylabel("accuracy in %", color=TUNED)
        beside.spines[["top", "left"]].set_visible(False)


def _on(axes: Axes | None) -> tuple[Figure, Axes]:
    if axes is None:
        return new_figure()
    return axes.figure, plain(axes)  # type: ignore[return-value]


def _named(found: Item | Mapping[str, Item]) -> dict[str, Item]:
    named = {str(key): value for key, value in found.items()} if isinstance(found, Mapping) else {"": found}
    if not named:
        raise UsageError("there is nothing to draw; give at least one")
    return named


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [ONE] if count == 1 else list(colormaps["viridis"](np.linspace(0.0, 0.85, count)))


def _measurements(measured: Measurements) -> list[Measurement]:
    every = list(measured.measurements if isinstance(measured, Monitor) else measured)
    if not every:
        raise UsageError("there is no measurement to draw; give at least one")
    return every


def _series(every: Sequence[Measurement], name: str) -> tuple[Array, Array]:
    """Steps and values of one number, where it was measured and is finite."""
    pairs = [(one.step, getattr(one, name)) for one in every if getattr(one, name) is not None]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    good = np.isfinite(values)
    return steps[good], values[good]


def _steps_from_zero(axes: Axes, every: Sequence[Measurement]) -> None:
    """A log axis of steps with room for step 0."""
    last = max(one.step for one in every)
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.4)
    axes.set_xlim(-0.1, max(1.0, 1.15 * last))
    axes.set_xticks([0, *(10**k for k in range(len(str(last))) if 10**k <= 1.15 * last)])
    axes.set_xlabel("step")
