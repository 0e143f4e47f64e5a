r"""Lanczos with full reorthogonalisation, for a symmetric matrix of which only products are known.

Multiplied basis vectors P and pending ones Z, all orthonormal, satisfy exactly

    H P = P T + Z F        Ritz pairs: T s = θ s, v = P s, residual ‖H v − θ v‖ = ‖F s‖

A product turns the first pending vector into a multiplied one and leaves what is new of it as the last pending one. All
products go into one Krylov space, because two that take turns are each of half the degree. A full basis is restarted
from its best Ritz vectors ("thick restart"), which keeps the relation above.

One Krylov space can't see a second copy of an eigenvalue. So, when all wanted pairs look converged or the space is
exhausted, a fresh random vector joins, and the next products are its own: a "look" at what is orthogonal to the space.
There its own Ritz values θ_j and the norms β_j of what each product left say how much an eigenvector u at μ above all
θ_j has grown,

    |⟨u, next vector⟩| = |⟨u, fresh vector⟩| Π_j |μ − θ_j| / β_j ≤ 1

and a random unit vector in n dimensions has |⟨u, fresh vector⟩| < δ √(π/2n) with probability δ. The look ends when that
alone could still hide an eigenvalue which belongs to the wanted ones (δ = MISSED; in exact arithmetic), when its own
leading pair has converged below them, or when it is exhausted. If it has found such eigenvalues, it goes on until all
wanted pairs have converged again, and another look follows. A run that ends at max_products has not looked, or not to
the end, however well its pairs have converged; and two eigenvalues closer than the tolerance of a pair count as copies.

Sources: Wu and Simon, SIAM J. Matrix Anal. Appl. 2000 (thick restart); Bai, Demmel et al., "Templates for the Solution
of Algebraic Eigenvalue Problems", 2000 (band Lanczos); Kuczyński and Woźniakowski, SIAM J. Matrix Anal. Appl. 1992 (a
random start).
"""

from __future__ import annotations

import math
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
MISSED = 0.01  # probability that a look misses an eigenvalue which belongs to the wanted ones


@dataclass(frozen=True)
class Ritz:
    """Wanted Ritz pairs, in order: values (k,), residual norms (k,), estimated errors (k,), vectors (n, k)."""

    values: Array
    residuals: Array
    errors: Array
    vectors: Tensor | None


@dataclass(frozen=True)
class Leading:
    """What :func:`lanczos` found.

    Attributes:
        ritz: the wanted pairs.
        products: how many were made.
        looked: whether a look for eigenvalues that the pairs miss came to its end and found none.
        floor: what rounding leaves of an error at least; it counts as converged.
    """

    ritz: Ritz
    products: int
    looked: bool
    floor: float


