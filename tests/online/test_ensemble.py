"""Runs trained together against the same runs trained one by one."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import RECIPE, RUNS, assert_same, one_by_one
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gammaopt._errors import UsageError
from gammaopt._laws import Loss
from gammaopt._plan import Parametrization
from gammaopt.online import (
    CNN,
    MLP,
    Digits,
    Recipe,
    Run,
    RunRecord,
    Staircase,
    ensemble,
    train,
    train_many,
)
from gammaopt.online import _stack as stack_module
from gammaopt.online.train import OptimizerName

pytest_plugins = ["ensemble_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("adam", 0.0), ("adamw", 0.0)])
def test_together_as_one_by_one_in_float64(loss: Loss, optimizer: OptimizerName, momentum: float) -> None:
    recipe = dataclasses.replace(RECIPE, loss=loss, optimizer=optimizer, momentum=momentum)
    scale = 1.0 if optimizer == "sgd" else 0.1
    bad = Run(1.0, 1e6, 3)  # in the midst, so that the others' states move up when it leaves
    runs = [Run(run.gamma, run.lr * scale, run.seed) for run in RUNS]
    runs.insert(5, bad)
    many = train_many(recipe, runs)
    assert_same(many, one_by_one(recipe, runs), 1e-12)
    assert 0 < (many[5].diverged_at or 0) <= 50
    assert all(record.diverged_at is None for record in many if record is not many[5])


@pytest.mark.parametrize("stack", [1, 2, 5, None])
def test_stacks_of_any_size_give_the_same(stack: int | None) -> None:
    recipe = dataclasses.replace(RECIPE, optimizer="adam")
    runs = [Run(run.gamma, 0.1 * run.lr, run.seed) for run in RUNS]
    assert_same(train_many(recipe, runs, stack=stack), one_by_one(recipe, runs), 1e-12)


@pytest.mark.parametrize("stack", [1, None])
def test_float32_agrees_to_1e_5(stack: int | None) -> None:
    recipe = dataclasses.replace(RECIPE, dtype=torch.float32, steps=40, loss="mse")
    runs = [run for run in RUNS if run.gamma >= 1]
    assert_same(train_many(recipe, runs, stack=stack), one_by_one(recipe, runs), 1e-5)


@pytest.mark.parametrize("parametrization", ["mean_field", "as_is"])
def test_regression_with_biases_and_layer_norm_and_a_frozen_layer(parametrization: Parametrization) -> None:
    def make() -> nn.Module:
        torch.manual_seed(7)
        first, last = nn.Linear(32, 16), nn.Linear(16, 1)
        first.requires_grad_(False)
        return nn.Sequential(first, nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 16), nn.GELU(), last)

    recipe = Recipe(
        make, Staircase(), "mse", steps=50, batch_size=8, parametrization=parametrization, dtype=torch.float64
    )
    if parametrization == "mean_field":  # drawn for each seed anew, frozen or not
        recipe = dataclasses.replace(recipe, build=partial(MLP, 32, 1, width=8, bias=True))
    runs = [Run(gamma, 0.05, seed) for gamma in (0.5, 2.0) for seed in (0, 1)]
    assert_same(train_many(recipe, runs), one_by_one(recipe, runs), 1e-12)


def test_convolutions_alone_and_stacked() -> None:
    recipe = dataclasses.replace(RECIPE, build=partial(CNN, (1, 12, 12), 10, width=4, depth=3), steps=12)
    runs = RUNS[:4]
    ones = one_by_one(recipe, runs)
    assert_same(train_many(recipe, runs), ones, 1e-12)
    assert_same(train_many(recipe, runs, stack=4), ones, 1e-12)


def test_diverged_runs_are_recorded_and_disturb_nobody() -> None:
    recipe = dataclasses.replace(RECIPE, loss="mse", steps=130)
    runs = [*RUNS, Run(1.0, 1e4, 3), Run(1.0, 200.0, 4), Run(0.1, 1e30, 3)]
    many = train_many(recipe, runs)
    assert_same(many, one_by_one(recipe, runs), 1e-12)
    assert sum(record.diverged_at is not None for record in many) == 3
    assert_same(train_many(recipe, runs[-3:]), many[-3:], 0.0)


def test_budgets_are_the_runs_of_fewer_steps() -> None:
    runs = [*RUNS[:3], Run(1.0, 1e4, 3)]
    many = train_many(RECIPE, runs, budgets=(60, 7, 50))
    ones = [
        record
        for run in runs
        for end in (7, 50, 60)
        for record in one_by_one(dataclasses.replace(RECIPE, steps=end), [run])
    ]
    assert_same(many, ones, 1e-12)


def test_small_gamma_under_cross_entropy_is_the_same_together_and_alone_in_a_float32_recipe() -> None:
    recipe = Recipe(partial(MLP, 144, 10, width=64), Digits(), "cross_entropy", steps=100, depth=3.0)
    small = [Run(0.003, 1.0, 0), Run(0.009, 1.0, 0)]  # in float32 the first is off by 9 % at the end
    assert_same(train_many(recipe, small), one_by_one(recipe, small), 1e-9)
    large = [Run(0.01, 1.0, 0)]
    assert_same(train_many(recipe, large), one_by_one(recipe, large), 1e-5)
    assert (recipe.at(0.009).dtype, recipe.at(0.01).dtype) == (torch.float64, torch.float32)


def test_small_gamma_alone_is_trained_in_float64() -> None:
    recipe = dataclasses.replace(RECIPE, dtype=torch.float32, loss="mse")
    small, large = Run(5e-3, 1.0, 3), Run(1.0, 1.0, 3)
    many = train_many(recipe, [small, large])
    assert_same(many[:1], one_by_one(dataclasses.replace(recipe, dtype=torch.float64), [small]), 1e-12)
    assert_same(many[1:], one_by_one(recipe, [large]), 1e-5)
    assert train_many(recipe, [small, large], one_at_a_time=True) == [
        *one_by_one(dataclasses.replace(recipe, dtype=torch.float64), [small]),
        *one_by_one(recipe, [large]),
    ]


def test_frozen_output_is_computed_once_for_a_seed_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = 0
    h0 = stack_module.Seed._h0

    def counted(self: stack_module.Seed, inputs: Tensor) -> Tensor:
        nonlocal samples
        samples += len(inputs)
        return h0(self, inputs)

    monkeypatch.setattr(stack_module.Seed, "_h0", counted)
    train_many(RECIPE, RUNS, stack=2)
    assert samples == 2 * (RECIPE.steps * RECIPE.batch_size + 2048)


def test_progress_counts_to_the_longest_budget_and_one_at_a_time_every_budget() -> None:
    for alone, each in ((False, 20), (True, 30)):
        told: list[ensemble.Progress] = []
        train_many(RECIPE, RUNS[:2], budgets=(10, 20), one_at_a_time=alone, on_progress=told.append)
        assert told[-1] == ensemble.Progress(2 * each, 2 * each)


def test_seeds_of_finished_stacks_are_forgotten() -> None:
    seeds = stack_module.Seeds(recipe := dataclasses.replace(RECIPE, steps=2))
    train_many(recipe, [Run(1.0, 0.1, seed) for seed in range(7)], stack=1, shared=seeds)
    assert list(seeds._made) == list(seeds._batches) == [3, 4, 5, 6]


def test_bytes_per_run_leaves_the_callers_generator_alone() -> None:
    before = torch.get_rng_state()
    ensemble.bytes_per_run(RECIPE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("changes", "copies"), [({}, 2), ({"momentum": 0.9}, 3), ({"optimizer": "adam"}, 4)])
def test_bytes_per_run_are_parameters_gradients_states_and_what_backward_keeps(
    changes: dict[str, Any], copies: int
) -> None:
    parameters, activations = 144 * 16 + 16 * 16 + 16 * 10, 8 * (144 + 16 + 16)
    for dtype, size in ((torch.float64, 8), (torch.float32, 4)):
        recipe = dataclasses.replace(RECIPE, dtype=dtype, **changes)
        assert ensemble.bytes_per_run(recipe) == size * (copies * parameters + activations)


def test_out_of_memory_halves_the_stack_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = stack_module.Stack.train_step

    def limited(self: stack_module.Stack) -> tuple[Tensor, Tensor]:
        sizes.append(len(self.runs))
        if len(self.runs) > 6 or (len(self.runs) == 6 and self.step == 30):
            raise torch.OutOfMemoryError("too much")
        return step(self)

    monkeypatch.setattr(ensemble, "LOOK_EVERY", 10)  # so that steps were told that are taken again
    whole = train_many(RECIPE, RUNS)
    monkeypatch.setattr(stack_module.Stack, "train_step", limited)
    told: list[ensemble.Progress] = []
    assert_same(train_many(RECIPE, RUNS, on_progress=told.append), whole, 1e-12)
    assert set(sizes) >= {12, 6, 3}
    assert max(progress.done for progress in told) == told[-1].done == told[-1].total


def test_a_stack_too_large_to_be_made_takes_no_progress_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = stack_module.Stack.__init__

    def tight(self: stack_module.Stack, seeds: stack_module.Seeds, runs: list[Run], *, alone: bool = False) -> None:
        made.append(len(runs))
        if len(made) == 2:
            raise torch.OutOfMemoryError("too much")
        make(self, seeds, runs, alone=alone)

    monkeypatch.setattr(stack_module.Stack, "__init__", tight)
    told: list[ensemble.Progress] = []
    train_many(RECIPE, RUNS[:4], stack=2, on_progress=told.append)
    assert made == [2, 2, 1, 1]
    assert told[-1] == (4 * 60, 4 * 60, 0)


def test_the_host_starts_few_operations_for_a_run_of_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand runs wait for it: a mean by torch for each point of each curve was 70 % of it."""

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return function(*args, **(kwargs or {}))

    def stubbed(self: stack_module.Stack) -> tuple[Tensor, Tensor]:
        self.step += 1
        return torch.full((len(self.runs),), 2.0), torch.full((len(self.runs),), 0.1)

    monkeypatch.setattr(stack_module.Stack, "train_step", stubbed)
    counts = []
    for size in (10, 30):
        with Counter() as counter:
            records = train_many(RECIPE, [Run(1.0, 0.1 * (i + 1), 0) for i in range(size)], budgets=(20, 60))
        assert all(record.curve.loss == (2.0,) * len(record.curve.steps) for record in records)
        counts.append(counter.count)
    assert (counts[1] - counts[0]) / 20 < 40, "torch operations for one more run and its two records"


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Counting(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().mean(0)
        return x


class Copying(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.copy_(x.detach().mean(0))
        return x


class Scaling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean().item()


class Selecting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, x.sum(0).nonzero().flatten()]


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Leaving(nn.Module):
    """By way of NumPy, for which torch has no rule."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(0 * x.detach().numpy())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.BatchNorm1d(16), r"accumulates running statistics.*track_running_stats=False"),
        (nn.Dropout(0.5), r"draws at random.*set p=0"),
        (Branching(), r"branches on a tensor's values.*use torch\.where"),
        (Scaling(), r"turns a tensor into a number.*keep it a tensor"),
        (Selecting(), r"makes a shape that depends on a tensor's values.*use torch\.where"),
        (Counting(), r"writes into buffer 'seen', which all runs share; compute it anew in forward"),
        (Copying(), r"writes into buffer 'seen', which all runs share; compute it anew in forward"),
        (Noisy(), r"draws at random.*draw outside forward"),
        (Leaving(), r"can't be run for several networks at once \(Cannot access .*\); change it"),
    ],
)
def test_a_module_that_cannot_be_stacked_is_named_and_runs_one_at_a_time(module: nn.Module, message: str) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(144, 16), module, nn.ReLU(), nn.Linear(16, 10))

    recipe = dataclasses.replace(RECIPE, build=make, parametrization="as_is", steps=5)
    named = rf"2 \({type(module).__name__}\) {message}.*one_at_a_time=True"
    with pytest.raises(UsageError, match=named) as told:
        train_many(recipe, RUNS[:2])
    assert len(str(told.value)) < 200
    assert "pytorch/issues" not in str(told.value)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Drawn(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


class Doubling(nn.Module):
    """Another function in evaluation than in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else 2 * x


def with_module(make: Callable[[], nn.Module], **changes: object) -> Recipe:
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(144, 16), make(), nn.ReLU(), nn.Linear(16, 10))

    return dataclasses.replace(RECIPE, build=build, parametrization="as_is", steps=5, **changes)  # type: ignore[arg-type]


