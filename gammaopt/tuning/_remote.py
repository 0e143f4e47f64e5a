"""The coordinator's side of a distributed study: hand cells to whoever takes them, and collect their records.

It has the same face as :class:`gammaopt.tuning._workers.Workers`, so a study with workers on other machines is the
study of one process: the same plan, searches, cells and verdict.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from gammaopt._errors import UsageError
from gammaopt.online.record import RunRecord
from gammaopt.tuning._folder import Cell
from gammaopt.tuning._plan import StudyPlan
from gammaopt.tuning._queue import Queue, cell_hash, find_queue, heartbeat_of, make_queue
from gammaopt.tuning._server import PatientStorage, open_server, server_errors
from gammaopt.tuning._tune import Remote
from gammaopt.tuning._workers import Workers

QUIET_SECONDS = 20.0  # without any worker, before a word about it


class RemoteWorkers:
    """Trains cells by putting them into the queue. A context manager; the queue is closed when the study is done.

    With ``guest=True`` that is left to the study's own coordinator: workers stay for the cells of both. ``on_commit``
    is told the commit of the code that each cell was trained with, ``None`` if it is not known, ahead of its record.
    """

    def __init__(
        self,
        plan: StudyPlan,
        url: str,
        remote: Remote,
        *,
        began_under: dict[str, str],
        study_id: str,
        guest: bool = False,
        on_commit: Callable[[Cell, str | None], object] = lambda _, __: None,
    ) -> None:
        self._on_commit = on_commit
        self._plan, self._url, self._remote, self._guest = plan, url, remote, guest
        heartbeat = heartbeat_of(remote.grace)
        self._poll = min(1.0, heartbeat / 4)
        self._reap_every = float(heartbeat)
        # Of its own: Optuna's ask, which the searches use, doesn't go with heartbeats.
        self._storage: PatientStorage = open_server(
            url, heartbeat=heartbeat, grace=remote.grace, create=True, say=remote.say
        )
        try:
            with server_errors(url, self._storage.patience):
                self._queue: Queue = make_queue(
                    self._storage, remote.study, plan, began_under=began_under, study_id=study_id, grace=remote.grace
                )
        except BaseException:
            self._storage.engine.dispose()
            raise
        self._opened = time.monotonic()  # only now: the grace is in the queue, where workers read it

    def __enter__(self) -> RemoteWorkers:
        return self

    def run(self, cells: Iterable[Cell]) -> Iterator[RunRecord]:
        """Have the cells trained and yield their records as they come in."""
        waiting = {cell_hash(self._plan, cell): cell for cell in cells}
        if waiting:
            with server_errors(self._url, self._storage.patience):
                yield from self._run(waiting)

    def _run(self, waiting: dict[str, Cell]) -> Iterator[RunRecord]:
        if not self._guest:
            self._queue.set_closed(False)
        self._queue.enqueue(waiting.values())
        reaped = busy = time.monotonic()
        while waiting:
            if records := self._queue.records(waiting):
                commits = self._queue.commits()
                for name, record in records:
                    self._on_commit(waiting.pop(name), commits.get(name))
                    yield record
            if not waiting:
                return
            now = time.monotonic()
            if now - reaped > self._reap_every:
                reaped = now
                self._reap(waiting)
            if self._queue.counts()["RUNNING"]:
                busy = now
            elif now - busy > QUIET_SECONDS:
                busy = now
                self._remote.say(
                    f"{len(waiting)} cells wait and no worker is at work; "
                    f"start some: gammaopt worker --storage URL --study {self._remote.study}"
                )
            time.sleep(self._poll)

    def _reap(self, waiting: dict[str, Cell]) -> None:
        now = time.monotonic()
        # Read each time, for another coordinator may have changed it.
        grace = self._storage.grace_period = self._queue.reaping_grace
        away_until = self._storage.away_until
        if now - max(self._opened, away_until) > grace > self._remote.grace == self._queue.grace:
            self._queue.settle_grace()  # by now each worker has given a sign of life, and read it
        # After an outage the workers get the time to show that they live.
        if now - away_until > grace:
            self._queue.reap()
            # A coordinator killed between failing a trial and queueing its cell again has left that cell nowhere.
            self._queue.enqueue(waiting.values())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._guest:
                with server_errors(self._url, self._storage.patience):
                    self._queue.set_closed(True)
        finally:
            self._storage.engine.dispose()


@contextmanager
def finished(plan: StudyPlan, url: str, remote: Remote, study_id: str) -> Iterator[Workers]:
    """Who trains the cells of a study that has its result: nobody. Its queue is closed, if a kill had left it open."""
    storage = open_server(url, grace=remote.grace, create=True, say=remote.say)
    try:
        with (
            server_errors(url, storage.patience),
            suppress(UsageError),
        ):  # it may have been made in a storage that isn't there any more
            queue = find_queue(storage, remote.study)
            if queue.attrs["id"] == study_id and not queue.closed:
                queue.set_closed(True)
    finally:
        storage.engine.dispose()
    yield Workers(plan, 1)
