"""Lanczos on diagonal matrices, whose eigenvalues are known: what it finds, and with how many products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gammaopt.diagnostics._lanczos import SECOND_LOOK, Array, Krylov, Which, lanczos, order

K, TOL = 8, 1e-6


def leading(values: Array, which: Which) -> Array:
    return values[order(values, which)][:K]


def found(values: Array, which: Which, seed: int = 0, **settings: Any) -> tuple[Array, int]:
    diagonal, draw = torch.from_numpy(values), torch.Generator().manual_seed(seed)
    start = torch.randn(1, len(values), generator=draw, dtype=torch.float64)
    settings = {"tol": TOL, "max_products": 400, "capacity": 400, "vectors": False} | settings
    ritz, products = lanczos(lambda vector: diagonal * vector, start, K, which, generator=draw, **settings)
    return ritz.values, products


def plain(values: Array, which: Which, seed: int = 0) -> int:
    """Products of one Krylov space until it seems converged, looked at after every second one."""
    diagonal, draw = torch.from_numpy(values), torch.Generator().manual_seed(seed)
    start: Tensor = torch.randn(1, len(values), generator=draw, dtype=torch.float64)
    space = Krylov(lambda vector: diagonal * vector, start, 400, draw)
    while True:
        space.advance()
        ritz = space.ritz(K, which)
        if space.done % 2 == 0 and len(ritz.values) == K and np.all(ritz.errors <= TOL * np.abs(ritz.values)):
            return space.done


EDGES = {
    "both signs nearly equal": np.concatenate([np.linspace(-1, 1, 800), 1 + 0.01 * np.arange(1, 9), [-1.015, -1.035]]),
    "one sign, decaying": 4.0 * np.exp(-np.arange(1500) / 20),
}


@pytest.mark.parametrize("which", ["largest", "magnitude"])
@pytest.mark.parametrize("name", EDGES)
def test_all_products_but_the_second_look_go_into_one_krylov_space(name: str, which: Which) -> None:
    values = EDGES[name]
    for seed in (0, 1):
        ours, products = found(values, which, seed)
        np.testing.assert_allclose(ours, leading(values, which), rtol=1e-5)
        assert products <= plain(values, which, seed) + SECOND_LOOK + 2


@pytest.mark.parametrize("which", ["largest", "magnitude"])
def test_copies_that_one_krylov_space_can_not_see_are_found(which: Which) -> None:
    values = np.concatenate([[5.0, 5.0, 5.0, 4.0, 4.0, -4.5, -4.5, 3.0, 2.5], 0.5 * np.exp(-np.arange(600) / 30)])
    for seed in (0, 1, 2):
        ours, _ = found(values, which, seed)
        np.testing.assert_allclose(ours, leading(values, which), rtol=1e-5)


def test_a_basis_that_restarts_takes_a_second_look_too() -> None:
    values = np.concatenate([[5.0, 5.0, 4.0, 4.0, 3.0, 2.5, 2.0, 1.5], 0.5 * np.exp(-np.arange(600) / 30)])
    ours, _ = found(values, "largest", capacity=24)
    np.testing.assert_allclose(ours, leading(values, "largest"), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_basis_stays_orthonormal_though_most_vectors_are_cleaned_once(dtype: torch.dtype) -> None:
    values = torch.from_numpy(EDGES["one sign, decaying"]).to(dtype)  # large ones converge early and come back
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(1, len(values), generator=draw, dtype=torch.float64).to(dtype)
    space = Krylov(lambda vector: values * vector, start, 161, draw)
    for step in range(160):
        if step == 80:
            space.add_random()
            space.turn()
        space.advance()
    basis = space._basis[: space.count]
    apart = (basis @ basis.T - torch.eye(len(basis), dtype=dtype)).abs().max()
    assert float(apart) < 50 * torch.finfo(dtype).eps


def test_only_numbers_of_the_small_matrix_leave_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    for leave in ("cpu", "numpy", "tolist", "item"):
        plain_way = getattr(Tensor, leave)

        def watched(self: Tensor, *args: Any, way: Any = plain_way) -> Any:
            taken.append(self.numel())
            return way(self, *args)

        monkeypatch.setattr(Tensor, leave, watched)
    values = EDGES["one sign, decaying"][:199]  # a prime: no square of a small matrix is a multiple of a vector
    ours, _ = found(values, "largest", capacity=60)
    np.testing.assert_allclose(ours, leading(values, "largest"), rtol=1e-5)
    assert len(values) == 199
    assert taken
    assert max(taken) <= 60**2
    assert not any(size and size % len(values) == 0 for size in taken), "a vector left the device"
