"""A worker: takes cells from a study's queue, trains them from their checkpoints, and hands in the records.

Any number may run, anywhere, started by anything, and any may be killed at any time:

kill -9           its trial goes stale, and another worker goes on from the checkpoint that it wrote last
SIGTERM, SIGUSR1  it writes a checkpoint, hands its cell back, and ends well
stopped too long  its trial was given to another; it notices, drops what it has, and takes another cell
server restarted  it trains on, and waits for the server with what it has to say
"""

from __future__ import annotations

import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import sqlalchemy.exc
import torch
from optuna.exceptions import StorageInternalError

from gammaopt._errors import UsageError
from gammaopt._stopping import SIGNALS, Stopping, asked_by
from gammaopt.online._checkpoint import DamagedCheckpointError
from gammaopt.online.ensemble import CHECKPOINT_SECONDS, Progress, StopTraining, together, train_many
from gammaopt.online.record import RunRecord
from gammaopt.online.train import Run
from gammaopt.tuning._frozen import git_commit
from gammaopt.tuning._queue import Claim, Queue, TakenError, find_queue
from gammaopt.tuning._server import PATIENCE, PatientStorage, StoppedWaitingError, open_server, server_errors
from gammaopt.tuning._tune import INSTALL, check_versions

STRAY_SECONDS = 3600.0
CONNECTION_GRACE = 60  # of a worker's own connections: it reaps nobody


