"""ResNet-18 with the stem for small images: one 3×3 convolution, no pooling, then four stages of residual blocks.

A stage halves the image and doubles the channels, but for the first. In mean-field form every convolution has
a = (C_in·9)^(-1/2), the readout 1/(8·width), and gains and biases of the norms are trained at N·η.
The norms undo the scale of all convolutions, so that the depth is 2, gains and readout, however many layers there are:
``effective_depth`` measures 2.00, and ``wrap`` uses γ^(2/L_eff) = γ^1. The stable edge on ``photos`` at width 4,
measured at γ = 1, 30 and 1,000 for three seeds, has slope 1.07 over all (95 %: 0.86 … 1.27), 1.30 from 1 to 30 and 0.84
from 30 to 1,000 (2026-11-26, ``experiments/architectures.py``).
Source: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016, section 4.2.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gammaopt._errors import at_least, one_of

Norm = Literal["batch", "group", "none"]
STAGES = 4


class BasicBlock(nn.Module):
    """x + (conv, norm, ReLU, conv, norm)(x), then ReLU; a 1×1 convolution on the shortcut where shapes differ."""

    def __init__(self, fan_in: int, width: int, stride: int, norm: Norm, running_stats: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = make_norm(norm, width, running_stats)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = make_norm(norm, width, running_stats)
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(fan_in, width, 1, stride, bias=False), make_norm(norm, width, running_stats)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, channels, height, width) to images."""
        branch = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(branch + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet with basic blocks for images of 32×32 or so: 18 weight layers at ``depth=2``.

    Args:
        shape: (channels, height, width) of one input; sides of at least 8.
        outputs: number of outputs.
        width: channels N of the stem and the first stage; the last stage has 8·N.
        depth: residual blocks in each of the four stages; 2 is ResNet-18.
        norm: ``"batch"``, ``"group"`` (groups of 8 channels, or one group if ``width`` is no multiple of 8) or
            ``"none"``.
        running_stats: let batch norm keep running statistics and use them in evaluation, as torch does by default.
            Without, it takes the statistics of the batch in evaluation too: then h and h₀ see the same ones, and many
            runs train as one stack (:func:`gammaopt.online.train_many`).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        outputs: int,
        *,
        width: int = 64,
        depth: int = 2,
        norm: Norm = "batch",
        running_stats: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"outputs": outputs, "width": width, "depth": depth}.items():
            at_least(name, value, 1)
        at_least("side of shape", min(shape[1:]), 8)
        one_of("norm", norm, get_args(Norm))
        self.conv = nn.Conv2d(shape[0], width, 3, padding=1, bias=False)
        self.norm = make_norm(norm, width, running_stats)
        blocks: list[nn.Module] = []
        fan_in = width
        for stage in range(STAGES):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(BasicBlock(fan_in, width * 2**stage, stride, norm, running_stats))
                fan_in = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.readout = nn.Linear(fan_in, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, channels, height, width) to outputs (n, outputs)."""
        x = self.blocks(F.relu(self.norm(self.conv(x))))
        return torch.as_tensor(self.readout(x.mean((-2, -1))))


def make_norm(norm: Norm, width: int, running_stats: bool) -> nn.Module:
    """The normalisation layer of that name for ``width`` channels."""
    if norm == "batch":
        return nn.BatchNorm2d(width, track_running_stats=running_stats)
    if norm == "group":
        return nn.GroupNorm(width // 8 if width % 8 == 0 else 1, width)
    return nn.Identity()
