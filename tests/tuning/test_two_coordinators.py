"""A study's own coordinator and a confirmation on more seeds at one queue, and two that make one at the same moment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optuna
import pytest
from memory_storage import MemoryStorage
from optuna.trial import TrialState

from gammaopt import UsageError
from gammaopt.online import RunRecord
from gammaopt.online.record import Curve
from gammaopt.tuning import Remote, StudyPlan, _queue, _remote
from gammaopt.tuning._folder import Cell, versions
from gammaopt.tuning._queue import PART, Queue, find_queue, make_queue
from gammaopt.tuning._remote import RemoteWorkers, finished
from gammaopt.tuning._search import experiments_allowed
from gammaopt.tuning._state import read_storage

PLAN = StudyPlan("digits", steps=2, trials=4, seeds=1, confirm_seeds=2)
MINE, THEIRS, OTHER = (Cell(1.0, 0.5, seed) for seed in range(3))
RECORD = RunRecord(1.0, 0.5, 0, 200, 1.0, 0.5, 1.0, 0.5, 1.0, None, Curve((), (), ()))


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> MemoryStorage:
    made = MemoryStorage()
    monkeypatch.setattr(_remote, "open_server", lambda *_, **__: made)
    return made


def coordinator(grace: int = 60, *, guest: bool = False) -> RemoteWorkers:
    return RemoteWorkers(PLAN, "x", Remote("mine", grace), began_under=versions(), study_id="x", guest=guest)


def work(queue: Queue, commit: str | None = None) -> None:
    claim = queue.claim("me", commit)
    assert claim is not None
    queue.finish(claim, replace(RECORD, seed=claim.cell.seed))


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


def test_workers_of_a_finished_study_wait_for_no_cell_that_nobody_will_queue_again(storage: MemoryStorage) -> None:
    with coordinator(grace=60), coordinator(guest=True):
        queue = find_queue(storage, "mine")
        queue.enqueue([MINE, THEIRS])
        lost = queue.claim("killed")  # as is the confirmation that wanted it
        assert lost is not None
    work(queue)
    over = [queue.over]
    storage.last_beat[lost.trial_id] -= 2 * 60 - 5
    over.append(queue.over)  # a coordinator that is there may just be about to see it
    storage.last_beat[lost.trial_id] -= 10
    over.append(queue.over)
    queue.enqueue([OTHER])
    over.append(queue.over)
    work(queue)
    queue.set_closed(False)
    over.append(queue.over)
    assert over == [False, False, True, False, False]


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


def test_the_commits_that_workers_trained_under_are_told_ahead_of_their_records(storage: MemoryStorage) -> None:
    told: list[object] = []
    remote = Remote("mine", 60)
    with RemoteWorkers(
        PLAN, "x", remote, began_under=versions(), study_id="x", on_commit=lambda *each: told.append(each)
    ) as own:
        queue = find_queue(storage, "mine")
        queue.enqueue([MINE, THEIRS, OTHER])
        for commit in ("B", None, "A"):
            work(queue, commit)
        for record in own.run([MINE, THEIRS]):
            told.append(record.seed)
    assert told == [(MINE, "B"), 0, (THEIRS, None), 1]


def test_a_storage_tells_the_commit_of_each_run_that_is_another_than_its_search_began_under(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gammaopt.tuning._server.open_server", lambda *_, **__: storage)
    coordinator()
    optuna.create_study(storage=storage, study_name="mine/tuned").set_user_attr("git_commit", "A")
    queue = find_queue(storage, "mine")
    queue.enqueue([MINE, THEIRS, OTHER])
    for commit in ("B", None, "A"):
        work(queue, commit)
    commits = read_storage("postgresql://x", "mine").commits
    assert [commits.of(cell) for cell in (MINE, THEIRS, OTHER)] == ["B", None, "A"]
    assert commits.under([MINE, OTHER]) == ["A", "B"]
    assert commits.under([MINE, THEIRS]) == ["B"]
    assert commits.of(Cell(1.0, 0.5, 3)) == "A"  # what workers had finished that told no commit yet


def test_a_worker_outside_git_that_takes_a_lost_ones_cell_is_not_taken_for_that_ones_commit(
    storage: MemoryStorage,
) -> None:
    coordinator()
    queue = find_queue(storage, "mine")
    queue.enqueue([MINE])
    claim = queue.claim("lost", "B")
    assert claim is not None
    storage.set_trial_state_values(claim.trial_id, TrialState.FAIL)
    with experiments_allowed():
        optuna.storages.RetryHeartbeatStaleTrialCallback()(queue.study, storage.get_trial(claim.trial_id))
    work(queue, None)
    assert queue.commits() == {claim.hash: None}


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
