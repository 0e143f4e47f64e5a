"""One arm's search: an Optuna study asked for a batch of trials at a time, each averaged over the tuning seeds.

Half of the trials are Sobol points, the rest come from the plan's sampler. A batch is what trains together, so batches
are large: all Sobol points are one, since none waits for another's score, and the sampler proposes the rest in about
eight, each point away from those asked in the same batch (see ``_samplers``). No pruner: on plateau-then-drop curves
every stock pruner kills the runs that win later. Seeds are never a sampled parameter.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gammaopt._errors import MissingExtraError, UsageError, require
from gammaopt.tuning._budget import Plan
from gammaopt.tuning._folder import Cell
from gammaopt.tuning._frozen import frozen
from gammaopt.tuning._record import Record
from gammaopt.tuning._result import Trial
from gammaopt.tuning._samplers import given, model_sampler
from gammaopt.tuning._space import Space

if TYPE_CHECKING:
    import optuna

BATCH = 4  # at least as many trials are asked for together, whatever the number of workers
ROUNDS = 8  # batches that the sampler proposes, unless they would be smaller than that

_ANOTHER = "give another --storage, or none for SQLite in the study's folder"
_REBUILD = "restore it, or remove it and run the same command: the trials are made again from the finished runs"
_ROOM = "make room on the disk, and run the same command to go on: the finished runs are kept"
_FULL = ("disk is full", "disk I/O error", "No space left")  # SQLite's words, those at a quota, and PostgreSQL's

Evaluate = Callable[[list[Cell]], dict[Cell, Record]]


@dataclass(frozen=True)
class Search:
    """One arm: its name, its space, and its number of trials."""

    arm: str
    space: Space
    trials: int


def without_secrets(url: str) -> str:
    """A storage URL as it may be shown: password and query, which can hold one, left out."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).set(query={}).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return url.partition("?")[0].rpartition("@")[2]


def has_secrets(url: str) -> bool:
    """Whether a storage URL holds a password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return False
    return parsed.password is not None or "password" in parsed.query


def no_driver(url: str) -> MissingExtraError:
    """A storage whose driver isn't installed, in words."""
    return MissingExtraError(
        f"no driver for {without_secrets(url)} is installed; for PostgreSQL run: pip install 'gammaopt[postgres]', "
        "and write the URL as postgresql+psycopg://…"
    )


