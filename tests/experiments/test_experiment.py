"""What experiments share: claims and their words, results that a kill does not lose, seconds over several calls."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import _experiment
import numpy as np
import pytest
from _experiment import Claim, Found, Place, above, below, kept, near, number, run, timed
from _sweep import resumed
from matplotlib.figure import Figure

from gammaopt._files import locked


def test_a_number_near_its_prediction_holds_whatever_its_interval() -> None:
    claim = near("x", -0.667, 0.1, -0.7, (-1.0, -0.4), why="unused")
    assert (claim.holds, claim.predicted, claim.why) == (True, "-0.67 ± 0.1", "")
    assert near("x", 1.0, 0.1, 1.2, why="noise").row == "| x | 1.00 ± 0.1 | 1.2 |  | no: noise |"


def test_a_number_that_is_off_beyond_noise_says_so_also_where_it_holds() -> None:
    claim = near("x", 1.0, 0.1, 1.05, (1.02, 1.08), why="a bend")
    assert claim.holds
    assert claim.row == "| x | 1.00 ± 0.1 | 1.05 | 1.02 … 1.08 | yes, off by +0.05: a bend |"
    assert Claim.from_dict(json.loads(json.dumps(asdict(claim)))) == claim


@pytest.mark.parametrize(("claim", "holds"), [
    (above("x", 0.0, 1.0, (0.1, 2.0)), True),
    (above("x", 0.0, 1.0, (-0.1, 2.0)), False),
    (above("x", 0.0, -1.0), False),
    (below("x", 0.5, 0.4), True),
    (below("x", 0.5, 0.4, (0.2, 0.6)), False),
])  # fmt: skip
def test_a_bound_must_hold_for_the_whole_interval(claim: Claim, holds: bool) -> None:
    assert claim.holds is holds


@pytest.mark.parametrize(("claim", "why"), [
    (above("x", 0.0, 1.0, (-0.1, 2.0)), "its interval contains the bound"),
    (above("x", 0.0, -1.0, (-2.0, -0.1)), "its whole interval lies below"),
    (above("x", 3.0, 2.0), "beyond by 1"),
    (below("x", 0.5, 0.6, (0.4, 0.8)), "its interval contains the bound"),
    (below("x", 0.5, 0.8, (0.7, 0.9)), "its whole interval lies above"),
    (below("x", 0.5, 0.75), "beyond by 0.25"),
    (below("x", 0.5, math.inf), "not measured"),
    (near("x", 2.0, 0.1, 3.0, (2.5, 3.5)), "its whole interval lies above"),
    (near("x", 2.0, 0.1, 1.0, (0.5, 1.5)), "its whole interval lies below"),
    (near("x", 2.0, 0.1, 3.0, (1.5, 4.5)), "its interval reaches into the tolerance"),
    (near("x", 2.0, 0.1, 1.7), "beyond by 0.2"),
    (near("x", 2.0, 0.1, math.nan), "not measured"),
])  # fmt: skip
def test_a_claim_that_does_not_hold_always_has_a_reason(claim: Claim, why: str) -> None:
    assert (claim.holds, claim.why) == (False, why)
    assert claim.row.endswith(f": {why} |")


def test_a_number_that_is_none_is_told_before_and_after_json() -> None:
    made = near("x", 1.0, 0.1, math.nan, (math.nan, 2.0))
    back = Claim.from_dict(json.loads(json.dumps(_experiment._finite(asdict(made)))))
    assert (back.measured, back.interval) == (None, (None, 2.0))
    for claim in (made, back):
        assert claim.off is None
        assert claim.row == "| x | 1.00 ± 0.1 | none | none … 2 | no: not measured |"
    assert [number(value, ".2f") for value in (1.0, None, math.inf)] == ["1.00", "none", "none"]


def test_what_a_kill_left_is_not_computed_again(tmp_path: Path) -> None:
    path, done = tmp_path / "folder" / "squares.jsonl", []

    def square(number: int) -> int:
        done.append(number)
        return number**2

    tasks = {str(number): number for number in range(5)}
    assert resumed(square, dict(list(tasks.items())[:2]), path, 1) == {"0": 0, "1": 1}
    with open(path, "a") as file:
        file.write('["2", 4')  # cut off
    assert resumed(square, tasks, path, 1) == {"0": 0, "1": 1, "2": 4, "3": 9, "4": 16}
    assert done == [0, 1, 2, 3, 4]
    assert resumed(square, tasks, path, 1)["4"] == 16
    assert len(done) == 5
    (torn := tmp_path / "torn.jsonl").write_text('["0", 0')  # in its first line
    assert resumed(square, dict(list(tasks.items())[:2]), torn, 1) == {"0": 0, "1": 1}
    assert resumed(lambda _: pytest.fail("again"), {"0": 0, "1": 1}, torn, 1) == {"0": 0, "1": 1}


def test_a_part_is_made_once_and_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    assert kept(path, lambda: {"a": (1.0, math.nan)}) == {"a": [1.0, None]}
    assert kept(path, lambda: pytest.fail("made again")) == {"a": [1.0, None]}


def test_a_damaged_part_is_set_aside_and_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path := tmp_path / "part.json").write_text('{"a": [1.0')
    assert kept(path, lambda: {"a": 2.0}) == {"a": 2.0}
    assert f"{path} is damaged and is kept as part.damaged; it is made again" in capsys.readouterr().err
    assert (tmp_path / "part.damaged").read_text() == '{"a": [1.0'


def test_cells_of_other_code_are_other_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_experiment, "HERE", tmp_path)

    def digest_of(code: str) -> str:
        _experiment._code.cache_clear()
        (tmp_path / "made_up.py").write_text(code)
        return _experiment.code_digest("made_up")

    first = digest_of('"""A title."""\nBAR = 0.1  # of two\n')
    assert digest_of('"""Another title."""\nBAR = 0.1\n') == first
    assert digest_of('"""A title."""\nBAR = 0.2  # of two\n') != first


def test_results_of_another_preset_are_in_another_file(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert place.file("a.json", ("width", 64)) != place.file("a.json", ("width", 65))


def test_a_data_set_takes_the_place_of_the_digits(tmp_path: Path) -> None:
    assert Place(tmp_path).stream.name == "digits"
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (300, 32, 32, 3), dtype=np.uint8), np.arange(300) % 10
    np.savez(tmp_path / "part0.npz", X=images, Y=labels)
    stream = Place(tmp_path, data=tmp_path).stream
    assert (stream.shape, stream.classes) == ((3, 32, 32), 10)
    assert stream.name.startswith("cifar5m")


def test_seconds_of_all_calls_are_counted_also_of_one_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "seconds"
    path.write_text("100.0\n")
    with pytest.raises(KeyError), timed(path):
        raise KeyError
    with timed(path) as seconds:
        pass
    assert seconds[0] >= 100.0
    assert float(path.read_text()) == pytest.approx(seconds[0], abs=0.1)
    with timed(path, every=0.01):  # a kill would leave what was written meanwhile
        before = path.read_text()
        deadline = time.monotonic() + 30
        while path.read_text() in (before, ""):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_the_preset_paper_asks_for_its_data_and_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given: list[Place] = []

    def measure(preset: str, place: Place) -> Found:
        given.append(place)
        return Found([near("x", 1, 0.1, 1.0)], "One is one.", Figure(), {"preset": preset})

    (data := tmp_path / "data").mkdir()
    np.savez(data / "part0.npz", X=np.zeros((300, 32, 32, 3), np.uint8), Y=np.arange(300) % 10)
    words = ["--results", str(tmp_path), "--work", str(tmp_path / "work"), "--preset", "paper"]
    with pytest.raises(SystemExit):
        run("made_up", "Title.", {"paper": "large"}, measure, words)
    assert "give its folder: --data PATH" in capsys.readouterr().err
    run("made_up", "Title.", {"paper": "large"}, measure, [*words, "--data", str(data), "--device", "cpu"])
    assert given[0].data == data
    content = json.loads((tmp_path / "paper.json").read_text(encoding="utf-8"))
    assert content["command"] == "python experiments/made_up.py --preset paper --data PATH --device cpu"
    assert (content["title"], content["device"], content["preset"]) == ("Title", "cpu", "large")
    assert content["data_set"].startswith("cifar5m")


def one_is_one(_: str, __: Place) -> Found:
    return Found([near("x", 1, 0.1, 1.0)], "One is one.", Figure())


def told(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[object, str]:
    """Exit code and last line of an experiment with these words."""
    with pytest.raises(SystemExit) as stopped:
        run("made_up", "Title.", {"cpu": "small"}, one_is_one, list(map(str, words)))
    return stopped.value.code, capsys.readouterr().err.splitlines()[-1]


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "file").write_text("")
    results = "--results", tmp_path / "results"
    code, line = told(capsys, *results, "--work", file)
    assert (code, line) == (
        2,
        f"made_up.py: {file / 'cpu'} can't be written: Not a directory; choose another folder with --work",
    )
    (odd := tmp_path / "my --out").mkdir()
    (odd / "file").write_text("")
    code, line = told(capsys, *results, "--work", odd / "file")
    assert line == (
        f"made_up.py: {odd / 'file' / 'cpu'} can't be written: Not a directory; choose another folder with --work"
    )
    code, line = told(capsys, "--results", file, "--work", tmp_path / "work")
    assert (code, line) == (2, f"made_up.py: {file}: File exists; give another --work or --results")
    code, line = told(capsys, *results, "--work", tmp_path / "work", "--cores", 0)
    assert (code, line.partition("error: ")[2]) == (2, "cores=0 is too small; give at least 1")
    code, line = told(capsys, *results, "--work", tmp_path / "work", "--data", "/nowhere")
    assert (code, line.partition("error: ")[2]) == (
        2,
        "data=/nowhere is not used by the preset cpu, whose data are made here; drop it",
    )
    code, line = told(capsys, *results, "--work", tmp_path / "work", "--device", "toaster")
    assert (code, line.partition(";")[0]) == (2, "made_up.py: unknown device 'toaster'")
    with locked(tmp_path / "work" / "cpu"):
        code, line = told(capsys, *results, "--work", tmp_path / "work")
    assert (code, "is in use by another process" in line) == (2, True)


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> Found:
        raise KeyboardInterrupt

    monkeypatch.setitem(globals(), "one_is_one", stop)
    code, line = told(capsys, "--results", tmp_path, "--work", tmp_path / "work")
    assert (code, line) == (130, "made_up.py: stopped; run the same command again to go on")


def test_results_of_another_device_or_data_set_are_in_another_file(tmp_path: Path) -> None:
    places = [Place(tmp_path), Place(tmp_path, "cuda"), Place(tmp_path, data=tmp_path), Place(tmp_path, data=Path("/"))]
    assert len({place.file("a.json", "preset") for place in places}) == 4