def work(
    storage: str,
    study: str,
    *,
    checkpoints: str | Path,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    idle_seconds: float | None = None,
    patience: float = PATIENCE,
    stopping: Stopping | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> int:
    """Train cells of a study until it is done, or until a signal asks for the end.

    Args:
        storage: URL of the database; PostgreSQL.
        study: its name there, which the coordinator was given.
        checkpoints: folder for the state of the run in training, named by its cell. Shared between machines, it lets
            any of them go on with the cell of any other.
        checkpoint_seconds: how often that is written.
        idle_seconds: how long to wait for more cells; until the study is done if ``None``.
        patience: how many seconds to wait for a server that is away.
        stopping: asks for the end; :data:`SIGNALS` if ``None``, of which only the main thread hears.
        say: told in one line what happens.

    Returns:
        How many cells it finished.

    Raises:
        UsageError: for a storage that can't be opened or stays away, an unknown study, other package versions than
            the study's, or a folder that can't be written. The cell in work is handed back first.
    """
    with asked_by(SIGNALS) if stopping is None else nullcontext(stopping) as asked, suppress(StoppedWaitingError):
        if asked.told:  # while this was imported
            say("asked to stop before it began")
            return 0
        server = open_server(storage, grace=CONNECTION_GRACE, create=False, patience=patience, stopping=asked, say=say)
        try:
            with server_errors(storage, server.patience):
                queue = find_queue(server, study)
                worker = _Worker(queue, server, Path(checkpoints), checkpoint_seconds, asked, say)
                try:
                    return worker.loop(idle_seconds)
                finally:
                    worker.heart.stop()
        finally:
            server.engine.dispose()
    return 0


class _Heart:
    """A thread that gives signs of life for the trial in work, and notices when that was taken."""

    def __init__(self, queue: Queue, storage: PatientStorage) -> None:
        self._queue, self._storage = queue, storage
        self.interval = math.inf  # seconds between two signs, once they were read
        self._claim: Claim | None = None
        self._taken: Claim | None = None
        self._error: Exception | None = None
        self._ended, self._began = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def watch(self, claim: Claim | None) -> None:
        self._claim = claim
        self._began.set()

    def lost(self, claim: Claim) -> bool:
        """Whether the trial was taken.

        Raises:
            Exception: what ended the signs of life. A worker without them would train a cell that another is given.
        """
        if self._error is not None:
            raise self._error
        return self._taken is claim

    def _beat(self) -> None:
        try:
            while not self._ended.is_set():
                self.interval = self._queue.heartbeat  # read each time: a coordinator may ask for more signs
                if self._began.wait(self.interval):
                    self._began.clear()  # a claim is a sign of life itself; from here on by the heartbeat of now
                elif (claim := self._claim) is not None and not self._queue.holds(claim):
                    self._taken = claim
        except Exception as error:  # for the thread that trains, whatever it is
            self._error = error
        self._storage.remove_session()

    def stop(self) -> None:
        self._ended.set()
        self._began.set()
        self._thread.join(timeout=5.0)


class _Worker:
    def __init__(
        self,
        queue: Queue,
        storage: PatientStorage,
        checkpoints: Path,
        checkpoint_seconds: float,
        stopping: Stopping,
        say: Callable[[str], object],
    ) -> None:
        check_versions(f"the storage's {queue.name}", queue.attrs["versions"], INSTALL)
        self._recipe, self._commit = queue.plan.recipe(), git_commit(queue.plan.source)
        self._alone: bool | None = None  # whether the network can't be stacked, once that was tried
        self._queue, self._stopping, self._say = queue, stopping, say
        self._checkpoints, self._seconds = checkpoints, checkpoint_seconds
        try:
            checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{checkpoints} can't be made ({error.strerror}); give another --checkpoints") from None
        _sweep(checkpoints)
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self.heart = _Heart(queue, storage)

    def loop(self, idle_seconds: float | None) -> int:
        done, idle_since = 0, time.monotonic()
        seen_over = False
        self._say(f"{self._name} works on {self._queue.name}")
        while not self._stopping.told:
            claim = self._queue.claim(self._name, self._commit)
            if claim is not None:
                done += self._train(claim)
                idle_since = time.monotonic()
                seen_over = False
            elif (over := self._queue.over) and seen_over:
                self._say(f"the study is done; {done} cells finished here")
                return done
            elif idle_seconds is not None and time.monotonic() - idle_since > idle_seconds:
                self._say(f"no cell for {idle_seconds:g} s; {done} cells finished here")
                return done
            else:
                seen_over = over  # twice: a cell that changes hands has no live trial for a moment
                self._stopping.wait(min(1.0, self._queue.heartbeat / 4))
        self._say(f"asked to stop; {done} cells finished here")
        return done

    def _train(self, claim: Claim) -> bool:
        """Train a claimed cell to its end, and hand it in; false if it ended otherwise."""
        path = self._checkpoints / f"{claim.hash}.pt"
        self.heart.watch(claim)
        try:
            self._say(_of(claim) + (f", from its checkpoint ({claim.lost} lost)" if path.exists() else ""))
            try:
                self._run(claim, path)
            except DamagedCheckpointError:
                aside = path.with_suffix(".damaged")
                path.replace(aside)
                self._say(f"the checkpoint {path} can't be read; kept as {aside.name}, and the cell starts anew")
                self._run(claim, path)
        except TakenError:
            self._say(f"{_of(claim)} was given to another worker after a silence; dropped here")
            return False
        except StopTraining:
            self._hand_back(claim)
            return False
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError):
            raise  # there is nobody to hand it back to
        except BaseException:
            self._hand_back(claim)
            raise
        finally:
            self.heart.watch(None)
        return True

    def _run(self, claim: Claim, path: Path) -> None:
        last = time.monotonic()

        def look(_: Progress) -> None:
            nonlocal last
            silence, last = time.monotonic() - last, time.monotonic()
            try:
                taken = self.heart.lost(claim) or (silence > self.heart.interval and not self._queue.holds(claim))
            except StoppedWaitingError:
                raise StopTraining from None  # which writes a checkpoint
            if taken:
                raise TakenError
            if self._stopping.told:
                raise StopTraining

        def hand_in(_: Run, records: list[RunRecord]) -> None:
            try:
                self._queue.finish(claim, records[0])  # ahead of the end of the checkpoint
            except StoppedWaitingError:
                raise StopTraining from None  # the last checkpoint stays, and the cell goes on from it

        if self._alone is None:
            self._alone = not together(self._recipe)
        run = Run(claim.cell.gamma, claim.cell.lr, claim.cell.seed)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            train_many(
                self._recipe,
                [run],
                one_at_a_time=self._alone,
                checkpoint=path,
                checkpoint_seconds=self._seconds,
                on_done=hand_in,
                on_progress=look,
            )
        finally:
            torch.set_num_threads(threads)

    def _hand_back(self, claim: Claim) -> None:
        # Where that fails it was taken, or the server is away: then the trial goes stale, which does the same.
        with suppress(TakenError, StoppedWaitingError, sqlalchemy.exc.SQLAlchemyError, StorageInternalError):
            self._queue.hand_back(claim)
            self._say(f"{_of(claim)} handed back")


def _sweep(checkpoints: Path) -> None:
    """Remove what workers left that were killed as they wrote: files so old that nobody writes them any more."""
    for path in checkpoints.iterdir():
        if not re.fullmatch(r"\.[0-9a-f]{16}\.pt\..+", path.name):  # the folder may hold files of others
            continue
        with suppress(OSError):  # another worker was first
            if time.time() - path.stat().st_mtime > STRAY_SECONDS:
                path.unlink()


def _of(claim: Claim) -> str:
    cell = claim.cell
    return f"cell {claim.hash}: γ = {cell.gamma:.3g}, lr = {cell.lr:.3g}, seed {cell.seed}"
