"""The gallery of pictures, drawn from its small runs: all panels are there, and their numbers are the mechanisms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diagnostics_gallery as module
import pytest
from matplotlib.figure import Figure


def test_the_small_gallery_has_all_panels_and_shows_the_mechanisms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    real = module.gallery

    def spy(*args: Any) -> Any:
        made = real(*args)
        drawn.append(made[0])
        return made

    monkeypatch.setattr(module, "gallery", spy)
    module.main(["--preset", "smoke", "--results", str(tmp_path)])
    for name in ("smoke.png", "smoke-monitor.png"):
        assert (tmp_path / name).stat().st_size > 20_000
    panels = drawn[0].axes[:9]
    assert all(panel.get_title() for panel in panels)
    assert all(panel.has_data() for panel in panels)
    found = json.loads((tmp_path / "smoke.json").read_text(encoding="utf-8"))
    start, end = (found["eigenvalues"][name] for name in ("at the start", "after training"))
    assert [abs(value) for value in start] == sorted((abs(value) for value in start), reverse=True)
    assert end[0] > 2 * start[0]  # progressive sharpening
    assert found["dynamics"]["γ = 0.01"].startswith("catapult")
    assert not any("catapult" in found["dynamics"][name] for name in ("γ = 1", "γ = 100", "γ = 300"))
    assert "; lazy" in found["verdicts"]["γ = 0.01"]
    assert all("; rich" in found["verdicts"][name] for name in ("γ = 1", "γ = 100", "γ = 300"))
    assert found["cosine"]["100, 300"] > found["cosine"]["1, 100"] > found["cosine"]["0.01, 1"]
    assert found["collapse"]["spread"] < found["collapse"]["before"] / 2
