"""A disk that fills up is told in one line, what was finished before stays, and the same command goes on later."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gammaopt import UsageError
from gammaopt.online import Curve, Progress, Run, RunRecord, train_many
from gammaopt.online._checkpoint import DamagedCheckpointError
from gammaopt.online._run_file import RunFile, read_runs
from gammaopt.online.ensemble import StopTraining
from gammaopt.tuning import StudyPlan, tune
from gammaopt.tuning._state import read_folder

PLAN = StudyPlan("digits", steps=20, trials=4, seeds=1, confirm_seeds=2)
RUN = Run(1.0, 1.0, 0)
LONG = replace(PLAN, steps=60).recipe()  # longer than the way to the first look


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can't be mounted here: that takes root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def record(seed: int) -> RunRecord:
    return RunRecord(0.1, 1 / 3, seed, 3, 0.03, 0.25, 2.5, 0.5, 2.0, None, Curve((1, 3), (2.3, 2.6), (0.0, 0.375)))


def add_many(file: RunFile[RunRecord]) -> None:
    for seed in range(1, 100):
        file.add(record(seed))


def fill(disk: Path, leave: int) -> Path:
    """A file that takes all but about ``leave`` bytes."""
    (disk / "room").write_bytes(b"x" * leave)
    blocker = disk / "blocker"
    with open(blocker, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    (disk / "room").unlink()
    return blocker


def test_runs_that_fit_no_more_leave_the_file_whole_and_come_in_once_there_is_room(small_disk: Path) -> None:
    file = RunFile(small_disk / "runs.jsonl", RunRecord.from_dict)
    file.add(record(0))
    blocker = fill(small_disk, leave=0)
    with pytest.raises(
        UsageError, match=r"runs\.jsonl can't be written \(No space left on device\); make room"
    ) as told:
        add_many(file)
    assert "\n" not in str(told.value)
    kept, rest = read_runs(small_disk / "runs.jsonl", RunRecord.from_dict)
    assert rest == 0
    assert [r.seed for r in kept] == list(range(len(kept)))
    assert kept == file.records
    blocker.unlink()
    file.add(record(len(kept)))
    file.close()
    assert len(read_runs(small_disk / "runs.jsonl", RunRecord.from_dict)[0]) == len(kept) + 1


def test_a_study_on_a_full_disk_can_be_read_and_goes_on_to_the_same_result(small_disk: Path, tmp_path: Path) -> None:
    # The database elsewhere: it alone is larger than the disk.
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    blocker: list[Path] = []

    def full_after_three(progress: object) -> None:
        if getattr(progress, "new_runs", 0) == 3 and not blocker:
            blocker.append(fill(small_disk, leave=0))

    with pytest.raises(UsageError, match=r"can't be written \(No space left on device"):
        tune(PLAN, small_disk / "study", storage=storage, on_progress=full_after_three)
    runs = len(read_folder(small_disk / "study").runs)
    assert runs >= 3
    blocker[0].unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gammaopt.report.html_report", lambda result: result.in_words())
        result = tune(PLAN, small_disk / "study", storage=storage)
        whole = tune(PLAN, tmp_path / "whole")
    assert (result.trials, result.runs) == (whole.trials, whole.runs)


def test_a_database_that_fills_up_asks_for_room_and_not_for_its_removal() -> None:
    from sqlalchemy import create_engine, text

    from gammaopt.tuning._search import _as_usage_error

    engine = create_engine("sqlite://")
    storage = SimpleNamespace(engine=engine)
    with engine.connect() as connection:
        connection.execute(text("PRAGMA max_page_count = 4"))
        connection.execute(text("CREATE TABLE t (x TEXT)"))
        with pytest.raises(UsageError, match=r"can't be used \(.*disk is full\); make room"), _as_usage_error(storage):
            connection.execute(text("INSERT INTO t VALUES (:x)"), {"x": "x" * 100_000})


def test_a_database_with_no_room_to_begin_asks_for_room(small_disk: Path) -> None:
    with pytest.raises(UsageError, match=r"can't be opened \(.*\); make room on the disk"):
        tune(PLAN, small_disk / "study")
    gc.collect()  # the connection that Optuna didn't get far with, or the disk is in use


def stopped(checkpoint: Path) -> None:
    """A run that stops at its first look and leaves a checkpoint."""

    def stop(progress: Progress) -> None:
        if progress.done:
            raise StopTraining

    train_many(LONG, [RUN], checkpoint=checkpoint, on_progress=stop)


def test_a_checkpoint_that_does_not_fit_is_told_and_the_one_before_stays(small_disk: Path, tmp_path: Path) -> None:
    with pytest.raises(StopTraining):
        stopped(tmp_path / "whole.pt")
    (small_disk / "run.pt").write_bytes(b"the one before")
    fill(small_disk, leave=(tmp_path / "whole.pt").stat().st_size // 2).rename(small_disk / "full")
    with pytest.raises(UsageError, match=r"the checkpoint .*run\.pt can't be written \(No space left on device\)"):
        stopped_over(small_disk / "run.pt")
    assert (small_disk / "run.pt").read_bytes() == b"the one before"
    assert {path.name for path in small_disk.iterdir()} == {"run.pt", "full"}


def stopped_over(path: Path) -> None:
    """As :func:`stopped`, over a file that is no checkpoint of this run."""
    from gammaopt.online._checkpoint import save
    from gammaopt.online._stack import Seeds, Stack
    from gammaopt.online._traces import Traces

    stack = Stack(Seeds(PLAN.recipe()), [RUN])
    save(path, [RUN], [PLAN.recipe().steps], stack, Traces([RUN], PLAN.recipe().steps), {})


@pytest.mark.parametrize("keep", [0, 10, 5000])
def test_a_torn_checkpoint_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(StopTraining):
        stopped(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedCheckpointError, match=r"run\.pt can't be read as a checkpoint"):
        train_many(LONG, [RUN], checkpoint=path)
    assert path.stat().st_size == keep


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "run.pt")
    with pytest.raises(DamagedCheckpointError, match=r"run\.pt can't be read as a checkpoint \(KeyError\)"):
        train_many(LONG, [RUN], checkpoint=tmp_path / "run.pt")


def test_a_study_with_a_file_size_limit_ends_in_one_line_and_exit_code_two(tmp_path: Path) -> None:
    """What a quota does, and needs no root: the kernel refuses to let a file grow."""
    code = (
        "import resource, sys, runpy;"
        "from gammaopt.tuning import _tune;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "sys.argv[0] = 'gammaopt'; runpy.run_module('gammaopt', run_name='__main__')"
    )
    words = ["tune", "digits", "--steps", "20", "--trials", "4", "--seeds", "1", "--confirm-seeds", "2", "--jobs", "1"]
    words += ["--storage", "sqlite://", "--out", str(tmp_path / "study")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "runs.jsonl can't be written (File too large); make room" in done.stderr
    assert "Traceback" not in done.stderr
    state = read_folder(tmp_path / "study")
    assert 0 < len(state.runs) < 10
