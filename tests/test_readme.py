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


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"experiments/results/{name}/cpu.json").read_text(encoding="utf-8"))
    return found


def said(pattern: str) -> float:
    """The number of a sentence of README."""
    (number,) = re.findall(pattern, " ".join(README.split()))
    return float(number)


def test_the_numbers_of_the_law_are_the_committed_ones() -> None:
    """Each is what was measured, rounded up to the digits that it is told with."""
    depth = max(abs(row["measured"] - row["predicted"]) for row in result("depth")["rows"])
    assert 0 <= said(r"follow the law within ([\d.]+) in the exponent for L = 2 … 6") - depth < 0.1
    normal = max(
        abs(row["measured"] - row["predicted"]) for row in result("architectures")["rows"] if row["normalised"]
    )
    assert 0 <= said(r"follow L_eff within ([\d.]+) over γ from 1 to 1,000") - normal < 0.01
    assert all(claim["holds"] for claim in result("knee")["claims"]), "the knee is right within half a decade"
    rows = result("width_transfer")["rows"]
    field = [row for row in rows if row["form"] == "mean field"]
    assert said(r"by at most ([\d.]+) × from width 64 to 2,048 \(Adam 1,024\) at γ = 1 and 30") == pytest.approx(
        max(row["measured"] for row in field if row["gamma"] in (1.0, 30.0)), abs=0.051
    )
    lazy = [row for row in field if row["gamma"] == 0.1]
    assert said(r"by ([\d.]+) × at γ = 0.1") == pytest.approx(max(row["measured"] for row in lazy), abs=0.051)
    late = [
        [rate for width, rate in zip(row["widths"], row["log10_best"], strict=True) if width >= 512] for row in lazy
    ]
    assert said(r"\(([\d.]+) × above width 512\)") == pytest.approx(
        10 ** max(max(rates) - min(rates) for rates in late), abs=0.051
    )
    (base,) = [r for r in rows if (r["form"], r["start"], r["optimizer"]) == ("base", "normal", "sgd")]
    assert said(r"weights N\(0, 1/fan_in\) by ([\d.]+) × \(SGD\)") == pytest.approx(base["measured"], abs=0.051)


def test_the_searchs_numbers_are_the_committed_ones() -> None:
    shares = [row["to_raw"] for row in result("search")["rows"]]
    assert said(r"takes ([\d.]+) to [\d.]+ of the trials") == pytest.approx(min(shares), abs=0.006)
    assert said(r"takes [\d.]+ to ([\d.]+) of the trials") == pytest.approx(max(shares), abs=0.006)


def test_ci_runs_only_commands_that_readme_shows() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    commands = re.findall(r"^make \w+", script, flags=re.MULTILINE)
    assert commands == ["make test", "make check"]
    assert all(command in README for command in commands)


def test_files_it_links_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
