"""A study as it stands, read without changing it: from its folder, or from a storage and its name there.

The trials are read from the arms' Optuna studies, as far as their runs are there. Where those are missing, the searches
are made again from the runs, in memory: which points come next follows from the finished trials, so under the versions
that the study began under they come out as they were, up to the first run that is missing. Under others they may be
other points, for which there are no runs.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gammaopt._errors import UsageError, require
from gammaopt.online._run_file import read_runs
from gammaopt.tuning._budget import Plan
from gammaopt.tuning._folder import Cell, Commits, Folder, commits_in, opened
from gammaopt.tuning._folder import plan_from as plan_from
from gammaopt.tuning._plan import StudyPlan
from gammaopt.tuning._record import Record
from gammaopt.tuning._result import Trial, TuneResult
from gammaopt.tuning._search import completed, read_only, search, without_secrets
from gammaopt.tuning._tune import (
    INSTALL,
    Remote,
    Trains,
    arms,
    check_versions,
    choose,
    confirmation_cells,
    places_to_confirm,
    result_from,
    study_name,
)

OnRun = Callable[[int, int], object]  # runs done, of how many


@dataclass(frozen=True)
class StudyState:
    """What a study has by now.

    Attributes:
        where: the folder, or the name in the storage.
        plan: what it runs.
        versions: those it began under.
        study_id: what tells it from others of the same plan.
        runs: cell → its record.
        find_trials: gives :attr:`trials`, which takes its time where the searches have to be made again.
        commits: of the code that its runs were made under.
        queue: state → trials of the queue, of a study with workers.
        grace: seconds of silence after which its workers are taken for lost, of a study with workers.
    """

    where: str
    plan: Plan
    versions: dict[str, str]
    study_id: str
    runs: Mapping[Cell, Record]
    find_trials: Callable[[], dict[str, list[Trial]]]
    commits: Commits
    queue: Counter[str] | None = None
    grace: int | None = None

    @cached_property
    def trials(self) -> dict[str, list[Trial]]:
        """Arm → its complete trials, in order.

        Raises:
            UsageError: if they can't be told here: the study's storage is missing, and under the versions here the
                searches don't come out as they were.
        """
        return self.find_trials()

    @property
    def searched(self) -> bool:
        """Whether both arms have all their trials."""
        return all(len(trials) == self.plan.trials for trials in self.trials.values())

    @property
    def maker(self) -> str:
        """What runs the study."""
        return "`gammaopt tune`" if isinstance(self.plan, StudyPlan) else "gammaopt.tuning.study()"

    def cells_to_confirm(self, seeds: int | None = None) -> list[Cell]:
        """The chosen cell of each arm on each fresh seed; ``seeds`` of them, or as many as the plan says.

        Raises:
            UsageError: if the searches are not at their end, or for fewer seeds than the plan says: of several looks at
                the seeds, the one that stops soonest could be chosen.
        """
        if seeds is not None and seeds < self.plan.confirm_seeds:
            raise UsageError(
                f"seeds={seeds} is fewer than the {self.plan.confirm_seeds} that the study planned; "
                f"give {self.plan.confirm_seeds} or more"
            )
        if not self.searched:
            done = ", ".join(f"{name} {len(trials)}/{self.plan.trials}" for name, trials in self.trials.items())
            raise UsageError(f"{self.where} is still searching ({done} trials); let {self.maker} finish it first")
        return confirmation_cells(self._with(seeds), choose(self.plan, self.trials))

    def _with(self, seeds: int | None) -> Plan:
        return self.plan if seeds is None else self.plan.with_fresh_seeds(seeds)

    def result(self, seeds: int | None = None) -> TuneResult:
        """The result on that many fresh seeds. With more than planned it notes that it is another look at the study.

        Raises:
            UsageError: if runs are missing; the message says how many.
        """
        cells = self.cells_to_confirm(seeds)
        missing = sum(cell not in self.runs for cell in cells)
        if missing:
            raise UsageError(
                f"{missing} of {len(cells)} runs on fresh seeds are missing in {self.where}; "
                f"run `gammaopt confirm`, or let {self.maker} finish it"
            )
        command = self.plan.command()
        result = result_from(self._with(seeds), self.trials, self.runs, self.versions, self.commits, command)
        if seeds is None or seeds == self.plan.confirm_seeds:
            return result
        another = (
            f"another look: {self.plan.confirm_seeds} fresh seeds were planned, and {seeds} include them; "
            "who looks until a verdict pleases is wrong more often than 5 % of the time"
        )
        return replace(result, notes=(*result.notes, another))


def read_folder(path: Path) -> StudyState:
    """The study of a folder, whether or not a process works there.

    Raises:
        UsageError: if it holds none, or a damaged file.
    """
    file = path / "study.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        plan, began_under, study_id = plan_from(content["plan"]), dict(content["versions"]), str(content["id"])
    except FileNotFoundError:
        raise UsageError(f"{path} holds no study; give the folder that `gammaopt tune` wrote") from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file} is not a readable study ({type(error).__name__}: {error}); restore it") from None
    records, _ = read_runs(path / "runs.jsonl", plan.read_record)
    runs = _by_cell(records)

    def find_trials() -> dict[str, list[Trial]]:
        found = _in_database(path / "study.db", study_name(plan, study_id), plan, runs)
        # A power cut may have torn the database of a finished study; one at work tells how far it is.
        whole = found is not None and all(len(trials) == plan.trials for trials in found.values())
        if found is not None and (whole or not (path / "result.json").exists()):
            return found
        fix = "install those, or restore its study.db: its searches are read from there"
        return _again(str(path), plan, runs, began_under, f"{fix}, or with --storage and --study if it has workers")

    return StudyState(str(path), plan, began_under, study_id, runs, find_trials, commits=commits_in(path))


def read_storage(url: str, name: str) -> StudyState:
    """The study of that name in a storage which its workers share.

    Raises:
        UsageError: if the storage can't be opened, or has no such study with a queue.
    """
    from gammaopt.tuning._queue import find_queue
    from gammaopt.tuning._server import backend_of, open_server, server_errors

    if backend_of(url) == "sqlite":
        raise UsageError(
            f"a study with the storage {without_secrets(url)} keeps its runs in its folder; give that folder instead"
        )
    storage = open_server(url, grace=60, create=False, patience=0.0)
    try:
        with server_errors(url, storage.patience):
            queue = find_queue(storage, name)
            records, commits = queue.records(), queue.commits()
            plan, began_under = queue.plan, dict(queue.attrs["versions"])
            runs = _by_cell(record for _, record in records)
            made_under = {_cell_of(record): commits.get(name) for name, record in records}
            found = _stored(storage, name, plan, runs)
            return StudyState(
                name,
                plan,
                began_under,
                queue.attrs["id"],
                runs,
                lambda: _again(name, plan, runs, began_under, "install those") if found is None else found,
                queue=queue.counts(),
                commits=Commits(_begun_under(storage, name), made_under),
                grace=queue.grace,
            )
    finally:
        storage.engine.dispose()


def _begun_under(storage: Any, name: str) -> str | None:
    """The commit that the study's search was begun under; ``None`` where it is not known."""
    optuna = require("optuna", "tune")
    if f"{name}/tuned" not in {study.study_name for study in storage.get_all_studies()}:
        return None
    commit: str | None = optuna.load_study(study_name=f"{name}/tuned", storage=storage).user_attrs.get("git_commit")
    return commit


