"""The frozen copy's running statistics matter: held-out accuracy with those of the start is lower, at small γ."""

from __future__ import annotations

import batch_norm
import pytest


@pytest.mark.slow
def test_statistics_of_h0_give_the_accuracy_of_batch_statistics_and_those_of_the_start_do_not() -> None:
    preset = batch_norm.Preset(gammas=(0.1,), width=8, steps=100, held_out=500, seeds=2)
    row = batch_norm.measure(preset, 0.1)
    batch, own, start = (row[name] for name in batch_norm.ROWS)
    assert own > start + 0.05
    assert abs(own - batch) < 0.15
