"""README does what it says: its example runs, its table is the committed result, and CI runs only what it shows."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_example_runs_and_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    names = runpy.run_path(str(script))
    assert names["loss"].item() < 0.2  # the target's variance is 1
    assert "effective rate" in capsys.readouterr().out


def test_table_is_the_committed_result() -> None:
    result = json.loads((ROOT / "experiments/results/tuned_vs_one/cpu.json").read_text(encoding="utf-8"))
    assert result["date"] in README
    assert result["machine"].partition(",")[0] in README
    for study in result["studies"]:
        row = f"| {study['task']}, {study['loss'].replace('_', '-')} | {study['gamma']:.2g} |"
        (line,) = [line for line in README.splitlines() if line.startswith(row)]
        assert f"{100 * study['confirm']['mean_difference']:+.2f}" in line
        assert line.rstrip().endswith(f"| {study['verdict']} |")


def test_committed_result_shows_what_the_project_claims() -> None:
    result = json.loads((ROOT / "experiments/results/tuned_vs_one/cpu.json").read_text(encoding="utf-8"))
    (study,) = [study for study in result["studies"] if study["loss"] == "cross_entropy"]
    assert study["verdict"] == "confirmed"
    assert study["confirm"]["mean_difference"] >= 0.015
    assert study["confirm"]["ci95"][0] > 0
    assert len(study["confirm"]["seeds"]) >= 10
    assert study["arms"]["one_equal_budget"]["trials"] == study["arms"]["tuned"]["trials"]


def test_ci_runs_only_commands_that_readme_shows() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    commands = re.findall(r"^make \w+", script, flags=re.MULTILINE)
    assert commands == ["make test", "make check"]
    assert all(command in README for command in commands)


def test_files_it_links_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
