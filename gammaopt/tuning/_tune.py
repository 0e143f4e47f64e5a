"""``tune``: search the arms, choose, confirm on fresh seeds, and write the result and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from gammaopt._errors import UsageError, at_least, require
from gammaopt.tuning._budget import Plan
from gammaopt.tuning._confirm import Confirmation, paired_t
from gammaopt.tuning._folder import Cell, Commits, Folder, notes_on, opened, versions
from gammaopt.tuning._plan import StudyPlan
from gammaopt.tuning._record import Record
from gammaopt.tuning._result import ENOUGH_SEEDS, Arm, Rival, Spent, Trial, TuneResult, all_diverged, edges
from gammaopt.tuning._search import Search, open_storage, search, without_secrets
from gammaopt.tuning._workers import Workers, forget_begun

if TYPE_CHECKING:
    from gammaopt.tuning._remote import RemoteWorkers

RIVAL_OCTAVES = (-0.5, -0.25, 0.25, 0.5)  # from the rate that γ = 1 chose; tuned γ has to beat it at all of these


class Trains(Protocol):
    """Who trains the cells of a study."""

    def run(self, cells: Iterable[Cell]) -> Iterable[Any]:
        """Train the cells and yield their records as they finish, in any order."""


@dataclass(frozen=True)
class Remote:
    """Have the runs of a study trained by ``gammaopt worker`` processes, on any machines.

    Args:
        study: name of the study in the storage, which the workers are given.
        grace: seconds without a sign of life after which a worker is taken for lost and its cell given to another.
        say: told in one line what concerns the workers and the storage.
    """

    study: str
    grace: int = 120
    say: Callable[[str], object] = lambda _: None


@dataclass(frozen=True)
class Progress:
    """Where a study stands; sent before the first run and after each.

    Attributes:
        stage: ``"tuned"``, ``"one_equal_budget"`` or ``"confirm"``.
        trials, trials_total: trials done of both arms.
        runs, runs_total: runs done of the whole study, confirmation included.
        new_runs: runs done by this process; the rest had been done before.
        best: best feasible trial of the stage so far.
    """

    stage: str
    trials: int
    trials_total: int
    runs: int
    runs_total: int
    new_runs: int
    best: Trial | None


@dataclass
class _Counter:
    plan: Plan
    folder: Folder
    send: Callable[[Progress], None]
    stage: str = "tuned"
    trials: list[Trial] = field(default_factory=list)
    asked: set[Cell] = field(default_factory=set)
    new: int = 0

    confirm_runs: int = 0

    @property
    def total(self) -> int:
        return 2 * self.plan.trials * self.plan.seeds + (
            self.confirm_runs or (3 + len(RIVAL_OCTAVES)) * self.plan.confirm_seeds
        )

    def event(self) -> None:
        trials = [t for t in self.trials if t.arm == self.stage and not t.diverged]
        best = max(trials, key=lambda trial: self.plan.merit(trial.score), default=None)
        runs = min(len(self.asked), self.total)
        self.send(Progress(self.stage, len(self.trials), 2 * self.plan.trials, runs, self.total, self.new, best))

    def told(self, trial: Trial) -> None:
        self.trials.append(trial)
        self.event()


def tune(
    plan: StudyPlan,
    out: str | Path,
    *,
    storage: str | None = None,
    jobs: int = 1,
    remote: Remote | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> TuneResult:
    """Run a study to its end in folder ``out``, or go on with it there; finished runs are never trained again.

    Args:
        plan: what to run.
        out: folder of the study; made if missing. It may hold this plan only.
        storage: Optuna storage URL; SQLite in the folder if ``None``.
        jobs: processes to train in. With more than one, call from under ``if __name__ == "__main__":``.
        remote: have the runs trained by ``gammaopt worker`` processes on any machines, which share ``storage``; see
            :class:`Remote`. The result is the same.
        on_progress: called before the first run and after each.

    Returns:
        The result, also written to ``result.json`` and ``report.html`` in the folder. A finished study is read
        back, and only its report is written again.

    Raises:
        UsageError: for a folder that holds something else, is in use, has a damaged file, or was begun under other
            package versions.
        MissingExtraError: without ``pip install 'gammaopt[tune]'``.
    """
    at_least("jobs", jobs, 1)
    if remote is not None:
        at_least("grace", remote.grace, 2)
        if storage is None:
            raise UsageError(f"study={remote.study!r} needs a storage that its workers share; give --storage")
    workers = partial(_workers, plan, jobs, storage, remote)
    return run_study(plan, out, workers, storage=storage, remote=remote, on_progress=on_progress)


def run_study(
    plan: Plan,
    out: str | Path,
    workers_of: Callable[[Folder], AbstractContextManager[Trains]],
    *,
    storage: str | None = None,
    remote: Remote | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> TuneResult:
    """:func:`tune` for any plan; ``workers_of`` gives who trains the cells of a study in its folder."""
    for module in ("optuna", "scipy", "matplotlib", "sklearn"):
        require(module, "tune")
    out = Path(out)
    # A storage outside the folder is tried before the folder is taken; SQLite in it needs the folder first.
    given = None if storage is None else _open(storage, remote)
    with _disposed(given), opened(out, plan) as folder, workers_of(folder) as workers:
        if not folder.finished:
            elsewhere = f"another folder with {plan.option('out')}"
            elsewhere += "" if remote is None else " and another name with --study"  # a queue is of one folder
            check_versions(str(out), folder.versions, f"install those, or choose {elsewhere}")
        # The runs of a folder are those of its plan: what it has is done.
        counter = _Counter(plan, folder, on_progress or (lambda _: None), asked=set(folder.runs))

        def evaluate(cells: Sequence[Cell]) -> dict[Cell, Record]:
            missing = [cell for cell in cells if cell not in folder.runs]
            if missing and folder.finished:
                raise UsageError(
                    f"{out} holds a result, but {len(missing)} of its runs are missing in runs.jsonl; "
                    "restore that, or remove result.json to train them again"
                )
            for record in workers.run(missing):
                folder.add(record)
                counter.asked.add(Cell(record.gamma, record.lr, record.seed))
                counter.new += 1
                counter.event()
            return {cell: folder.runs[cell] for cell in cells}

        backend = given or open_storage(f"sqlite:///{quote(str((out / 'study.db').resolve()))}", own=True)
        name = remote.study if remote is not None else study_name(plan, folder.study_id)
        if not folder.finished:
            counter.event()  # nothing is wrong, and now it will take its time
        trials: dict[str, list[Trial]] = {}
        for arm in arms(plan):
            counter.stage = arm.arm
            trials[arm.arm] = search(
                plan, name, arm, backend, evaluate, counter.told, commit=folder.commits.begun, named=remote is not None
            )
        # Trials that the database kept may have lost their runs, to a power cut or a hand: those are trained again.
        searched = [trial for of_arm in trials.values() for trial in of_arm]
        evaluate([Cell(trial.gamma, trial.lr, seed) for trial in searched for seed in plan.tuning_seeds])
        cells = confirmation_cells(plan, choose(plan, trials))
        counter.stage, counter.confirm_runs = "confirm", len(cells)
        counter.event()
        evaluate(cells)
        counter.event()
        command = plan.command(
            out=str(out),
            storage=None if storage is None else without_secrets(storage),
            study=None if remote is None else remote.study,
        )
        result = result_from(plan, trials, folder.runs, folder.versions, folder.commits, command)
        if not folder.finished:
            folder.write("result.json", result.to_json())
            forget_begun(folder.path)
        elif folder.differs(result.to_json()):
            raise UsageError(
                f"{out / 'result.json'} is not what the runs beside it give; remove it to have it written again"
            )
        from gammaopt.report import html_report

        folder.write("report.html", html_report(result))
        return result


def _spent(plan: Plan, trials: Mapping[str, list[Trial]], runs: Mapping[Cell, Record]) -> dict[str, Spent]:
    """What each arm's search was given and took; runs that diverged at step n took n."""
    each, spent = plan.run_budget(), {}
    for name, arm in trials.items():
        of_arm = [runs[Cell(trial.gamma, trial.lr, seed)] for trial in arm for seed in plan.tuning_seeds]
        taken = sum(min(run.diverged_at or each.steps, each.steps) for run in of_arm)
        spent[name] = Spent(
            runs=len(of_arm),
            samples=None if each.samples is None else len(of_arm) * each.samples,
            flops=None if each.flops is None else len(of_arm) * each.flops,
            used=taken / (len(of_arm) * each.steps),
        )
    return spent


