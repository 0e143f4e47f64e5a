"""The folder of a study loses nothing: damaged, foreign and locked folders are told in one line and left untouched."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gammaopt import UsageError
from gammaopt._files import write_atomically
from gammaopt.online.record import Curve, RunRecord
from gammaopt.tuning import StudyPlan
from gammaopt.tuning._folder import Cell, opened

PLAN = StudyPlan("digits", steps=3, trials=4, seeds=1, confirm_seeds=2, gamma_range=(0.01, 100.0))


def record(seed: int) -> RunRecord:
    return RunRecord(0.1, 1 / 3, seed, 3, 0.03, 0.25, 2.5, 0.5, 2.0, None, Curve((1, 3), (2.3, 2.6), (0.0, 0.375)))


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with three finished runs."""
    out = tmp_path / "deep" / "study"
    with opened(out, PLAN) as folder:
        for seed in range(3):
            folder.add(record(seed))
    return out


def refused(path: Path, plan: StudyPlan = PLAN) -> str:
    """The message with which the folder is refused; it must be one line, and the folder must stay as it was."""
    before = content(path) if path.is_dir() else path.read_bytes()
    with pytest.raises(UsageError) as caught, opened(path, plan):
        pytest.fail("the folder was opened")
    assert (content(path) if path.is_dir() else path.read_bytes()) == before
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_runs_come_back_exactly_by_their_cell(study: Path) -> None:
    with opened(study, PLAN) as folder:
        assert folder.runs == {Cell(0.1, 1 / 3, seed): record(seed) for seed in range(3)}


def test_a_run_is_on_disk_before_add_returns(study: Path) -> None:
    with opened(study, PLAN) as folder:
        folder.add(record(3))
        lines = (study / "runs.jsonl").read_text().splitlines()
        assert RunRecord.from_dict(json.loads(lines[-1])) == record(3)


def test_the_plan_is_written_first_and_once(tmp_path: Path) -> None:
    with opened(tmp_path / "new", PLAN):
        assert json.loads((tmp_path / "new" / "study.json").read_text())["plan"] == PLAN.to_dict()
    before = (tmp_path / "new" / "study.json").stat()
    with opened(tmp_path / "new", PLAN):
        pass
    assert (tmp_path / "new" / "study.json").stat().st_ino == before.st_ino


def test_an_exception_inside_releases_the_folder_and_keeps_its_runs(study: Path) -> None:
    def work() -> None:
        with opened(study, PLAN) as folder:
            folder.add(record(3))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        work()
    with opened(study, PLAN) as folder:
        assert len(folder.runs) == 4


@pytest.mark.parametrize("keep", [1, 40, -1])
def test_a_half_written_last_line_is_dropped_and_the_next_run_starts_a_new_line(study: Path, keep: int) -> None:
    runs = study / "runs.jsonl"
    whole = runs.read_bytes()
    runs.write_bytes(whole + (record(3).to_json().encode() + b"\n")[:keep])
    with opened(study, PLAN) as folder:
        assert len(folder.runs) == 3
        assert runs.read_bytes() == whole
        folder.add(record(4))
    with opened(study, PLAN) as folder:
        assert [cell.seed for cell in folder.runs] == [0, 1, 2, 4]


def test_a_half_written_only_line_leaves_an_empty_file(study: Path) -> None:
    (study / "runs.jsonl").write_bytes(b'{"gamma": 0.1, "lr"')
    with opened(study, PLAN) as folder:
        assert folder.runs == {}
    assert (study / "runs.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe\x00", b"", b"[]", b"null", b'{"gamma": 1}', b'{"gamma": 0.1, "lr": 0.3'], ids=repr
)
@pytest.mark.parametrize("tail", [b"", b'{"gam'], ids=["whole", "half-written"])
def test_a_damaged_line_is_named_and_nothing_is_cut_off(study: Path, damage: bytes, tail: bytes) -> None:
    lines = (study / "runs.jsonl").read_bytes().splitlines()
    lines[1] = damage
    (study / "runs.jsonl").write_bytes(b"\n".join(lines) + b"\n" + tail)
    message = refused(study)
    assert "runs.jsonl line 2 is not a run record" in message
    assert "restore the file, or choose another folder with --out" in message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"plan": {}, "versions": {}}', '{"plan": 3, "versions": {}}', '"digits"']
)
def test_an_unreadable_plan_is_refused(study: Path, text: str) -> None:
    (study / "study.json").write_text(text)
    message = refused(study)
    assert "study.json is not a readable study" in message
    assert "restore it, or choose another folder with --out" in message


