"""Distributed studies on a real PostgreSQL server with real processes, which are killed, stopped and cut off."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest
import torch
from sqlalchemy import create_engine
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.pool import NullPool

import gammaopt.report
from gammaopt import UsageError
from gammaopt.cli import main
from gammaopt.online import Run, RunRecord, train_many
from gammaopt.tuning import Remote, StudyPlan, tune
from gammaopt.tuning._folder import Cell, versions
from gammaopt.tuning._queue import PART, _waiting, cell_hash
from gammaopt.tuning._state import read_storage

pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'gammaopt[postgres]'")

from gammaopt.tuning._remote import RemoteWorkers
from gammaopt.tuning._worker import work

if TYPE_CHECKING:
    from postgres_server import Server
    from worker_processes import StartWorker, WorkerProcess

pytest_plugins = ["worker_processes"]

SHORT = StudyPlan("digits", steps=20, trials=4, seeds=1, confirm_seeds=2)
LONG = replace(SHORT, steps=2000)  # a second or two: time to be killed in
GRACE, SOON = 60, 3  # seconds; the second for workers that are to be missed soon
OFTEN: dict[str, Any] = {"checkpoint_seconds": 0.0}  # a checkpoint at each look


def cells(count: int) -> list[Cell]:
    return [Cell(2.0 ** (i % 5), 0.5 + i // 5, i % 3) for i in range(count)]


@contextmanager
def coordinator(
    url: str, plan: StudyPlan, say: Callable[[str], object] = print, grace: int = GRACE
) -> Iterator[RemoteWorkers]:
    remote = Remote("mine", grace=grace, say=say)
    with RemoteWorkers(plan, url, remote, began_under=versions(), study_id="x") as workers:
        yield workers


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
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
    """The studies there are, none before Optuna's tables are made."""
    try:
        with create_engine(url, poolclass=NullPool).connect() as connection:
            return sorted(connection.exec_driver_sql("SELECT study_name FROM studies").scalars())
    except ProgrammingError:
        return []


def assert_each_cell_is_done_once(url: str, planned: list[Cell], plan: StudyPlan) -> None:
    done = Counter(trial.user_attrs["cell"] for trial in trials(url) if trial.state.name == "COMPLETE")
    assert done == Counter(cell_hash(plan, cell) for cell in planned)
    assert {trial.state.name for trial in trials(url)} <= {"COMPLETE", "FAIL", "PRUNED"}


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
    with coordinator(database, LONG, grace=SOON) as queue:
        records: list[RunRecord] = []
        waiting = in_background(lambda: records.extend(queue.run(planned)))
        victim = start_worker("mine", **OFTEN)
        until(path.exists)
        victim.send(signal.SIGKILL)
        victim.wait()
        # A mark in the state tells whether the next worker takes it up: all answers before it were right.
        content = torch.load(path, weights_only=True)
        assert 0 < content["step"] < LONG.steps
        content["shares"] = torch.ones_like(content["shares"])
        torch.save(content, path)
        helper = start_worker("mine")
        waiting.join(180)
        assert not waiting.is_alive()
    assert helper.wait() == 0
    assert_each_cell_is_done_once(database, planned, LONG)
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
        assert 0 < torch.load(path, weights_only=True)["step"] < LONG.steps
        assert [trial.state.name for trial in trials(database)] == ["PRUNED", "WAITING"]
        start_worker("mine")
        (record,) = queue.run(planned)
    assert record == alone(LONG, cell)
    assert [trial.state.name for trial in trials(database)] == ["PRUNED", "COMPLETE"]


