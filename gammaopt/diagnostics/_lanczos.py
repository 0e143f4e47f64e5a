r"""Lanczos with full reorthogonalisation, for a symmetric matrix of which only products are known.

Multiplied basis vectors P and pending ones Z, all orthonormal, satisfy exactly

    H P = P T + Z F        Ritz pairs: T s = θ s, v = P s, residual ‖H v − θ v‖ = ‖F s‖

A product turns the first pending vector into a multiplied one and leaves what is new of it as the last pending one; so
the number of vectors pending is the block size, and a fresh random vector may join at any time. It does when all
wanted pairs look converged, and the next products are its own: copies of an eigenvalue that one Krylov space can't see
show up then, move the Ritz values by more than their errors, and let another one join. Until then all products go into
one Krylov space, because two that take turns are each of half the degree. A full basis is
restarted from its best Ritz vectors ("thick restart"), which keeps the relation above.

Sources: Wu and Simon, SIAM J. Matrix Anal. Appl. 2000 (thick restart); Bai, Demmel et al., "Templates for the Solution
of Algebraic Eigenvalue Problems", 2000 (band Lanczos).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Which = Literal["largest", "magnitude"]
Array = NDArray[np.float64]

EVERY = 2  # products between two looks at the Ritz values
SECOND_LOOK = 5  # products of a fresh vector's own, before convergence is believed


@dataclass(frozen=True)
class Ritz:
    """Wanted Ritz pairs, in order: values (k,), residual norms (k,), estimated errors (k,), vectors (n, k)."""

    values: Array
    residuals: Array
    errors: Array
    vectors: Tensor | None


class Krylov:
    """The growing basis, on the device of ``start``.

    Args:
        multiply: v (n,) → H v (n,).
        start: (p, n) first vectors; p is the block size.
        capacity: vectors that the basis may hold.
        generator: for the fresh vectors.
    """

    def __init__(
        self, multiply: Callable[[Tensor], Tensor], start: Tensor, capacity: int, generator: torch.Generator
    ) -> None:
        self._multiply, self._generator = multiply, generator
        self.capacity = min(capacity, start.shape[1])
        self._basis = torch.empty(self.capacity, start.shape[1], dtype=start.dtype, device=start.device)
        self._matrix = np.zeros((self.capacity, self.capacity))  # column j: H q_j in the basis
        self.count, self.done = 0, 0  # vectors in the basis, and how many of them were multiplied
        self._scale = 0.0
        for vector in start:
            self._join(vector)

    @property
    def full(self) -> bool:
        """Whether the next product's new direction would find no room."""
        return self.count >= self.capacity

    @property
    def exhausted(self) -> bool:
        """Whether nothing is pending: the basis spans an invariant subspace."""
        return self.done == self.count

    def _orthogonal(self, vector: Tensor) -> tuple[Tensor, Tensor, float]:
        """What the basis lacks of ``vector``, its coefficients in the basis, and the norm of what it lacks.

        Once more only where more than half of a vector was taken away: what rounding leaves of the basis in a rest is
        of the size of the whole vector, and twice is enough (Daniel, Gragg, Kaufman and Stewart 1976).
        """
        basis = self._basis[: self.count]
        coefficients = torch.zeros_like(basis[:, 0])
        norm = float(vector.norm())
        for _ in range(2):
            before, part = norm, basis @ vector
            vector = torch.addmv(vector, basis.T, part, alpha=-1)
            coefficients += part
            norm = float(vector.norm())
            if norm > before / 2:
                break
        return vector, coefficients, norm

    def _join(self, vector: Tensor) -> float:
        """Append what is new of a vector; 0 if nothing is."""
        before = float(vector.norm())
        rest, _, norm = self._orthogonal(vector)
        if not norm > 1e-10 * before or self.full:
            return 0.0
        self._basis[self.count] = rest / norm
        self.count += 1
        return norm

    def add_random(self) -> None:
        """Let a fresh random direction join the pending ones."""
        size, basis = self._basis.shape[1], self._basis
        self._join(torch.randn(size, generator=self._generator, dtype=torch.float64).to(basis))

    def turn(self) -> None:
        """Let the last pending vector be the next to be multiplied: what joined just now, or continues the last one."""
        first, last = self.done, self.count - 1
        if first < last:
            self._basis[[first, last]] = self._basis[[last, first]]
            self._matrix[[first, last]] = self._matrix[[last, first]]

    def advance(self) -> None:
        """One product, of the first pending vector."""
        product = self._multiply(self._basis[self.done])
        rest, coefficients, norm = self._orthogonal(product)
        column = coefficients.double().cpu().numpy()
        self._matrix[: self.count, self.done] = column
        self._scale = max(self._scale, float(product.norm()))
        self.done += 1
        epsilon = torch.finfo(self._basis.dtype).eps
        if norm > 1e2 * epsilon * self._scale and not self.full:
            self._basis[self.count] = rest / norm
            self._matrix[self.count, self.done - 1] = norm
            self.count += 1

    def ritz(self, k: int, which: Which, vectors: bool = False) -> Ritz:
        """The ``k`` wanted Ritz pairs, or as many as there are."""
        values, small, residuals = self._solve()
        wanted = order(values, which)[:k]
        errors = np.array([self._error(i, values, residuals) for i in wanted])
        lifted = None
        if vectors:
            lifted = self._basis[: self.done].T @ torch.as_tensor(small[:, wanted]).to(self._basis)
        return Ritz(values[wanted], residuals[wanted], errors, lifted)

    def _solve(self) -> tuple[Array, Array, Array]:
        done = self.done
        inner = self._matrix[:done, :done]
        # In torch, not in NumPy: its own pool of threads spins after each call, and slows the next product to half.
        values, small = (part.numpy() for part in torch.linalg.eigh(torch.from_numpy((inner + inner.T) / 2)))
        residuals = np.linalg.norm(self._matrix[done : self.count, :done] @ small, axis=0)
        return values, small, residuals

    @staticmethod
    def _error(i: int, values: Array, residuals: Array) -> float:
        """min(r, r²/gap), the gap being to the nearest Ritz value that is not in the same cluster."""
        distance = np.abs(values - values[i])
        apart = distance[distance > residuals + residuals[i]]
        gap = float(apart.min()) if len(apart) else 0.0
        residual = float(residuals[i])
        return min(residual, residual**2 / gap) if gap else residual

    def quadrature(self) -> tuple[Array, Array]:
        """Nodes θ and weights τ² (summing to 1) of the first vector's spectral measure; of an unrestarted basis."""
        values, small, _ = self._solve()
        return values, small[0] ** 2

    def restart(self, keep: int, which: Which) -> None:
        """Shrink the basis to the ``keep`` best Ritz vectors and what is pending."""
        values, small, _ = self._solve()
        best = order(values, which)[:keep]
        done, count = self.done, self.count
        waiting = self._basis[done:count].clone()
        coupling = self._matrix[done:count, :done] @ small[:, best]
        kept = torch.as_tensor(small[:, best].T.copy()).to(self._basis) @ self._basis[:done]
        self._basis[: len(best)] = kept
        self.done, self.count = len(best), len(best) + len(waiting)
        self._basis[self.done : self.count] = waiting
        self._matrix[:] = 0.0
        self._matrix[: self.done, : self.done] = np.diag(values[best])
        self._matrix[self.done : self.count, : self.done] = coupling


