"""What a step and a centred pass cost, against torch's own optimizer and the plain network.

    python experiments/benchmarks/step_cost.py --check --json step_cost.json

Bars: a step at most 1.05 × torch's, 1.02 × in the median over the table (up to 16 distinct multipliers); forward and
backward with a frozen copy at most 1.40 × the plain network's (it adds one forward), with a zero readout 1.02 ×.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial

import timm
import torch
import torchvision
from _paired import Row, argument_parser, compare, report
from torch import Tensor, nn

import gammaopt
from gammaopt._plan import Scale
from gammaopt.optim._multipliers import GroupScales

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": partial(torchvision.models.resnet18, num_classes=10),
    "vit_tiny": partial(timm.create_model, "vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=4),
}
KERNELS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}
OPTIMIZERS = {"SGD": {"momentum": 0.9}, "AdamW": {}}
MULTIPLIERS = (1, 16)


def main() -> None:
    options = argument_parser(__doc__).parse_args()
    torch.manual_seed(0)
    steps = [
        step_row(network, optimizer, kernel, count, options.seconds)
        for network in NETWORKS
        for optimizer in OPTIMIZERS
        for kernel in KERNELS
        for count in MULTIPLIERS
    ]
    ratio = statistics.median(row.ratio for row in steps)
    rows = [*steps, Row("step, median of the table", 0.0, 0.0, ratio, 1.02)]
    rows += [pass_row(name, center, options.seconds) for name in NETWORKS for center in ("copy", "zero_readout")]
    report(rows, options)


def step_row(network: str, optimizer: str, kernel: str, count: int, seconds: float) -> Row:
    """One optimizer step on a network with random gradients, ``count`` distinct multipliers.

    Both optimizers step the same parameters with the same states: where two copies lie in memory makes a difference
    of 3 % by itself.
    """
    net = gammaopt.wrap(NETWORKS[network](), 1.0, depth=2.0, center="none")
    for parameter in net.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    settings = {"lr": 1e-6, **OPTIMIZERS[optimizer], **KERNELS[kernel]}
    ours = getattr(gammaopt, optimizer)(net.parameters(), **settings)
    theirs = getattr(torch.optim, optimizer)(net.parameters(), **settings)
    theirs.step()
    ours.state = theirs.state
    scales = tuple(Scale(1.0 + 0.01 * (i % count)) for i in range(len(ours._scales[0].scales)))
    ours._scales = [GroupScales(scales, ours._scales[0].names)]
    name = f"step {network} {optimizer} {kernel}, {count} multipliers"
    return compare(name, ours.step, theirs.step, bar=1.05, seconds=seconds)


def pass_row(network: str, center: str, seconds: float) -> Row:
    """Forward and backward of a wrapped network against the plain one with the same parameters, batch 8."""
    images = torch.randn(8, 3, 32, 32)
    wrapped = NETWORKS[network]()
    plain = copy.copy(wrapped)
    gammaopt.wrap(wrapped, 1.0, depth=2.0, knee=1.0, example_inputs=images, center=center)  # type: ignore[arg-type]
    bar = 1.40 if center == "copy" else 1.02
    run = partial(forward_backward, images=images)
    # A pass takes 0.1 to 0.3 s, and two of the same differ by a tenth: the median of fewer pairs moves by 3 %.
    return compare(f"pass {network} {center}", partial(run, wrapped), partial(run, plain), bar=bar, seconds=8 * seconds)


def forward_backward(model: nn.Module, images: Tensor) -> None:
    model.zero_grad()
    model(images).square().mean().backward()


if __name__ == "__main__":
    main()
