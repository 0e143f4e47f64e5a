"""Distributed studies on a real PostgreSQL server with real processes, which are killed, stopped and cut off."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest
import torch
from sqlalchemy.pool import NullPool

import gammaopt.report
from gammaopt import UsageError
from gammaopt.online import Run, RunRecord, train_many
from gammaopt.tuning import Remote, StudyPlan, tune
from gammaopt.tuning._folder import Cell, versions
from gammaopt.tuning._queue import PART, cell_hash

pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'gammaopt[postgres]'")

from gammaopt.tuning._remote import RemoteWorkers
from gammaopt.tuning._worker import work

if TYPE_CHECKING:
    from conftest import StartWorker, WorkerProcess
    from postgres_server import Server

SHORT = StudyPlan("digits", steps=20, trials=4, seeds=1, confirm_seeds=2)
LONG = replace(SHORT, steps=2000)  # a second or two: time to be killed in
GRACE = 2
OFTEN: dict[str, Any] = {"checkpoint_seconds": 0.0}  # a checkpoint at each look


def cells(count: int) -> list[Cell]:
    return [Cell(2.0 ** (i % 5), 0.5 + i // 5, i % 3) for i in range(count)]


@contextmanager
def coordinator(url: str, plan: StudyPlan, say: Callable[[str], object] = print) -> Iterator[RemoteWorkers]:
    remote = Remote("mine", grace=GRACE, say=say)
    with RemoteWorkers(plan, url, remote, began_under=versions(), study_id="x") as workers:
        yield workers


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def look_into(url: str) -> optuna.storages.RDBStorage:
    """The storage, for a look that leaves no connection open."""
    return optuna.storages.RDBStorage(url, engine_kwargs={"poolclass": NullPool})


def trials(url: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=f"mine/{PART}", storage=look_into(url)).get_trials(deepcopy=False)


def names(url: str) -> list[str]:
    return sorted(study.study_name for study in look_into(url).get_all_studies())


def assert_each_cell_is_done_once(url: str, planned: list[Cell], plan: StudyPlan) -> None:
    done = Counter(trial.user_attrs["cell"] for trial in trials(url) if trial.state.name == "COMPLETE")
    assert done == Counter(cell_hash(plan, cell) for cell in planned)
    assert {trial.state.name for trial in trials(url)} <= {"COMPLETE", "FAIL"}


def alone(plan: StudyPlan, cell: Cell) -> RunRecord:
    """The record of the same run, never interrupted."""
    return train_many(plan.recipe(), [Run(cell.gamma, cell.lr, cell.seed)])[0]


def checkpoint_of(tmp_path: Path, plan: StudyPlan, cell: Cell) -> Path:
    return tmp_path / "checkpoints" / f"{cell_hash(plan, cell)}.pt"


def in_background(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_four_workers_do_eighty_cells_each_once(database: str, start_worker: StartWorker) -> None:
    planned = cells(80)
    with coordinator(database, SHORT) as queue:
        workers = [start_worker("mine") for _ in range(4)]
        records = list(queue.run(planned))
    assert {Cell(r.gamma, r.lr, r.seed) for r in records} == set(planned)
    assert len(records) == 80
    assert [worker.wait() for worker in workers] == [0] * 4
    assert_each_cell_is_done_once(database, planned, SHORT)
    assert Counter(trial.state.name for trial in trials(database)) == {"COMPLETE": 80}
    by = Counter(trial.user_attrs["worker"] for trial in trials(database))
    assert len(by) == 4, "a worker had nothing to do"
    assert sum(worker.said.count("cell ") for worker in workers) == 80  # none was begun twice either


def test_kill_9_in_mid_trial_another_worker_goes_on_from_the_checkpoint(
    database: str, start_worker: StartWorker, tmp_path: Path
) -> None:
    first, *_ = planned = cells(2)
    path = checkpoint_of(tmp_path, LONG, first)
    with coordinator(database, LONG) as queue:
        records: list[RunRecord] = []
        waiting = in_background(lambda: records.extend(queue.run(planned)))
        victim = start_worker("mine", **OFTEN)
        until(path.exists)
        victim.send(signal.SIGKILL)
        victim.wait()
        # A mark in the state tells whether the next worker takes it up: all answers before it were right.
        content = torch.load(path, weights_only=True)
        assert 0 < content["step"] < LONG.steps  # type: ignore[operator]
        content["shares"] = [torch.ones_like(shares) for shares in content["shares"]]
        torch.save(content, path)
        helper = start_worker("mine")
        waiting.join(60)
        assert not waiting.is_alive()
    assert helper.wait() == 0
    assert_each_cell_is_done_once(database, planned, LONG)
    assert Counter(trial.state.name for trial in trials(database)) == {"COMPLETE": 2, "FAIL": 1}
    assert "from its checkpoint (1 lost)" in helper.said
    record = next(r for r in records if r.lr == first.lr and r.gamma == first.gamma)
    assert record.curve.accuracy[0] == 1.0 > alone(LONG, first).curve.accuracy[0]
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_worker_asked_to_stop_leaves_a_checkpoint_and_its_cell_and_exits_with_0(
    database: str, start_worker: StartWorker, tmp_path: Path, number: signal.Signals
) -> None:
    (cell,) = planned = cells(1)
    path = checkpoint_of(tmp_path, LONG, cell)
    with coordinator(database, LONG) as queue:
        queue._queue.enqueue(planned)
        stopped = start_worker("mine", checkpoint_seconds=1e9)
        until(lambda: "cell " in stopped.said)
        time.sleep(0.3)
        stopped.send(number)
        assert stopped.wait() == 0
        assert "handed back" in stopped.said
        assert 0 < torch.load(path, weights_only=True)["step"] < LONG.steps  # type: ignore[operator]
        assert [trial.state.name for trial in trials(database)] == ["WAITING"]
        start_worker("mine")
        (record,) = queue.run(planned)
    assert record == alone(LONG, cell)
    assert [trial.state.name for trial in trials(database)] == ["COMPLETE"]


def test_a_worker_that_was_stopped_for_too_long_drops_what_was_taken_and_goes_on(
    database: str, start_worker: StartWorker, tmp_path: Path
) -> None:
    planned = cells(3)
    with coordinator(database, LONG) as queue:
        records: list[RunRecord] = []
        waiting = in_background(lambda: records.extend(queue.run(planned)))
        sleeper = start_worker("mine", **OFTEN)
        until(checkpoint_of(tmp_path, LONG, planned[0]).exists)
        sleeper.send(signal.SIGSTOP)
        until(lambda: any(trial.state.name == "FAIL" for trial in trials(database)))
        helper = start_worker("mine")
        until(lambda: "from its checkpoint (1 lost)" in helper.said)
        sleeper.send(signal.SIGCONT)
        waiting.join(60)
        assert not waiting.is_alive()
    assert (sleeper.wait(), helper.wait()) == (0, 0)
    assert "was given to another worker after a silence; dropped here" in sleeper.said
    assert_each_cell_is_done_once(database, planned, LONG)
    assert Counter(trial.state.name for trial in trials(database)) == {"COMPLETE": 3, "FAIL": 1}
    assert {Cell(r.gamma, r.lr, r.seed): r for r in records}[planned[0]] == alone(LONG, planned[0])


@pytest.mark.usefixtures("no_report")
def test_the_server_is_restarted_in_mid_study_and_nothing_is_lost(
    postgres: Server, database: str, start_worker: StartWorker
) -> None:
    planned = cells(40)
    said: list[str] = []
    with coordinator(database, replace(SHORT, steps=100), said.append) as queue:
        records: list[RunRecord] = []
        waiting = in_background(lambda: records.extend(queue.run(planned)))
        workers = [start_worker("mine") for _ in range(2)]
        until(lambda: len(records) >= 4)
        postgres.stop()
        time.sleep(1.0)
        before = len(records)
        postgres.start()
        waiting.join(60)
        assert not waiting.is_alive()
    assert before < 40
    assert [worker.wait() for worker in workers] == [0, 0]
    for lines in ["\n".join(said), *(worker.said for worker in workers)]:
        assert "the storage is away (" in lines
        assert "the storage is back after" in lines
    assert len(records) == len({(r.gamma, r.lr, r.seed) for r in records}) == 40
    assert_each_cell_is_done_once(database, planned, replace(SHORT, steps=100))


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a tiny study's time."""
    monkeypatch.setattr(gammaopt.report, "html_report", lambda result: result.in_words())


