"""What a server says when it fails: what waiting mends is waited for, and all else is told in one line with its fix."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError, PendingRollbackError, ProgrammingError

from gammaopt import UsageError
from gammaopt.online import Curve, RunRecord
from gammaopt.tuning import Remote, StudyPlan, _remote, _server, _worker
from gammaopt.tuning._folder import Cell, versions
from gammaopt.tuning._queue import PART, make_queue
from gammaopt.tuning._record import Record
from gammaopt.tuning._remote import RemoteWorkers
from gammaopt.tuning._search import Search, open_storage, search
from gammaopt.tuning._server import PatientStorage, cannot_open, cannot_use, server_errors

PLAN = StudyPlan("digits", steps=2, trials=4, seeds=1, confirm_seeds=2)
CELL = Cell(1.0, 0.5, 0)
URL = "postgresql+psycopg://me:secret@host/db"


class DriverError(Exception):
    """An error of the driver, with PostgreSQL's code."""

    def __init__(self, words: str, sqlstate: str | None = None) -> None:
        super().__init__(words)
        self.sqlstate = sqlstate


def operational(words: str, sqlstate: str | None = None) -> OperationalError:
    return OperationalError("INSERT", {}, DriverError(words, sqlstate))


def wrapped(error: Exception) -> StorageInternalError:
    """As Optuna hands on what a commit raised."""
    made = StorageInternalError("An exception is raised during the commit.")
    made.__cause__ = error
    return made


def rolled_back(error: Exception) -> PendingRollbackError:
    """What the next query on a broken transaction raises."""
    made = PendingRollbackError("roll back first")
    made.__context__ = error
    return made


FULL = operational('could not extend file "base/5": No space left on device', "53100")
NO_DATABASE = operational('connection failed: FATAL:  database "db" does not exist')
NO_TABLE = ProgrammingError("SELECT", {}, DriverError('relation "version_info" does not exist', "42P01"))
AWAY = operational("server closed the connection unexpectedly")


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PatientStorage:
    """A patient storage, on a file, which coordinators and workers take for that of their URL."""
    made = PatientStorage(f"sqlite:///{tmp_path / 'x.db'}", heartbeat=1, grace=4, create=True, patience=0.3)
    for module in (_remote, _worker):
        monkeypatch.setattr(module, "open_server", lambda *_, **__: made)
    return made


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (FULL, "make room on its server's disk"),
        (wrapped(FULL), "make room on its server's disk"),
        (rolled_back(FULL), "make room on its server's disk"),
        (NO_DATABASE, "create that database"),
        (operational("permission denied", "42501"), "grant that to the user of --storage"),
        (operational("connection failed: FATAL:  password authentication failed for user"), "mend the user or the"),
        (operational("x", "28P01"), "mend the user or the password"),
    ],
)
def test_what_no_waiting_mends_is_told_at_once_with_its_fix(
    storage: PatientStorage, error: Exception, fix: str
) -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        storage.wait_for_it(call)
    assert len(calls) == 1
    for said in (str(cannot_use(URL, error, 600.0)), str(cannot_open(URL, error))):
        assert fix in said
        assert "secret" not in said
        assert "\n" not in said


@pytest.mark.parametrize("code", [None, "57P01", "40001", "40P01", "53300", "08006"])
def test_a_server_that_is_away_or_asks_for_another_try_is_waited_for(storage: PatientStorage, code: str | None) -> None:
    errors: list[Exception] = [operational("away", code), wrapped(operational("away", code))]

    def call() -> str:
        if errors:
            raise errors.pop()
        return "there"

    assert storage.wait_for_it(call) == "there"
    assert "was away for 600 s (away); start its server" in str(cannot_use(URL, operational("away", code), 600.0))
    assert "is away (away); start its server" in str(cannot_use(URL, operational("away", code), 0.0))


def test_a_missing_table_and_a_missing_database_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, message in {
        NO_TABLE: "holds no study yet; wait for the 0 % of `gammaopt tune … --study NAME`",
        NO_DATABASE: r'can\'t be opened \(.*database "db" does not exist\); create that database, or give another',
    }.items():
        fails = Mock(side_effect=wrapped(error))
        monkeypatch.setattr(_server, "PatientStorage", fails)
        with pytest.raises(UsageError, match=message):
            _worker.work(URL, "mine", checkpoints="x")
        monkeypatch.setattr(optuna.storages, "RDBStorage", fails)
        with pytest.raises(UsageError, match=message):
            open_storage(URL, own=False)


