"""What a training function is handed, what it may return, and each mistake in it told in one line."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gammaopt
import gammaopt.report
from gammaopt import EtaLaw, UsageError
from gammaopt.tuning import DivergedError, ObjectiveTrial, study
from gammaopt.tuning._folder import Cell
from gammaopt.tuning._objective import ObjectivePlan
from gammaopt.tuning._study import trainer_of

LAW = EtaLaw(depth=3, loss="cross_entropy")
SMALL: dict[str, Any] = {"law": LAW, "base_lr": 0.5, "steps": 100, "trials": 4, "seeds": 1, "confirm_seeds": 2}


def hill(trial: ObjectiveTrial) -> float:
    return height(trial.gamma, trial.lr)


def height(gamma: float, lr: float) -> float:
    return 0.9 - 0.01 * math.log2(gamma) ** 2 - 0.01 * math.log2(lr) ** 2


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a fake study's time."""
    monkeypatch.setattr(gammaopt.report, "html_report", lambda result: result.in_words())


def trial_of(gamma: float = 0.5, **changes: Any) -> ObjectiveTrial:
    return ObjectiveTrial(replace(PLAN, **changes), Cell(gamma, 2.0, 7))


PLAN = ObjectivePlan("hill", 3.0, "sgd", "cross_entropy", 1.0, None, 0.5, 1000)


def test_a_trial_brings_what_the_run_is_of() -> None:
    trial = trial_of(0.5, settings={"sizes": (3, 4)})
    assert (trial.gamma, trial.lr, trial.seed, trial.steps) == (0.5, 2.0, 7, 1000)
    assert trial.effective_lr == pytest.approx(1.0)  # γ¹ under cross-entropy
    assert trial.settings == {"sizes": [3, 4]}
    trial.settings["sizes"] = "spoilt"
    assert replace(PLAN, settings={"sizes": [3, 4]}).settings == {"sizes": [3, 4]}


def test_the_rate_of_a_trial_is_the_one_that_the_optimizer_multiplies_by_the_law() -> None:
    trial = trial_of(0.5)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model = gammaopt.wrap(net, trial.gamma, depth=3, knee=1.0, loss="cross_entropy")
    optimizer = gammaopt.SGD(model.parameters(), lr=trial.lr)
    assert list(optimizer.effective_lrs().values()) == pytest.approx([trial.effective_lr] * 6)


@pytest.mark.parametrize("every", [1, 7, 250])
def test_reports_are_thinned_to_forty_means_between_log_spaced_steps(every: int) -> None:
    trial, steps = trial_of(), range(every, 1001, every)
    for step in steps:
        trial.report(step, torch.tensor(float(step), requires_grad=True))
    record = trial._record(None)
    kept = [step for step, _ in record.reports]
    assert len(kept) == min(len(steps), len(kept)) <= 40
    assert kept == sorted(set(kept))
    assert kept[-1] == steps[-1]
    edges = [0, *kept]
    for before, (step, value) in zip(edges, record.reports, strict=False):
        own = [s for s in steps if before < s <= step]
        assert value == pytest.approx(sum(own) / len(own), rel=1e-5)
    assert record.score == pytest.approx(sum(steps) / len(steps))  # of all, not of those kept
    assert record.curve.steps == tuple(kept)
    if every == 1:
        assert kept[:5] == [1, 2, 3, 4, 5][: len(kept)]
        ratios = [b / a for a, b in pairwise(kept[20:])]
        assert max(ratios) / min(ratios) < 1.05, "not evenly spaced in log"


