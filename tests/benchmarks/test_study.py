"""The study benchmark with a tiny study: what it counts, and that a missed bar is named and fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import study

from gammaopt.tuning._folder import Cell


def test_a_tiny_study_is_timed_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "BAR", 1e6)
    with pytest.raises(SystemExit) as stopped:
        study.main(["--preset", "smoke", "--jobs", "1", "--every", "2", "--check", "--json", str(tmp_path / "s.json")])
    assert stopped.value.code == 1
    out = capsys.readouterr()
    assert "× against 1e+06 ×" in out.err
    (row,) = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert 8 + 12 <= row["runs"] <= 8 + 14  # two arms of four trials; on two fresh seeds two or three, and four rivals
    assert row["runs_one_at_a_time"] == 2 + 2 + row["runs"] // 2 - 4
    assert row["factor"] == pytest.approx(row["one_at_a_time"] / row["ours"])
    assert 0 < row["training_factor"] != row["factor"]
    assert row["median_distance"] <= 0.01
    assert f"from {row['runs_one_at_a_time']} of {row['runs']} runs" in out.out


def test_the_share_is_spread_over_the_batch() -> None:
    cells = [Cell(1.0, float(i + 1), 0) for i in range(10)]
    assert [cell.lr for cell in study.spaced(cells, 2)] == [3.0, 8.0]
    assert study.spaced(cells[:3], 5) == cells[:3]
    assert study.spaced([], 2) == []
