"""Signals to a worker at the worst moments: in its first seconds, and in the midst of slow steps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from memory_storage import MemoryStorage
from torch import Tensor, nn

from gammaopt import _errors
from gammaopt._stopping import Stopping
from gammaopt._worker_command import worker as worker_command
from gammaopt.online import Run, ensemble, train_many
from gammaopt.online._stack import Stack
from gammaopt.online.ensemble import StopTraining
from gammaopt.tuning import StudyPlan, _worker
from gammaopt.tuning._folder import Cell, versions
from gammaopt.tuning._queue import make_queue
from gammaopt.tuning._server import PatientStorage
from gammaopt.tuning._worker import STRAY_SECONDS, _Worker

PLAN = StudyPlan("digits", steps=60, trials=4, seeds=1, confirm_seeds=2)


@pytest.fixture
def unheard() -> Iterator[list[int]]:
    """Signals that reach the process and not the worker; without this they would end the tests."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    yield heard
    signal.signal(signal.SIGTERM, before)


def test_sigterm_while_a_worker_imports_ends_it_well(unheard: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_import(*_: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(_errors, "require", slow_import)
    monkeypatch.setattr(_worker, "open_server", pytest.fail)
    worker_command("postgresql+psycopg://host/db", "mine", quiet=True)
    assert unheard == []


def test_slow_steps_are_looked_at_after_some_seconds_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [Run(1.0, 0.5, 0)]
    whole = train_many(PLAN.recipe(), run)
    real, steps = Stack.train_step, 0

    def slow(self: Stack) -> tuple[Tensor, Tensor]:
        nonlocal steps
        steps += 1
        time.sleep(0.02)
        return real(self)

    def stop(_: object) -> None:
        raise StopTraining

    monkeypatch.setattr(Stack, "train_step", slow)
    monkeypatch.setattr(ensemble, "LOOK_SECONDS", 0.1)
    with pytest.raises(StopTraining):
        train_many(PLAN.recipe(), run, checkpoint=tmp_path / "x.pt", on_progress=stop)
    assert steps < 20
    assert train_many(PLAN.recipe(), run, checkpoint=tmp_path / "x.pt") == whole


def a_worker(checkpoints: Path) -> _Worker:
    storage = MemoryStorage()
    queue = make_queue(storage, "mine", PLAN, began_under=versions(), study_id="x", grace=60)
    return _Worker(queue, cast("PatientStorage", storage), checkpoints, 1e9, Stopping(), lambda _: None)


def test_a_worker_removes_what_one_killed_in_mid_write_left_long_ago(tmp_path: Path) -> None:
    cut_off, fresh = f".{'0a' * 8}.pt.k2_x9zq1", f".{'1b' * 8}.pt.a0b1c2d3"
    of_others = [f"{'0a' * 8}.pt", ".model.pt.old", f".{'0a' * 7}.pt.k2_x9zq1", f"x.{'0a' * 8}.pt.k2_x9zq1"]
    for name in (cut_off, fresh, *of_others):
        (tmp_path / name).write_bytes(b"")
    for name in (cut_off, *of_others):
        long_ago = time.time() - 2 * STRAY_SECONDS
        os.utime(tmp_path / name, (long_ago, long_ago))
    a_worker(tmp_path).heart.stop()
    assert {path.name for path in tmp_path.iterdir()} == {fresh, *of_others}


def test_a_cell_that_changes_hands_is_no_end_of_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = a_worker(tmp_path)
    queue, waits = worker._queue, []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        if len(waits) == 1:  # it was given up when the worker looked, and now another trial of it is there
            queue.enqueue([Cell(1.0, 0.5, 0)])
        return False

    queue.set_closed(True)
    monkeypatch.setattr(worker._stopping, "wait", wait)
    assert worker.loop(None) == 1
    worker.heart.stop()
    assert len(waits) == 2


def test_a_worker_trains_a_network_that_cannot_be_stacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from gammaopt.online import TASKS

    def with_dropout() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 10))

    monkeypatch.setitem(TASKS, "digits", replace(TASKS["digits"], build=with_dropout))
    worker = a_worker(tmp_path)
    worker._queue.enqueue([Cell(1.0, 0.5, 0)])
    claim = worker._queue.claim("me")
    assert claim is not None
    assert worker._train(claim)
    worker.heart.stop()
    assert worker._queue.counts() == {"COMPLETE": 1}
