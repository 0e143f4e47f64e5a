"""The frozen plan: what it refuses, what names it, and that tuning never sees the seeds of the confirmation."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from gammaopt import UsageError
from gammaopt.online import train
from gammaopt.online.train import FAMILIES, OPTIMIZERS
from gammaopt.optim import SGD
from gammaopt.tuning import StudyPlan

PLAN = StudyPlan("digits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "mnist"}, "unknown task 'mnist'; choose one of: digits"),
        ({"loss": "hinge"}, "unknown loss 'hinge'; choose one of: cross_entropy, mse"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; choose one of: sgd"),
        ({"steps": 0}, "steps=0 is too small; give at least 1"),
        ({"steps": 1.5}, "steps=1.5 is not a whole number"),
        ({"trials": 3}, "trials=3 is too small; give at least 4"),
        ({"seeds": 0}, "seeds=0 is too small; give at least 1"),
        ({"confirm_seeds": 1}, "confirm_seeds=1 is too small; give at least 2"),
        ({"seed": -1}, "seed=-1 is too small; give at least 0"),
        ({"gamma_range": (0.0, 1.0)}, "gamma=0 is not allowed; give a finite gamma > 0"),
        ({"gamma_range": (0.1, -3.0)}, "gamma=-3 is not allowed; give a finite gamma > 0"),
        ({"gamma_range": (math.nan, 1.0)}, "gamma=nan is not allowed; give a finite gamma > 0"),
        ({"gamma_range": (0.1, math.inf)}, "gamma=inf is not allowed; give a finite gamma > 0"),
        ({"gamma_range": (2.0, 0.5)}, "gamma_range=2 0.5 is empty; give the lower γ first"),
        ({"gamma_range": (1.0, 1.0)}, "gamma_range=1 1 is empty; give the lower γ first"),
        ({"device": "toaster"}, "unknown device 'toaster'; choose cpu, or cuda"),
        ({"device": "meta"}, "device 'meta' can't be used: .*; choose cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_bad_value_is_named_with_its_fix_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        replace(PLAN, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gamma_range", [(1.0,), (0.1, 1.0, 10.0)])
def test_a_gamma_range_that_is_no_pair_is_a_usage_error(gamma_range: Any) -> None:
    with pytest.raises(UsageError, match="gamma_range"):
        replace(PLAN, gamma_range=gamma_range)


def test_loss_and_steps_default_to_the_tasks() -> None:
    assert (PLAN.loss, PLAN.steps) == ("cross_entropy", 1000)
    assert StudyPlan("digits", "cross_entropy", steps=1000) == PLAN


CHANGES: dict[str, Any] = {
    "loss": "mse",
    "steps": 999,
    "trials": 31,
    "seeds": 4,
    "confirm_seeds": 13,
    "gamma_range": (0.01, 99.0),
    "seed": 1,
    "law_version": 2,
    "octaves": 4.0,
    "sampler": "gp",
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_that_decides_a_number_is_in_the_digest(name: str) -> None:
    assert replace(PLAN, **{name: CHANGES[name]}).digest != PLAN.digest


def test_the_optimizer_is_in_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "other", SGD)
    monkeypatch.setitem(FAMILIES, "other", "sgd")
    assert replace(PLAN, optimizer="other").digest != PLAN.digest


def test_the_device_is_not_in_the_digest_and_no_field_was_forgotten_here() -> None:
    moved = replace(PLAN)
    object.__setattr__(moved, "device", "cuda:1")
    assert moved.digest == PLAN.digest
    assert {field.name for field in fields(StudyPlan)} == {*CHANGES, "task", "optimizer", "device"}


def test_the_digest_does_not_depend_on_how_a_number_was_typed() -> None:
    assert StudyPlan("digits", gamma_range=(1, 100)).digest == StudyPlan("digits", gamma_range=(1.0, 100.0)).digest
    assert len(PLAN.digest) == 8


def test_the_plan_as_a_dictionary_survives_json_and_gives_the_plan_back() -> None:
    data = json.loads(json.dumps(PLAN.to_dict()))
    assert data == PLAN.to_dict()
    assert StudyPlan(**{**data, "gamma_range": tuple(data["gamma_range"])}) == PLAN


def test_no_seed_of_a_confirmation_was_ever_tuned_on_whatever_the_base_seed() -> None:
    plans = [replace(PLAN, seed=seed, seeds=50, confirm_seeds=200) for seed in range(6)]
    tuned = [set(plan.tuning_seeds) for plan in plans]
    fresh = [set(plan.fresh_seeds) for plan in plans]
    assert [len(seeds) for seeds in (*tuned, *fresh)] == [50] * 6 + [200] * 6
    assert len(set().union(*tuned, *fresh)) == 6 * 250, "two studies share a seed"


@pytest.mark.parametrize(("trials", "rates"), [(4, 4), (16, 4), (32, 6), (100, 10)])
def test_the_small_arm_has_about_the_root_of_the_budget_and_at_least_four_rates(trials: int, rates: int) -> None:
    assert replace(PLAN, trials=trials).rates == rates


@pytest.mark.parametrize("gamma_range", [(0.01, 100.0), (1 / 3, 10.0), (0.123456789, 1234567.5)])
def test_the_command_names_the_very_same_plan(gamma_range: tuple[float, float]) -> None:
    plan = replace(PLAN, loss="mse", steps=77, trials=9, seeds=2, confirm_seeds=5, gamma_range=gamma_range, seed=3)
    words = shlex.split(plan.command())
    assert words[:3] == ["gammaopt", "tune", "digits"]

    def after(option: str, index: int = 1) -> str:
        return words[words.index(option) + index]

    typed = StudyPlan(
        words[2],
        after("--loss"),
        after("--optimizer"),
        int(after("--steps")),
        int(after("--trials")),
        int(after("--seeds")),
        int(after("--confirm-seeds")),
        (float(after("--gamma-range")), float(after("--gamma-range", 2))),
        int(after("--seed")),
        after("--device"),
    )
    assert typed == plan


def test_the_recipe_is_the_tasks_with_the_plans_loss_and_budget() -> None:
    recipe = replace(PLAN, loss="mse", steps=12).recipe()
    assert (recipe.loss, recipe.steps, recipe.batch_size, recipe.depth) == ("mse", 12, 32, 3.0)
    assert replace(PLAN, loss="mse").base_lr == 16.0
    assert PLAN.law.factor(0.1) == pytest.approx(0.1)
    assert replace(PLAN, loss="mse").law.factor(0.1) == pytest.approx(0.01)


@pytest.mark.parametrize("gamma_range", [(1e-6, 1e-4), (0.01, 100.0)])
def test_the_runs_of_a_plan_are_centred_without_loss_at_every_gamma_it_searches(
    gamma_range: tuple[float, float],
) -> None:
    plan = replace(PLAN, steps=3, gamma_range=gamma_range)
    for gamma in gamma_range:
        assert train(plan.recipe(), gamma=gamma, lr=plan.base_lr, seed=0).steps == 3  # warnings are errors here


def test_both_arms_train_in_float64_where_the_smallest_gamma_needs_it() -> None:
    for lowest, dtype in ((0.009, torch.float64), (0.01, torch.float32)):
        assert replace(PLAN, gamma_range=(lowest, 10.0)).recipe().dtype == dtype
