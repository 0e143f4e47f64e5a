"""Sparse parity: the product of a few of many bits, a target with no slope to follow until its features are learned.

    y = [x₁x₂⋯x_k > 0],    x uniform on {−1, +1}^bits

Source: Barak, Edelman, Goel, Kakade, Malach, Zhang, "Hidden progress in deep learning: SGD learns parities near the
computational limit", NeurIPS 2022 (arXiv 2207.08799).
"""

from __future__ import annotations

from torch import Tensor

from gammaopt._errors import UsageError, at_least
from gammaopt.online.streams import _random
from gammaopt.online.streams._base import Generated, Split


class Parity(Generated):
    """Infinite stream of ±1 vectors (float32) and int64 classes: 1 where the first ``degree`` bits multiply to +1.

    Training and held-out samples come from the same distribution with independent draws, so of 2^``bits`` patterns the
    same one may come again, and in both splits: often where there are few.

    Args:
        bits: length of the input, ≥ 1.
        degree: number k of bits that matter, 1 … ``bits``. A larger one is harder.

    Raises:
        UsageError: for sizes out of range.

    Example:
        >>> x, y = Parity(bits=20, degree=3).batches(seed=0, start=0, stop=2, size=4)
        >>> bool(((x[..., :3].prod(-1) > 0) == y.bool()).all())
        True
    """

    classes = 2

    def __init__(self, bits: int = 20, degree: int = 3) -> None:
        at_least("bits", bits, 1)
        if not at_least("degree", degree, 1) <= bits:
            raise UsageError(f"degree={degree} is more than bits={bits}; give at most {bits}")
        self.name = f"parity-{bits}-{degree}"
        self.shape: tuple[int, ...] = (bits,)
        self.degree = degree

    def batches(self, seed: int, start: int, stop: int, size: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        """See :class:`Stream`."""
        keys = _random.keys(seed, start, stop, split, self.device)
        bits = _random.bits(keys, size * self.shape[0]).view(-1, size, *self.shape)
        minus = self.degree - bits[..., : self.degree].sum(-1)
        return 2.0 * bits - 1.0, 1 - minus % 2
