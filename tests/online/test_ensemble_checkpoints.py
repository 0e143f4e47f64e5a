"""A stack that was killed goes on from its checkpoint, and from no other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import RECIPE, RUNS, assert_same, build
from torch import Tensor, nn

import gammaopt
from gammaopt._errors import UsageError
from gammaopt.online import (
    MLP,
    Recipe,
    Run,
    RunRecord,
    StopTraining,
    _checkpoint,
    ensemble,
    train_many,
)
from gammaopt.online import _stack as stack_module
from gammaopt.online._traces import Traces
from gammaopt.online.streams import cifar5m
from gammaopt.online.train import OptimizerName

pytest_plugins = ["ensemble_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_stopped_stack_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look_every: Callable[[int], None], optimizer: OptimizerName
) -> None:
    look_every(10)
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, loss="mse", momentum=0.9 if optimizer == "sgd" else 0.0)
    runs = [*(Run(run.gamma, 0.1 * run.lr, run.seed) for run in RUNS), Run(1.0, 1e9, 3)]
    whole = train_many(recipe, runs, budgets=(20, 60))
    path = tmp_path / "stack.pt"

    def stop(progress: ensemble.Progress) -> None:
        if progress.done >= 0.6 * progress.total:
            raise StoppedError

    with pytest.raises(StoppedError):
        train_many(recipe, runs, budgets=(20, 60), checkpoint=path, on_progress=stop)
    steps = 0
    step = stack_module.Stack.train_step

    def counted(self: stack_module.Stack) -> tuple[Tensor, Tensor]:
        nonlocal steps
        steps += 1
        return step(self)

    monkeypatch.setattr(stack_module.Stack, "train_step", counted)
    told: list[ensemble.Progress] = []
    again = train_many(recipe, runs, budgets=(20, 60), checkpoint=path, on_progress=told.append)
    assert again == whole
    assert 0 < steps <= 0.5 * recipe.steps
    assert told[-1].done == told[-1].total
    assert told[0].restored == told[0].done == told[-1].restored >= 0.5 * told[-1].total
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_other_runs_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "CHECKPOINT_SECONDS", 0.0)

    def stop(progress: ensemble.Progress) -> None:
        if progress.done > 0.5 * progress.total:
            raise StoppedError

    path = tmp_path / "stack.pt"
    with pytest.raises(StoppedError):
        train_many(RECIPE, RUNS[:2], checkpoint=path, on_progress=stop)
    assert train_many(RECIPE, RUNS[2:4], checkpoint=path) == train_many(RECIPE, RUNS[2:4])


def with_tanh(net: nn.Module) -> nn.Module:
    """The network with another activation: the same parameters by name, shape and rate."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Tanh())
    return net


def stopped(recipe: Recipe, runs: list[Run], path: Path, budgets: tuple[int, ...] = ()) -> None:
    def stop(progress: ensemble.Progress) -> None:
        if 0.5 * progress.total < progress.done:
            raise StoppedError

    with pytest.raises(StoppedError):
        train_many(recipe, runs, budgets=budgets, checkpoint=path, on_progress=stop)
    assert path.exists()


@pytest.mark.parametrize(
    ("changes", "budgets"),
    [
        ({}, (5, 20)),
        ({"build": partial(MLP, 144, 10, width=8)}, (20,)),
        ({"build": lambda: with_tanh(build())}, (20,)),
        ({"depth": 4.0}, (20,)),
        ({"parametrization": "as_is", "knee": 2.0}, (20,)),
        ({"base": partial(MLP, 144, 10, width=4)}, (20,)),
    ],
    ids=["budgets", "width", "activation", "depth", "knee", "base"],
)
def test_a_checkpoint_of_the_same_runs_but_another_network_law_or_budgets_is_not_used(
    tmp_path: Path, look_every: Callable[[int], None], changes: dict[str, object], budgets: tuple[int, ...]
) -> None:
    look_every(4)
    plain = dataclasses.replace(RECIPE, steps=20)
    if {"base", "knee"} & set(changes):
        plain = dataclasses.replace(plain, parametrization="as_is", knee=1.0)
    stopped(plain, RUNS[:2], path := tmp_path / "stack.pt", (20,))
    other = dataclasses.replace(plain, **changes)  # type: ignore[arg-type]
    told: list[ensemble.Progress] = []
    again = train_many(other, RUNS[:2], budgets=budgets, checkpoint=path, on_progress=told.append)
    assert again == train_many(other, RUNS[:2], budgets=budgets)
    assert told[-1].restored == 0


