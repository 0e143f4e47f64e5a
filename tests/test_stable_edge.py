"""The law on a real task: the stable edge of c in η = c·s(γ) stands in one half-decade over γ = 1, 10, 100.

A 4-term staircase of parities on 32 bits, target of unit variance, 3-layer MLP of width 128 in mean-field form, MSE/2,
batch 64. The table this repeats was measured over 3,000 steps: at every γ ≥ 1 log₁₀ c = 0.5 trains and 1 diverges.
"""

from __future__ import annotations

import math
from functools import partial

import pytest

from gammaopt import EtaLaw
from gammaopt.online import MLP, Recipe, RunRecord, Staircase, train

STEPS, TERMS = 1500, 4
GAMMAS = (1.0, 10.0, 100.0)


def run(gamma: float, log10_c: float) -> RunRecord:
    recipe = Recipe(partial(MLP, 32, 1, width=128, depth=3), Staircase(32, TERMS), "mse", "sgd", STEPS, 64, depth=3.0)
    # The table's loss is MSE/2, the recipe's is MSE: half the rate gives the same steps.
    return train(recipe, gamma=gamma, lr=10**log10_c / 2, seed=0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_stable_edge_lies_in_the_half_decade_above_half_a_decade(gamma: float) -> None:
    below, above = run(gamma, 0.5), run(gamma, 1.0)
    assert below.final_loss is not None
    assert below.final_loss < 0.02  # over the target's variance of 1
    # Past the edge a run diverges, or its ReLUs die and it answers a constant: either way it has learned nothing.
    assert above.diverged_at is not None or (above.final_loss is not None and above.final_loss > 0.9)


def test_without_the_law_the_rate_of_gamma_one_does_not_train_gamma_one_hundred() -> None:
    """At log₁₀ c = −0.5 γ = 1 learns everything; the same η at γ = 100 is 21 times below the law and learns nothing."""
    same_rate = math.log10(EtaLaw(3).factor(100.0))
    at_one, at_hundred = run(1.0, -0.5), run(100.0, -0.5 - same_rate)
    assert at_one.final_loss is not None
    assert at_one.final_loss < 0.02
    assert at_hundred.final_loss is not None
    assert at_hundred.final_loss > 0.8
