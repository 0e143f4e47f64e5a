"""A database server that many processes share, and that may be away for a while.

Each call of Optuna's storage is one transaction. One that was cut off, because the server was restarted or the network
failed, is made again after growing pauses, up to ``patience`` seconds. What a call made twice could do is harmless:
attributes are set to the same value, a claim whose answer was lost goes stale and is retried, a trial that was finished
or given up stays so, and of two trials of one cell the first counts (:mod:`gammaopt.tuning._queue`).
"""

from __future__ import annotations

import functools
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import TrialState
from sqlalchemy.engine import make_url

from gammaopt._errors import UsageError
from gammaopt._stopping import Stopping as Stopping
from gammaopt.tuning._search import experiments_allowed, no_driver, without_secrets

PATIENCE = 600.0  # seconds that a process waits for the server
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
CONNECT_SECONDS = 10
IDLE_SECONDS = 30  # inside a transaction, at least

_CALLS = (  # what Optuna asks of the storage, and the cache in front of it
    "create_new_study", "delete_study", "set_study_user_attr", "set_study_system_attr", "get_study_id_from_name",
    "get_study_name_from_id", "get_study_directions", "get_study_user_attrs", "get_study_system_attrs",
    "get_all_studies", "_create_new_trial", "_set_trial_param", "get_trial_param", "set_trial_state_values",
    "set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr", "get_trial", "_get_trials",
    "get_trial_id_from_study_id_trial_number", "_get_best_trial_id", "record_heartbeat", "_get_stale_trial_ids",
)  # fmt: skip


_REMEDIES = {  # SQLSTATE, or its class → what a user can do
    "53100": "make room on its server's disk, and run the same command to go on",
    "28": "mend the user or the password in --storage",
    "3D000": "create that database, or give another --storage",
    "42501": "grant that to the user of --storage",
}
_WORDS = {  # SQLSTATE → the words of an error that comes without one
    "3D000": 'database ".*" does not exist',
    "28000": 'role ".*" does not exist|authentication failed|no pg_hba|no password supplied',
    "42P01": "no such table",
    "53100": "disk is full|No space left",
}
NO_TABLE = "42P01"


class StoppedWaitingError(Exception):
    """The process was told to stop while it waited for the server."""


