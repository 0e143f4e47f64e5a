"""The search benchmark: it counts trials to the goal, the grid bounds it, a missed bar is named and fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import search


def test_the_number_counted_is_that_of_the_first_trial_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    scores = iter([0.1, 0.2, 0.7049, 0.7051, 0.9])

    def look_up(*_: object) -> tuple[float, bool]:
        seen.append(next(scores))
        return seen[-1], False

    monkeypatch.setattr(search, "look_up", look_up)
    monkeypatch.setattr(search, "best_known", lambda _: 0.705 + search.WITHIN)
    assert search.trials_needed("digits-mse", "law", 0) == 4
    assert seen == [0.1, 0.2, 0.7049, 0.7051]


def test_a_diverged_trial_is_not_there_and_a_search_that_never_is_counts_one_more_than_the_grid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search, "grid_trials", lambda _: 18)
    monkeypatch.setattr(search, "look_up", lambda *_: (1.0, True))
    assert search.trials_needed("digits-mse", "raw", 0) == 19


def test_rows_and_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {"law": [10, 30, 20], "raw": [50, 70, 60], "raw wide": [90, 90, 90]}
    monkeypatch.setattr(search, "PRESETS", {"smoke": 3})
    monkeypatch.setattr(search, "trials_needed", lambda name, box, seed: needed[box][seed] + (name == "parity-mse"))
    with pytest.raises(SystemExit) as stopped:
        search.main(["--preset", "smoke", "--jobs", "1", "--check", "--json", str(tmp_path / "s.json")])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == ("missed: parity-mse: 21 trials, 0.34 of the raw box's, at most 0.33 wanted\n")
    rows = {row["name"]: row for row in json.loads((tmp_path / "s.json").read_text())["rows"]}
    digits = rows["digits-mse"]
    assert digits["median"] == {"law": 20, "raw": 60, "raw wide": 90}
    assert digits["to_raw"] == pytest.approx(1 / 3)
    assert digits["grid"] == 12 * 21  # γ from 0.01 to 46, three to a decade; 21 rates
    assert digits["to_grid"] == pytest.approx(20 / 252)
    assert digits["not_there"] == {"law": 0, "raw": 0, "raw wide": 0}
