"""The toy's closed forms against all of the network: autograd's Hessian, an integrated flow, and a loop over layers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import linear_toy as toy
import numpy as np
import pytest
import torch
from _experiment import Place, near
from scipy.integrate import solve_ivp

from gammaopt._errors import UsageError


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("gamma", [0.01, 1.0, 50.0])
def test_the_sharpness_at_the_end_is_that_of_all_layers(depth: int, gamma: float) -> None:
    w = torch.full((depth,), (1 + gamma) ** (1 / depth), dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda w: 0.5 * ((w.prod() - 1) / gamma - 1) ** 2, w)
    expected = float(torch.linalg.eigvalsh(hessian)[-1])
    assert float(toy.end_sharpness(depth, np.array(gamma))) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("depth", [2, 3])
def test_the_time_to_half_is_that_of_the_integrated_flow(depth: int) -> None:
    gamma = 30.0

    def half(_: float, w: np.ndarray) -> float:
        return float((w[0] ** depth - 1) / gamma - 0.5)

    half.terminal = True  # type: ignore[attr-defined]
    flow = solve_ivp(
        lambda _, w: -toy.gradient(depth, np.array(gamma), w), (0, 1e5), [1.0], events=half, rtol=1e-10, atol=1e-12
    )
    assert toy.half_time(depth, gamma) == pytest.approx(flow.t_events[0][0], rel=1e-6)


def test_descent_is_that_of_separate_layers() -> None:
    depth, gamma, eta, steps = 3, 5.0, 0.3, 40
    w = torch.ones(depth, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        loss = 0.5 * ((w.prod() - 1) / gamma - 1) ** 2
        (slope,) = torch.autograd.grad(loss, w)
        w = (w - eta * slope).detach().requires_grad_()
    found, _ = toy.descend(depth, np.array([gamma]), np.array([eta]), steps)
    assert found[0] == pytest.approx(float(w[0].detach()), rel=1e-12)


def test_the_edge_of_a_known_rule_is_found_to_a_hundredth_of_a_decade() -> None:
    gammas = np.array([0.1, 1.0, 10.0])
    logs = toy.edge(lambda gamma, eta: eta < 3 * gamma**1.5, gammas, gammas**1.5, upper=True)
    assert logs == pytest.approx(np.log10(3 * gammas**1.5), abs=0.006)
    assert toy.exponent(gammas, logs)[0] == pytest.approx(1.5, abs=0.01)
    with pytest.raises(UsageError, match="outside the rates"):
        toy.edge(lambda gamma, eta: eta < 1e9 * gamma, gammas, gammas, upper=True)


def test_descent_ends_at_the_closed_forms() -> None:
    for depth in (2, 4):
        found = toy.checks(toy.PRESETS["smoke"], depth)
        assert found["sharpness at the end"] < 1e-3
        assert found["time to half"] < 0.01


def test_claims_are_exponents_and_each_is_of_a_quantity_of_its_own() -> None:
    preset = toy.PRESETS["smoke"]
    claims = [*toy.scalar_claims(preset, 3)[0], *toy.lower_edge(preset, 3)]
    assert all(" ± " in claim.predicted for claim in claims)
    assert [claim.what.removesuffix(", L = 3") for claim in claims] == [
        "stable edge, γ ≪ 1", "stable edge, γ ≫ 1", "stable edge, logistic loss, γ ≪ 1", "stable edge, sign, γ ≪ 1",
        "stable edge, sign, γ ≫ 1", "sharpness at the end, γ ≪ 1", "sharpness at the end, γ ≫ 1", "time to half, γ ≫ 1",
        "smallest rate that trains, in γ", "smallest rate that trains, in the budget",
    ]  # fmt: skip


def test_a_measured_exponent_has_students_interval_and_its_local_slopes() -> None:
    gammas, logs = np.array([1.0, 10.0, 100.0]), np.array([0.0, 0.9, 2.0])
    found, interval, why = toy.exponent(gammas, logs)
    assert interval is not None
    assert interval[1] - found == pytest.approx(12.706 * 0.1 * 3**-0.5, rel=1e-3)  # t of one degree of freedom
    assert why == "no single power: local slopes 0.90, 1.10, from 0.90 to 1.10, steepest between γ = 10 and 100"


@pytest.mark.parametrize("points", [[], [(1.0, 0)], [(1.0, 0), (1.0, 1)]])
def test_a_matrix_network_without_edges_is_a_failing_claim(
    points: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No edge inside the rates on either side, or one γ for each seed."""
    edges = [SimpleNamespace(gamma=gamma, seed=seed, lr=0.1, reach=0.05) for gamma, seed in points]
    monkeypatch.setattr(toy, "portrait", lambda *_: SimpleNamespace(records=[]))
    monkeypatch.setattr(toy, "critical_rates", lambda *_: edges)
    claims = toy.matrix_claims(toy.PRESETS["smoke"], Place(tmp_path), 3)
    assert [(claim.holds, claim.why) for claim in claims] == [(False, "no two neighbours were measured")] * 2
    assert "γ ≥ 1, L = 3: none instead of 0.67 ± 0.1" in toy.meaning(claims)


def test_the_sentence_counts_exponents_and_names_those_that_miss() -> None:
    good, bad = near("stable edge, L = 2", 1.0, 0.05, 1.01), near("stable edge, L = 3", 0.67, 0.05, 0.9)
    assert toy.meaning([good]) == "A deep linear network has 1 of 1 exponents of the law."
    assert "1 of 2 exponents of the law but not stable edge, L = 3: 0.90 instead of 0.67" in toy.meaning([good, bad])
