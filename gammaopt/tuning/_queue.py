"""The queue of cells: an Optuna study with one trial for each planned (γ, lr, seed), which workers take and finish.

A cell is named by its hash. At any time one trial of it is *live* (waiting, running or complete); a trial whose worker
gave no sign of life for the grace period fails, and another of the same cell takes its place. One that is handed back
is given up, Optuna's ``PRUNED``, and so is the second of two live ones, which a connection that broke at the wrong
moment may leave. So each planned cell is finished once, by one worker, and none is forgotten.

A trial goes from waiting to running once and never back, so the worker that took it is its only owner, and a call made
again after a lost answer finds it where that worker left it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from gammaopt._errors import UsageError
from gammaopt.online.record import RunRecord
from gammaopt.tuning._folder import Cell, plan_from, versions
from gammaopt.tuning._plan import StudyPlan
from gammaopt.tuning._search import experiments_allowed
from gammaopt.tuning._space import GAMMA, RATE

PART = "cells"  # the queue of study NAME is Optuna's study NAME/cells, beside NAME/tuned and NAME/one_equal_budget
RECORD, COMMIT = "gammaopt:record", "git_commit"
LIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
MAKING_SECONDS = 5.0  # that another process gets to make a queue
LOST_LIMIT = 10  # workers that a cell may lose before it is blamed for it


class TakenError(Exception):
    """The trial isn't this worker's any more: it was silent for too long, and the cell was given to another."""


def heartbeat_of(grace: int) -> int:
    """Seconds between two signs of life, if ``grace`` seconds without one mean that the worker is lost."""
    return max(1, grace // 4)


def cell_hash(plan: StudyPlan, cell: Cell) -> str:
    """Sixteen hex digits that name a run: what is trained, how, by what code, for how long; not the study around it."""
    recipe = [plan.task, plan.loss, plan.optimizer, plan.steps, plan.law_version, _dtype(plan), plan.device]
    what = json.dumps([sorted(versions().items()), *recipe, cell.gamma.hex(), cell.lr.hex(), cell.seed])
    return hashlib.blake2b(what.encode(), digest_size=8).hexdigest()


@functools.lru_cache(maxsize=16)  # a recipe is made of a network's modules, and each cell asks
def _dtype(plan: StudyPlan) -> str:
    return str(plan.recipe().dtype)


@dataclass(frozen=True)
class Claim:
    """A cell that a worker has taken.

    Attributes:
        trial_id: Optuna's id of the trial.
        cell: what to run.
        hash: names the cell, and its checkpoint.
        lost: how many workers were lost over it before.
    """

    trial_id: int
    cell: Cell
    hash: str
    lost: int


class Queue:
    """The queue of a study, on a storage. See :func:`make_queue` and :func:`find_queue`."""

    def __init__(self, study: optuna.Study, storage: BaseStorage) -> None:
        self.study, self._server = study, storage  # the study's own is a cache in front of it
        self.storage: BaseStorage = study._storage
        self.attrs: dict[str, Any] = study.user_attrs
        self._lost_before: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        """What a user calls the study."""
        return self.study.study_name.removesuffix(f"/{PART}")

    @property
    def plan(self) -> StudyPlan:
        """The plan whose cells are queued."""
        plan = plan_from(self.attrs["plan"])
        assert isinstance(plan, StudyPlan)
        return plan

    @property
    def grace(self) -> int:
        """Seconds without a sign of life after which a worker is lost, as they are now."""
        return int(self.study.user_attrs["grace"])

    @property
    def heartbeat(self) -> int:
        """Seconds between two signs of life of a worker; another coordinator may change them."""
        return heartbeat_of(self.grace)

    @property
    def reaping_grace(self) -> int:
        """What a coordinator waits before it takes a worker for lost: also for one that beats by the grace before."""
        attrs = self.study.user_attrs
        return max(int(attrs["grace"]), int(attrs.get("grace_before", 0)))

    def settle_grace(self) -> None:
        """Forget the grace before: each worker has read the one of now."""
        self.study.set_user_attr("grace_before", self.grace)

    @property
    def closed(self) -> bool:
        """Whether the study has its result."""
        return bool(self.study.user_attrs.get("closed", False))

    def set_closed(self, closed: bool) -> None:
        """Say whether the study has its result. Its own coordinator does, and no confirmation on more seeds."""
        self.study.set_user_attr("closed", closed)

    @property
    def over(self) -> bool:
        """Whether workers can go: the study has its result, and no cell is left, of a confirmation neither.

        A cell whose worker is lost is not, if it lies there for so long that no coordinator can be there to see it.
        """
        if not self.closed:
            return False
        trials = self._trials()
        done = {trial.user_attrs["cell"] for trial in trials if trial.state == TrialState.COMPLETE}
        left = [trial for trial in trials if trial.state in (TrialState.WAITING, TrialState.RUNNING)]
        left = [trial for trial in left if trial.user_attrs["cell"] not in done]
        # Twice the grace: one that is there has reaped it by then.
        return not left or {trial._trial_id for trial in left} <= self._silent(2 * self.reaping_grace)

    def enqueue(self, cells: Iterable[Cell]) -> None:
        """Add those of the cells that no live trial holds."""
        plan = self.plan
        live = {trial.user_attrs["cell"] for trial in self._trials() if trial.state in LIVE}
        for cell in cells:
            if (name := cell_hash(plan, cell)) not in live:
                self.study.add_trial(_waiting(plan, cell, name))

    def forgive(self) -> None:
        """Count the workers that cells lose from here on: what they died of before may be mended."""
        self._lost_before = frozenset(trial.number for trial in self._trials(TrialState.FAIL))

    def claim(self, worker: str, commit: str | None = None) -> Claim | None:
        """Take the first waiting cell, or ``None`` if there is none; ``commit`` is that of the worker's code."""
        for trial in self._trials(TrialState.WAITING):
            # A sign of life first: a worker killed just after the claim must leave a trial that can go stale.
            self._beat(trial._trial_id)
            try:
                if not self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                    continue
                same = [t for t in self._trials() if t.user_attrs["cell"] == trial.user_attrs["cell"]]
                if any(t.number < trial.number and t.state in LIVE for t in same):
                    self.storage.set_trial_state_values(trial._trial_id, TrialState.PRUNED)
                    continue
                self.storage.set_trial_user_attr(trial._trial_id, "worker", worker)
                # Unknown too: a trial that takes a lost one's place has the attributes of that one.
                self.storage.set_trial_user_attr(trial._trial_id, COMMIT, commit)
            except UpdateFinishedTrialError:
                continue
            attrs = trial.user_attrs
            cell = Cell(attrs["gamma"], attrs["lr"], attrs["seed"])
            return Claim(trial._trial_id, cell, attrs["cell"], sum(t.state == TrialState.FAIL for t in same))
        return None

    def _beat(self, trial_id: int) -> None:
        self.storage.record_heartbeat(trial_id)  # type: ignore[attr-defined]

    def _silent(self, seconds: float) -> set[int]:
        found: set[int] = self._server.silent(self.study._study_id, seconds)  # type: ignore[attr-defined]
        return found

    def holds(self, claim: Claim) -> bool:
        """Give a sign of life for a trial in work, and tell whether it is still the worker's."""
        if self.storage.get_trial(claim.trial_id).state != TrialState.RUNNING:
            return False
        self._beat(claim.trial_id)
        return True

    def finish(self, claim: Claim, record: RunRecord) -> None:
        """Hand in the record of a claimed cell.

        Raises:
            TakenError: if the trial was taken meanwhile; the record is dropped then.
        """
        attrs = {"effective_lr": record.effective_lr, "diverged": record.diverged_at is not None}
        try:
            self.storage.set_trial_system_attr(claim.trial_id, RECORD, record.to_json())
            for key, value in attrs.items():
                self.storage.set_trial_user_attr(claim.trial_id, key, value)
            self.storage.set_trial_state_values(
                claim.trial_id, TrialState.COMPLETE, [getattr(record, self.plan.metric)]
            )
        except UpdateFinishedTrialError:
            # Nobody else completes it: it was, by this call, whose answer was lost.
            if self.storage.get_trial(claim.trial_id).state != TrialState.COMPLETE:
                raise TakenError from None

    def hand_back(self, claim: Claim) -> None:
        """Put a claimed cell back, for any worker to go on with from its checkpoint."""
        try:
            self.storage.set_trial_state_values(claim.trial_id, TrialState.PRUNED)
        except UpdateFinishedTrialError:
            if self.storage.get_trial(claim.trial_id).state != TrialState.PRUNED:
                raise TakenError from None
        # Should this not come about, the coordinator finds a cell without a live trial, and queues it.
        self.enqueue([claim.cell])

    def reap(self) -> None:
        """Fail the trials whose worker gave no sign of life for the grace period, and queue their cells again.

        Raises:
            UsageError: if an unfinished cell lost one worker after the other since :meth:`forgive`.
        """
        with experiments_allowed():
            optuna.storages.fail_stale_trials(self.study)
        done = {trial.user_attrs["cell"] for trial in self._trials(TrialState.COMPLETE)}
        failed = [
            trial
            for trial in self._trials(TrialState.FAIL)
            if trial.number not in self._lost_before and trial.user_attrs["cell"] not in done
        ]
        for name, lost in Counter(trial.user_attrs["cell"] for trial in failed).items():
            if lost >= LOST_LIMIT:
                cell = next(trial.user_attrs for trial in failed if trial.user_attrs["cell"] == name)
                raise UsageError(
                    f"the cell γ={cell['gamma']:.3g}, lr={cell['lr']:.3g}, seed={cell['seed']} lost {lost} workers; "
                    "see what they say (memory?), and run the same command to go on"
                )

    def records(self, wanted: Container[str] | None = None) -> list[tuple[str, RunRecord]]:
        """The records handed in, with the hashes of their cells; of all cells, or of those wanted."""
        done = [(str(trial.user_attrs["cell"]), trial) for trial in self._trials(TrialState.COMPLETE)]
        return [
            (name, RunRecord.from_dict(json.loads(trial.system_attrs[RECORD])))
            for name, trial in done
            if wanted is None or name in wanted
        ]

    def commits(self) -> dict[str, str | None]:
        """Hash of a finished cell → the commit of its worker's code, ``None`` outside git; of those who told it."""
        attrs = [trial.user_attrs for trial in self._trials(TrialState.COMPLETE)]
        return {each["cell"]: each[COMMIT] for each in attrs if COMMIT in each}

    def counts(self) -> Counter[str]:
        """State → how many trials: WAITING, RUNNING, COMPLETE, FAIL if the worker was lost, PRUNED if given up."""
        return Counter(trial.state.name for trial in self._trials())

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)


