"""The frozen copy's batch normalisation in evaluation: running statistics of its own, or those of the start.

    python experiments/batch_norm.py --preset cpu

f = (h − h₀)/γ in evaluation uses running statistics in h and in h₀. If θ₀ kept those of the start, (0, 1), h₀ would be
another function than the one that training subtracted, and f off by the difference, over γ. A small convolutional
network is trained on augmented digits; held-out accuracy is then measured with batch statistics in both (as in
training), with gammaopt's own in evaluation, and with the start's put back into θ₀.
Writes results/batch_norm/PRESET.json beside this file and prints one line for each γ.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from _sweep import parser, write
from torch import Tensor, nn

import gammaopt
from gammaopt.online import Digits
from gammaopt.online.streams import Batches

ROWS = ("batch statistics", "running statistics of h₀", "those of the start")


@dataclass(frozen=True)
class Preset:
    """How much to run."""

    gammas: tuple[float, ...] = (0.1, 1.0)
    width: int = 16
    steps: int = 300
    batch_size: int = 64
    lr: float = 0.1
    held_out: int = 1000
    seeds: int = 3


PRESETS = {"smoke": Preset(gammas=(0.1,), width=4, steps=40, held_out=200, seeds=1), "cpu": Preset()}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "batch_norm", PRESETS).parse_args(arguments)
    preset = PRESETS[options.preset]
    rows = [measure(preset, gamma) for gamma in preset.gammas]
    write(options.results, options.preset, {"rows": rows})
    print(f"| γ | {' | '.join(ROWS)} |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['gamma']:g} | " + " | ".join(f"{100 * row[name]:.1f} %" for name in ROWS) + " |")


def measure(preset: Preset, gamma: float) -> dict[str, float]:
    """Mean held-out accuracy over seeds, in each of the three ways."""
    found = [accuracies(preset, gamma, seed) for seed in range(preset.seeds)]
    return {"gamma": gamma, **{name: round(mean(each[name] for each in found), 4) for name in ROWS}}


def accuracies(preset: Preset, gamma: float, seed: int) -> dict[str, float]:
    """One network: trained, and then read in the three ways."""
    torch.manual_seed(seed)
    batches = Batches(Digits(), seed, preset.steps, preset.batch_size)
    model = gammaopt.wrap(network(preset.width), gamma, example_inputs=batches[0][0], loss="cross_entropy")
    start = copy.deepcopy(model.gammaopt_theta0)
    optimizer = gammaopt.SGD(model.parameters(), lr=preset.lr, momentum=0.9)
    for step in range(preset.steps):
        x, y = batches[step]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = (part[0] for part in Digits().batches(seed, 0, 1, preset.held_out, "held_out"))
    found = {ROWS[1]: accuracy(model.eval(), x, y)}
    buffers = zip(model.gammaopt_theta0.buffers(), start.buffers(), strict=True)  # type: ignore[union-attr]
    saved = copy.deepcopy(model.state_dict())
    for now, then in buffers:
        now.copy_(then)
    found[ROWS[2]] = accuracy(model, x, y)
    model.load_state_dict(saved)
    return {ROWS[0]: accuracy(model.train(), x, y), **found}


def network(width: int) -> nn.Module:
    """Two normalised convolutions and a readout, for images of (1, 12, 12)."""
    layers: list[nn.Module] = []
    for fan_in in (1, width):
        layers += [nn.Conv2d(fan_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * width, 10))


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images with the right class."""
    return float((model(x).argmax(-1) == y).float().mean())


if __name__ == "__main__":
    main()
