"""The gallery is made from the results alone and says what was not measured; the committed page is up to date."""

from __future__ import annotations

import json
from pathlib import Path

import gallery
import pytest
from _experiment import near

HERE = Path(gallery.__file__).parent


def result(held: bool = True) -> dict[str, object]:
    claim = near("exponent", 2.0, 0.1, 2.0 if held else 3.0, (1.9, 2.1), why="too short")
    return {
        "date": "2026-01-01", "machine": "two cores", "title": "A title", "device": "cpu", "seconds": 240,
        "command": "python experiments/second.py --preset cpu", "versions": {"torch": "9"}, "meaning": "It is so.",
        "claims": [{**claim.__dict__}], "table": "",
    }  # fmt: skip


def write(folder: Path, name: str, preset: str, content: object) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / f"{preset}.json").write_text(json.dumps(content))
    (folder / name / f"{preset}.png").touch()


def test_the_page_shows_claims_commands_and_what_was_not_measured(tmp_path: Path) -> None:
    write(tmp_path, "second", "cpu", result(held=False))
    write(tmp_path, "second", "smoke", result())
    write(tmp_path, "phase_portrait", "cpu", result())
    write(tmp_path, "phase_portrait", "gpu", {**result(), "machine": "a large GPU"})
    write(tmp_path, "surrogates", "digits", {"rows": []})
    text = gallery.page(gallery.read(tmp_path))
    assert "2 of 3 predictions hold" in text
    assert text.index("## phase_portrait") < text.index("## second")
    assert "| exponent | 2.00 ± 0.1 | 3 | 1.9 … 2.1 | no: too short |" in text
    assert "![It is so.](results/second/cpu.png)" in text
    assert "**gpu**: not measured; `python experiments/second.py --preset gpu`" in text
    assert "**gpu**: `python experiments/second.py --preset cpu`; a large GPU, cpu; 2026-01-01, 4 min; torch 9." in text
    assert "| [phase_portrait](#phase_portrait) | 1 of 1 | a large GPU | 4 min |" in text
    assert "| all, cpu | 1 of 2 | | 8 min |" in text
    assert "surrogates" not in text
    assert "smoke" not in text


def test_a_folder_without_results_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gallery.main(["--results", str(tmp_path), "--out", str(tmp_path / "page.md")])
    assert f"{tmp_path} holds no result of an experiment; run one" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize(("file", "told"), [("cpu.json", "is damaged ("), ("cpu.png", "is missing")])
def test_a_damaged_result_or_a_missing_picture_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, told: str
) -> None:
    write(tmp_path, "second", "cpu", result())
    path = tmp_path / "second" / file
    path.write_text('{"claims') if path.suffix == ".json" else path.unlink()
    with pytest.raises(SystemExit):
        gallery.main(["--results", str(tmp_path), "--out", str(tmp_path / "page.md")])
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{path} {told}" in line
    assert "restore it, or run experiments/second.py" in line
    write(tmp_path, "second", "cpu", result())
    with pytest.raises(SystemExit):
        gallery.main(["--results", str(tmp_path), "--out", str(tmp_path / "no" / "page.md")])
    assert "page.md can't be written: No such file or directory; give another --out" in capsys.readouterr().err


def test_a_prediction_outside_of_the_interval_is_counted(tmp_path: Path) -> None:
    claim = near("exponent", 2.0, 0.1, 2.05, (2.01, 2.09))
    write(tmp_path, "second", "cpu", {**result(), "claims": [{**claim.__dict__}]})
    text = gallery.page(gallery.read(tmp_path))
    assert "1 of 1 predictions hold" in text
    assert "for 1 of those the 95 % interval excludes the prediction, and the row says by how much. A bound" in text
    assert "yes, off by +0.05 |" in text


def test_no_prediction_outside_of_its_interval_is_no_sentence_and_a_missing_number_is_none(tmp_path: Path) -> None:
    gone = {**near("exponent", 2.0, 0.1, 2.05).__dict__, "measured": None, "interval": [None, 2.0], "holds": False}
    write(tmp_path, "second", "paper", {**result(), "claims": [gone], "data_set": "mnist1m"})
    text = gallery.page(gallery.read(tmp_path))
    assert "excludes the prediction" not in text
    assert "written as ± or as a range. A bound holds only if the number and its whole interval" in text
    assert "| exponent | 2.00 ± 0.1 | none | none … 2 | no |" in text
    assert "two cores, cpu; mnist1m; 2026-01-01" in text


def test_the_committed_page_is_what_the_committed_results_give() -> None:
    found = gallery.read(HERE / "results")
    assert (HERE / "README.md").read_text(encoding="utf-8") == gallery.page(found)
    for name, presets in found.items():
        assert (HERE / f"{name}.py").exists()
        for preset in presets:
            assert (HERE / "results" / name / f"{preset}.png").exists()
