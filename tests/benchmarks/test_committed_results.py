"""The committed results say what README, CHANGELOG and the recipes do: a bar is met, or its miss is listed here."""

from __future__ import annotations

import argparse
import ast
import json
import re
from pathlib import Path
from typing import Any

import _paired
import pytest
import search
import streams

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"


def rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / name / "cpu.json").read_text())["rows"]
    assert found
    return found


@pytest.mark.parametrize("row", rows("false_positives"), ids=lambda row: row["name"])
@pytest.mark.parametrize("verdict", ["confirmed", "worse"])
def test_a_gamma_without_effect_is_told_apart_in_at_most_five_percent_of_400_studies(
    row: dict[str, Any], verdict: str
) -> None:
    assert row["studies"] == sum(row["verdicts"].values()) >= 400
    assert row[verdict] == row["verdicts"].get(verdict, 0) / row["studies"] <= 0.05


def test_a_study_is_four_times_as_fast_as_one_run_at_a_time() -> None:
    (row,) = rows("study")
    assert row["trials"] == 200
    assert row["one_at_a_time"] / row["ours"] == pytest.approx(row["factor"])
    assert row["factor"] >= 4.0


def test_the_rescaled_time_pruner_spares_the_best_trials_that_the_others_kill() -> None:
    assert json.loads((RESULTS / "pruners" / "cpu.json").read_text())["studies"] >= 10
    found = rows("pruners")
    ours = [row for row in found if row["pruner"] == "rescaled time"]
    stock = [row for row in found if row["pruner"] not in ("rescaled time", "none")]
    assert {row["pruner"] for row in stock} == {"median", "successive halving", "hyperband"}
    assert max(row["killed"] for row in ours) <= 0.02 < 0.5 < min(row["killed"] for row in stock)
    assert all(row["regret_more_than_none"] <= 0.0 and row["compute"] < 0.8 for row in ours)


# Bars that are known to be missed: a new miss fails, and so does one that is mended and still stands here.
SEARCH_MISSES = {
    "digits-mse": {"raw box", "full grid"},
    "digits-cross_entropy": {"raw box"},
    "parity-mse": {"raw box", "full grid"},
}
DIAGNOSTICS_MISSES = {
    "parities, MSE, γ = 30, at the start": {"error"},
    "digits, cross-entropy, γ = 1, at the start": {"error"},
    "NTK of an MLP, width 128, 10 outputs": {"speed"},
    "NTK of a CNN, 12×12, width 16, 10 outputs": {"speed"},
    "NTK of a CNN, 16×16×3, width 32, 10 out": {"speed"},
    "NTK of a CNN, 16×16×3, width 128, 10 out": {"speed"},
}


def test_the_streams_are_as_fast_as_their_bars() -> None:
    bars = {name: (wanted, 1.0) for name, (_, wanted) in streams.MADE.items()}
    assert bars == {"digits": (50_000, 1.0), "photos": (10_000, 1.0)}
    found = {row["name"]: row for row in rows("streams")}
    for name, (wanted, bar) in bars.items():
        assert (found[name]["baseline"], found[name]["bar"]) == (wanted, bar)
        assert found[name]["rate"] >= wanted
        assert found[name]["ratio"] == pytest.approx(found[name]["rate"] / wanted)
    assert found["cifar5m, uint8"]["bar"] == streams.OF_DISK == 0.9
    assert all(row["ratio"] >= row["bar"] for row in found.values())


def test_the_searchs_missed_bars_are_the_known_ones() -> None:
    assert pytest.approx(1 / 3) == search.BAR
    found = rows("search")
    missed: dict[str, set[str]] = {}
    for row in found:
        assert row["bar"] == search.BAR
        assert row["to_raw"] == pytest.approx(row["median"]["law"] / row["median"]["raw"])
        assert row["to_grid"] == pytest.approx(row["median"]["law"] / row["grid"])
        names = {what for to, what in (("to_raw", "raw box"), ("to_grid", "full grid")) if row[to] > row["bar"]}
        missed |= {row["name"]: names} if names else {}
    assert missed == SEARCH_MISSES
    assert len(search.missed_bars(found)) == sum(map(len, SEARCH_MISSES.values()))


def test_the_diagnostics_missed_bars_are_the_known_ones() -> None:
    missed: dict[str, set[str]] = {}
    for row in rows("diagnostics"):
        names = {"error" if words.startswith("error") else "speed" for words in row["missed"]}
        if "until_converged" in row:
            assert row["until_converged"]["error"] <= 1e-5
            assert ("error" in names) == (row["error"] > 1e-5)
        else:
            assert row["error"] <= 1e-10
            assert ("speed" in names) == (row["speed"] < row["bar"])
        missed |= {row["name"]: names} if names else {}
    assert missed == DIAGNOSTICS_MISSES


@pytest.mark.parametrize("row", rows("recipes"), ids=lambda row: row["name"])
def test_a_recipe_reaches_by_default_what_its_first_lines_say(row: dict[str, Any]) -> None:
    """A percentage of "What to expect" is that of the committed run, within a point; a range holds it."""
    text = ast.get_docstring(ast.parse((ROOT / "recipes" / f"{row['name']}.py").read_text(encoding="utf-8"))) or ""
    expected = " ".join(text.partition("What to expect:")[2].split())
    said = re.findall(r"(\d+)(?: to (\d+))? %", expected)
    assert said, "no percentage"
    low, high = int(said[0][0]), int(said[0][1] or said[0][0])
    assert low - 1 <= row["accuracy"] <= high + 1


def test_a_result_names_its_processor_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_paired, "commit", lambda: "0123abc")
    out = tmp_path / "out.json"
    _paired.write_json(argparse.Namespace(json=out, check=False), {"rows": []}, [])
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["git_commit"] == "0123abc"
    assert content["processor"] == _paired.processor()
    assert set(content) == {"date", "machine", "processor", "torch", "git_commit", "rows"}
