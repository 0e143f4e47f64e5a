"""What proposes the next point: the given start points first, then TPE or a Gaussian process.

TPE ranks the trials it has seen, so the cliff at the edge of stability does not bend its model of everything else. The
Gaussian process models the score itself and its own probability of divergence; it needs fewer trials and more time
for each. Both take divergence as a constraint, and both keep away from points that were asked and not yet told: TPE
takes them for bad ones (a constant liar), the Gaussian process averages over what they may bring.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from gammaopt._errors import one_of

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("tpe", "gp")


def model_sampler(name: str, key: str) -> optuna.samplers.BaseSampler:
    """The sampler called ``name``, seeded by ``key``.

    A key for each trial: a sampler made anew on resuming must not repeat its first points.
    """
    import optuna

    one_of("sampler", name, SAMPLERS)
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
    if name == "gp":
        return optuna.samplers.GPSampler(n_startup_trials=0, seed=seed)
    return optuna.samplers.TPESampler(n_startup_trials=0, seed=seed)


def given(point: dict[str, float]) -> optuna.samplers.BaseSampler:
    """A sampler of one given point. Not ``enqueue_trial``: a point enqueued by a killed process would come up twice."""
    from optuna.samplers import BaseSampler

    class Given(BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> float:
            return point[param_name]

    return Given()
