"""Staircase of parities: a target learned in steps, each monomial a stepping stone to the next.

    y = (x₁ + x₁x₂ + x₁x₂x₃ + … + x₁⋯x_k) / √k,    x uniform on {−1, +1}^bits,    so Var y = 1

Source: Abbe, Boix-Adsera, Brennan, Bresler, Nagaraj, "The staircase property", NeurIPS 2021 (arXiv 2108.10573).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gammaopt._errors import UsageError, at_least
from gammaopt.online.streams import _random
from gammaopt.online.streams._base import Generated, Split


class Staircase(Generated):
    """Infinite stream of ±1 vectors (float32) and one float target with mean 0 and variance 1.

    Training and held-out samples come from the same distribution with independent draws; few bits repeat, see
    :class:`Parity`.

    Args:
        bits: length of the input, ≥ 1.
        terms: number k of monomials, 1 … ``bits``.
    """

    classes = 0

    def __init__(self, bits: int = 32, terms: int = 4) -> None:
        at_least("bits", bits, 1)
        if not at_least("terms", terms, 1) <= bits:
            raise UsageError(f"terms={terms} is more than bits={bits}; give at most {bits}")
        self.name = f"staircase-{bits}-{terms}"
        self.shape: tuple[int, ...] = (bits,)
        self.terms = terms

    def batches(self, seed: int, start: int, stop: int, size: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        """See :class:`Stream`."""
        keys = _random.keys(seed, start, stop, split, self.device)
        inputs = 2.0 * _random.bits(keys, size * self.shape[0]).view(-1, size, *self.shape) - 1.0
        monomials = torch.cumprod(inputs[..., : self.terms], dim=-1)
        return inputs, monomials.sum(-1) / self.terms**0.5