def test_batch_statistics_are_those_of_each_batch_and_slice() -> None:
    recipe = with_module(lambda: nn.BatchNorm1d(16, track_running_stats=False))
    assert_same(train_many(recipe, RUNS[:4]), one_by_one(recipe, RUNS[:4]), 1e-12)


@pytest.mark.parametrize("changes", [{}, {"dtype": torch.float32}, {"steps": 1}])
def test_a_module_of_its_own_that_mixes_samples_is_refused(changes: dict[str, object]) -> None:
    recipe = dataclasses.replace(with_module(Centred), **changes)  # type: ignore[arg-type]
    for stack in (1, 2):
        with pytest.raises(UsageError, match=r"depends on the other samples passed with it.*one_at_a_time=True"):
            train_many(recipe, RUNS[1:3], stack=stack)


@pytest.mark.parametrize(
    ("module", "obstacle"),
    [
        (Branching, r"\(Branching\) branches on a tensor's values"),
        (Counting, r"\(Counting\) writes into buffer 'seen'"),
    ],
)
def test_a_stack_of_one_is_checked_too(module: Callable[[], nn.Module], obstacle: str) -> None:
    with pytest.raises(UsageError, match=obstacle):
        train_many(with_module(module), RUNS[:1])


def test_buffers_drawn_for_each_seed_are_refused_but_for_one_seed() -> None:
    recipe = with_module(Drawn)
    with pytest.raises(UsageError, match=r"buffer '2\.mask' is drawn anew for each seed"):
        train_many(recipe, RUNS[:2])
    assert_same(train_many(recipe, RUNS[:4:2]), one_by_one(recipe, RUNS[:4:2]), 1e-12)


