r"""Vision transformer for small images: patches of 4×4 pixels, pre-LayerNorm blocks, mean over tokens, readout.

    x ← x + proj(attention(norm₁(x))),    x ← x + down(GELU(up(norm₂(x))))

Width grows by heads of a fixed size, so attention's 1/√(head size) is the same at every width, as mean-field form
needs it. Attention is written out: torch's fused kernels have no second derivative, and sharpness needs one.

The last norm undoes the scale of the stream before it, so that the depth is no number of blocks: with two blocks of
width 32 in mean-field form ``effective_depth`` measures 1.7 to 2.3 at initialisation, 2.05 in the mean. ``wrap`` uses
the one of its network: s(γ) = γ^(2/L) at γ = 1,000 is 370 to 3,000, 8 × apart between seeds. So give ``depth=2``, gains
and readout, which is γ^1 for each seed. The stable edge on ``photos``, measured at γ = 1, 30 and 1,000, has slope 0.93
over all (95 %: 0.80 … 1.06) but is no such power: 1.32 from 1 to 30 and 0.56 from 30 to 1,000 (2026-11-26,
``experiments/architectures.py``).
Source: Dosovitskiy et al., "An image is worth 16×16 words", ICLR 2021.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gammaopt._errors import UsageError, at_least

TOKEN_STD = 0.02


class Attention(nn.Module):
    """Softmax attention of all tokens on all tokens, in heads of ``head_size`` features."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, tokens, width) to tokens."""
        heads = self.qkv(x).unflatten(-1, (3, -1, self.head_size))  # n, tokens, 3, heads, head size
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-2, -1) / self.head_size**0.5, -1)
        return torch.as_tensor(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Attention and a two-layer network four times as wide, each on a normalised copy of the stream."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, head_size)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, tokens, width) to tokens."""
        x = x + self.attention(self.norm1(x))
        return x + torch.as_tensor(self.down(F.gelu(self.up(self.norm2(x)))))


class ViT(nn.Module):
    """Vision transformer.

    Args:
        shape: (channels, height, width) of one input; sides divisible by ``patch``.
        outputs: number of outputs.
        width: features N of a token, divisible by ``head_size``.
        depth: number of blocks.
        patch: side of a patch, in pixels.
        head_size: features of one attention head, at every width.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        outputs: int,
        *,
        width: int = 192,
        depth: int = 6,
        patch: int = 4,
        head_size: int = 16,
    ) -> None:
        super().__init__()
        for name, value in {"outputs": outputs, "width": width, "depth": depth, "patch": patch}.items():
            at_least(name, value, 1)
        if width % at_least("head_size", head_size, 1):
            raise UsageError(f"width={width} is no multiple of head_size={head_size}; change one of them")
        channels, *size = shape
        if any(side % patch for side in size):
            raise UsageError(
                f"shape={shape} can't be cut into patches of {patch}×{patch}; give a patch that divides it"
            )
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.pos_embed = nn.Parameter(TOKEN_STD * torch.randn(size[0] // patch * (size[1] // patch), width))
        self.blocks = nn.Sequential(*(Block(width, head_size) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, channels, height, width) to outputs (n, outputs)."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        return torch.as_tensor(self.readout(self.norm(self.blocks(tokens)).mean(1)))
