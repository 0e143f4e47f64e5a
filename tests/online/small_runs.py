"""Small runs that the tests of the ensemble share, and what compares their records."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gammaopt.online import MLP, Digits, Recipe, Run, RunRecord, train

build = partial(MLP, 144, 10, width=16)
RECIPE = Recipe(build, Digits(), steps=60, batch_size=8, depth=3.0, dtype=torch.float64)
RUNS = [Run(gamma, lr, seed) for gamma in (0.1, 1.0, 10.0) for lr in (0.5, 2.0) for seed in (3, 4)]


def one_by_one(recipe: Recipe, runs: list[Run]) -> list[RunRecord]:
    return [train(recipe, **run._asdict()) for run in runs]


def assert_same(many: list[RunRecord], ones: list[RunRecord], tolerance: float) -> None:
    assert len(many) == len(ones)
    for a, b in zip(many, ones, strict=True):
        assert (a.gamma, a.lr, a.seed, a.steps, a.diverged_at) == (b.gamma, b.lr, b.seed, b.steps, b.diverged_at)
        for name in ("effective_lr", "prequential_accuracy", "prequential_loss", "final_accuracy", "final_loss"):
            ours, theirs = getattr(a, name), getattr(b, name)
            assert (ours is None) == (theirs is None), name
            assert theirs is None or ours == pytest.approx(theirs, rel=tolerance, abs=tolerance), name
        assert a.curve.steps == b.curve.steps
        assert a.curve.loss == pytest.approx(b.curve.loss, rel=max(tolerance, 1e-5))