def test_held_out_outputs_at_the_start_are_those_in_evaluation_mode() -> None:
    recipe = with_module(Doubling)
    assert_same(train_many(recipe, RUNS[:2]), one_by_one(recipe, RUNS[:2]), 1e-12)


def test_one_at_a_time_runs_batch_norm_as_it_is() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))

    recipe = dataclasses.replace(RECIPE, build=make, parametrization="as_is", steps=5)
    many = train_many(recipe, RUNS[:2], one_at_a_time=True, budgets=(3, 5))
    assert many[1::2] == one_by_one(recipe, RUNS[:2])
    assert [record.steps for record in many] == [3, 5, 3, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": (0,)}, "budget=0 is too small"),
        ({"budgets": (61,)}, "budget=61 is more than the recipe's steps=60; give at most 60"),
        ({"budgets": 61}, "budget=61 is more than the recipe's steps=60; give at most 60"),
        ({"stack": 0}, "stack=0 is too small"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train_many(RECIPE, RUNS, **options)  # type: ignore[arg-type]


def test_repeated_and_impossible_runs() -> None:
    with pytest.raises(UsageError, match=r"the run γ=1, lr=0.5, seed=3 is given twice; drop one"):
        train_many(RECIPE, [*RUNS, Run(1.0, 0.5, 3)])
    with pytest.raises(UsageError, match="gamma=-1"):
        train_many(RECIPE, [Run(-1.0, 0.5, 3)])
    with pytest.raises(UsageError, match="lr=nan"):
        train_many(RECIPE, [Run(1.0, math.nan, 3)])
    assert train_many(RECIPE, []) == []


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (Run(1.0, 0.5, 3), r"runs=Run\(.*\) is no list of runs; give \[Run\(1\.0, 0\.1, 0\), …\]"),
        (5, "runs=5 is no list of runs"),
        ([1.0, 0.5, 3], r"1\.0 among the runs is no run"),
        ([(1.0, 0.5)], r"\(1\.0, 0\.5\) among the runs is no run"),
        ([Run(1.0, 0.5, 0.5)], r"seed=0\.5 is not a whole number"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_list_of_runs(runs: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train_many(RECIPE, runs)  # type: ignore[arg-type]


def test_numbers_may_be_numpys() -> None:
    recipe = dataclasses.replace(RECIPE, steps=6)
    six: Any = np.int64(6)
    half: Any = np.float32(0.5)
    seeds: Any = np.arange(2)
    budgets: Any = np.array([3, 6])
    numpys = dataclasses.replace(RECIPE, steps=six)
    runs = [Run(gamma, half, seed) for gamma in np.array([1.0, 2.0]) for seed in seeds]
    plain = [Run(gamma, 0.5, seed) for gamma in (1.0, 2.0) for seed in (0, 1)]
    many = train_many(numpys, runs, budgets=budgets)
    assert many == train_many(recipe, plain, budgets=(3, 6))
    one = train(numpys, gamma=4 * half, lr=half, seed=seeds[1])
    assert one == train(recipe, gamma=2.0, lr=0.5, seed=1)
    for record in (*many, one):
        assert RunRecord.from_dict(json.loads(record.to_json())) == record
    for seed in (True, 0.5, "0", np.float64(1.0)):
        with pytest.raises(UsageError, match=r"seed=.* is not a whole number; give an integer"):
            train(recipe, gamma=1.0, lr=0.5, seed=seed)  # type: ignore[arg-type]


def test_one_budget_may_be_a_number() -> None:
    recipe = dataclasses.replace(RECIPE, steps=6)
    assert train_many(recipe, RUNS[:2], budgets=5) == train_many(recipe, RUNS[:2], budgets=(5,))


@pytest.mark.parametrize("stack", [1, 2])
def test_a_network_with_outputs_that_the_loss_cannot_take(stack: int) -> None:
    narrow = dataclasses.replace(RECIPE, build=partial(MLP, 144, 4, width=8), steps=5)
    for loss in ("cross_entropy", "mse"):
        with pytest.raises(UsageError, match=r"shape \(8, 4\), and the stream's targets are 10 classes; .*10 outputs$"):
            train_many(dataclasses.replace(narrow, loss=loss), RUNS[:2], stack=stack)


def test_frozen_parameters_drawn_for_each_seed_are_refused_but_for_one_seed() -> None:
    def frozen() -> nn.Module:
        return nn.Linear(16, 16).requires_grad_(False)

    recipe = with_module(frozen)
    with pytest.raises(UsageError, match=r"parameter '2\.weight' is frozen but drawn anew .*one_at_a_time"):
        train_many(recipe, RUNS[:2])
    assert_same(train_many(recipe, RUNS[:4:2]), one_by_one(recipe, RUNS[:4:2]), 1e-12)
    assert_same(train_many(recipe, RUNS[:2], one_at_a_time=True), one_by_one(recipe, RUNS[:2]), 0.0)


def test_the_stack_fits_the_caches_and_large_or_convolutional_networks_train_alone() -> None:
    def size(**changes: object) -> int:
        recipe = dataclasses.replace(RECIPE, dtype=torch.float32, **changes)  # type: ignore[arg-type]
        return ensemble._stack_size(stack_module.Seeds(recipe), RUNS)

    assert size(build=partial(MLP, 144, 10, width=64)) >= 81
    assert size(build=partial(MLP, 144, 10, width=512)) == 1
    assert size(build=partial(CNN, (1, 12, 12), 10, width=4, depth=3)) == 1
    assert size(build=partial(MLP, 144, 10, width=64), optimizer="adam") < size(build=partial(MLP, 144, 10, width=64))