class Krylov:
    """The growing basis, on the device of ``start``.

    Args:
        multiply: v (n,) → H v (n,).
        start: (n,) first vector.
        capacity: vectors that the basis may hold.
        generator: for the fresh vectors.
    """

    def __init__(
        self, multiply: Callable[[Tensor], Tensor], start: Tensor, capacity: int, generator: torch.Generator
    ) -> None:
        self._multiply, self._generator = multiply, generator
        self.size = len(start)
        self.capacity = min(capacity, self.size)
        self._basis = torch.empty(self.capacity, len(start), dtype=start.dtype, device=start.device)
        self._matrix = np.zeros((self.capacity, self.capacity))  # column j: H q_j in the basis
        self.count, self.done = 0, 0  # vectors in the basis, and how many of them were multiplied
        self._dropped = np.zeros(self.capacity)  # column j: norm of what H q_j has outside of it
        self._scale, self._restarted = 0.0, False
        self._join(start)

    @property
    def full(self) -> bool:
        """Whether the next product's new direction would find no room."""
        return self.count >= self.capacity

    @property
    def exhausted(self) -> bool:
        """Whether nothing is pending: the basis spans an invariant subspace."""
        return self.done == self.count

    @property
    def pending(self) -> int:
        """How many vectors wait to be multiplied."""
        return self.count - self.done

    def _orthogonal(self, vector: Tensor) -> tuple[Tensor, Tensor, float]:
        """What the basis lacks of ``vector``, its coefficients in the basis, and the norm of what it lacks.

        Once more only where more than half of a vector was taken away: what rounding leaves of the basis in a rest is
        of the size of the whole vector, and twice is enough (Daniel, Gragg, Kaufman and Stewart 1976). After a restart
        always: once leaves as much of the basis as its vectors lack in being orthogonal, and that would grow each time.
        """
        basis = self._basis[: self.count]
        coefficients = torch.zeros_like(basis[:, 0])
        norm = float(vector.norm())
        for _ in range(2):
            before, part = norm, basis @ vector
            vector = torch.addmv(vector, basis.T, part, alpha=-1)
            coefficients += part
            norm = float(vector.norm())
            if norm > before / 2 and not self._restarted:
                break
        return vector, coefficients, norm

    def _join(self, vector: Tensor) -> bool:
        """Append what is new of a vector, and say whether anything is."""
        before = float(vector.norm())
        rest, _, norm = self._orthogonal(vector)
        if not norm > 1e-10 * before or self.full:
            return False
        self._basis[self.count] = rest / norm
        self.count += 1
        return True

    def add_random(self) -> bool:
        """Let a fresh random direction join the pending ones; ``False`` if the basis is full, or the whole space."""
        size, basis = self._basis.shape[1], self._basis
        return self._join(torch.randn(size, generator=self._generator, dtype=torch.float64).to(basis))

    def turn(self) -> None:
        """Let the last pending vector be the next to be multiplied: what joined just now, or continues the last one."""
        first, last = self.done, self.count - 1
        if first < last:
            self._basis[[first, last]] = self._basis[[last, first]]
            self._matrix[[first, last]] = self._matrix[[last, first]]

    def advance(self) -> float:
        """One product, of the first pending vector; the norm of what it left as the last pending one, 0 if nothing.

        What is left of an invariant space is rounding, and larger than that of one product: it is noted in the
        residuals, not followed. A direction that stays in the basis unmultiplied hides its parts of eigenvectors from
        all that join later.
        """
        product = self._multiply(self._basis[self.done])
        rest, coefficients, norm = self._orthogonal(product)
        column = coefficients.double().cpu().numpy()
        self._matrix[: self.count, self.done] = column
        self._matrix[self.done, : self.done] = column[: self.done]  # also of a part that a restart had let go
        self._scale = max(self._scale, float(product.norm()))
        self.done += 1
        epsilon = torch.finfo(self._basis.dtype).eps
        if not norm > max(epsilon**0.5 * float(product.norm()), 1e2 * epsilon * self._scale) or self.full:
            self._dropped[self.done - 1] = norm
            return 0.0
        self._basis[self.count] = rest / norm
        self._matrix[self.count, self.done - 1] = norm
        self.count += 1
        return norm

    def ritz(self, k: int, which: Which, vectors: bool = False) -> Ritz:
        """The ``k`` wanted Ritz pairs, or as many as there are."""
        values, small, residuals = self._solve()
        wanted = order(values, which)[:k]
        errors = np.array([self._error(i, values, residuals) for i in wanted])
        lifted = None
        if vectors:
            lifted = self._basis[: self.done].T @ torch.as_tensor(small[:, wanted]).to(self._basis)
        return Ritz(values[wanted], residuals[wanted], errors, lifted)

    def _solve(self, first: int = 0) -> tuple[Array, Array, Array]:
        """Ritz values, small vectors and residual norms, of the multiplied vectors from ``first`` on by themselves."""
        done = self.done
        inner = self._matrix[first:done, first:done]
        # In torch, not in NumPy: its own pool of threads spins after each call, and slows the next product to half.
        values, small = (part.numpy() for part in torch.linalg.eigh(torch.from_numpy((inner + inner.T) / 2)))
        outside = np.vstack([self._matrix[done : self.count, first:done], np.diag(self._dropped[first:done])])
        residuals = np.linalg.norm(outside @ small, axis=0)
        return values, small, residuals

    def own(self, first: int, which: Which) -> tuple[Array, Array]:
        """Ritz values of the vectors from ``first`` on by themselves, in order, and their estimated errors."""
        values, _, residuals = self._solve(first)
        down = order(values, which)
        return values[down], np.array([self._error(i, values, residuals) for i in down])

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
        """Shrink the basis to the ``keep`` best Ritz vectors and what is pending.

        Of that no more stays than leaves room for a product: the last one, and those that the Ritz vectors kept have
        most of in their residuals. What goes is noted in these.
        """
        self._restarted = True
        values, small, _ = self._solve()
        best = order(values, which)[:keep]
        done, count = self.done, self.count
        coupling = self._matrix[done:count, :done] @ small[:, best]
        most = max(1, self.capacity - len(best) - 1)
        heavy = np.argsort(-np.linalg.norm(coupling[:-1], axis=1), kind="stable")[: most - 1]
        stay = [*sorted(heavy.tolist()), count - done - 1] if count > done else []
        waiting = self._basis[[done + i for i in stay]]  # a copy
        gone = np.delete(coupling, stay, axis=0)
        dropped = np.linalg.norm(np.vstack([self._dropped[:done, None] * small[:, best], gone]), axis=0)
        coupling = coupling[stay]
        kept = torch.as_tensor(small[:, best].T.copy()).to(self._basis) @ self._basis[:done]
        self._basis[: len(best)] = kept
        self.done, self.count = len(best), len(best) + len(waiting)
        self._basis[self.done : self.count] = waiting
        self._matrix[:] = 0.0
        self._matrix[: self.done, : self.done] = np.diag(values[best])
        self._matrix[self.done : self.count, : self.done] = coupling
        self._dropped[:] = 0.0
        self._dropped[: self.done] = dropped


