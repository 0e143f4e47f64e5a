"""A worker whose server stays away, without a server: the calls that would reach it fail."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from gammaopt import UsageError
from gammaopt.online import Curve, RunRecord
from gammaopt.tuning import StudyPlan, _queue
from gammaopt.tuning._folder import Cell, versions
from gammaopt.tuning._queue import LOST_LIMIT, Claim, Queue, cell_hash, make_queue
from gammaopt.tuning._server import PatientStorage, StoppedWaitingError, Stopping
from gammaopt.tuning._worker import _Worker

PLAN = StudyPlan("digits", steps=200, trials=4, seeds=1, confirm_seeds=2)
CELL = Cell(1.0, 1.0, 0)
RECORD = RunRecord(1.0, 1.0, 0, 200, 1.0, 0.5, 1.0, 0.5, 1.0, None, Curve((), (), ()))


class _Memory(optuna.storages.InMemoryStorage):
    """A storage with the calls for signs of life, which count for nothing here."""

    def record_heartbeat(self, trial_id: int) -> None: ...

    def remove_session(self) -> None: ...


def queue_in(storage: _Memory) -> Queue:
    return make_queue(storage, "mine", PLAN, began_under=versions(), study_id="x", grace=4)


@pytest.fixture
def queue() -> Queue:
    return queue_in(_Memory())


def worker_of(queue: Queue, checkpoints: Path) -> tuple[_Worker, Claim]:
    queue.enqueue([CELL])
    claim = queue.claim("me")
    assert claim is not None
    storage = cast("PatientStorage", queue.storage)
    return _Worker(queue, storage, checkpoints, 0.0, Stopping(), lambda _: None), claim


def fails_with(error: Exception) -> property:
    """A property that fails on its first access, and is a minute later."""
    left = [error]

    def heartbeat(_: Queue) -> float:
        if left:
            raise left.pop()
        return 60.0

    return property(heartbeat)


def test_a_worker_without_signs_of_life_stops_and_says_why(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Queue, "heartbeat", fails_with(OperationalError("beat", {}, Exception("away for too long"))))
    worker, claim = worker_of(queue, tmp_path)
    with pytest.raises(OperationalError, match="away for too long"):
        worker._train(claim)
    worker.heart.stop()
    assert queue.counts() == {"RUNNING": 1}  # nobody to hand it back to: it goes stale


def test_a_worker_asked_to_stop_while_it_waits_for_the_server_leaves_a_checkpoint(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([False, False])

    def away(_: Claim) -> bool:
        for taken in looks:
            return taken
        raise StoppedWaitingError

    worker, claim = worker_of(queue, tmp_path)
    worker._seconds = 1e9  # none but the one at the end
    monkeypatch.setattr(worker.heart, "lost", away)
    assert not worker._train(claim)
    worker.heart.stop()
    assert (tmp_path / f"{claim.hash}.pt").exists()


def test_a_finished_cell_that_cannot_be_handed_in_falls_back_to_its_last_checkpoint(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise StoppedWaitingError

    worker, claim = worker_of(queue, tmp_path)
    monkeypatch.setattr(queue, "finish", away)
    assert not worker._train(claim)
    worker.heart.stop()
    assert (tmp_path / f"{claim.hash}.pt").exists()


def lose(queue: Queue, times: int) -> None:
    for _ in range(times):
        queue.enqueue([CELL])
        claim = queue.claim("me")
        assert claim is not None
        queue.storage.set_trial_state_values(claim.trial_id, TrialState.FAIL)


def test_a_cell_that_loses_worker_after_worker_is_blamed_but_not_for_ever(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna.storages, "fail_stale_trials", lambda _: None)
    lose(queue, LOST_LIMIT - 1)
    queue.reap()
    lose(queue, 1)
    with pytest.raises(UsageError, match=rf"the cell γ=1, lr=1, seed=0 lost {LOST_LIMIT} workers; .*memory"):
        queue.reap()
    again = queue_in(cast("_Memory", queue.storage))  # the same command, once the memory is there
    again.reap()
    queue.enqueue([CELL])
    claim = queue.claim("me")
    assert claim is not None
    queue.finish(claim, RECORD)
    queue.reap()  # it is done, whatever it cost


def test_the_code_that_trains_a_run_is_part_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cell_hash(PLAN, CELL)
    assert before == cell_hash(PLAN, CELL) != cell_hash(PLAN, Cell(1.0, 1.0, 1))
    monkeypatch.setattr(_queue, "versions", lambda: {**versions(), "torch": "1.0"})
    assert cell_hash(PLAN, CELL) != before