def _waiting(plan: StudyPlan, cell: Cell, name: str) -> FrozenTrial:
    """A trial for a cell, in the law's coordinates."""
    # As wide as any cell of the plan: γ = 1 belongs to it, whatever range is searched.
    point = {GAMMA: math.log2(cell.gamma), RATE: math.log2(cell.lr / plan.base_lr)}
    low, high = (math.log2(gamma) for gamma in plan.gamma_range)
    ends = {GAMMA: (min(low, 0.0), max(high, 0.0)), RATE: (-plan.octaves, plan.octaves)}
    return optuna.create_trial(
        state=TrialState.WAITING,
        params=point,
        distributions={
            key: optuna.distributions.FloatDistribution(min(low, point[key]), max(high, point[key]))
            for key, (low, high) in ends.items()
        },
        user_attrs={"gamma": cell.gamma, "lr": cell.lr, "seed": cell.seed, "cell": name},
    )


def make_queue(
    storage: BaseStorage, name: str, plan: StudyPlan, *, began_under: dict[str, str], study_id: str, grace: int
) -> Queue:
    """The queue of study ``name``, made if it is missing.

    Args:
        storage: where it lies.
        name: of the study.
        plan: whose cells will be queued.
        began_under: the versions that workers must have.
        study_id: of the study's folder.
        grace: seconds without a sign of life after which a worker is taken for lost. Workers at work read it at their
            next sign of life, so until then the one before counts, if it is longer: see :attr:`Queue.reaping_grace`.

    Raises:
        UsageError: if the storage has another study of that name.
    """
    where: dict[str, Any] = {"study_name": f"{name}/{PART}", "storage": storage}
    try:
        study = optuna.create_study(**where, direction="maximize")
        found: dict[str, Any] = {}
    except DuplicatedStudyError:
        study = optuna.load_study(**where)
        found = _once_whole(study)
    attrs = {"plan": plan.to_dict(), "versions": began_under, "grace": grace, "id": study_id}
    if "id" not in found:  # a new one, or one whose coordinator was killed as it made it
        with experiments_allowed():
            study.set_metric_names([plan.metric])
        for key, value in attrs.items():  # the id last: with it the queue is whole
            study.set_user_attr(key, value)
        found = study.user_attrs  # which another coordinator may have written at the same time
    if any(found[key] != attrs[key] for key in ("plan", "versions", "id")):
        raise UsageError(
            f"the storage has another study called {name!r}; give another --study, or --out with that one's folder"
        )
    queue = Queue(study, storage)
    if found.get("grace", grace) != grace:
        study.set_user_attr("grace_before", queue.reaping_grace)  # first: a kill between the two leaves the longer
    study.set_user_attr("grace", grace)
    queue.forgive()
    return queue