@pytest.mark.parametrize("bad", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_report_that_is_not_finite_ends_the_run_as_diverged(bad: float) -> None:
    def train(trial: ObjectiveTrial) -> float:
        trial.report(10, 0.5)
        trial.report(20, bad)
        return 1.0

    (record,) = trainer_of(replace(PLAN, objective="train"), train)(None).__enter__().run([Cell(0.5, 1.0, 0)])  # type: ignore[arg-type]
    assert (record.score, record.diverged_at, record.reports) == (0.0, 20, ((10, 0.5),))


def test_a_run_that_swallows_its_divergence_is_diverged_all_the_same() -> None:
    trial = trial_of()
    for step in (3, 4):
        with pytest.raises(DivergedError):
            trial.report(step, math.nan if step == 3 else 0.9)
    assert (trial._record(0.9).score, trial._record(0.9).diverged_at) == (0.0, 3)


@pytest.mark.parametrize(
    ("returned", "changes", "score"),
    [
        (math.nan, {}, 0.0),
        (-math.inf, {}, 0.0),
        (50.0, {"direction": "minimize", "diverged_score": 23.0}, 23.0),
        (math.inf, {"direction": "minimize", "diverged_score": 23.0}, 23.0),
        (-3.0, {"diverged_score": -1.0}, -1.0),
    ],
)
def test_a_score_worse_than_a_diverged_runs_is_one(returned: float, changes: dict[str, Any], score: float) -> None:
    record = trial_of(**changes)._record(returned)
    assert (record.score, record.diverged_at) == (score, 1001)


@pytest.mark.parametrize("returned", [1, 0.25, np.float32(0.25), torch.tensor([0.25]), np.array([[2]])])
def test_any_number_is_a_score(returned: Any) -> None:
    assert trial_of()._record(returned).score == float(np.asarray(returned).reshape(()))


class Callable_:  # noqa: N801
    def __call__(self, trial: ObjectiveTrial) -> float:
        return hill(trial)

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("objective", [Callable_(), functools.partial(hill), lambda trial: hill(trial)])
def test_any_callable_is_a_function_hashable_or_not(tmp_path: Path, objective: Any) -> None:
    assert study(objective, tmp_path, **SMALL, diverged_score=-9, quiet=True).trials


async def later(trial: ObjectiveTrial) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (Callable_, {}, "objective=Callable_ is a class; give a function"),
        (3.0, {}, "objective=3.0 is no function"),
        (height, {}, r"objective=height\(gamma, lr\) can't be called with a trial; give a function of one argument"),
        (later, {}, "objective=later is asynchronous or a generator"),
        (hill, {"law": 3.0}, r"law=3.0 is no law; give gammaopt.EtaLaw\(depth, optimizer, loss\)"),
        (hill, {"base_lr": 0}, "base_lr=0 is not allowed"),
        (hill, {"steps": 0}, "steps=0 is too small"),
        (hill, {"trials": 3}, "trials=3 is too small"),
        (hill, {"direction": "up"}, "unknown direction 'up'; choose one of: maximize, minimize"),
        (hill, {"direction": "minimize"}, "direction='minimize' needs diverged_score"),
        (hill, {"diverged_score": math.nan}, "diverged_score=nan is no finite number"),
        (hill, {"metric": ""}, "metric='' is no name"),
        (hill, {"sampler": "grid"}, "unknown sampler 'grid'"),
        (hill, {"gamma_range": (2.0, 1.0)}, "gamma_range=2 1 is empty"),
        (hill, {"settings": {"net": nn}}, r"settings\['net'\]=<module .* can't be written down"),
        (hill, {"settings": [3]}, r"settings=\[3\] is no dictionary"),
        (hill, {"plateau_steps": -1}, "plateau_steps=-1 is not allowed"),
        (hill, {"batch_size": 0}, "batch_size=0 is too small"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_bad_argument_is_told_in_one_line_before_a_folder_is_made(
    tmp_path: Path, objective: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        study(objective, tmp_path / "out", **{**SMALL, **options}, quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("returned", "reports", "message"),
    [
        ("0.9", [], "returned '0.9', which is no number"),
        (None, [], "returned nothing and reported nothing; return a score, or report on the way"),
        ((1.0, 2.0), [], r"returned \(1.0, 2.0\), which is no number"),
        (torch.zeros(3), [], "which is no number"),
        (True, [], "returned True, which is no number"),
        (-0.5, [], "the score -0.5 is below 0, which is what a diverged run would get; give study"),
        (1.0, [(5, 1.0), (5, 1.0)], "step=5 was reported after step=5; report each step once, in order"),
        (1.0, [(5, 1.0), (4, 1.0)], "step=4 was reported after step=5"),
        (1.0, [(-1, 1.0)], "step=-1 is too small"),
        (1.0, [(1.5, 1.0)], "step=1.5 is not a whole number"),
        (1.0, [(101, 1.0)], "step=101 is beyond the steps=100 of a run"),
        (1.0, [(5, "x")], "value='x' was reported at step=5 and is no number"),
    ],
)
def test_a_bad_score_or_report_is_told_in_one_line_with_its_cell(
    tmp_path: Path, returned: Any, reports: list[tuple[Any, Any]], message: str
) -> None:
    def train(trial: ObjectiveTrial) -> Any:
        for step, value in reports:
            trial.report(step, value)
        return returned

    with pytest.raises(UsageError, match=message) as caught:
        study(train, tmp_path, **SMALL, quiet=True)
    assert "\n" not in str(caught.value)
    assert "seed = 0 of train" in caught.value.__notes__[0]