@pytest.mark.parametrize(("waits", "words"), [({}, "is away"), ({"patience": 600.0}, "was away for 600 s")])
def test_a_search_on_a_server_that_is_away_tells_nobody_to_remove_it(
    monkeypatch: pytest.MonkeyPatch, waits: dict[str, float], words: str
) -> None:
    def away(*_: object, **__: object) -> None:
        raise AWAY

    monkeypatch.setattr(optuna, "create_study", away)
    server = SimpleNamespace(engine=SimpleNamespace(url=make_url(URL)), **waits)
    arm = Search("tuned", PLAN.space("tuned"), 4)
    with pytest.raises(UsageError, match=rf"the storage .*host/db {words} \(.*\); start its server"):
        search(PLAN, "x", arm, server, Mock(), Mock())


def test_a_search_that_was_deleted_from_its_server_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = PatientStorage(f"sqlite:///{tmp_path / 'x.db'}", grace=4, create=True)
    monkeypatch.setattr("gammaopt.tuning._search._is_a_file", lambda _: False)
    arm = Search("tuned", PLAN.space("tuned"), 4)

    def evaluate(cells: list[Cell]) -> dict[Cell, Record]:
        delete(storage, "mine/tuned")
        return {
            cell: RunRecord(cell.gamma, cell.lr, cell.seed, 2, 1.0, 0.5, 1.0, 0.5, 1.0, None, Curve((), (), ()))
            for cell in cells
        }

    with pytest.raises(UsageError, match=r"the study was deleted from the storage .*; what made it, .* makes it again"):
        search(PLAN, "mine", arm, storage, evaluate, Mock())


def test_the_trials_that_gave_no_sign_of_life_for_long_are_told(storage: PatientStorage) -> None:
    queue = make_queue(storage, "mine", PLAN, began_under=versions(), study_id="x", grace=4)
    queue.enqueue([Cell(1.0, 0.5, seed) for seed in range(4)])
    silent, alive, done = (queue.claim("w") for _ in range(3))  # the fourth waits
    assert silent is not None
    assert alive is not None
    assert done is not None
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-100 seconds')")
    assert queue.holds(alive)
    storage.set_trial_state_values(done.trial_id, optuna.trial.TrialState.FAIL)
    assert storage.silent(queue.study._study_id, 90) == {silent.trial_id}
    assert storage.silent(queue.study._study_id, 110) == set()
    storage.away_until = time.monotonic() - 80
    assert storage.silent(queue.study._study_id, 90) == set()  # nobody could give one in all that time


def coordinator() -> RemoteWorkers:
    return RemoteWorkers(PLAN, URL, Remote("mine", 4), began_under=versions(), study_id="x")


def delete(storage: PatientStorage, name: str = f"mine/{PART}") -> None:
    other = RDBStorage(str(storage.engine.url))
    optuna.delete_study(study_name=name, storage=other)
    other.engine.dispose()


def test_a_worker_and_a_coordinator_whose_study_was_deleted_say_so(storage: PatientStorage, tmp_path: Path) -> None:
    workers = coordinator()
    workers._queue.enqueue([CELL])

    def say(line: str) -> None:
        if line.startswith("cell "):
            delete(storage)

    with pytest.raises(UsageError, match="the study was deleted from the storage"):
        _worker.work(URL, "mine", checkpoints=tmp_path / "c", checkpoint_seconds=0, idle_seconds=0, say=say)
    with pytest.raises(UsageError, match="the study was deleted from the storage"):
        list(workers.run([Cell(1.0, 0.5, 1)]))


@pytest.mark.parametrize("call", ["get_study_user_attrs", "set_study_user_attr", "_create_new_trial", "_get_trials"])
def test_a_coordinator_whose_server_stays_away_says_so(
    storage: PatientStorage, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def away(*_: object, **__: object) -> None:
        raise AWAY

    def all_of_it() -> None:
        with coordinator() as workers:
            list(workers.run([CELL]))

    make_queue(storage, "mine", PLAN, began_under=versions(), study_id="x", grace=4)
    monkeypatch.setattr(PatientStorage, call, away)
    with pytest.raises(UsageError, match=r"the storage .*host/db was away for .*; start its server"):
        all_of_it()


def test_a_bug_stays_a_bug() -> None:
    with pytest.raises(KeyError, match="oops"), server_errors(URL, 0.0):
        raise KeyError("oops")
