"""The false-positive benchmark: γ does nothing in it, its studies go through the real search, a missed bar fails."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import false_positives
import numpy as np
import pytest

from gammaopt.tuning import StudyPlan
from gammaopt.tuning._folder import Cell

PLAN = replace(false_positives.PLAN, trials=8, seeds=2, confirm_seeds=3)
GAMMAS = np.geomspace(0.01, 200, 40).tolist()


def scores_of(plan: StudyPlan, shift: float, cells: list[Cell]) -> list[float]:
    """The scores of cells, which the table has under one disguise."""
    records = false_positives.LookedUp(plan, false_positives.table(), shift).records(cells)
    return [getattr(records[cell], plan.metric) for cell in cells]


def best(plan: StudyPlan, shift: float, gamma: float) -> tuple[float, float]:
    """(best score, its octave) of one tuning seed at one γ, over rates an eighth of an octave apart."""
    octaves = np.arange(-32, 16) / 8
    scores = scores_of(
        plan, shift, [Cell(gamma, plan.base_lr * 2.0**octave, plan.tuning_seeds[0]) for octave in octaves]
    )
    return max(scores), float(octaves[np.argmax(scores)])


def test_no_gamma_has_a_better_best_rate_in_either_disguise() -> None:
    at_one, octave = best(PLAN, 0.0, 1.0)
    assert {best(PLAN, 0.0, gamma) for gamma in GAMMAS} == {(at_one, octave)}
    assert best(PLAN, 1.0, 1.0) == (at_one, octave)
    shifted = [best(PLAN, 1.0, gamma) for gamma in GAMMAS]
    assert max(score for score, _ in shifted) <= at_one + 1e-12
    assert min(score for score, _ in shifted) > at_one - 0.01  # the grid of rates misses the best one by a little
    moved = [found - octave for _, found in shifted]
    assert min(moved) < -0.8
    assert max(moved) > 0.8


def test_the_seeds_of_a_study_are_different_columns_of_the_table_and_another_study_has_others() -> None:
    table = false_positives.table()
    cells = [Cell(1.0, table.base_lr, seed) for seed in (*PLAN.tuning_seeds, *PLAN.fresh_seeds)]
    scores = scores_of(PLAN, 0.0, cells)
    row = table.scores[0, table.octaves.tolist().index(0.0)]
    assert len({row.tolist().index(score) for score in scores}) == 5
    other = replace(PLAN, seed=1)
    cells = [Cell(1.0, table.base_lr, seed) for seed in (*other.tuning_seeds, *other.fresh_seeds)]
    assert set(scores_of(other, 0.0, cells)) != set(scores)


def test_a_gamma_that_helps_is_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the few false positives are no sign of a verdict that never confirms."""
    plain = false_positives.LookedUp._record

    def better_away_from_one(self: false_positives.LookedUp, cell: Cell) -> object:
        record = plain(self, cell)
        gain = 0.2 * np.exp(-((np.log2(cell.gamma) + 3) ** 2) / 4)
        return replace(record, prequential_accuracy=record.prequential_accuracy + gain)

    assert false_positives.study(0, PLAN)["exact"].verdict != "confirmed"
    monkeypatch.setattr(false_positives.LookedUp, "_record", better_away_from_one)
    assert false_positives.study(0, replace(PLAN, trials=16))["exact"].verdict == "confirmed"


def test_the_small_preset_counts_its_verdicts_and_names_a_missed_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(false_positives, "BAR", -1.0)
    with pytest.raises(SystemExit) as stopped:
        false_positives.main(["--preset", "smoke", "--jobs", "1", "--check", "--json", str(tmp_path / "f.json")])
    assert stopped.value.code == 1
    out = capsys.readouterr()
    assert re.findall(r"missed: (\w+): .* % confirmed against at most -100 %", out.err) == ["exact", "shifted"]
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["exact", "shifted"]
    for row in rows:
        assert sum(row["verdicts"].values()) == row["studies"] == 3
        assert row["confirmed"] == row["verdicts"].get("confirmed", 0) / 3 <= row["at_chosen_rate_alone"]
        low, high = row["ci95"]
        assert low <= row["confirmed"] <= high
