r"""Hermite targets: single- and multi-index functions of a Gaussian input, learned one direction after another.

    y = (1/√M)·Σ_m Π_i h_{m_i}(z_i),    z_i = ⟨u_i, x⟩,    x ~ N(0, 1)^inputs,    u_i orthonormal

h_n = He_n/√n! are the Hermite polynomials that are orthonormal under a normal z, so Var y = 1. The lowest degree of a
single-index target is its information exponent; a multi-index one such as z₁ + z₁z₂ + z₁z₂z₃ is a staircase.
Source: Ben Arous, Gheissari, Jagannath, "Online stochastic gradient descent on non-convex losses from high-dimensional
inference", JMLR 2021; Abbe, Boix-Adsera, Misiakiewicz, "SGD learning on neural networks: leap complexity and
saddle-to-saddle dynamics", COLT 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from gammaopt._errors import UsageError, at_least
from gammaopt.online.streams import _random
from gammaopt.online.streams._base import Generated, Split, with_knobs


class Hermite(Generated):
    """Infinite stream of normal vectors (float32) and one float target with mean 0 and variance 1, or its sign.

    Training and held-out samples come from the same distribution with independent draws; the directions are the same
    for every seed.

    Args:
        inputs: length of the input, ≥ 1.
        monomials: the degrees m_i of each: ``((2,),)`` is the single-index h₂(z₁), ``((1,), (1, 1), (1, 1, 1))`` the
            multi-index (z₁ + z₁z₂ + z₁z₂z₃)/√3.
        draw: which random directions u_i.
        classes: 0 for y itself; 2 for int64 classes, 1 where y > 0: what a run's accuracy needs.

    Raises:
        UsageError: for sizes out of range, monomials that are constant or equal, or other ``classes``.

    Example:
        >>> x, y = Hermite(16, ((1,), (1, 1))).batches(seed=0, start=0, stop=2, size=4)
        >>> x.shape, y.shape
        (torch.Size([2, 4, 16]), torch.Size([2, 4]))
    """

    def __init__(
        self, inputs: int = 32, monomials: Sequence[Sequence[int]] = ((2,),), *, draw: int = 0, classes: int = 0
    ) -> None:
        at_least("inputs", inputs, 1)
        if classes not in (0, 2):
            raise UsageError(f"classes={classes} must be 0 for the target itself, or 2 for its sign")
        self.classes = classes
        if not isinstance(monomials, Sequence) or not all(isinstance(monomial, Sequence) for monomial in monomials):
            raise UsageError(
                f"monomials={monomials!r} must be lists of degrees, one for each; give e.g. ((2,), (1, 1))"
            )
        self.monomials = tuple(_trimmed(monomial) for monomial in monomials)
        if not self.monomials or len(set(self.monomials)) < len(self.monomials):
            raise UsageError(f"monomials={monomials} must be one or more, all different")
        directions = max(map(len, self.monomials))
        if directions > inputs:
            raise UsageError(f"monomials={monomials} has {directions} directions, more than inputs={inputs}")
        self.name = f"hermite-{inputs}-" + "+".join(".".join(map(str, monomial)) for monomial in self.monomials)
        self.name = with_knobs(self.name + ("-sign" if classes else ""), draw=(draw, 0))
        self.shape: tuple[int, ...] = (inputs,)
        self.directions = _orthonormal(inputs, directions, draw)

    def to(self, device: torch.device | str) -> Self:
        """The same stream, with its samples made on ``device``."""
        twin = super().to(device)
        twin.directions = self.directions.to(device)
        return twin

    def batches(self, seed: int, start: int, stop: int, size: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        """See :class:`Stream`."""
        keys = _random.keys(seed, start, stop, split, self.device)
        inputs = _random.normals(keys, size * self.shape[0]).view(-1, size, *self.shape)
        # In float64, rounded once: the same float32 target on every machine.
        values = polynomials(inputs.double() @ self.directions, max(map(max, self.monomials)))
        total = torch.zeros(inputs.shape[:-1], dtype=torch.float64, device=self.device)
        for monomial in self.monomials:
            product = torch.ones_like(total)
            for direction, degree in enumerate(monomial):
                product *= values[degree][..., direction]
            total += product
        targets = (total / len(self.monomials) ** 0.5).float()
        return inputs, (targets > 0).long() if self.classes else targets


def polynomials(z: Tensor, highest: int) -> list[Tensor]:
    """h₀(z) … h_highest(z), by √(n+1)·h_{n+1} = z·h_n − √n·h_{n−1}."""
    made = [torch.ones_like(z), z]
    for n in range(1, highest):
        made.append((z * made[n] - n**0.5 * made[n - 1]) / (n + 1) ** 0.5)
    return made


def _trimmed(monomial: Sequence[int]) -> tuple[int, ...]:
    """The degrees without zeros at the end, at least one of them."""
    degrees = [at_least("degree of a monomial", degree, 0) for degree in monomial]
    while degrees and not degrees[-1]:
        degrees.pop()
    if not degrees:
        raise UsageError(f"monomial {tuple(monomial)} is constant; give it a degree >= 1")
    return tuple(degrees)


def _orthonormal(inputs: int, directions: int, draw: int) -> Tensor:
    """Random orthonormal columns (inputs, directions), float64; the sign of R's diagonal makes them unique."""
    key = torch.tensor([_random.key("hermite", draw)])
    q, r = torch.linalg.qr(_random.normals(key, inputs * directions).view(inputs, directions).double())
    return torch.as_tensor(q * r.diagonal().sign())
