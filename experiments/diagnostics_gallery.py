"""A gallery of the diagnostics' pictures, drawn from small real runs.

    python experiments/diagnostics_gallery.py --preset cpu

An MLP in mean-field form learns a staircase of parities by gradient descent (_descent.py): one run at γ = 0.01 whose
rate is large enough to catapult, one at γ = 1, and rich ones. Each panel is one function of ``gammaopt.report``.
Writes results/diagnostics_gallery/PRESET.png, PRESET-monitor.png and the numbers in PRESET.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _descent import STREAM, Descent, descend
from _sweep import parser, write
from matplotlib.figure import Figure
from torch import Tensor

from gammaopt.diagnostics import (
    Monitor,
    agreements,
    collapse,
    dynamics,
    hessian_eigenvalues,
    ntk_eigenvalues,
    spectral_density,
)
from gammaopt.online.record import six_digits
from gammaopt.report import (
    draw_agreement,
    draw_alignment,
    draw_collapse,
    draw_density,
    draw_dynamics,
    draw_edge,
    draw_monitor,
    draw_ntk,
    draw_spectrum,
)

FULL = ("sharpness", "ntk", "features")


@dataclass(frozen=True)
class Preset:
    """Width, samples, how many steps, and how many eigenvalues."""

    width: int = 64
    samples: int = 128
    steps: int = 400
    catapult_steps: int = 120
    k: int = 20
    probes: int = 4
    rich: tuple[float, ...] = (30.0, 100.0, 300.0)
    per_decade: int = 12  # steps measured at in each factor of 10


PRESETS = {
    "smoke": Preset(
        width=32, samples=64, steps=150, catapult_steps=60, k=6, probes=1, rich=(100.0, 300.0), per_decade=5
    ),
    "cpu": Preset(),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "diagnostics_gallery", PRESETS).parse_args(arguments)
    preset = PRESETS[options.preset]
    watched = {0.01: watch(preset, 0.01, 6.0, preset.catapult_steps), 1.0: watch(preset, 1.0, 0.4, preset.steps)}
    watched |= {gamma: watch(preset, gamma, 0.6, preset.steps) for gamma in preset.rich}
    figure, numbers = gallery(preset, watched)
    path = write(options.results, options.preset, numbers)
    figure.savefig(path.with_suffix(".png"), dpi=90)
    beside = Path(f"{path.with_suffix('')}-monitor.png")
    draw_monitor(watched[preset.rich[-2]]).savefig(beside, dpi=90)
    print(f"{path.with_suffix('.png')}\n{beside}")


def watch(preset: Preset, gamma: float, rate: float, steps: int, seed: int = 0) -> Monitor:
    """One run with a monitor along it."""
    each = preset.per_decade
    return descend(
        Descent(preset.width, preset.samples, gamma, rate, seed, steps=steps, measures=FULL, per_decade=each)
    )


def samples(preset: Preset) -> tuple[Tensor, Tensor]:
    """What the runs trained on."""
    x, y = STREAM.batches(0, 0, 1, preset.samples)
    return x[0].double(), y[0].double()


def gallery(preset: Preset, watched: dict[float, Monitor]) -> tuple[Figure, dict[str, Any]]:
    """The panels, and the numbers in them."""
    data, one = samples(preset), watched[1.0].model
    lazy, *rest = watched
    rich = rest[-1]
    names = {gamma: f"γ = {gamma:g}" for gamma in watched}
    chosen = preset.rich[-2]
    start = watch(preset, 1.0, 0.4, 0).model
    spectra = {
        label: hessian_eigenvalues(model, "mse", data, preset.k, "magnitude")
        for label, model in (("at the start", start), ("after training", one))
    }
    density = spectral_density(one, "mse", data, probes=preset.probes)
    kernels = {names[gamma]: ntk_eigenvalues(watched[gamma].model, data[0]) for gamma in (lazy, 1.0, rich)}
    held_out = STREAM.batches(0, 0, 1, 512, "held_out")[0][0].double()
    agreed = agreements({gamma: monitor.model for gamma, monitor in watched.items()}, held_out)
    records = {gamma: monitor.finish() for gamma, monitor in watched.items()}
    collapsed = collapse([records[gamma] for gamma in preset.rich])

    figure = Figure(figsize=(17, 13), layout="constrained")
    axes = figure.subplots(3, 3)
    draw_spectrum(spectra, axes[0, 0])
    axes[0, 0].set_title("Hessian, γ = 1: leading eigenvalues", fontsize=10)
    draw_density(density, axes[0, 1])
    axes[0, 1].set_title("Hessian, γ = 1: spectral density", fontsize=10)
    draw_ntk(kernels, axes[0, 2])
    axes[0, 2].set_title("NTK after training", fontsize=10)
    draw_alignment(watched[chosen], axes[1, 0])
    axes[1, 0].set_title(f"alignment in time, {names[chosen]}", fontsize=10)
    draw_edge({names[gamma]: watched[gamma] for gamma in watched}, axes[1, 1])
    axes[1, 1].set_title("sharpness × rate", fontsize=10)
    draw_agreement(agreed, axes[1, 2])
    axes[1, 2].set_title("agreement on held-out samples, by γ", fontsize=10)
    draw_dynamics(records[lazy], axes[2, 0])
    axes[2, 0].set_title(f"dynamics, {names[lazy]}: a catapult", fontsize=10)
    draw_dynamics(records[chosen], axes[2, 1])
    axes[2, 1].set_title(f"dynamics, {names[chosen]}: plateau and stairs", fontsize=10)
    draw_collapse(collapsed, [names[gamma] for gamma in preset.rich], axes[2, 2])
    return figure, {
        "eigenvalues": {label: [six_digits(float(v)) for v in found.values] for label, found in spectra.items()},
        "products": {label: found.products for label, found in spectra.items()},
        "dynamics": {names[gamma]: str(dynamics(record)) for gamma, record in records.items()},
        "cosine": {f"{a:g}, {b:g}": round(found.cosine, 4) for (a, b), found in agreed.items()},
        "collapse": {"spread": round(collapsed.spread, 4), "before": round(collapsed.before, 4)},
        "verdicts": {names[gamma]: monitor.verdict() for gamma, monitor in watched.items()},
    }


if __name__ == "__main__":
    main()
