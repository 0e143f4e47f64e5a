"""The committed results say what README and CHANGELOG do: a result that misses its bar can't be committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


def rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / name / "cpu.json").read_text())["rows"]
    assert found
    return found


@pytest.mark.parametrize("row", rows("false_positives"), ids=lambda row: row["name"])
@pytest.mark.parametrize("verdict", ["confirmed", "worse"])
def test_a_gamma_without_effect_is_told_apart_in_at_most_five_percent_of_400_studies(
    row: dict[str, Any], verdict: str
) -> None:
    assert row["studies"] == sum(row["verdicts"].values()) >= 400
    assert row[verdict] == row["verdicts"].get(verdict, 0) / row["studies"] <= 0.05


def test_a_study_is_four_times_as_fast_as_one_run_at_a_time() -> None:
    (row,) = rows("study")
    assert row["trials"] == 200
    assert row["one_at_a_time"] / row["ours"] == pytest.approx(row["factor"])
    assert row["factor"] >= 4.0


def test_the_rescaled_time_pruner_spares_the_best_trials_that_the_others_kill() -> None:
    assert json.loads((RESULTS / "pruners" / "cpu.json").read_text())["studies"] >= 10
    found = rows("pruners")
    ours = [row for row in found if row["pruner"] == "rescaled time"]
    stock = [row for row in found if row["pruner"] not in ("rescaled time", "none")]
    assert {row["pruner"] for row in stock} == {"median", "successive halving", "hyperband"}
    assert max(row["killed"] for row in ours) <= 0.02 < 0.5 < min(row["killed"] for row in stock)
    assert all(row["regret_more_than_none"] <= 0.0 and row["compute"] < 0.8 for row in ours)