def _is_a_file(url: str) -> bool:
    """Whether the storage is SQLite, or not even a URL: no server."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).get_backend_name() == "sqlite"
    except (ArgumentError, ValueError):
        return True


def read_only(path: Path) -> Any:
    """Optuna's storage in a SQLite file, for a look that changes nothing."""
    optuna = require("optuna", "tune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with experiments_allowed():
        # Twice: SQLAlchemy decodes it, and so does SQLite, which would take a "?" in it for the end of the path.
        url = f"sqlite:///file:{quote(quote(str(path.resolve())))}?mode=ro&uri=true"
        return optuna.storages.RDBStorage(url, skip_table_creation=True)


def open_storage(url: str, *, own: bool) -> Any:
    """Optuna's storage at ``url``; ``own`` if it is the study's own, in its folder.

    Raises:
        UsageError: if it can't be opened, e.g. a file that is no database.
    """
    optuna = require("optuna", "tune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        # A server may have closed a connection that has been idle: each is tried before it is used.
        storage = optuna.storages.RDBStorage(url, engine_kwargs={} if own else {"pool_pre_ping": True})
        if own:
            _without_fsync(storage.engine)
        return storage
    except ImportError:
        raise no_driver(url) from None
    except Exception as error:  # SQLAlchemy, its driver and Optuna each have their own
        if not _is_a_file(url):
            from gammaopt.tuning._server import cannot_open

            raise cannot_open(url, error) from None
        reason, shown = str(error).strip().splitlines()[0], without_secrets(url)
        fix = _mend(reason) if own or _mend(reason) == _ROOM else _ANOTHER
        raise UsageError(f"the storage {shown} can't be opened ({reason}); {fix}") from None


def _without_fsync(engine: Any) -> None:
    """A commit no longer waits for the disk: a trial has some fifty, and the runs it tells of lie in runs.jsonl.

    A killed process loses nothing by it; what a power cut tears is made again from the runs.
    """
    from sqlalchemy import event

    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    engine.dispose()  # the connections it has were made before


@contextlib.contextmanager
def experiments_allowed() -> Iterator[None]:
    """Parts of Optuna that it calls experimental, used knowingly."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def search(
    plan: Plan,
    name: str,
    arm: Search,
    storage: Any,
    evaluate: Evaluate,
    told: Callable[[Trial], None],
    commit: str | None = None,
    named: bool = False,
) -> list[Trial]:
    """Run the arm's study to its number of trials, going on where an earlier process stopped.

    Args:
        plan: the study's plan.
        name: of the study: what tells it from others in the storage.
        arm: what to search.
        storage: from :func:`open_storage`.
        evaluate: runs cells, and returns a record for each.
        told: called with each trial when it is done, and at the start with those done before.
        commit: of the code, kept with the plan.
        named: whether the user gave the name.

    Returns:
        The completed trials, in order.
    """
    with _as_usage_error(storage):
        optuna = require("optuna", "tune")
        name = f"{name}/{arm.arm}"
        study = optuna.create_study(storage=storage, study_name=name, direction=plan.direction, load_if_exists=True)
        start = arm.space.points(max(arm.trials // 2, min(BATCH, arm.trials)), seed=plan.seed)
        if "plan" not in study.user_attrs:
            with experiments_allowed():
                study.set_metric_names([plan.metric])
            for key, value in frozen(plan, arm.space, arm.trials, start, commit).items():
                study.set_user_attr(key, value)
        for before in completed(study, plan, arm):
            told(before)
        if len(completed(study, plan, arm)) < arm.trials:
            another = "another name with --study" if named else f"another folder with {plan.option('out')}"
            _check_grid(study, name, arm.space.digest(start), another)
        while len(done := completed(study, plan, arm)) < arm.trials:
            batch = _ask(study, plan, arm, start, len(done))
            cells = [[Cell(*arm.space.cell(t.params), seed) for seed in plan.tuning_seeds] for t in batch]
            records = evaluate([cell for row in cells for cell in row])
            for trial, row in zip(batch, cells, strict=True):
                _tell(study, plan, trial, [records[cell] for cell in row])
            for made in completed(study, plan, arm)[len(done) :]:
                told(made)
        return done


def _check_grid(study: optuna.Study, name: str, here: str, another: str) -> None:
    if (there := study.user_attrs.get("grid_hash")) != here:
        raise UsageError(
            f"the search {name} began on another grid (hash {there} there, {here} here), and its trials would mix; "
            f"go on with the code that it began under, or choose {another}"
        )


def _ask(
    study: optuna.Study, plan: Plan, arm: Search, start: list[dict[str, float]], done: int
) -> list[optuna.trial.Trial]:
    """The trials of the next batch: those that a killed process left asked and untold, then new ones.

    Which points come next depends on the finished trials and on the number of the trial only, so a study that was
    killed anywhere goes on to the result it would have had.
    """
    import optuna

    running = optuna.trial.TrialState.RUNNING
    distributions: dict[str, Any] = {
        name: optuna.distributions.FloatDistribution(low, high) for name, (low, high) in arm.space.ranges().items()
    }
    batch = []
    for left in study.get_trials(deepcopy=False, states=(running,)):
        # Its process is gone: this one holds the folder's lock.
        if set(left.params) == set(distributions):
            batch.append(optuna.trial.Trial(study, left._trial_id))
        else:  # killed within ask
            study.tell(left.number, state=optuna.trial.TrialState.FAIL)
    for index in range(done + len(batch), _batch_end(arm.trials, len(start), done)):
        key = f"{plan.seed}/{arm.arm}/{index}"
        study.sampler = given(start[index]) if index < len(start) else model_sampler(plan.sampler, key)
        batch.append(study.ask(distributions))
    return batch


def _batch_end(trials: int, start: int, done: int) -> int:
    """Number of trials after the batch that ``done`` finished ones are in: of ``trials``, ``start`` are given points.

    A function of the plan and of ``done`` only, so that a killed study makes the batches it would have made.
    """
    if done < start:
        return start
    size = max(BATCH, math.ceil((trials - start) / ROUNDS))
    return min(start + size * ((done - start) // size + 1), trials)


def _tell(study: optuna.Study, plan: Plan, trial: optuna.trial.Trial, records: Sequence[Record]) -> None:
    diverged = [record.seed for record in records if record.diverged_at is not None]
    first = records[0]
    for key, value in {"gamma": first.gamma, "lr": first.lr, "effective_lr": first.effective_lr}.items():
        trial.set_user_attr(key, value)
    scores = [plan.score(record) for record in records]
    trial.set_user_attr("scores", scores)
    trial.set_user_attr("diverged_seeds", diverged)
    _report(trial, records)
    if "diverged" not in trial.constraints:  # a process may have been killed just after it
        trial.set_constraint("diverged", float(len(diverged)) or -1.0)
    study.tell(trial, sum(scores) / len(scores))


def _report(trial: optuna.trial.Trial, records: Sequence[Record]) -> None:
    """The mean over the seeds at each log-spaced step that all of them reached."""
    before = trial.storage.get_trial(trial._trial_id).intermediate_values  # of a process killed on its way here
    of_seeds = [dict(record.reports) for record in records]
    for step in of_seeds[0]:
        values = [reports[step] for reports in of_seeds if step in reports]
        if len(values) == len(records) and step not in before:
            trial.report(sum(values) / len(values), step)


def completed(study: optuna.Study, plan: Plan, arm: Search) -> list[Trial]:
    """The complete trials of an arm's study, in order."""
    import optuna

    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    made = []
    for trial in done[: arm.trials]:
        gamma, lr = arm.space.cell(trial.params)
        diverged = bool(trial.user_attrs["diverged_seeds"])
        made.append(Trial(arm.arm, gamma, lr, plan.law.lr(lr, gamma), float(trial.value or 0.0), diverged))
    return made


def _mend(reason: str) -> str:
    """What helps a database: room, or another copy of it."""
    return _ROOM if any(words in reason for words in _FULL) else _REBUILD


@contextlib.contextmanager
def _as_usage_error(storage: Any) -> Iterator[None]:
    """A damaged database is the user's to restore, and an absent server to start, not a crash."""
    import sqlalchemy.exc

    optuna = require("optuna", "tune")
    # A storage in memory has no engine.
    url = storage.engine.url.render_as_string(hide_password=False) if hasattr(storage, "engine") else "sqlite://"
    if not _is_a_file(url):
        from gammaopt.tuning._server import server_errors

        with server_errors(url, getattr(storage, "patience", 0.0)):  # Optuna's own doesn't wait
            yield
        return
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UsageError(f"the study's storage can't be used ({reason}); {_mend(reason)}") from None
