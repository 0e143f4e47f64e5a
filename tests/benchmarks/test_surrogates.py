"""The tables of real runs: what is committed reads, and a look-up between its cells is where it should be."""

from __future__ import annotations

import numpy as np
import pytest
import search
import surrogates

from gammaopt.tuning._space import GAMMA, RATE

NAMES = ("digits-mse", "digits-cross_entropy", "parity-mse")


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_table_has_the_shape_of_its_grid_and_scores_that_its_curves_add_up_to(name: str) -> None:
    table = surrogates.read(name)
    cells = len(table.gammas), len(table.octaves)
    assert cells == (16, 27)
    assert table.scores.shape == (*cells, 3)
    assert table.diverged.shape == cells
    assert table.curves.shape == (*cells, len(table.curve_steps))
    assert table.curve_steps[-1] == table.steps
    lengths = np.diff([0, *table.curve_steps])
    online = (table.curves * lengths).sum(-1) / table.steps
    whole = ~table.diverged
    assert np.abs(online - table.mean)[whole].max() < 1e-3
    assert table.law.depth == table.depth == 3.0


@pytest.mark.parametrize("name", NAMES)
def test_a_table_reaches_from_where_nothing_is_best_to_where_every_run_diverges(name: str) -> None:
    """Beyond its ends a look-up is constant, which is harmless only if the best lies well inside."""
    table = surrogates.read(name)
    best = np.where(table.diverged, -1.0, table.mean).argmax(1)
    assert 0 < best.min() <= best.max() < len(table.octaves) - 1
    assert table.diverged[:, -1].all()
    assert not table.diverged[:, 0].any()


def test_a_cell_is_found_at_its_own_place_and_the_middle_is_the_mean_of_the_corners() -> None:
    table = surrogates.read("digits-mse")
    for i, j in ((0, 0), (3, 7), (15, 26), (8, 13)):
        score, diverged = table.at(float(table.gammas[i]), float(table.octaves[j]))
        assert score == pytest.approx(table.mean[i, j], abs=1e-12)
        assert diverged == bool(table.diverged[i, j])
    i, j = 6, 12
    gamma = float(np.sqrt(table.gammas[i] * table.gammas[i + 1]))
    octave = float(table.octaves[j : j + 2].mean())
    assert table.at(gamma, octave)[0] == pytest.approx(table.mean[i : i + 2, j : j + 2].mean())
    assert table.at(1e9, 99.0) == table.at(float(table.gammas[-1]), float(table.octaves[-1]))
    assert table.at(1e-9, -99.0) == table.at(float(table.gammas[0]), float(table.octaves[0]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("box", search.BOXES)
def test_a_place_has_the_same_score_in_every_box_that_holds_it(name: str, box: str) -> None:
    table = surrogates.read(name)
    for gamma, octave in ((0.02, -3.0), (1.0, 0.0), (9.0, 2.0)):
        place = {GAMMA: np.log2(gamma), RATE: octave}
        if box != "law":
            place[RATE] += np.log2(table.law.factor(gamma))
        assert search.look_up(table, box, place) == pytest.approx(table.at(gamma, octave))


@pytest.mark.parametrize("name", NAMES)
def test_the_raw_boxes_hold_the_laws_box_and_no_more_than_its_corners_ask_for(name: str) -> None:
    table = surrogates.read(name)
    (low, high), (c_low, c_high) = search.ranges(table, "law").values()
    for box in ("raw", "raw wide"):
        (gamma_low, gamma_high), (eta_low, eta_high) = search.ranges(table, box).values()
        assert gamma_low <= low
        assert high <= gamma_high
        corners = [np.log2(table.law.factor(2.0**gamma)) + c for gamma in (low, high) for c in (c_low, c_high)]
        assert eta_low <= min(corners) + 1e-9
        assert max(corners) <= eta_high + 1e-9
        if box == "raw":
            assert (eta_low, eta_high) == pytest.approx((min(corners), max(corners)))
    i, j = np.unravel_index(np.where(table.diverged, -1.0, table.mean).argmax(), table.diverged.shape)
    assert low <= np.log2(table.gammas[i]) <= high
    assert c_low <= table.octaves[j] <= c_high
