"""Lanczos on diagonal matrices, whose eigenvalues are known: what it finds, and with how many products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gammaopt.diagnostics._lanczos import Array, Krylov, Look, Which, lanczos, order

K, TOL = 8, 1e-6


def leading(values: Array, which: Which) -> Array:
    return values[order(values, which)][:K]


def found(values: Array, which: Which, seed: int = 0, **settings: Any) -> tuple[Array, int]:
    diagonal, draw = torch.from_numpy(values), torch.Generator().manual_seed(seed)
    start = torch.randn(len(values), generator=draw, dtype=torch.float64)
    settings = {"tol": TOL, "max_products": 400, "capacity": 400, "vectors": False} | settings
    made = lanczos(lambda vector: diagonal * vector, start, K, which, generator=draw, **settings)
    return made.ritz.values, made.products


def plain(values: Array, which: Which, seed: int = 0) -> int:
    """Products of one Krylov space until it seems converged, looked at after every second one."""
    diagonal, draw = torch.from_numpy(values), torch.Generator().manual_seed(seed)
    start: Tensor = torch.randn(len(values), generator=draw, dtype=torch.float64)
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
def test_all_products_but_those_of_one_look_go_into_one_krylov_space(
    name: str, which: Which, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = EDGES[name]
    looked: list[Look] = []
    advance = Look.advance

    def counted(look: Look) -> None:
        looked.append(look)
        advance(look)

    monkeypatch.setattr(Look, "advance", counted)
    for seed in (0, 1):
        looked.clear()
        ours, products = found(values, which, seed)
        np.testing.assert_allclose(ours, leading(values, which), rtol=1e-5)
        assert products - len(looked) <= plain(values, which, seed) + 2
        assert len(set(looked)) == 1
        assert len(looked) <= plain(values, which, seed) / 2


@pytest.mark.parametrize("doubled", [0, 2, 5, 6])
def test_a_copy_near_the_last_wanted_value_is_found(doubled: int) -> None:
    """Five products of a fresh vector's own missed the copy of the seventh value from nine starts of ten."""
    values = 4 * np.exp(-np.arange(1500) / 60)
    values = np.append(values, values[doubled])
    for seed in range(4):
        ours, products = found(values, "largest", seed, tol=1e-5)
        np.testing.assert_allclose(ours, leading(values, "largest"), rtol=1e-4)
        assert products <= 90


@pytest.mark.parametrize(("distinct", "copies"), [(8, 10), (6, 10), (10, 9), (3, 40)])
def test_copies_are_found_where_one_krylov_space_soon_has_no_more_to_give(distinct: int, copies: int) -> None:
    values = np.repeat(0.5 * np.random.default_rng(0).random(distinct) ** 2 + 0.05, copies)
    for seed in range(6):
        ours, _ = found(values, "largest", seed)
        np.testing.assert_allclose(ours, leading(values, "largest"), rtol=1e-8)


def test_a_fresh_vector_finds_room_in_a_full_basis() -> None:
    values = np.concatenate([[5.0, 5.0, 5.0, 4.0, 4.0, 3.0, 2.5, 2.0, 1.5], 0.5 * np.exp(-np.arange(600) / 30)])
    for seed in range(4):
        for capacity in (K + 4, K + 5, K + 6, K + 7):
            ours, products = found(values, "largest", seed, capacity=capacity)
            np.testing.assert_allclose(ours, leading(values, "largest"), rtol=1e-5)
            assert products < 200


def test_residuals_hold_what_is_left_of_an_invariant_space() -> None:
    values = torch.linspace(1, 2, 10, dtype=torch.float64).repeat(10)
    draw = torch.Generator().manual_seed(0)
    space = Krylov(lambda vector: values * vector, torch.randn(100, generator=draw).double(), 60, draw)
    while not space.exhausted:
        space.advance()
    assert space.done == 10
    kept = space.ritz(4, "largest", vectors=True)
    assert kept.vectors is not None
    moved = values[:, None] * kept.vectors - kept.vectors * torch.from_numpy(kept.values)
    assert (moved.norm(dim=0).numpy() <= kept.residuals + 1e-14).all()
    assert kept.residuals.max() < 1e-7


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
    start = torch.randn(len(values), generator=draw, dtype=torch.float64).to(dtype)
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
