"""The streams' benchmark: it passes over files of CIFAR-5M's form and removes them, a missed bar is named and fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import streams

from gammaopt.online import Digits


def test_each_stream_is_measured_and_a_missed_bar_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MADE", {"digits": (Digits, 1e12)})
    monkeypatch.setattr(streams, "OF_DISK", 0.0)
    monkeypatch.setattr(streams, "forget", lambda _: None)  # a file system in memory forgets nothing
    out = tmp_path / "out.json"
    words = ["--seconds", "0.01", "--images", "2000", "--folder", str(tmp_path), "--check", "--json", str(out)]
    with pytest.raises(SystemExit) as end:
        streams.main(words)
    assert end.value.code not in (0, None)
    assert list(tmp_path.iterdir()) == [out], "the files are removed"
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["digits", "cifar5m, uint8", "cifar5m, normalised here"]
    assert all(row["rate"] > 0 and row["ratio"] > 0 for row in rows)
    assert rows[0]["ratio"] == pytest.approx(rows[0]["rate"] / 1e12)