def order(values: Array, which: Which) -> NDArray[np.int64]:
    """Indices of eigenvalues, the most wanted first."""
    return np.argsort(-values if which == "largest" else -np.abs(values), kind="stable")


class Look:
    """Products of a fresh vector's own: whether they leave room for an eigenvalue that belongs to the wanted ones.

    Args:
        space: in which the fresh vector is the last pending one.
        which: what is wanted.
        least: what an unseen eigenvalue must exceed to belong to the wanted ones, by its size if ``which`` says so;
            ``None`` if any does, because there are too few.
        tol: relative error at which the look's own leading pair counts as converged.


    Attributes:
        over: whether nothing more than what it has found can come of further products.
        exhausted: whether it left no direction to go on in.
    """

    def __init__(self, space: Krylov, which: Which, least: float | None, tol: float) -> None:
        self._space, self._which, self._least, self._tol = space, which, least, tol
        self._needed = math.log(math.sqrt(2 * space.size / math.pi) / MISSED)
        self._first, self._norms = space.done, 0.0  # own vectors are multiplied from there on; Σ log β
        self._before, self._grown = 0.0, 0.0  # logs of the growth until the last restart, and until now
        self.over = self.exhausted = False

    def advance(self) -> None:
        """One product of its own."""
        self._space.turn()
        left = self._space.advance()
        self.over = self.exhausted = not left
        if not left or self._least is None:
            return
        values, errors = self._space.own(self._first, self._which)
        sizes, ends = (
            (values, [self._least]) if self._which == "largest" else (abs(values), [self._least, -self._least])
        )
        self._norms += math.log(left)
        with np.errstate(divide="ignore"):
            growth = min(float(np.log(np.abs(end - values)).sum()) for end in ends)
        self._grown = self._before + growth - self._norms
        below = sizes <= self._least  # the first one of these is what it would find next
        settled = bool(below.any()) and errors[below][0] <= self._tol * sizes[below][0]
        self.over = settled or self._grown >= self._needed

    def restart(self, keep: int) -> None:
        """Restart the basis; what has grown until then is in the vector that is pending."""
        self._space.restart(keep, self._which)
        self._first, self._norms, self._before = self._space.done, 0.0, max(0.0, self._grown)


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
) -> Leading:
    """The ``k`` wanted pairs; stops at an estimated relative error ``tol`` of each.

    Args:
        multiply: v (n,) → H v (n,).
        start: (n,) first vector.
        k, which: how many pairs, and which.
        tol: relative to each |θ|.
        max_products: to make at most.
        capacity: vectors that the basis may hold, at least k + 5.
        generator: for fresh vectors.
        vectors: whether to return Ritz vectors.
    """
    space = Krylov(multiply, start, capacity, generator)
    wanted, products, looked = min(k, space.size), 0, False
    rounding = 1e2 * torch.finfo(start.dtype).eps
    look: Look | None = None
    before: Ritz | None = None  # what there was when the look began

    def make_room() -> None:
        if space.full and space.capacity < space.size:
            # Fewer than k would throw wanted ones away, however many copies have left a vector pending each.
            keep = max(k + 2, min(k + max(k // 2, 2), space.capacity - space.pending - 1))
            if look is None:
                space.restart(keep, which)
            else:
                look.restart(keep)

    while products < max_products:
        make_room()
        products += 1
        if look is None:
            space.advance()
            ended, early = space.exhausted, products % EVERY and products < max_products
        else:
            look.advance()
            ended, early = look.exhausted, not look.over
        if early and not ended:
            continue
        ritz = space.ritz(k, which)
        scale = np.abs(ritz.values)
        allowed = tol * scale + rounding * float(scale.max(initial=0.0))
        complete = len(ritz.values) == wanted
        converged = complete and bool(np.all(ritz.errors <= allowed))
        if not (ended or converged):
            look = None  # what it found converges with the rest, and so does a pair whose gap it has shown to be small
            continue
        if converged and before is not None and not _moved(before, ritz, allowed):
            looked = True
            break
        look = before = None
        make_room()
        if space.add_random():
            least = float((ritz.values if which == "largest" else scale)[-1] + allowed[-1]) if complete else None
            look, before = Look(space, which, least, tol), ritz
        elif space.exhausted:
            looked = True  # it was the whole space; otherwise what is pending is all that is left of it
            break
    ritz = space.ritz(k, which, vectors)
    return Leading(ritz, products, looked, rounding * float(np.abs(ritz.values).max(initial=0.0)))


def _moved(before: Ritz, after: Ritz, allowed: Array) -> bool:
    """Whether a look has changed the wanted values by more than their errors, or completed them."""
    if len(before.values) < len(after.values):
        return True
    return bool(np.any(np.abs(after.values - before.values) > 3 * before.errors + allowed))
