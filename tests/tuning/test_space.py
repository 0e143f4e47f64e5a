"""The search space lives in the law's coordinates: its points cover it, and γ = 1 has the same range of rates."""

from __future__ import annotations

import math

import pytest

from gammaopt.tuning import Space

PLANE = Space((0.01, 100.0), base_lr=2.0)
LINE = Space(None, base_lr=2.0)


def test_the_range_of_rates_is_five_octaves_either_way_for_every_gamma_and_for_one_alike() -> None:
    assert PLANE.ranges()["log2_c"] == LINE.ranges()["log2_c"] == (-5.0, 5.0)
    assert PLANE.ranges()["log2_gamma"] == pytest.approx((math.log2(0.01), math.log2(100)))
    assert set(LINE.ranges()) == {"log2_c"}


def test_a_cell_is_two_to_the_coordinates() -> None:
    assert PLANE.cell({"log2_gamma": 3.0, "log2_c": -1.0}) == (8.0, 1.0)
    assert PLANE.cell({"log2_gamma": -2.0, "log2_c": 5.0}) == (0.25, 64.0)
    assert LINE.cell({"log2_c": 0.0}) == (1.0, 2.0)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("space", [PLANE, LINE], ids=["plane", "line"])
def test_start_points_lie_inside_and_cover_the_space(space: Space, seed: int) -> None:
    points = space.points(16, seed)
    assert len(points) == 16
    for name, (low, high) in space.ranges().items():
        units = sorted((point[name] - low) / (high - low) for point in points)
        assert all(0 <= u <= 1 for u in units)
        # A Sobol sequence puts one of 16 points in each sixteenth of each coordinate.
        assert [int(16 * u) for u in units] == list(range(16))


def test_start_points_cover_all_quarters_of_the_plane() -> None:
    quarters = {(p["log2_gamma"] > 0, p["log2_c"] > 0) for p in PLANE.points(4, seed=0)}
    assert len(quarters) == 4


@pytest.mark.parametrize("count", [0, 1, 3, 5, 16])
def test_any_number_of_start_points_can_be_had_and_fewer_are_the_first_of_more(count: int) -> None:
    points = PLANE.points(count, seed=0)
    assert len(points) == count
    assert points == PLANE.points(16, seed=0)[:count]


def test_start_points_depend_on_the_seed() -> None:
    assert PLANE.points(4, seed=0) != PLANE.points(4, seed=1)


@pytest.mark.parametrize(
    ("gamma", "c", "names"),
    [
        (0.0, 0.0, []),
        (math.log2(100), 0.0, ["log2_gamma"]),
        (math.log2(0.01) + 0.3, 0.0, ["log2_gamma"]),  # 3 % of 13.3 octaves is 0.4
        (math.log2(0.01) + 0.5, 0.0, []),
        (0.0, 4.8, ["log2_c"]),
        (0.0, -4.6, []),
        (math.log2(0.01), -5.0, ["log2_gamma", "log2_c"]),
    ],
)
def test_a_point_near_the_end_of_a_range_is_told_by_coordinate(gamma: float, c: float, names: list[str]) -> None:
    assert PLANE.at_edge({"log2_gamma": gamma, "log2_c": c}) == names


def test_gamma_one_alone_is_never_at_the_edge_of_gamma() -> None:
    assert LINE.at_edge({"log2_gamma": 0.0, "log2_c": 5.0}) == ["log2_c"]
