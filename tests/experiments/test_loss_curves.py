"""The claims on loss curves, on curves whose plateaus, stairs and collapse are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from _experiment import Claim
from loss_curves import plateau_claims, stair_claims

GAMMAS = [10 ** (k / 2) for k in range(4, 11)]


def stairs(gamma: float, seed: int, first: float, second: float) -> Any:
    """Relative loss in two stairs, of a tenth and of 0.7, at times that are powers of γ."""
    steps = np.unique(np.geomspace(1, 60_000, 400).round())

    def fallen(at: float) -> Any:
        return 1 / (1 + (at / steps) ** 6)

    times = 6.0 * (1 + 0.05 * seed) * gamma**first, 60.0 * (1 + 0.05 * seed) * gamma**second
    loss = 0.9 * (1 - 0.1 * fallen(times[0]) - 0.7 * fallen(times[1]))
    return SimpleNamespace(curve=SimpleNamespace(steps=steps.tolist(), loss=loss.tolist()), diverged_at=None)


def curves(first: float, second: float, seeds: int = 3) -> Any:
    return {gamma: [stairs(gamma, seed, first, second) for seed in range(seeds)] for gamma in GAMMAS}


def claim(claims: list[Claim], start: str) -> Claim:
    return next(one for one in claims if one.what.startswith(start))


def test_the_plateau_ends_within_the_first_stair_whatever_the_second_does() -> None:
    found = claim(plateau_claims(3, curves(1 / 3, 0.5)), "plateau, exponent")
    assert found.measured == pytest.approx(1 / 3, abs=0.01)
    assert found.interval is not None
    assert found.interval[0] <= found.measured <= found.interval[1]
    assert found.holds


def test_a_plateau_of_another_power_does_not_hold_and_shows_its_local_slopes() -> None:
    found = claim(plateau_claims(3, curves(0.6, 0.6)), "plateau, exponent")
    assert not found.holds
    assert found.why.startswith("local slopes 0.60, 0.6")


def test_curves_of_one_shape_collapse_and_others_do_not() -> None:
    one, other = (claim(plateau_claims(4, curves(*powers)), "spread") for powers in ((0.5, 0.5), (0.1, 0.8)))
    assert one.holds
    assert one.measured < 0.1
    assert not other.holds
    assert "of the loss from 1 to 0." in one.what


def test_both_stairs_are_measured() -> None:
    found = stair_claims(3, curves(1 / 3, 1 / 3))
    assert claim(found, "size of the first stair").measured == pytest.approx(0.1, abs=0.01)
    assert claim(found, "size of the second stair").measured == pytest.approx(0.7, abs=0.02)
    assert all(one.holds for one in found)
