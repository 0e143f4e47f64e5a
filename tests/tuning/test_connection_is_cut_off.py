"""A connection to the server that breaks off at any statement: the call waits, is made again, and nothing is lost.

Where it breaks matters: Optuna answers some errors of the driver with another query on the same broken transaction,
and what that raises no longer says that the server was away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from optuna.trial import TrialState
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.pool import NullPool

from gammaopt.online import Run, train_many
from gammaopt.tuning import Remote, StudyPlan
from gammaopt.tuning._folder import Cell, versions

pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'gammaopt[postgres]'")

from gammaopt.tuning._remote import RemoteWorkers

if TYPE_CHECKING:
    from gammaopt.tuning._server import PatientStorage

pytest_plugins = ["worker_processes"]

PLAN = StudyPlan("digits", steps=2, trials=4, seeds=1, confirm_seeds=2)


class Scissors:
    """Cuts a storage's connection on the server's side, at the first statement or commit of a kind not cut yet.

    A commit is cut off twice: before it, and after it, so that its answer is lost.
    """

    def __init__(self, storage: PatientStorage) -> None:
        self.cut: list[str] = []
        self.sharp = False
        self._last = ""
        self._other = create_engine(storage.engine.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        event.listen(storage.engine, "before_cursor_execute", self._statement)
        event.listen(storage.engine, "commit", lambda connection: self._meet(connection, f"commit after {self._last}"))
        dialect: Any = storage.engine.dialect
        self._commit, dialect.do_commit = dialect.do_commit, self._committed
        self._error = dialect.dbapi.OperationalError

    def _statement(self, connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        self._last = statement
        self._meet(connection, statement)

    def _committed(self, connection: Any) -> None:
        self._commit(connection)
        if self._due(f"answer to the commit after {self._last}"):
            connection.dbapi_connection.close()
            raise self._error("server closed the connection unexpectedly")

    def _due(self, kind: str) -> bool:
        if not self.sharp or kind in self.cut:
            return False
        self.cut.append(kind)
        self.sharp = False
        return True

    def _meet(self, connection: Connection, kind: str) -> None:
        if self._due(kind):
            pid = connection.connection.dbapi_connection.info.backend_pid  # type: ignore[union-attr]
            with self._other.connect() as other:
                other.exec_driver_sql(f"SELECT pg_terminate_backend({pid}, 5000)")


def test_wherever_the_connection_breaks_the_cell_is_queued_claimed_and_handed_in_once(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gammaopt.tuning._server.FIRST_PAUSE", 0.01)
    said: list[str] = []
    (record,) = train_many(PLAN.recipe(), [Run(1.0, 0.5, 0)])
    remote = Remote("mine", grace=60, say=said.append)
    with RemoteWorkers(PLAN, database, remote, began_under=versions(), study_id="x") as workers:
        queue = workers._queue
        scissors = Scissors(workers._storage)
        cells = lost = 0
        while not scissors.sharp:  # until a cell went all the way and nothing new was met
            scissors.sharp = True
            cell = Cell(1.0, 0.5, cells)
            cells += 1
            queue.enqueue([cell])
            claim = None
            for end in (queue.hand_back, lambda claim: queue.finish(claim, record)):
                claim = queue.claim("w")
                if claim is None:  # nobody knows that it was taken: it goes stale
                    ((trial,), lost) = queue.study.get_trials(states=(TrialState.RUNNING,)), lost + 1
                    queue.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                    queue.enqueue([cell])
                    claim = queue.claim("w")
                assert claim is not None
                assert claim.cell == cell
                assert queue.holds(claim)
                end(claim)
            assert claim is not None
            assert queue.records({claim.hash}) == [(claim.hash, record)]
        scissors.sharp = False
        assert cells > 30
        assert lost == 1
        # The rest Optuna itself tries again: it adds a trial up to five times.
        assert sum(line.startswith("the storage is away (") for line in said) > cells // 2
        counts = queue.counts()
        assert (counts.pop("COMPLETE"), counts.pop("FAIL")) == (cells, lost)
        assert counts.keys() == {"PRUNED"}  # handed back, or the second of two that one call added
