"""The mechanisms that γ governs, in numbers on small runs; slow: the experiment and all its claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import regimes
from regimes import PRESETS, Descent, descended

from gammaopt.diagnostics import dynamics

SMOKE = PRESETS["smoke"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("regimes")
    regimes.main(["--preset", "smoke", "--results", str(folder)])
    assert (folder / "smoke.png").stat().st_size > 20_000
    found: dict[str, Any] = json.loads((folder / "smoke.json").read_text(encoding="utf-8"))
    return found


def row(found: dict[str, Any], start: str) -> dict[str, Any]:
    (one,) = (one for one in found["rows"] if one["what"].startswith(start))
    return dict(one)


def test_sharpness_at_the_end_falls_like_the_laws_say(smoke: dict[str, Any]) -> None:
    assert row(smoke, "exponent of the sharpness, L = 3, γ ≤ 0.03")["measured"] == pytest.approx(-2, abs=0.2)
    assert row(smoke, "exponent of the sharpness, L = 3, γ ≥ 1")["measured"] == pytest.approx(-2 / 3, abs=0.15)
    assert all(
        point["largest_sharpness_lr"] < 1.6 for point in smoke["sharpness"]["points"]
    )  # the edge decides nothing


def test_sharpness_times_rate_comes_to_two_from_below_and_stays(smoke: dict[str, Any]) -> None:
    found = row(smoke, "sharpness × rate late, γ = 100")
    assert found["measured"] == pytest.approx(2, abs=0.1)
    assert found["without_edge"] > 2.3  # where it would go at a small rate
    assert smoke["edge"]["curves"]["γ = 100"][0]["sharpness_lr"] < 0.2


def test_a_small_gamma_catapults_and_a_large_one_does_not(smoke: dict[str, Any]) -> None:
    lazy, rich = (next(c for c in smoke["catapult"]["cells"] if c["gamma"] == gamma) for gamma in (0.01, 100.0))
    assert lazy["catapult"] > 5
    assert lazy["final"] < 0.1
    before, after = lazy["sharpness_lr"]
    assert before > 2 > after
    assert rich["catapult"] is None
    assert rich["final"] < 0.2


def test_the_kernel_turns_to_the_targets_before_the_loss_moves(smoke: dict[str, Any]) -> None:
    rich, lazy = smoke["alignment"]["rich"], smoke["alignment"]["lazy"]
    waiting = [one for one in rich if one["loss"] >= 0.95 * rich[0]["loss"]]
    assert waiting[-1]["alignment"] > rich[0]["alignment"] + 0.2
    assert waiting[-1]["kernel_kept"] < 0.6
    assert rich[-1]["loss"] < 0.6 * rich[0]["loss"]
    assert lazy[-1]["loss"] < 0.6 * lazy[0]["loss"]
    assert lazy[-1]["kernel_kept"] > 0.95
    assert abs(lazy[-1]["alignment"] - lazy[0]["alignment"]) < 0.05


def test_a_descent_stops_where_it_diverges_or_has_learned() -> None:
    gone = descended(Descent(SMOKE, 100.0, 50.0, steps=60))
    assert dynamics(gone.record).diverged_at is not None
    assert gone.record.steps < 60
    assert gone.end_sharpness is None
    learned = descended(Descent(SMOKE, 1.0, 0.4, steps=200, until=0.3, measures=("sharpness",), per_decade=1))
    assert learned.record.steps < 60
    assert learned.end_sharpness == pytest.approx(learned.measured[-1].sharpness_lr / 0.4)  # type: ignore[operator]


@pytest.mark.slow
def test_every_claim_of_the_experiment_holds(tmp_path: Path) -> None:
    regimes.main(["--preset", "cpu", "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 11
    assert [row for row in rows if not row["holds"]] == []
