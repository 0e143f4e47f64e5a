"""A PostgreSQL server and worker processes for the tests of distributed studies."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from postgres_server import Server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A running PostgreSQL server; skips where its binary or its driver is missing."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'gammaopt[postgres]'")
    from postgres_server import binaries, running

    if binaries() is None:
        pytest.skip("no PostgreSQL server binary; install the distribution's package postgresql")
    with running() as server:
        yield server


@pytest.fixture
def database(postgres: Server) -> str:
    """The URL of an empty database."""
    return postgres.new_database()


class WorkerProcess:
    """A real process that does what ``gammaopt worker`` does, forked from one that has imported torch already."""

    def __init__(self, process: BaseProcess, log: Path) -> None:
        self.process, self._log = process, log

    @property
    def said(self) -> str:
        """All its lines so far."""
        return self._log.read_text(encoding="utf-8") if self._log.exists() else ""

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 180) -> int | None:
        """Wait for its end; its exit code."""
        self.process.join(seconds)
        return self.process.exitcode


def _run_worker(url: str, study: str, checkpoints: str, log: str, settings: dict[str, Any]) -> None:
    from gammaopt import UsageError
    from gammaopt.tuning._worker import work

    def say(line: str) -> None:
        with open(log, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    try:
        work(url, study, checkpoints=checkpoints, say=say, **settings)
    except UsageError as error:
        say(f"error: {error}")
        raise SystemExit(2) from None


StartWorker = Callable[..., WorkerProcess]


@pytest.fixture
def start_worker(tmp_path: Path, database: str) -> Iterator[StartWorker]:
    """``start_worker(study, **settings)`` starts a worker on the test's database; all are killed after the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gammaopt.tuning._worker", "gammaopt.online.tasks", "psycopg", "scipy.stats"])
    started: list[WorkerProcess] = []

    def start(study: str, **settings: Any) -> WorkerProcess:
        log = tmp_path / f"worker{len(started)}.log"
        checkpoints = str(settings.pop("checkpoints", tmp_path / "checkpoints"))
        words = (database, study, checkpoints, str(log), settings)
        process = context.Process(target=_run_worker, args=words, daemon=True)
        process.start()
        started.append(WorkerProcess(process, log))
        return started[-1]

    yield start
    for worker in started:
        with suppress(ProcessLookupError):
            worker.send(signal.SIGKILL)
        worker.process.join()