def _once_whole(study: optuna.Study) -> dict[str, Any]:
    """The attributes of a queue that another process may be making; without an id if it doesn't come to its end."""
    deadline = time.monotonic() + MAKING_SECONDS
    while "id" not in (attrs := study.user_attrs) and time.monotonic() < deadline:
        time.sleep(0.1)
    return attrs


def find_queue(storage: BaseStorage, name: str) -> Queue:
    """The queue of study ``name``.

    Raises:
        UsageError: if there is none, or a half-made one; the message lists those there are.
    """
    names = [study.study_name for study in storage.get_all_studies()]
    if f"{name}/{PART}" not in names and f"{name}/tuned" in names:
        raise UsageError(
            f"study {name!r} of the storage has no queue of cells: one process trains it and keeps its runs; "
            "give the folder that it was made in"
        )
    if f"{name}/{PART}" not in names:
        there = [other.removesuffix(f"/{PART}") for other in names if other.endswith(f"/{PART}")]
        raise UsageError(
            f"the storage has no study {name!r} with a queue of cells; "
            + (f"there are: {', '.join(there)}" if there else "start `gammaopt tune … --study NAME` first")
        )
    study = optuna.load_study(study_name=f"{name}/{PART}", storage=storage)
    if "id" not in _once_whole(study):
        raise UsageError(
            f"the queue of study {name!r} is half made: its coordinator was stopped; run that `gammaopt tune …` again"
        )
    return Queue(study, storage)