def test_a_checkpoint_of_a_folder_that_has_changed_is_not_used(
    tmp_path: Path, look_every: Callable[[int], None]
) -> None:
    look_every(4)
    draw, labels = np.random.default_rng(0), np.arange(200) % 10

    def recipe() -> Recipe:
        np.savez(tmp_path / "part0.npz", X=draw.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8), Y=labels)
        build = partial(MLP, 3072, 10, width=8)
        return Recipe(build, cifar5m(tmp_path), steps=20, batch_size=8, depth=3.0, dtype=torch.float64)

    stopped(recipe(), RUNS[:2], path := tmp_path / "stack.pt")
    told: list[ensemble.Progress] = []
    train_many(recipe(), RUNS[:2], checkpoint=path, on_progress=told.append)
    assert told[-1].restored == 0


def test_a_grown_set_of_runs_goes_on_with_the_stack_of_its_checkpoint(
    tmp_path: Path, look_every: Callable[[int], None]
) -> None:
    look_every(10)
    stopped(RECIPE, RUNS[2:5], path := tmp_path / "stack.pt")
    told: list[ensemble.Progress] = []
    assert_same(
        train_many(RECIPE, RUNS[:6], checkpoint=path, on_progress=told.append), train_many(RECIPE, RUNS[:6]), 1e-12
    )
    assert told[-1].restored >= 3 * 20
    assert not path.exists()


def test_a_checkpoint_of_other_versions_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look_every: Callable[[int], None]
) -> None:
    look_every(4)
    recipe = dataclasses.replace(RECIPE, steps=20)
    for package in (gammaopt, torch):
        stopped(recipe, RUNS[:2], path := tmp_path / "stack.pt")
        told: list[ensemble.Progress] = []
        with monkeypatch.context() as patch:
            patch.setattr(package, "__version__", "0.0")
            train_many(recipe, RUNS[:2], checkpoint=path, on_progress=told.append)
        assert told[-1].restored == 0


def test_a_kill_while_a_finished_stack_is_handed_over_takes_no_step_again(
    tmp_path: Path, look_every: Callable[[int], None]
) -> None:
    look_every(10)
    runs, path = [*RUNS[:4], Run(1.0, 1e9, 3), RUNS[4]], tmp_path / "stack.pt"
    whole = dict(zip(runs, train_many(RECIPE, runs), strict=True))
    kept: list[Run] = []

    def fill_up(run: Run, records: list[RunRecord]) -> None:
        if len(kept) == 3:
            raise StoppedError
        kept.append(run)
        assert records == [whole[run]]

    with pytest.raises(StoppedError):
        train_many(RECIPE, runs, checkpoint=path, on_done=fill_up)
    told: list[ensemble.Progress] = []
    left = [run for run in runs if run not in kept]
    rest = train_many(RECIPE, [*left, *RUNS[6:8]], checkpoint=path, on_progress=told.append)
    assert rest[:3] == [whole[run] for run in left]
    assert told[-1] == (5 * 60, 5 * 60, 3 * 60)
    assert not path.exists()


def test_a_begun_stack_in_float64_goes_on_ahead_of_a_new_one_in_float32(
    tmp_path: Path, look_every: Callable[[int], None]
) -> None:
    look_every(10)
    recipe = dataclasses.replace(RECIPE, dtype=torch.float32)
    stopped(recipe, [Run(5e-4, 1.0, 3)], path := tmp_path / "stack.pt")
    told: list[ensemble.Progress] = []
    train_many(recipe, [Run(1.0, 1.0, 3), Run(5e-4, 1.0, 3)], checkpoint=path, on_progress=told.append)
    assert told[-1].restored == 30