def _by_cell(records: Iterable[Record]) -> dict[Cell, Record]:
    return {_cell_of(record): record for record in records}


def _cell_of(record: Record) -> Cell:
    return Cell(record.gamma, record.lr, record.seed)


def _stored(storage: Any, name: str, plan: Plan, runs: Mapping[Cell, Record]) -> dict[str, list[Trial]] | None:
    """Arm → its trials whose runs are there, from their Optuna studies; ``None`` if the search isn't in the storage."""
    optuna = require("optuna", "tune")
    there = {study.study_name for study in storage.get_all_studies()}
    found: dict[str, list[Trial]] = {arm.arm: [] for arm in arms(plan)}
    if f"{name}/{arms(plan)[0].arm}" not in there:
        return None
    for arm in arms(plan):
        if f"{name}/{arm.arm}" in there:
            study = optuna.load_study(study_name=f"{name}/{arm.arm}", storage=storage)
            found[arm.arm] = [
                trial
                for trial in completed(study, plan, arm)
                if all(Cell(trial.gamma, trial.lr, seed) in runs for seed in plan.tuning_seeds)
            ]
    return found


def _in_database(path: Path, name: str, plan: Plan, runs: Mapping[Cell, Record]) -> dict[str, list[Trial]] | None:
    """:func:`_stored` from a file, and ``None`` too if that is missing or can't be read."""
    import sqlalchemy.exc

    optuna = require("optuna", "tune")
    if not path.exists():
        return None
    try:
        storage = read_only(path)
        try:
            return _stored(storage, name, plan, runs)
        finally:
            storage.engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError):
        return None


