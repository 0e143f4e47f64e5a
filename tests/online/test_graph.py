"""Recorded steps against ordinary ones. Without an accelerator a "recording" calls the function again: what a replay
may rely on, fixed places for all that changes, is the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch

from gammaopt.online import MLP, Digits, Recipe, Run, RunRecord, ensemble, train_many
from gammaopt.online._graph import WARM_UP, Made, Record, Stepper
from gammaopt.online._stack import Seeds, Stack
from gammaopt.online.train import OptimizerName

RECIPE = Recipe(
    partial(MLP, 144, 10, width=16), Digits(), "mse", steps=120, batch_size=8, depth=3.0, dtype=torch.float64
)
RUNS = [Run(gamma, 0.5, seed) for gamma in (0.1, 1.0, 10.0) for seed in (3, 4)]


class Recorder:
    """Stands for :class:`CudaGraphs`: runs what was recorded again, in the same places, and counts."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, function: Callable[[], Made]) -> Callable[[], Made]:
        self.recordings += 1
        made = torch.empty(0), torch.empty(0)

        def replay() -> Made:
            nonlocal made
            self.replays += 1
            fresh = function()
            made = fresh if made[0].shape != fresh[0].shape else made
            for old, new in zip(made, fresh, strict=True):
                old.copy_(new)  # as a graph writes its results to the same memory every time
            return made

        return replay


def trained(recipe: Recipe, runs: list[Run], monkeypatch: pytest.MonkeyPatch, record: Record) -> list[RunRecord]:
    with monkeypatch.context() as patch:
        patch.setattr(ensemble, "Stepper", partial(Stepper, record=record))
        return train_many(recipe, runs)


@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("adam", 0.0), ("adamw", 0.0)])
@pytest.mark.parametrize("seeds", [1, 2])
def test_replayed_steps_are_the_ordinary_ones(
    monkeypatch: pytest.MonkeyPatch, optimizer: OptimizerName, momentum: float, seeds: int
) -> None:
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, momentum=momentum)
    runs = [Run(run.gamma, run.lr * (1 if optimizer == "sgd" else 0.1), run.seed) for run in RUNS[:: 3 - seeds]]
    recorder = Recorder()
    replayed = trained(recipe, runs, monkeypatch, recorder)
    assert (recorder.recordings, recorder.replays) == (1, recipe.steps - WARM_UP)
    for ours, plain in zip(replayed, train_many(recipe, runs), strict=True):
        assert ours.final_loss == pytest.approx(plain.final_loss, rel=1e-12)
        assert ours.prequential_loss == pytest.approx(plain.prequential_loss, rel=1e-12)
        assert ours.prequential_accuracy == plain.prequential_accuracy


def test_a_stack_that_loses_a_run_is_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, recorder = [*RUNS, Run(1.0, 1e4, 3)], Recorder()
    replayed = trained(RECIPE, runs, monkeypatch, recorder)
    assert recorder.recordings == 2
    assert replayed[-1].diverged_at is not None
    assert replayed == train_many(RECIPE, runs)


def test_a_network_that_cannot_be_recorded_takes_ordinary_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Callable[[], Made]) -> Callable[[], Made]:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert trained(RECIPE, RUNS, monkeypatch, refuse) == train_many(RECIPE, RUNS)


def test_a_recording_that_does_not_fit_halves_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def tight(function: Callable[[], Made]) -> Callable[[], Made]:
        replay = Recorder()(function)

        def limited() -> Made:
            made = replay()
            sizes.append(len(made[0]))
            if sizes[-1] > 3:
                raise torch.OutOfMemoryError("too much")
            return made

        return limited

    records = trained(RECIPE, RUNS, monkeypatch, tight)
    assert set(sizes) == {6, 3}
    assert [record.final_loss for record in records] == pytest.approx(
        [record.final_loss for record in train_many(RECIPE, RUNS)], rel=1e-12
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a real CUDA graph")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_cuda_graph_takes_the_ordinary_steps(optimizer: OptimizerName) -> None:
    recipe = dataclasses.replace(RECIPE, device="cuda", optimizer=optimizer)
    runs = [Run(run.gamma, 0.05, run.seed) for run in RUNS]
    graphed, plain = (Stack(Seeds(recipe), runs) for _ in range(2))
    take_step = Stepper(graphed)
    for _ in range(20):
        ours, theirs = take_step(), plain.train_step()
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)