def order(values: Array, which: Which) -> NDArray[np.int64]:
    """Indices of eigenvalues, the most wanted first."""
    return np.argsort(-values if which == "largest" else -np.abs(values), kind="stable")


def lanczos(
    multiply: Callable[[Tensor], Tensor],
    start: Tensor,
    k: int,
    which: Which,
    *,
    tol: float,
    max_products: int,
    capacity: int,
    generator: torch.Generator,
    vectors: bool,
) -> tuple[Ritz, int]:
    """The ``k`` wanted pairs and the number of products; stops at an estimated relative error ``tol`` of each.

    Args:
        multiply: v (n,) → H v (n,).
        start: (p, n) first vectors; p is the block size.
        k, which: how many pairs, and which.
        tol: relative to each |θ|.
        max_products: to make at most.
        capacity: vectors that the basis may hold, at least k + 3.
        generator: for fresh vectors.
        vectors: whether to return Ritz vectors.
    """
    space = Krylov(multiply, start, capacity, generator)
    products, looking = 0, 0  # products that the fresh vector still gets
    before: Ritz | None = None  # what there was when it joined
    joined = False
    size = start.shape[1]
    while products < max_products:
        if space.exhausted:  # invariant: the rest of the space, if any, needs a fresh direction
            if space.done >= min(k, size) and joined:
                break
            space.add_random()
            joined = True
            if space.exhausted:
                break
        if space.full and space.capacity < size:
            space.restart(min(k + max(k // 2, 2), space.capacity - (space.count - space.done) - 1), which)
        if looking:
            space.turn()
            looking -= 1
        space.advance()
        products += 1
        if looking or (products % EVERY and products < max_products):
            continue
        ritz = space.ritz(k, which)
        if len(ritz.values) < min(k, size):
            continue
        scale = np.abs(ritz.values)
        floor = 1e2 * torch.finfo(start.dtype).eps * float(scale.max(initial=0.0))
        if not np.all(ritz.errors <= tol * scale + floor):
            continue
        if before is not None:
            moved = np.abs(ritz.values - before.values)
            if np.all(moved <= 3 * before.errors + tol * scale + floor):
                break
        space.add_random()
        joined, before, looking = True, ritz, SECOND_LOOK
    return space.ritz(k, which, vectors), products