class PatientStorage(RDBStorage):
    """Optuna's storage on a server, which waits for the server when that is away.

    Args:
        url: of the database.
        heartbeat, grace: seconds between two signs of life of a trial, and those without one after which it is
            stale; ``heartbeat`` is 0 for a process that reaps no stale trials.
        create: make Optuna's tables if they are missing.
        patience: seconds to wait for a server that is away.
        stopping: ends the waiting with :class:`StoppedWaitingError`.
        say: told in one line when the server is away, and when it is back.
    """

    def __init__(
        self,
        url: str,
        *,
        heartbeat: int = 0,
        grace: int,
        create: bool,
        patience: float = PATIENCE,
        stopping: Stopping | None = None,
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.patience, self._stopping, self._say = patience, stopping or Stopping(), say
        self.away_until = -float("inf")  # time.monotonic() of the last call that had to wait
        try:
            with experiments_allowed():
                super().__init__(
                    url,
                    engine_kwargs={"pool_pre_ping": True, "connect_args": _connect_args(url, grace)},
                    heartbeat_interval=heartbeat or None,
                    grace_period=grace,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback() if heartbeat else None,
                    skip_table_creation=not create,
                )
        except Exception:
            if hasattr(self, "engine"):
                self.engine.dispose()
            raise

    def silent(self, study_id: int, seconds: float) -> set[int]:
        """The running trials of a study that gave no sign of life for so long, though the server was there for it."""
        found: set[int] = self.wait_for_it(lambda: self._silent(study_id, seconds))
        return found if time.monotonic() - self.away_until > seconds else set()

    def _silent(self, study_id: int, seconds: float) -> set[int]:
        trial, beat = models.TrialModel, models.TrialHeartbeatModel
        with _create_scoped_session(self.scoped_session, True) as session:
            # Of the server's clock, and naive as heartbeats are.
            now = session.execute(sqlalchemy.func.now()).scalar_one().replace(tzinfo=None)
            found = (
                session.query(trial.trial_id)
                .join(beat, beat.trial_id == trial.trial_id)
                .filter(trial.study_id == study_id, trial.state == TrialState.RUNNING)
                .filter(beat.heartbeat < now - timedelta(seconds=seconds))
            )
            return {trial_id for (trial_id,) in found}

    def wait_for_it(self, call: Callable[[], Any]) -> Any:
        """What ``call`` returns, made again for as long as the server is away."""
        began: float | None = None
        pause = FIRST_PAUSE
        while True:
            try:
                answer = call()
            except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
                now = time.monotonic()
                began = now if began is None else began
                if not _is_away(error) or now - began > self.patience:
                    raise
                if pause == FIRST_PAUSE:
                    self._say(f"the storage is away ({reason_of(error)}); waiting for it")
                if self._stopping.wait(pause * random.uniform(0.5, 1.0)):
                    raise StoppedWaitingError from None
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if began is not None:
                    self.away_until = time.monotonic()
                    self._say(f"the storage is back after {self.away_until - began:.1f} s")
                return answer


def _patient(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def patient(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        return self.wait_for_it(lambda: call(self, *args, **kwargs))

    return patient


for _name in _CALLS:
    setattr(PatientStorage, _name, _patient(getattr(RDBStorage, _name)))


def _is_away(error: Exception) -> bool:
    """Whether the server could not be reached, broke off, or asks for another try: all are OperationalErrors.

    So are a full disk, a refused login and a missing database, which no waiting mends; SQLSTATE tells them.

    One of these that Optuna answers with another query on the same transaction ends as a PendingRollbackError. Optuna
    has rolled back by the time that it gets here, so another try begins on a new connection.
    """
    cause = _cause(error)
    away = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError, sqlalchemy.exc.PendingRollbackError)
    if _remedy(error) is not None:
        return False
    return isinstance(cause, away) or bool(getattr(cause, "connection_invalidated", False))


def _cause(error: BaseException) -> BaseException:
    """What the driver said first, under what was said about it."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, sqlalchemy.exc.PendingRollbackError) and cause.__context__ is not None:
        return cause.__context__
    return cause or error


def _sqlstate(error: BaseException) -> str | None:
    """PostgreSQL's code of an error; by its words where a connection failed, for the driver tells no code there."""
    driver = getattr(_cause(error), "orig", None)
    for name in ("sqlstate", "pgcode"):
        if (code := getattr(driver, name, None)) is not None:
            return str(code)
    words = str(driver or "")
    return next((code for code, pattern in _WORDS.items() if re.search(pattern, words)), None)


def _remedy(error: BaseException) -> str | None:
    """What mends an error that no waiting mends; ``None`` for any other."""
    code = _sqlstate(error) or ""
    return _REMEDIES.get(code) or _REMEDIES.get(code[:2])


def reason_of(error: Exception) -> str:
    """The driver's own words, one line."""
    cause = _cause(error)
    words = str(getattr(cause, "orig", None) or cause).strip().splitlines()
    return words[0].rstrip(".") if words else type(cause).__name__


def _connect_args(url: str, grace: int) -> dict[str, Any]:
    """Settings of a connection to PostgreSQL, so that no process that hangs or vanishes holds up the others."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "postgresql":
        return {}
    settings: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        # A process stopped inside a transaction would keep its row locked. And heartbeats are naive times.
        "options": f"-c idle_in_transaction_session_timeout={1000 * max(IDLE_SECONDS, grace)} -c TimeZone=UTC",
    }
    return {name: value for name, value in settings.items() if name not in parsed.query}


def open_server(url: str, **settings: Any) -> PatientStorage:
    """A :class:`PatientStorage`, for a database that can serve several processes.

    Raises:
        UsageError: for SQLite, which can't, or a server that can't be reached now.
    """
    if backend_of(url) == "sqlite":
        raise UsageError(
            f"the storage {without_secrets(url)} serves one process only: several would run cells twice; "
            "give a PostgreSQL one, postgresql+psycopg://…"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        try:
            return PatientStorage(url, **settings)
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            if not settings["create"]:
                raise
            # Another process was making the tables at the same moment; PostgreSQL lets only one.
            time.sleep(1.0)
            return PatientStorage(url, **settings)
    except ImportError:
        raise no_driver(url) from None
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, RuntimeError) as error:
        raise cannot_open(url, error) from None


def backend_of(url: str) -> str:
    """Which database a storage is, e.g. ``"postgresql"``.

    Raises:
        UsageError: for what is no URL of a storage.
    """
    try:
        return make_url(url).get_backend_name()
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        raise cannot_open(url, error) from None


def cannot_open(url: str, error: Exception) -> UsageError:
    """A storage that can't be opened, in words."""
    shown = without_secrets(url)
    if isinstance(error, sqlalchemy.exc.NoSuchModuleError):  # postgres://, as some providers write it
        return UsageError(f"the storage {shown} is of no known kind; for PostgreSQL write postgresql+psycopg://…")
    if _sqlstate(error) == NO_TABLE:  # Optuna's
        return UsageError(f"{shown} holds no study yet; wait for the 0 % of `gammaopt tune … --study NAME`")
    fix = _remedy(error) or "start its server, or give another --storage"
    return UsageError(f"the storage {shown} can't be opened ({reason_of(error)}); {fix}")


def cannot_use(url: str, error: Exception, patience: float) -> UsageError:
    """A storage that failed in mid-work, in words; ``patience`` is how long was waited for it."""
    shown, reason = without_secrets(url), reason_of(error)
    if _is_away(error):
        away = f"was away for {patience:g} s" if patience else "is away"
        return UsageError(f"the storage {shown} {away} ({reason}); start its server, and run the same command to go on")
    fix = _remedy(error) or "see its server's log, and run the same command to go on"
    return UsageError(f"the storage {shown} can't be used ({reason}); {fix}")


@contextmanager
def server_errors(url: str, patience: float) -> Iterator[None]:
    """Tell what a storage that waits ``patience`` seconds failed of in one line, and that a study was deleted from it.

    Raises:
        UsageError: that line.
    """
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
        raise cannot_use(url, error, patience) from None
    except KeyError as error:
        if error.args != (models.NOT_FOUND_MSG,):
            raise
        raise UsageError(
            f"the study was deleted from the storage {without_secrets(url)}; what made it, `gammaopt tune …` or "
            "study(), makes it again from the runs in its folder when it is run with the same arguments"
        ) from None
