"""The ensemble benchmark in a tiny size: what it measures and what it says it has not, and that a missed bar fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ensemble
import pytest

WORDS = ["--preset", "smoke", "--steps", "4", "--seconds", "0"]


def test_rows_of_this_device_are_measured_and_the_others_listed_with_their_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ensemble.main([*WORDS, "--json", str(tmp_path / "e.json")])
    made = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    here = [case.name for case in ensemble.CASES if case.device == "cpu"]
    assert [row["name"] for row in made["rows"]] == here
    for row in made["rows"]:
        assert min(row["ours"], row["loop"], row["factor"], row["bytes_per_run"]) > 0
        assert row["of_matmul"] == pytest.approx(row["flops"] / made["matmul_flops"])
    wanted = [(case.name, case.runs, case.bar) for case in ensemble.SMOKE if case.device == "cuda"]
    assert [(row["name"], row["runs"], row["bar"]) for row in made["not_measured"]] == wanted
    command = (
        "python experiments/benchmarks/ensemble.py --device cuda --check --json experiments/results/ensemble/cuda.json"
    )
    assert {row["command"] for row in made["not_measured"]} == {command}
    assert capsys.readouterr().out.count(f"not measured: {command}\n") == len(wanted) == 2


def test_a_missed_bar_is_named_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one = replace(ensemble.SMOKE[0], bar=1e6)
    monkeypatch.setitem(ensemble.PRESETS, "smoke", (one,))
    with pytest.raises(SystemExit) as stopped:
        ensemble.main([*WORDS, "--check"])
    assert stopped.value.code == 1
    assert "missed: MLP width 64: " in capsys.readouterr().err


def test_the_published_result_has_every_row_of_the_table() -> None:
    made = json.loads((Path(ensemble.__file__).parents[1] / "results/ensemble/cpu.json").read_text(encoding="utf-8"))
    listed = [*made["rows"], *made["not_measured"]]
    assert [(row["name"], row["device"], row["runs"], row["bar"]) for row in listed] == [
        (case.name, case.device, case.runs, case.bar) for case in ensemble.CASES
    ]
    assert all(row["factor"] >= row["bar"] for row in made["rows"])
