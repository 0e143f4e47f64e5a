"""The table of the recipes' index is what was measured, and a recipe that fails is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recipe_times as benchmark

RESULT = Path(benchmark.__file__).parents[1] / "results" / "recipes" / "cpu.json"


def test_the_index_has_the_committed_table_and_every_recipe_is_in_it_and_in_time() -> None:
    content = json.loads(RESULT.read_text(encoding="utf-8"))
    text = benchmark.INDEX.read_text(encoding="utf-8")
    assert benchmark.write_table(text, content) == text
    assert [row["name"] for row in content["rows"]] == sorted(p.stem for p in benchmark.INDEX.parent.glob("*.py"))
    for row in content["rows"]:
        assert row["accuracy"] > row["chance"] + 5
        assert row["seconds"] <= row["bar"] == 90


def test_the_last_line_is_read_and_a_recipe_that_fails_is_named(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text("print('held-out accuracy 45.6 % at γ = 3 (chance 10.0 %, all classes alike)')")
    bad.write_text("raise SystemExit('no data')")
    row = benchmark.measure(good)
    assert (row["name"], row["accuracy"], row["chance"]) == ("good", 45.6, 10.0)
    with pytest.raises(SystemExit, match=r"bad\.py ended with code 1: no data"):
        benchmark.measure(bad)
    with pytest.raises(SystemExit, match="lost the marks"):
        benchmark.write_table("no marks", {"machine": "", "date": "", "rows": []})
