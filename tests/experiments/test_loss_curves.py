"""The claims on loss curves, on curves whose plateaus, stairs and collapse are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from _experiment import Claim
from loss_curves import meaning, plateau_claims, stair_claims

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
    (low, high), measured = found.interval or (None, None), found.measured
    assert low is not None
    assert high is not None
    assert measured is not None
    assert low <= measured <= high
    assert found.holds


def test_a_plateau_of_another_power_does_not_hold_and_shows_its_local_slopes() -> None:
    found = claim(plateau_claims(3, curves(0.6, 0.6)), "plateau, exponent")
    assert not found.holds
    assert "one power from γ = 100 to 1e+05: local slopes 0.60, 0.6" in found.why


def flat(curves: Any) -> Any:
    """The same runs, none of which has moved."""
    for of in curves.values():
        for record in of:
            record.curve.loss = [0.9] * len(record.curve.loss)
    return curves


@pytest.mark.parametrize("depth", [2, 3])
def test_runs_that_stay_on_their_plateau_are_failing_claims_and_no_traceback(depth: int) -> None:
    still = flat(curves(1 / 3, 0.5))
    claims = plateau_claims(depth, still)
    plateau, waiting = claims[:2]
    assert (plateau.holds, plateau.why) == (False, "no two neighbours were measured")
    assert "| none |" in plateau.row
    assert (waiting.holds, waiting.measured) == (False, 21.0)
    assert waiting.why == "at γ = 100, 316, 1000, 3162, 10000, 31623, 100000"
    assert meaning({depth: still}, claims) == (
        f"At L = {depth} not every run of γ = 100 and 100000 leaves its plateau in the steps given."
    )
    for claim in (*claims, *stair_claims(depth, still, 10)):
        assert claim.holds or claim.why


def test_the_sentence_tells_the_plateaus_growth_and_one_curve_only_where_that_holds() -> None:
    for powers, together in (((1 / 3, 1 / 3), True), ((0.1, 0.8), False)):
        of = {3: curves(*powers)}
        told = meaning(of, plateau_claims(3, of[3]))
        assert told.startswith("At L = 3 the plateau grows ")
        assert ("in rescaled time the curves of each depth come together" in told) is together


def test_curves_of_one_shape_collapse_and_others_do_not() -> None:
    one, other = (claim(plateau_claims(4, curves(*powers)), "spread") for powers in ((0.5, 0.5), (0.1, 0.8)))
    assert one.holds
    assert one.measured is not None
    assert one.measured < 0.1
    assert not other.holds
    assert "of the loss from 1 to 0." in one.what


def test_both_stairs_are_measured() -> None:
    found = stair_claims(3, curves(1 / 3, 1 / 3), 10)
    assert claim(found, "size of the first stair").measured == pytest.approx(0.1, abs=0.01)
    assert claim(found, "size of the second stair").measured == pytest.approx(0.7, abs=0.02)
    assert all(one.holds for one in found)
    assert claim(stair_claims(3, curves(1 / 3, 1 / 3), 100), "size of the first stair").predicted == "0.01 ± 0.002"
