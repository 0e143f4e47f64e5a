"""A call that the storage has carried out, and whose answer was lost: it is made again, and does nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import optuna
import pytest
from optuna.trial import TrialState

from gammaopt.online import Run, RunRecord, train_many
from gammaopt.tuning import StudyPlan
from gammaopt.tuning._folder import Cell, versions
from gammaopt.tuning._queue import LOST_LIMIT, Queue, TakenError, _waiting, cell_hash, make_queue
from gammaopt.tuning._server import PatientStorage, Stopping
from gammaopt.tuning._worker import _Worker

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

PLAN = StudyPlan("digits", steps=2, trials=4, seeds=1, confirm_seeds=2)
CELL = Cell(1.0, 0.5, 0)


class Forgetful(optuna.storages.InMemoryStorage):
    """A storage one of whose calls is made twice, the second after what else happens in the meantime."""

    def __init__(self) -> None:
        super().__init__()
        self.twice: tuple[str, ...] = ()
        self.meanwhile: Callable[[], object] = lambda: None

    def lose_answer_of(self, *names: str) -> None:
        """Lose the answer of the next call of one of these names."""
        self.twice = names

    def record_heartbeat(self, trial_id: int) -> None: ...

    def remove_session(self) -> None: ...

    def _again(self, name: str, call: Callable[[], Any]) -> Any:
        answer = call()
        if name not in self.twice:
            return answer
        self.twice = ()
        self.meanwhile()
        return call()

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        call = super().set_trial_state_values
        return bool(self._again(state.name, lambda: call(trial_id, state, values)))

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        call = super().create_new_trial
        return int(self._again("create", lambda: call(study_id, template_trial)))


@pytest.fixture
def storage() -> Forgetful:
    return Forgetful()


@pytest.fixture
def queue(storage: Forgetful) -> Queue:
    return make_queue(storage, "mine", PLAN, began_under=versions(), study_id="x", grace=60)


@pytest.fixture(scope="module")
def record() -> RunRecord:
    return train_many(PLAN.recipe(), [Run(CELL.gamma, CELL.lr, CELL.seed)])[0]


def states(queue: Queue) -> list[str]:
    return [trial.state.name for trial in queue.study.get_trials(deepcopy=False)]


def test_a_cell_handed_back_twice_is_not_taken_from_the_worker_that_has_it(
    storage: Forgetful, queue: Queue, record: RunRecord
) -> None:
    queue.enqueue([CELL])
    first = queue.claim("a")
    assert first is not None
    taken = []

    def meanwhile() -> None:
        queue.enqueue([CELL])  # as a coordinator does
        taken.append(queue.claim("b"))

    storage.meanwhile = meanwhile
    storage.lose_answer_of("WAITING", "PRUNED")  # whichever of them hands it back
    queue.hand_back(first)
    (second,) = taken
    assert second is not None
    assert queue.claim("c") is None
    assert queue.holds(second)
    assert not queue.holds(first)
    queue.finish(second, record)
    assert states(queue) == ["PRUNED", "COMPLETE"]


@pytest.mark.parametrize("name", ["RUNNING", "COMPLETE", "PRUNED", "create"])
def test_whatever_is_done_twice_a_cell_is_finished_once(
    storage: Forgetful, queue: Queue, record: RunRecord, name: str
) -> None:
    storage.lose_answer_of(name)
    queue.enqueue([CELL])
    claim = queue.claim("a")
    if claim is None:  # its answer was lost: the trial goes stale
        assert name == "RUNNING"
        (trial,) = queue.study.get_trials(deepcopy=False)
        storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        queue.enqueue([CELL])
        claim = queue.claim("a")
    assert claim is not None
    queue.hand_back(claim)
    claim = queue.claim("b")
    assert claim is not None
    queue.finish(claim, record)
    assert storage.twice == ()
    assert queue.claim("c") is None
    assert states(queue).count("COMPLETE") == 1
    assert queue.records() == [(claim.hash, record)]


def test_a_cell_handed_in_with_a_lost_answer_counts_and_its_checkpoint_goes(
    storage: Forgetful, queue: Queue, tmp_path: Path
) -> None:
    queue.enqueue([CELL])
    claim = queue.claim("me")
    assert claim is not None
    said: list[str] = []
    worker = _Worker(queue, cast("PatientStorage", storage), tmp_path, 0.0, Stopping(), said.append)
    storage.lose_answer_of("COMPLETE")
    assert worker._train(claim)
    worker.heart.stop()
    assert not any("another worker" in line for line in said)
    assert list(tmp_path.iterdir()) == []


def test_a_cell_that_was_taken_can_neither_be_handed_in_nor_back(queue: Queue, record: RunRecord) -> None:
    queue.enqueue([CELL])
    claim = queue.claim("me")
    assert claim is not None
    queue.storage.set_trial_state_values(claim.trial_id, TrialState.FAIL)
    with pytest.raises(TakenError):
        queue.finish(claim, record)
    with pytest.raises(TakenError):
        queue.hand_back(claim)
    assert states(queue) == ["FAIL"]


def test_trials_given_up_are_no_lost_workers(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna.storages, "fail_stale_trials", lambda _: None)
    queue.enqueue([CELL])
    for _ in range(LOST_LIMIT):
        queue.study.add_trial(_waiting(PLAN, CELL, cell_hash(PLAN, CELL)))
    for _ in range(2 * LOST_LIMIT):
        claim = queue.claim("me")
        assert claim is not None
        assert claim.lost == 0
        queue.hand_back(claim)
    queue.reap()
    assert queue.counts()["FAIL"] == 0
