"""The grace period of a queue, when a coordinator changes it under workers that go by the one before."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import pytest
from memory_storage import MemoryStorage

from gammaopt.tuning import Remote, StudyPlan, _remote
from gammaopt.tuning._folder import Cell, versions
from gammaopt.tuning._queue import Queue, heartbeat_of, make_queue
from gammaopt.tuning._remote import RemoteWorkers
from gammaopt.tuning._server import PatientStorage
from gammaopt.tuning._worker import _Heart

PLAN = StudyPlan("digits", steps=2, trials=4, seeds=1, confirm_seeds=2)
CELL = Cell(1.0, 0.5, 0)


def queue_in(storage: MemoryStorage, grace: int) -> Queue:
    return make_queue(storage, "mine", PLAN, began_under=versions(), study_id="x", grace=grace)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def test_a_worker_reads_the_grace_at_each_claim_and_each_sign_of_life() -> None:
    storage = MemoryStorage()
    queue = queue_in(storage, 4000)
    queue.enqueue([CELL])
    heart = _Heart(queue, cast("PatientStorage", storage))
    until(lambda: heart.interval == heartbeat_of(4000))
    queue_in(storage, 4)
    claim = queue.claim("me")
    assert claim is not None
    heart.watch(claim)
    until(lambda: len(storage.beats) >= 2)  # the claim is one, and the next comes after a second, not after 1000
    queue_in(storage, 4000)
    until(lambda: heart.interval == heartbeat_of(4000))
    heart.stop()


def coordinator(monkeypatch: pytest.MonkeyPatch, storage: MemoryStorage, grace: int) -> RemoteWorkers:
    monkeypatch.setattr(_remote, "open_server", lambda *_, **__: storage)
    return RemoteWorkers(PLAN, "x", Remote("mine", grace), began_under=versions(), study_id="x")


def test_a_shorter_grace_reaps_nobody_that_goes_by_the_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    queue_in(storage, 600)
    first = coordinator(monkeypatch, storage, 4)
    first._reap({})
    assert storage.grace_period == 600
    again = coordinator(monkeypatch, storage, 4)  # killed and begun again: the workers may still go by 600
    again._reap({})
    assert storage.grace_period == 600
    again._opened -= 601
    again._reap({})
    again._reap({})
    assert storage.grace_period == 4


def test_workers_have_the_time_to_read_a_shorter_grace_from_when_the_server_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = MemoryStorage()
    queue_in(storage, 600)
    began = coordinator(monkeypatch, storage, 4)
    there = time.monotonic()  # after a wait for the server, as long as it may be
    monkeypatch.setattr(_remote, "make_queue", lambda *_, **__: began._queue)
    monkeypatch.setattr(time, "monotonic", lambda: there + 1e6 if hasattr(storage, "asked") else there)

    def opened(*_: object, **__: object) -> MemoryStorage:
        storage.asked = True  # type: ignore[attr-defined]
        return storage

    monkeypatch.setattr(_remote, "open_server", opened)
    again = RemoteWorkers(PLAN, "x", Remote("mine", 4), began_under=versions(), study_id="x")
    again._reap({})
    again._reap({})
    assert storage.grace_period == 600
    again._opened -= 601
    storage.away_until = there + 1e6 - 1  # and after an outage
    again._reap({})
    again._reap({})
    assert storage.grace_period == 600
    storage.away_until -= 600
    again._reap({})
    again._reap({})
    assert storage.grace_period == 4


def test_a_longer_grace_counts_at_once_for_every_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    first = coordinator(monkeypatch, storage, 4)
    coordinator(monkeypatch, storage, 600)
    first._opened -= 1e6
    for _ in range(2):
        first._reap({})
        assert storage.grace_period == 600
