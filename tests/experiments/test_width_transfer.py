"""The width experiment's claims are made from its numbers, and its search finds a best rate outside its first grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import width_transfer as wide
from _experiment import Place


def row(form: str, best: list[float], widths: list[int] | None = None) -> dict[str, Any]:
    spread = 10 ** (max(best) - min(best))
    return {
        "form": form, "start": "normal", "optimizer": "sgd", "gamma": 1.0, "widths": widths or [64, 256, 1024],
        "log10_best": best, "loss": [0.07, 0.05, 0.0449], "measured": round(spread, 3),
    }  # fmt: skip


def test_the_slope_tells_a_drift_from_noise_of_the_same_spread() -> None:
    drift, noise = row("mean field", [0.0, -0.3, -0.6]), row("mean field", [0.0, -0.6, 0.0])
    assert not wide.ratio(drift, [drift]).holds
    assert not wide.ratio(noise, [noise]).holds
    assert not wide.moved(drift, [drift]).holds
    assert wide.moved(drift, [drift]).measured == pytest.approx(-0.498, abs=1e-3)
    assert wide.moved(noise, [noise]).holds
    assert wide.moved(noise, [noise]).interval is not None


def test_a_plain_form_holds_only_where_its_rate_falls() -> None:
    falls, rises = row("plain", [0.0, -0.3, -0.62]), row("plain", [0.0, 0.3, 0.62])
    assert wide.moved(falls, [falls]).holds
    assert not wide.moved(rises, [rises]).holds
    assert wide.ratio(rises, [rises]).holds


def test_the_reason_of_a_miss_is_computed_from_the_numbers() -> None:
    base, plain = row("base", [0.0, -0.3, -0.6]), row("plain", [0.0, -0.3, -0.62])
    known = "one power from N = 64 to 1024: local slopes -0.50, -0.50; lowest loss 0.070, 0.050, 0.045"
    assert wide.ratio(base, [base, plain]).why == f"{known}; plain, N(0, 1/fan_in): × 4.17"
    field = row("mean field", [0.0, -0.3, -0.6])
    assert wide.ratio(field, [field, plain]).why == known
    level = row("base", [0.0, 0.0, 0.0])
    assert wide.ratio(level, [level, plain]).why == ""


def test_the_sentence_follows_from_the_claims() -> None:
    level, drift = row("mean field", [0.0, 0.1, 0.0]), row("mean field", [0.0, -0.3, -0.6])
    plain = row("plain", [0.0, 0.0, 0.0])

    def sentence(*rows: dict[str, Any]) -> str:
        return wide.meaning(list(rows), [wide.ratio(one, list(rows)) for one in rows])

    assert sentence(level) == (
        "From width 64 to 1024 the best rate moves: mean field by at most 2 × in 1 of 1 cases (1.3 × at most)."
    )
    assert "mean field by at most 2 × in 1 of 2 cases (4.0 × at most)" in sentence(level, drift)
    assert "plain by more than 2 × in 0 of 1 cases" in sentence(level, plain)


def test_a_best_rate_outside_the_first_grid_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Scores of a made-up network, whose best rate is −1 at width 64 and falls by a decade at width 128."""

    def scored(_: object, __: object, grids: wide.Grids, scores: dict[wide.Cell, float]) -> None:
        for (case, width), grid in grids.items():
            scores.update({(case, width, rate): (rate + (1.03 if width == 64 else 2.03)) ** 2 for rate in grid})

    monkeypatch.setattr(wide, "train", scored)
    case = wide.Case("plain", "normal", "sgd", 1.0, 0.0, 0.5)
    (found,) = wide.measure_rows(wide.Preset(cases=(case,), widths=(64, 128), widest=()), Place(tmp_path))
    assert found["log10_best"] == pytest.approx([-1.03, -2.03], abs=1e-3)
    assert found["measured"] == pytest.approx(10, rel=1e-3)


def test_all_gammas_are_trained_at_all_widths_up_to_2048() -> None:
    for preset in (wide.PRESETS["cpu"], wide.PRESETS["gpu"]):
        for gamma in (0.1, 1.0, 30.0):
            (case,) = [
                one for one in preset.cases if (one.form, one.optimizer, one.gamma) == ("mean field", "sgd", gamma)
            ]
            assert wide.widths_of(preset, case)[-1] == 2048
