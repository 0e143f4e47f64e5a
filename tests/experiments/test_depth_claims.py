"""The depth experiment tells depths apart where single exponents hold; its words are computed from its numbers."""

from __future__ import annotations

from typing import Any

import depth
import pytest
from _experiment import Claim


def row(optimizer: str, layers: int, slopes: list[float]) -> dict[str, Any]:
    measured, power = sum(slopes) / len(slopes), depth.POWERS[optimizer]
    return {
        "optimizer": optimizer, "depth": layers, "gammas": [1.0, 10.0, 100.0], "predicted": power / layers,
        "log10_best": [0.0, measured + 0.1, 2 * measured], "measured": measured, "slopes": slopes,
        "interval": (measured - 0.1, measured + 0.1), "late": None,
    }  # fmt: skip


def named(claims: list[Claim], part: str) -> Claim:
    (found,) = (claim for claim in claims if part in claim.what)
    return found


def test_exponents_of_the_law_hold_in_every_claim() -> None:
    rows = [row("sgd", layers, [2 / layers - 0.01, 2 / layers + 0.01]) for layers in (2, 3, 4)]
    claims = depth.claims_of(rows)
    assert len(claims) == 5
    assert all(claim.holds for claim in claims)
    assert named(claims, "common a").measured == pytest.approx(2.0)
    assert named(claims, "smallest fall").measured == pytest.approx(2 / 3 - 0.5)
    assert depth.meaning(claims).endswith("in 5 of 5 numbers.")


def test_an_exponent_that_does_not_fall_with_the_depth_is_found() -> None:
    """One exponent for all depths is within the bar at each of them, and is no law in the depth."""
    rows = [row("adam", layers, [0.21, 0.23]) for layers in (4, 5, 6)]
    claims = depth.claims_of(rows)
    assert all(claim.holds for claim in claims[:3])
    order = named(claims, "smallest fall")
    assert not order.holds
    assert order.why == "from depth to depth 0.220, 0.220, 0.220"
    assert "in 4 of 5 numbers, but adam, smallest fall of the exponent" in depth.meaning(claims)


def test_exponents_that_are_all_too_large_are_found() -> None:
    """Each is within its bar; together they are of another power."""
    claims = depth.claims_of([row("adam", layers, [1.24 / layers]) for layers in (3, 4, 5)])
    assert [claim.holds for claim in claims] == [True, True, True, True, False]
    common = named(claims, "common a")
    assert common.measured == pytest.approx(1.24)
    assert common.why == "exponent × L from depth to depth 1.24, 1.24, 1.24"
    assert "adam, common a of the exponents a/L is 1.24 instead of 1.00 ± 0.1" in depth.meaning(claims)


def test_the_interval_of_the_common_fit_is_over_seeds() -> None:
    rows = [row("sgd", layers, [a / layers for a in (1.9, 2.0, 2.1)]) for layers in (2, 3)]
    claim = named(depth.claims_of(rows), "common a")
    assert claim.interval == pytest.approx((2 - 4.3027 * 0.1 / 3**0.5, 2 + 4.3027 * 0.1 / 3**0.5), abs=1e-3)


def test_the_reason_of_a_miss_is_computed() -> None:
    (claim,) = depth.claims_of([row("sgd", 2, [0.5, 0.6])])
    assert not claim.holds
    known = "no single power: local slopes 0.65, 0.45, from 0.45 to 0.65, steepest between γ = 1 and 10"
    assert claim.why == known
    assert depth.reason({**row("sgd", 2, [0.5, 0.6]), "late": 0.9}) == f"{known}; 0.90 from γ = 30 on"