def test_a_worker_that_was_stopped_for_too_long_drops_what_was_taken_and_goes_on(
    database: str, start_worker: StartWorker, tmp_path: Path
) -> None:
    planned = cells(3)
    with coordinator(database, LONG, grace=SOON) as queue:
        records: list[RunRecord] = []
        waiting = in_background(lambda: records.extend(queue.run(planned)))
        sleeper = start_worker("mine", **OFTEN)
        until(checkpoint_of(tmp_path, LONG, planned[0]).exists)
        sleeper.send(signal.SIGSTOP)
        until(lambda: any(trial.state.name == "FAIL" for trial in trials(database)))
        helper = start_worker("mine")
        until(lambda: "from its checkpoint (1 lost)" in helper.said)
        sleeper.send(signal.SIGCONT)
        waiting.join(180)
        assert not waiting.is_alive()
    assert (sleeper.wait(), helper.wait()) == (0, 0)
    assert "was given to another worker after a silence; dropped here" in sleeper.said
    assert_each_cell_is_done_once(database, planned, LONG)
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
        waiting.join(180)
        assert not waiting.is_alive()
    assert before < 40
    assert [worker.wait() for worker in workers] == [0, 0]
    # A worker need not meet the outage, nor live to see its end, if the other one does what is left meanwhile.
    for lines in ["\n".join(said), "\n".join(worker.said for worker in workers)]:
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
    study.join(180)
    (many,) = done
    assert [worker.wait() for worker in workers] == [0, 0]
    assert many.plan == single.plan
    assert many.trials == single.trials
    assert many.verdict == single.verdict
    assert {name: (arm.gamma, arm.lr) for name, arm in many.arms.items()} == {
        name: (arm.gamma, arm.lr) for name, arm in single.arms.items()
    }
    for name, runs in many.runs.items():
        mine: Any
        theirs: Any
        for mine, theirs in zip(runs, single.runs[name], strict=True):
            assert mine.prequential_accuracy == theirs.prequential_accuracy
            assert mine.prequential_loss == pytest.approx(theirs.prequential_loss, rel=1e-5)
    assert names(database) == ["mine/cells", "mine/one_equal_budget", "mine/tuned"]
    stored = read_storage(database, "mine")
    assert {stored.commits.of(cell) for cell in stored.runs} == {stored.commits.begun} == {single.git_commit}
    assert many.git_commit == stored.result().git_commit == single.git_commit
    assert {trial.user_attrs["git_commit"] for trial in trials(database)} == {single.git_commit}
    counts = Counter(trial.state.name for trial in trials(database))
    assert counts == {"COMPLETE": len((tmp_path / "many" / "runs.jsonl").read_text().splitlines())}


# The array outlives the command that submitted it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_command_line_does_a_study_through_the_local_executor_and_looks_into_it(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coordinator, an array of workers from ``gammaopt slurm``, and the commands that read, each as typed."""
    pytest.importorskip("submitit", reason="pip install 'gammaopt[slurm]'")
    root = Path(gammaopt.report.__file__).parents[2]
    monkeypatch.setenv("GAMMAOPT_STORAGE", database)
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [sys.executable, "-m", "gammaopt"]
    plan = ["--steps", "20", "--trials", "4", "--seeds", "1", "--confirm-seeds", "2"]
    coordinator_words = [*words, "tune", "digits", *plan, "--study", "mine", "--out", "study", "--json"]
    log = open(tmp_path / "coordinator.log", "w+", encoding="utf-8")  # noqa: SIM115
    with (
        log,
        subprocess.Popen(coordinator_words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=log, text=True) as tuning,
    ):
        until(lambda: tuning.poll() is not None or "mine/cells" in names(database), seconds=240)
        monkeypatch.chdir(tmp_path)
        sent = cli("slurm", "--study", "mine", "--workers", 1, "--cluster", "local", "--folder", tmp_path / "logs")
        assert sent.startswith("worker ")
        out, _ = tuning.communicate(timeout=240)
        log.seek(0)
        assert tuning.returncode == 0, log.read()
    status = cli("status", "--study", "mine")
    assert "4/4 trials" in status
    assert "0 waiting, 0 running, " in status
    assert json.loads(out)["in_words"] in status
    assert cli("report", "--study", "mine", "--out", tmp_path / "r.html").strip() == json.loads(out)["in_words"]
    assert cli("confirm", "--study", "mine").strip() == json.loads(out)["in_words"]
    assert cli("export", "--study", "mine").count("\n") == 1 + len(
        (tmp_path / "study/runs.jsonl").read_text().splitlines()
    )
    until(lambda: "the study is done" in "".join(p.read_text() for p in (tmp_path / "logs").glob("*.err")))