def study_name(plan: Plan, study_id: str) -> str:
    """What the study of a folder is called in a storage, unless it was given a name."""
    return f"{plan.folder}-{plan.digest}-{study_id}"


def _open(storage: str, remote: Remote | None) -> Any:
    if remote is None:
        return open_storage(storage, own=False)
    from gammaopt.tuning._server import open_server

    return open_server(storage, grace=remote.grace, create=True, say=remote.say)


@contextmanager
def _disposed(storage: Any) -> Iterator[None]:
    """Connections closed at the end: a server has room for so many."""
    try:
        yield
    finally:
        if storage is not None:
            storage.engine.dispose()


def _workers(
    plan: StudyPlan, jobs: int, storage: str | None, remote: Remote | None, folder: Folder
) -> AbstractContextManager[Workers | RemoteWorkers]:
    if remote is None or storage is None:
        return Workers(plan, jobs, checkpoints=folder.path)
    from gammaopt.tuning._remote import RemoteWorkers, finished

    if folder.finished:
        return finished(plan, storage, remote, folder.study_id)
    return RemoteWorkers(
        plan, storage, remote, began_under=folder.versions, study_id=folder.study_id, on_commit=folder.made_under
    )


def arms(plan: Plan) -> list[Search]:
    """The searches of a study."""
    return [Search(arm, plan.space(arm), plan.trials) for arm in ("tuned", "one_equal_budget")]


