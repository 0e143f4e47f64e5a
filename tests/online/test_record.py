"""A run record is the same on disk and in memory, in one line of strict JSON; a curve has at most forty points."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gammaopt.online.record import Curve, RunRecord, log_spaced, six_digits

finite = st.floats(allow_nan=False, allow_infinity=False)
curves = st.lists(st.tuples(st.integers(1, 10**9), finite, finite), max_size=40).map(
    lambda rows: Curve(tuple(r[0] for r in rows), tuple(r[1] for r in rows), tuple(r[2] for r in rows))
)
records = st.builds(
    RunRecord,
    gamma=finite,
    lr=finite,
    seed=st.integers(),
    steps=st.integers(1),
    effective_lr=finite,
    prequential_accuracy=finite,
    prequential_loss=st.none() | finite,
    final_accuracy=finite,
    final_loss=st.none() | finite,
    diverged_at=st.none() | st.integers(1),
    curve=curves,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(records)
def test_a_record_comes_back_from_its_line_exactly(record: RunRecord) -> None:
    line = record.to_json()
    assert "\n" not in line
    assert RunRecord.from_dict(json.loads(line, parse_constant=pytest.fail)) == record


RECORD = RunRecord(0.5, 2.0, 7, 3, 1.0, 0.25, 2.5, 0.5, 2.0, None, Curve((1, 3), (2.3, 2.6), (0.0, 0.375)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_json_is_refused_and_not_written(bad: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(RECORD, prequential_loss=bad).to_json()


@pytest.mark.parametrize("change", ["missing", "extra", "curve", "curve field"])
def test_a_dictionary_that_is_no_record_is_an_error(change: str) -> None:
    data = json.loads(RECORD.to_json())
    if change == "missing":
        del data["final_loss"]
    elif change == "extra":
        data["flops"] = 1
    elif change == "curve":
        del data["curve"]
    else:
        data["curve"]["time"] = []
    with pytest.raises((KeyError, TypeError)):
        RunRecord.from_dict(data)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 10**7))
def test_log_spaced_steps_run_from_one_to_the_end_without_repeats(steps: int) -> None:
    points = log_spaced(steps)
    assert len(points) <= 40
    assert (points[0], points[-1]) == (1, steps)
    assert all(a < b for a, b in pairwise(points))
    gaps = [math.log(b / a) for a, b in pairwise(points) if a > 1000]
    assert not gaps or max(gaps) - min(gaps) < 4e-3


def test_short_runs_keep_every_step_and_long_ones_about_forty() -> None:
    assert log_spaced(40) == list(range(1, 41))
    assert log_spaced(5) == [1, 2, 3, 4, 5]
    assert 36 <= len(log_spaced(10**7)) <= 40  # the first points round to the same step


@settings(max_examples=100, deadline=None, derandomize=True)
@given(finite)
def test_six_digits_are_kept(value: float) -> None:
    rounded = six_digits(value)
    # 9.999999e307 may round up to inf only beyond the largest float.
    assert rounded == pytest.approx(value, rel=5.1e-6, abs=0) or math.isinf(rounded) or abs(value) < 1e-300
    assert float(f"{rounded:.6g}") == rounded or math.isinf(rounded)