def cli(*words: object) -> str:
    """What the command line says on stdout."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gammaopt", *map(str, words)])
        with redirect_stdout(out), pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 0, out.getvalue()
    return out.getvalue()


def test_a_damaged_checkpoint_is_set_aside_and_the_cell_is_done(database: str, tmp_path: Path) -> None:
    (cell,) = planned = cells(1)
    path = checkpoint_of(tmp_path, SHORT, cell)
    path.parent.mkdir()
    path.write_bytes(b"PK\x03\x04 torn")
    said: list[str] = []
    with coordinator(database, SHORT) as queue:
        queue._queue.enqueue(planned)
        assert work(database, "mine", checkpoints=path.parent, idle_seconds=0, say=said.append) == 1
        assert list(queue.run(planned)) == [alone(SHORT, cell)]
    assert any(f"the checkpoint {path} can't be read; kept as {path.stem}.damaged" in line for line in said)
    assert path.with_suffix(".damaged").read_bytes() == b"PK\x03\x04 torn"


def test_a_worker_whose_checkpoint_does_not_fit_hands_its_cell_back(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = planned = cells(1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with coordinator(database, LONG) as queue:
        queue._queue.enqueue(planned)
        monkeypatch.setattr("gammaopt._files.os.fsync", full)
        with pytest.raises(
            UsageError, match=rf"{cell_hash(LONG, cell)}\.pt can't be written \(No space left on device\)"
        ):
            work(database, "mine", checkpoints=tmp_path / "checkpoints", idle_seconds=0, **OFTEN)
        assert [trial.state.name for trial in trials(database)] == ["PRUNED", "WAITING"]
        monkeypatch.undo()
        assert work(database, "mine", checkpoints=tmp_path / "checkpoints", idle_seconds=0) == 1
    assert_each_cell_is_done_once(database, planned, LONG)


def test_of_two_live_trials_of_a_cell_the_first_counts(database: str, tmp_path: Path) -> None:
    """What a connection may leave that broke just after a trial was added: nobody knows, and it is added again."""
    planned = cells(2)
    with coordinator(database, SHORT) as queue:
        queue._queue.enqueue(planned)
        for cell in planned:
            queue._queue.study.add_trial(_waiting(SHORT, cell, cell_hash(SHORT, cell)))
        assert work(database, "mine", checkpoints=tmp_path, idle_seconds=0) == 2
        assert len(list(queue.run(planned))) == 2
    assert [trial.state.name for trial in trials(database)] == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED"]


def test_workers_of_a_finished_study_do_not_wait_for_a_lost_one_that_nobody_reaps(
    database: str, tmp_path: Path
) -> None:
    said: list[str] = []
    with coordinator(database, SHORT, grace=SOON) as queue:
        queue._queue.enqueue(cells(1))
        assert queue._queue.claim("killed") is not None
    assert work(database, "mine", checkpoints=tmp_path, say=said.append) == 0  # it comes to its end
    assert said[-1] == "the study is done; 0 cells finished here"


def test_a_coordinator_killed_while_it_reaped_leaves_no_cell_behind(database: str, tmp_path: Path) -> None:
    planned = cells(2)
    with coordinator(database, SHORT) as queue:
        queue._queue.enqueue(planned)
        claim = queue._queue.claim("gone")
        assert claim is not None
        queue._queue.storage.set_trial_state_values(claim.trial_id, optuna.trial.TrialState.FAIL)
    with coordinator(database, SHORT) as queue:
        queue._queue.enqueue(planned)
        assert work(database, "mine", checkpoints=tmp_path, idle_seconds=0) == 2
    assert_each_cell_is_done_once(database, planned, SHORT)


@pytest.mark.parametrize(
    ("study", "change", "message"),
    [
        ("yours", {}, r"the storage has no study 'yours' with a queue of cells; there are: mine"),
        ("mine", {"torch": "1.0"}, r"begun under other versions \(torch 1\.0 there, .* here\), .*; install the same"),
    ],
)
def test_a_worker_of_no_use_says_why(
    database: str, tmp_path: Path, study: str, change: dict[str, str], message: str
) -> None:
    remote = Remote("mine", grace=GRACE)
    began_under = {**versions(), **change}
    with (
        RemoteWorkers(SHORT, database, remote, began_under=began_under, study_id="x"),
        pytest.raises(UsageError, match=message),
    ):
        work(database, study, checkpoints=tmp_path)


def test_a_name_that_another_study_has_is_refused(database: str) -> None:
    with (
        coordinator(database, SHORT),
        pytest.raises(UsageError, match="another study called 'mine'; give another --study"),
    ):
        RemoteWorkers(LONG, database, Remote("mine", grace=GRACE), began_under=versions(), study_id="y")


def test_a_worker_before_any_study_says_so(database: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no study yet; wait for the 0 % of `gammaopt tune … --study NAME`"):
        work(database, "mine", checkpoints=tmp_path)