def _again(
    where: str, plan: Plan, runs: Mapping[Cell, Record], began_under: Mapping[str, str], fix: str
) -> dict[str, list[Trial]]:
    """:func:`search_again`, where it gives the trials that the study had."""
    found = search_again(plan, runs)
    # Other versions may ask for other points. They haven't, if the study ran every one of these.
    if runs and any(len(trials) < plan.trials for trials in found.values()):
        check_versions(where, began_under, fix)
    return found


class _NotYetError(Exception):
    """A run of the search is missing."""


def search_again(plan: Plan, runs: Mapping[Cell, Record]) -> dict[str, list[Trial]]:
    """Arm → the trials that the finished runs give."""
    optuna = require("optuna", "tune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def evaluate(cells: list[Cell]) -> dict[Cell, Record]:
        if any(cell not in runs for cell in cells):
            raise _NotYetError
        return {cell: runs[cell] for cell in cells}

    storage, found = optuna.storages.InMemoryStorage(), {}
    for arm in arms(plan):
        found[arm.arm] = told = list[Trial]()
        try:
            search(plan, "again", arm, storage, evaluate, told.append)
        except _NotYetError:
            continue
    return found


def summary(state: StudyState) -> dict[str, Any]:
    """How far a study is, as JSON values; the verdict in words once all its runs are there."""
    arms_now = {}
    for name, trials in state.trials.items():
        good = [trial for trial in trials if not trial.diverged]
        best = max(good, key=lambda trial: state.plan.merit(trial.score), default=None)
        arms_now[name] = {
            "trials": len(trials),
            "diverged": len(trials) - len(good),
            "best": None if best is None else {"gamma": best.gamma, "lr": best.lr, "score": best.score},
        }
    cells = state.cells_to_confirm() if state.searched else None
    done = sum(cell in state.runs for cell in cells or ())
    return {
        "study": state.where,
        "plan": state.plan.to_dict(),
        "arms": arms_now,
        "confirm": {"runs": done, "runs_total": None if cells is None else len(cells)},
        "queue": None if state.queue is None else dict(state.queue),
        "in_words": state.result().in_words() if cells is not None and done == len(cells) else None,
    }


def confirm_in_folder(
    path: Path,
    state: StudyState,
    seeds: int | None,
    workers_of: Callable[[Folder], AbstractContextManager[Trains]],
    on_run: OnRun = lambda done, total: None,
) -> TuneResult:
    """The result on ``seeds`` fresh seeds; the missing runs are trained here, and kept in the folder.

    Args:
        path: the study's folder.
        state: the study.
        seeds: how many fresh seeds; as many as the plan says if ``None``.
        workers_of: gives who trains what is missing.
        on_run: told how many of the missing runs are done, and how many there are: before the first, and after each.

    Raises:
        UsageError: if the searches are not at their end, the study began under other versions, or the folder is in use.
    """
    cells = state.cells_to_confirm(seeds)
    if all(cell in state.runs for cell in cells):
        return state.result(seeds)
    check_versions(state.where, state.versions, INSTALL)
    with opened(path, state.plan) as folder, workers_of(folder) as workers:
        missing = [cell for cell in cells if cell not in folder.runs]
        on_run(0, len(missing))
        for done, record in enumerate(workers.run(missing), 1):
            folder.add(record)
            on_run(done, len(missing))
    return read_folder(path).result(seeds)


def confirm_with_workers(
    url: str,
    state: StudyState,
    seeds: int | None,
    say: Callable[[str], object] = lambda _: None,
    on_run: OnRun = lambda done, total: None,
) -> TuneResult:
    """The result on ``seeds`` fresh seeds; the missing runs are trained by the study's workers.

    Args:
        url: of the storage.
        state: the study.
        seeds: how many fresh seeds; as many as the plan says if ``None``.
        say: told in one line what concerns the workers and the storage.
        on_run: as in :func:`confirm_in_folder`.

    Raises:
        UsageError: if the searches are not at their end, or the storage can't be opened.
    """
    cells = state.cells_to_confirm(seeds)
    if all(cell in state.runs for cell in cells):
        return state.result(seeds)
    check_versions(f"the storage's {state.where}", state.versions, INSTALL)
    from gammaopt.tuning._remote import RemoteWorkers

    assert isinstance(state.plan, StudyPlan)  # no other has a queue
    assert state.grace is not None
    remote = Remote(state.where, state.grace, say)
    with RemoteWorkers(
        state.plan, url, remote, began_under=state.versions, study_id=state.study_id, guest=True
    ) as workers:
        missing = [cell for cell in cells if cell not in state.runs]
        on_run(0, len(missing))
        for done, _ in enumerate(workers.run(missing), 1):
            on_run(done, len(missing))
    return read_storage(url, state.where).result(seeds)


def _arms_of(state: StudyState) -> dict[Cell, list[str]]:
    """Cell → what it was run for."""
    found: dict[Cell, list[str]] = {}
    try:
        trials = state.trials
    except UsageError:
        return found
    for name, of_arm in trials.items():
        for trial in of_arm:
            for seed in state.plan.tuning_seeds:
                found.setdefault(Cell(trial.gamma, trial.lr, seed), []).append(name)
    if state.searched:
        fresh = {cell.seed for cell in state.runs} - set(state.plan.tuning_seeds)
        for name, place in places_to_confirm(choose(state.plan, trials)).items():
            for seed in fresh:
                found.setdefault(Cell(*place, seed), []).append(f"confirm {name}")
    return found


def table(state: StudyState, what: str, form: str) -> str:
    """The runs or the trials as text: ``"csv"``, or ``"jsonl"`` with everything that was recorded, as it was.

    Of the runs, the csv says in a column ``arms`` what each was for: ``tuned`` or ``one_equal_budget`` in the search,
    several if arms share it, and ``confirm ARM`` on a fresh seed. It is empty where the searches can't be told here,
    see :attr:`StudyState.trials`.
    """
    rows: list[dict[str, Any]]
    if what == "trials":
        rows = [dataclasses.asdict(trial) for trials in state.trials.values() for trial in trials]
        fields = [field.name for field in dataclasses.fields(Trial)]
    else:
        rows = [json.loads(record.to_json()) for record in state.runs.values()]
        fields = [*state.plan.record_fields(), "arms"]
    if form == "jsonl":
        return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    if what == "runs":
        of = _arms_of(state)
        rows = [{**row, "arms": ", ".join(of.get(cell, ()))} for row, cell in zip(rows, state.runs, strict=True)]
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