@pytest.mark.usefixtures("no_report")
def test_a_study_through_workers_is_the_study_of_one_process(
    database: str, start_worker: StartWorker, tmp_path: Path
) -> None:
    plan = StudyPlan("digits", steps=20, trials=6, seeds=2, confirm_seeds=3)
    single = tune(plan, tmp_path / "single")
    done: list[Any] = []
    study = in_background(
        lambda: done.append(tune(plan, tmp_path / "many", storage=database, remote=Remote("mine", grace=GRACE)))
    )
    until(lambda: not study.is_alive() or "mine/cells" in names(database))
    workers: list[WorkerProcess] = [start_worker("mine") for _ in range(2)]
    study.join(60)
    (many,) = done
    assert [worker.wait() for worker in workers] == [0, 0]
    assert many.plan == single.plan
    assert many.trials == single.trials
    assert many.verdict == single.verdict
    assert {name: (arm.gamma, arm.lr) for name, arm in many.arms.items()} == {
        name: (arm.gamma, arm.lr) for name, arm in single.arms.items()
    }
    for name, runs in many.runs.items():
        for mine, theirs in zip(runs, single.runs[name], strict=True):
            assert mine.prequential_accuracy == theirs.prequential_accuracy
            assert mine.prequential_loss == pytest.approx(theirs.prequential_loss, rel=1e-5)
    assert names(database) == ["mine/cells", "mine/one_equal_budget", "mine/tuned"]
    counts = Counter(trial.state.name for trial in trials(database))
    assert counts == {"COMPLETE": len((tmp_path / "many" / "runs.jsonl").read_text().splitlines())}
