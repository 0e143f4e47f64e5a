"""A study's own coordinator and a confirmation on more seeds at one queue, and two that make one at the same moment."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from memory_storage import MemoryStorage

from gammaopt import UsageError
from gammaopt.online import RunRecord
from gammaopt.online.record import Curve
from gammaopt.tuning import Remote, StudyPlan, _queue, _remote
from gammaopt.tuning._folder import Cell, versions
from gammaopt.tuning._queue import PART, Queue, find_queue, make_queue
from gammaopt.tuning._remote import RemoteWorkers, finished

PLAN = StudyPlan("digits", steps=2, trials=4, seeds=1, confirm_seeds=2)
MINE, THEIRS = Cell(1.0, 0.5, 0), Cell(1.0, 0.5, 1)
RECORD = RunRecord(1.0, 1.0, 0, 200, 1.0, 0.5, 1.0, 0.5, 1.0, None, Curve((), (), ()))


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> MemoryStorage:
    made = MemoryStorage()
    monkeypatch.setattr(_remote, "open_server", lambda *_, **__: made)
    return made


def coordinator(grace: int = 60, *, guest: bool = False) -> RemoteWorkers:
    return RemoteWorkers(PLAN, "x", Remote("mine", grace), began_under=versions(), study_id="x", guest=guest)


def work(queue: Queue) -> None:
    claim = queue.claim("me")
    assert claim is not None
    queue.finish(claim, RECORD)


@pytest.mark.parametrize("own_first", [True, False])
def test_workers_stay_for_the_cells_of_both_whichever_ends_first(storage: MemoryStorage, own_first: bool) -> None:
    own, guest = coordinator(), coordinator(guest=True)
    queue = find_queue(storage, "mine")
    for cell, who in {MINE: own, THEIRS: guest}.items():
        queue.enqueue([cell])
        who._queue.reap()
    work(queue)
    for who in (own, guest) if own_first else (guest, own):
        assert not queue.over
        who.__exit__(None, None, None)
    assert not queue.over  # a cell of the confirmation waits
    work(queue)
    assert queue.over


def test_a_confirmation_leaves_a_queue_open_or_closed_as_it_was(storage: MemoryStorage) -> None:
    for closed in (True, False):
        with coordinator(guest=True) as guest:
            queue = find_queue(storage, "mine")
            queue.set_closed(closed)
            queue.enqueue([MINE, THEIRS])
            while (claim := queue.claim("me")) is not None:
                queue.finish(claim, RECORD)
            assert list(guest.run([MINE, THEIRS])) == [RECORD, RECORD]
        assert queue.closed is closed


def test_the_commits_that_workers_trained_under_are_told_with_their_cells(storage: MemoryStorage) -> None:
    told: list[str] = []
    remote = Remote("mine", 60)
    with RemoteWorkers(PLAN, "x", remote, began_under=versions(), study_id="x", on_commit=told.append) as own:
        queue = find_queue(storage, "mine")
        queue.enqueue([MINE, THEIRS, Cell(1.0, 0.5, 2)])
        for commit in ("B", None, "A"):
            claim = queue.claim("me", commit)
            assert claim is not None
            queue.finish(claim, RECORD)
        assert len(list(own.run([MINE, THEIRS]))) == 2
    assert told == queue.commits() == ["B", "A"]


def test_a_finished_study_leaves_grace_and_waiting_cells_alone_and_ends_what_a_kill_left_open(
    storage: MemoryStorage,
) -> None:
    coordinator(grace=600)
    queue = find_queue(storage, "mine")
    queue.enqueue([THEIRS])
    for study_id, closed in {"another": False, "x": True}.items():
        with finished(PLAN, "x", Remote("mine", 4), study_id):
            pass
        assert (queue.grace, queue.closed, queue.over) == (600, closed, False)


def test_a_queue_in_the_making_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    made = optuna.create_study(storage=storage, study_name=f"mine/{PART}", direction="maximize")

    def others(_: float) -> None:
        if "id" not in made.user_attrs:
            for key, value in {"plan": PLAN.to_dict(), "versions": versions(), "grace": 60, "id": "x"}.items():
                made.set_user_attr(key, value)

    monkeypatch.setattr("gammaopt.tuning._queue.time.sleep", others)
    values: dict[str, Any] = {"began_under": versions(), "grace": 60}
    with pytest.raises(UsageError, match="the storage has another study called 'mine'"):
        make_queue(storage, "mine", PLAN, study_id="y", **values)
    assert find_queue(storage, "mine").plan == make_queue(storage, "mine", PLAN, study_id="x", **values).plan == PLAN


def test_a_queue_that_was_never_made_to_its_end_is_made_by_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_queue, "MAKING_SECONDS", 0.0)
    storage = MemoryStorage()
    optuna.create_study(storage=storage, study_name=f"mine/{PART}", direction="maximize").set_user_attr("plan", "x")
    with pytest.raises(UsageError, match="the queue of study 'mine' is half made"):
        find_queue(storage, "mine")
    make_queue(storage, "mine", PLAN, began_under=versions(), study_id="x", grace=60)
    assert find_queue(storage, "mine").plan == PLAN


def test_a_study_without_a_queue_is_looked_for_in_its_folder() -> None:
    storage = MemoryStorage()
    optuna.create_study(storage=storage, study_name="digits-0123/tuned")
    with pytest.raises(UsageError, match=r"'digits-0123' of the storage has no queue .*; give the folder that"):
        find_queue(storage, "digits-0123")
    with pytest.raises(UsageError, match=r"no study 'other' .*start `gammaopt tune … --study NAME` first"):
        find_queue(storage, "other")