def choose(plan: Plan, trials: Mapping[str, list[Trial]]) -> dict[str, Trial]:
    """Arm → its best trial; the arm ``one`` are the first trials of ``one_equal_budget``."""
    return {name: best_trial(of_arm, plan.direction) for name, of_arm in _with_one(plan, trials).items()}


def _with_one(plan: Plan, trials: Mapping[str, list[Trial]]) -> dict[str, list[Trial]]:
    return {**trials, "one": [_renamed(trial, "one") for trial in trials["one_equal_budget"][: plan.rates]]}


def confirmation_cells(plan: Plan, chosen: Mapping[str, Trial]) -> list[Cell]:
    """What runs on the fresh seeds. Seed by seed: the arms of a seed share its batches."""
    places = places_to_confirm(chosen)
    cells = [Cell(*place, seed) for seed in plan.fresh_seeds for place in places.values()]
    return list(dict.fromkeys(cells))


def result_from(
    plan: Plan,
    trials: Mapping[str, list[Trial]],
    runs: Mapping[Cell, Record],
    began_under: dict[str, str],
    commits: Commits,
    command: str,
) -> TuneResult:
    """The result of finished searches and of the chosen cells' runs on the fresh seeds.

    The commits that it tells are those of its own runs: the study may have others, of a confirmation on more seeds.
    """
    chosen = choose(plan, trials)
    searched = [trial for of_arm in trials.values() for trial in of_arm]
    cells = [Cell(trial.gamma, trial.lr, seed) for trial in searched for seed in plan.tuning_seeds]
    under = commits.under([*cells, *confirmation_cells(plan, chosen)])
    of_place = {
        name: tuple(runs[Cell(*place, seed)] for seed in plan.fresh_seeds)
        for name, place in places_to_confirm(chosen).items()
    }
    spent = _spent(plan, _with_one(plan, trials), runs)
    return _result(plan, _with_one(plan, trials), chosen, of_place, spent, began_under, under, command)


INSTALL = "install the same"