def test_a_checkpoint_of_other_runs_is_left_by_a_call_that_writes_none(tmp_path: Path) -> None:
    def stop(progress: ensemble.Progress) -> None:
        raise ensemble.StopTraining

    path, recipe = tmp_path / "stack.pt", dataclasses.replace(RECIPE, steps=55)
    with pytest.raises(ensemble.StopTraining):
        train_many(recipe, RUNS[:2], checkpoint=path, on_progress=stop)
    before = path.read_bytes()
    train_many(recipe, RUNS[2:4], checkpoint=path)
    assert path.read_bytes() == before
    told: list[ensemble.Progress] = []
    train_many(recipe, RUNS[:2], checkpoint=path, on_progress=told.append)
    assert told[-1].restored == 2 * 50
    assert not path.exists()


def test_a_stop_at_the_very_end_leaves_a_checkpoint_too(tmp_path: Path) -> None:
    """Where all runs diverged, the last word on progress is for the steps that they did not take."""
    calls: list[ensemble.Progress] = []

    def stop(progress: ensemble.Progress) -> None:
        calls.append(progress)
        if progress.done == progress.total:
            raise ensemble.StopTraining

    path, runs = tmp_path / "stack.pt", [Run(1.0, 1e6, 0), Run(1.0, 1e7, 0)]
    with pytest.raises(ensemble.StopTraining):
        train_many(dataclasses.replace(RECIPE, steps=200), runs, checkpoint=path, on_progress=stop)
    assert path.exists()
    again = train_many(dataclasses.replace(RECIPE, steps=200), runs, checkpoint=path)
    assert again == train_many(dataclasses.replace(RECIPE, steps=200), runs)
    assert all(record.diverged_at is not None for record in again)


def test_restored_traces_are_on_the_host_wherever_the_stack_is(tmp_path: Path) -> None:
    path, ends = tmp_path / "stack.pt", [60]
    stack, traces = stack_module.Stack(stack_module.Seeds(RECIPE), RUNS[:2]), Traces(RUNS[:2], 60)
    traces.add(*stack.train_step())
    traces.look(stack.runs)
    _checkpoint.save(path, RUNS[:2], ends, stack, traces, {})
    moved: list[Tensor] = []

    class Moving(Tensor):
        """Stands for a tensor on an accelerator."""

        def cpu(self, *_: object) -> Tensor:
            moved.append(self)
            return self.as_subclass(Tensor)

    content = torch.load(path, weights_only=True)
    for name in ("losses", "shares"):
        assert content[name].shape == (2, 1)
        content[name] = content[name].as_subclass(Moving)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: content)
        _checkpoint.restore(path, ends, stack, traces, {})
    assert len(moved) == 2
    assert type(traces.losses) is type(traces.shares) is Tensor


@pytest.mark.parametrize("content", [b"nonsense", {"weight": torch.ones(2)}, [1, 2], torch.ones(3)])
def test_a_file_that_is_no_checkpoint_is_named_and_left_alone(tmp_path: Path, content: object) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"model\.pt can't be read as a checkpoint .*; move it away, or give another"):
        train_many(RECIPE, RUNS, checkpoint=path)
    assert path.read_bytes() == before


def test_a_checkpoint_may_be_a_str_in_a_folder_that_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ensemble, "LOOK_EVERY", 5)
    path = tmp_path / "not" / "there" / "stack.pt"

    def stop(progress: ensemble.Progress) -> None:
        if progress.done:
            raise StopTraining

    recipe = dataclasses.replace(RECIPE, steps=10)
    with pytest.raises(StopTraining):
        train_many(recipe, RUNS[:2], checkpoint=str(path), on_progress=stop)
    assert path.exists()
    told: list[ensemble.Progress] = []
    assert train_many(recipe, RUNS[:2], checkpoint=str(path), on_progress=told.append) == train_many(recipe, RUNS[:2])
    assert told[-1].restored == 10
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"the checkpoint .*file/stack\.pt can't be written"):
        train_many(recipe, RUNS[:2], checkpoint=tmp_path / "file" / "stack.pt", on_progress=stop)