def test_a_plan_that_is_not_text_is_refused(study: Path) -> None:
    (study / "study.json").write_bytes(b"\x80\x81\x82")
    assert "study.json is not a readable study (UnicodeDecodeError" in refused(study)


def test_a_damaged_result_is_refused(study: Path) -> None:
    (study / "result.json").write_text('{"task": "dig')
    assert "result.json is damaged; delete it" in refused(study)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trials": 5}, "trials: 4 there, 5 here"),
        ({"steps": 4}, "steps: 3 there, 4 here"),
        ({"loss": "mse"}, "loss: cross_entropy there, mse here"),
        ({"gamma_range": (0.01, 10.0)}, "gamma_range: [0.01, 100.0] there, [0.01, 10.0] here"),
        ({"law_version": 2}, "law_version: 1 there, 2 here"),
    ],
)
def test_another_study_is_refused_and_what_differs_is_named(
    study: Path, change: dict[str, int | str | tuple[float, float]], words: str
) -> None:
    message = refused(study, replace(PLAN, **change))  # type: ignore[arg-type]
    assert f"holds another study ({words}); choose another folder with --out" in message


def test_another_device_is_another_study_for_its_numbers_would_mix(study: Path) -> None:
    moved = replace(PLAN)
    object.__setattr__(moved, "device", "cuda")
    with pytest.raises(UsageError, match=r"holds another study \(device: cpu there, cuda here\)"), opened(study, moved):
        pass


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    for name in ("thesis.tex", "b", "c", "d"):
        (tmp_path / name).write_text("mine")
    message = refused(tmp_path)
    assert "holds other files (b, c, d) and no study; choose an empty folder with --out" in message


def test_runs_without_their_plan_are_not_taken_over(study: Path) -> None:
    (study / "study.json").unlink()
    assert "holds other files (runs.jsonl) and no study" in refused(study)


def test_an_empty_folder_and_one_killed_before_its_plan_was_written_are_taken(tmp_path: Path) -> None:
    with opened(tmp_path / "empty", PLAN):
        pass
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "lock").touch()
    (killed / ".study.json.x1y2").write_text('{"pl')
    with opened(killed, PLAN) as folder:
        assert folder.runs == {}


def test_a_file_is_refused_as_a_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "notes.txt is a file; choose a folder with --out" in refused(tmp_path / "notes.txt")


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with (
        pytest.raises(UsageError, match=r"can't be written: .*choose another folder"),
        opened(tmp_path / "notes.txt" / "study", PLAN),
    ):
        pytest.fail("the folder was opened")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_locked_in_this_process_is_in_use(study: Path) -> None:
    with open(study / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use by another process; wait for it, or choose another folder with --out" in refused(study)
    with opened(study, PLAN):
        pass


def test_a_folder_locked_by_another_process_is_free_again_when_that_is_killed(study: Path) -> None:
    code = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(study / "lock")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert "is in use by another process" in refused(study)
        holder.kill()
    with opened(study, PLAN):
        pass


def test_a_second_process_that_is_refused_leaves_no_plan_behind(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with open(tmp_path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(tmp_path)
    assert not (tmp_path / "study.json").exists()


def _fail(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda patch: patch.setattr(os, "fsync", _fail),
        lambda patch: patch.setattr(Path, "replace", _fail),
        lambda patch: patch.setattr(Path, "chmod", _fail),
    ],
    ids=["fsync", "rename", "chmod"],
)
def test_a_failed_write_leaves_the_old_file_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Callable[[pytest.MonkeyPatch], None]
) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, "old")
    with monkeypatch.context() as patch:
        break_it(patch)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, "new")
    assert content(tmp_path) == {"result.json": b"old"}
    write_atomically(path, "new γ")
    assert content(tmp_path) == {"result.json": "new γ".encode()}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_written_file_has_the_permissions_the_user_asked_for(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        write_atomically(tmp_path / "f", "x")
    finally:
        assert os.umask(old) == mask
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("name", ["runs.jsonl", "result.json"])
def test_a_folder_in_the_place_of_a_file_is_named(study: Path, name: str) -> None:
    (study / name).unlink(missing_ok=True)
    (study / name).mkdir()
    with pytest.raises(UsageError, match=name), opened(study, PLAN):
        pass
