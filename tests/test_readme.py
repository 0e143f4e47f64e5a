"""README does what it says: its example runs, its table is the committed result, and CI runs only what it shows."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GALLERY = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")


def test_example_runs_and_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    names = runpy.run_path(str(script))
    assert names["loss"].item() < 0.2  # the target's variance is 1
    assert "effective rate" in capsys.readouterr().out


@pytest.fixture(scope="module")
def studies() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "experiments/results/tuned_vs_one/cpu.json").read_text(encoding="utf-8"))
    return found


def test_table_is_the_committed_result(studies: dict[str, Any]) -> None:
    assert studies["table"] in README
    assert studies["date"] in README
    assert studies["machine"].partition(",")[0].removesuffix(" Processor") in README
    assert len(studies["table"].splitlines()) == 2 + len(studies["studies"])


def test_committed_result_shows_what_the_project_claims(studies: dict[str, Any]) -> None:
    confirmed = []
    for study, adjusted in zip(studies["studies"], studies["holm"], strict=True):
        assert len(study["confirm"]["seeds"]) >= 10
        assert study["arms"]["one_equal_budget"]["trials"] == study["arms"]["tuned"]["trials"]
        if study["verdict"] == "confirmed" and adjusted <= 0.05:
            assert study["confirm"]["ci95"][0] > 0
            confirmed.append(study["task"])
    assert len(set(confirmed)) >= 4, "tuned γ is confirmed better on fewer than four tasks"


def test_the_count_of_predictions_is_the_gallerys() -> None:
    (line,) = [line for line in GALLERY.splitlines() if line.endswith("hold within their stated tolerance.")]
    assert f"{line.partition(' predictions')[0]} predictions hold" in README


def test_ci_runs_only_commands_that_readme_shows() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    commands = re.findall(r"^make \w+", script, flags=re.MULTILINE)
    assert commands == ["make test", "make check"]
    assert all(command in README for command in commands)


def test_files_it_links_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