def check_versions(study: str, began_under: Mapping[str, str], fix: str) -> None:
    """Raise :class:`UsageError` unless the versions here are those that the study began under."""
    now = versions()
    changed = [
        f"{name} {began_under.get(name)} there, {now[name]} here" for name in now if began_under.get(name) != now[name]
    ]
    if changed or set(began_under) != set(now):
        what = changed[0] if changed else "other packages"
        raise UsageError(f"{study} holds a study begun under other versions ({what}), and its numbers would mix; {fix}")


def _renamed(trial: Trial, arm: str) -> Trial:
    return Trial(arm, trial.gamma, trial.lr, trial.effective_lr, trial.score, trial.diverged)


def best_trial(trials: list[Trial], direction: str = "maximize") -> Trial:
    """The best trial that diverged on no seed; where all did, the one that earned most before it did."""
    better = max if direction == "maximize" else min
    return better([trial for trial in trials if not trial.diverged] or trials, key=lambda trial: trial.score)


def places_to_confirm(chosen: Mapping[str, Trial]) -> dict[str, tuple[float, float]]:
    """Name → (γ, lr) of what runs on the fresh seeds: the chosen cells, and γ = 1 beside the rate it chose."""
    base = chosen["one_equal_budget"].lr
    rivals = {f"rival {octave:+g}": (1.0, base * 2.0**octave) for octave in RIVAL_OCTAVES}
    return {**{name: (best.gamma, best.lr) for name, best in chosen.items()}, **rivals}


def _result(
    plan: Plan,
    trials: dict[str, list[Trial]],
    chosen: dict[str, Trial],
    runs: dict[str, tuple[Record, ...]],
    spent: dict[str, Spent],
    began_under: dict[str, str],
    commits: Sequence[str],
    command: str,
) -> TuneResult:
    def scores(name: str) -> list[float]:
        return [plan.score(record) for record in runs[name]]

    def at_end(name: str) -> list[float]:
        of = plan.metric_at_end
        return scores(name) if of is None else [float(getattr(record, of)) for record in runs[name]]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    arms = {
        name: Arm(
            name=name,
            trials=len(trials[name]),
            diverged=sum(trial.diverged for trial in trials[name]),
            gamma=best.gamma,
            lr=best.lr,
            effective_lr=best.effective_lr,
            score=best.score,
            confirmed_score=mean(scores(name)),
            confirmed_final=mean(at_end(name)),
            scores=tuple(scores(name)),
        )
        for name, best in chosen.items()
    }

    def compare(baseline: str = "one_equal_budget") -> Confirmation:
        first, second = ("tuned", baseline) if plan.direction == "maximize" else (baseline, "tuned")
        return paired_t(plan.metric, plan.fresh_seeds, scores(first), scores(second))

    def compare_at_end(metric: str) -> Confirmation:
        return paired_t(metric, plan.fresh_seeds, at_end("tuned"), at_end("one_equal_budget"))

    return TuneResult(
        plan=plan,
        metric=plan.metric,
        arms=arms,
        confirm=compare(),
        confirm_final=None if plan.metric_at_end is None else compare_at_end(plan.metric_at_end),
        rivals=tuple(Rival(run[0].lr, compare(name)) for name, run in runs.items() if name not in chosen),
        spent=spent,
        notes=(*_notes(plan, chosen), *notes_on(commits)),
        versions=began_under,
        command=command,
        trials=tuple(trial for name in ("tuned", "one_equal_budget") for trial in trials[name]),
        runs={name: runs[name] for name in chosen},
        git_commit=next(iter(commits), None),
    )


def _notes(plan: Plan, chosen: dict[str, Trial]) -> list[str]:
    notes = [all_diverged(plan, name) for name, best in chosen.items() if best.diverged]
    for name in ("tuned", "one_equal_budget"):
        notes += [f"range too small: {edge}" for edge in edges(plan, name, chosen[name].gamma, chosen[name].lr)]
    if plan.confirm_seeds < ENOUGH_SEEDS:
        few, option = f"{plan.confirm_seeds} fresh seeds are few", plan.option("confirm_seeds")
        notes.append(f"{few}; give {option} {ENOUGH_SEEDS} or more")
    return notes
