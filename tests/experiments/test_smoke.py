"""Every experiment runs in its smoke preset: a result with claims, a picture, a table; a second run goes on."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest

NAMES = (
    "accuracy_vs_gamma", "agreement", "catapult_silent_alignment", "depth", "hessian_spectrum", "knee", "linear_toy",
    "loss_curves", "phase_portrait", "residual", "tuned_vs_one", "width_transfer",
)  # fmt: skip


WITHOUT_PAPER = {"catapult_silent_alignment", "linear_toy", "tuned_vs_one"}  # their data are made, and gpu is largest


@pytest.mark.parametrize("name", [*NAMES, "architectures"])
def test_an_experiment_has_a_preset_paper_or_says_why_it_has_none(name: str) -> None:
    experiment = importlib.import_module(name)
    assert ("paper" not in experiment.PRESETS) == (name in WITHOUT_PAPER)
    assert ("There is no preset paper:" in str(experiment.__doc__)) == (name in WITHOUT_PAPER)


@pytest.mark.parametrize("name", NAMES)
def test_smoke_preset_leaves_its_result_and_a_second_run_tells_the_same(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = importlib.import_module(name)
    assert {"smoke", "cpu", "gpu"} <= set(experiment.PRESETS)
    words = ["--preset", "smoke", "--cores", "1", "--results", str(tmp_path), "--work", str(tmp_path / "work")]
    experiment.main(words)
    result = json.loads((tmp_path / "smoke.json").read_text(encoding="utf-8"))
    assert result["command"] == f"python experiments/{name}.py --preset smoke"
    assert result["title"] == str(experiment.__doc__).splitlines()[0].rstrip(".")
    assert {"torch", "gammaopt"} <= set(result["versions"])
    assert result["device"] == "cpu"
    assert result["meaning"].endswith(".")
    assert result["claims"]
    for claim in result["claims"]:
        assert claim["holds"] or claim["why"], claim
        assert math.isfinite(claim["measured"]), claim
        low, high = claim["interval"] or (claim["measured"], claim["measured"])
        assert low <= claim["measured"] + 1e-12, claim
        assert high >= claim["measured"] - 1e-12, claim
    assert (tmp_path / "smoke.png").stat().st_size > 5_000
    printed = capsys.readouterr().out
    assert "| what | predicted | measured | 95 % interval | holds |" in printed
    assert all(claim["what"] in printed for claim in result["claims"])
    experiment.main(words)
    again = json.loads((tmp_path / "smoke.json").read_text(encoding="utf-8"))
    assert again["claims"] == result["claims"]
    assert again["meaning"] == result["meaning"]
