"""Tune γ with Optuna, then confirm on fresh seeds: is the tuned γ better than γ = 1 at the same budget?

The study has three arms: ``tuned`` searches (γ, η) with K·M trials, ``one_equal_budget`` searches η at γ = 1 with the
same K·M trials, and ``one`` is its first M trials, what somebody would spend who doesn't tune γ. The best cell of
each arm is then run on fresh seeds, and the verdict compares ``tuned`` with ``one_equal_budget``, paired by seed, and
with γ = 1 at the rates beside the one it chose.

``tune`` studies a bundled task, ``study`` your own training function.
"""

from typing import TYPE_CHECKING, Any

from gammaopt.tuning._confirm import Confirmation as Confirmation
from gammaopt.tuning._confirm import holm as holm
from gammaopt.tuning._confirm import paired_t as paired_t
from gammaopt.tuning._plan import StudyPlan as StudyPlan
from gammaopt.tuning._result import Arm as Arm
from gammaopt.tuning._result import Rival as Rival
from gammaopt.tuning._result import Spent as Spent
from gammaopt.tuning._result import TuneResult as TuneResult
from gammaopt.tuning._space import Space as Space
from gammaopt.tuning._study import confirm as confirm
from gammaopt.tuning._study import study as study
from gammaopt.tuning._trial import DivergedError as DivergedError
from gammaopt.tuning._trial import ObjectiveTrial as ObjectiveTrial
from gammaopt.tuning._tune import Progress as Progress
from gammaopt.tuning._tune import Remote as Remote
from gammaopt.tuning._tune import tune as tune

if TYPE_CHECKING:
    from gammaopt.tuning._pruner import RescaledTimePruner as RescaledTimePruner

__all__ = [
    "Arm",
    "Confirmation",
    "DivergedError",
    "ObjectiveTrial",
    "Progress",
    "Remote",
    "RescaledTimePruner",
    "Rival",
    "Space",
    "Spent",
    "StudyPlan",
    "TuneResult",
    "confirm",
    "holm",
    "paired_t",
    "study",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name != "RescaledTimePruner":  # a class of Optuna's, which importing this does not import
        raise AttributeError(f"module 'gammaopt.tuning' has no attribute {name!r}")
    from gammaopt.tuning._pruner import RescaledTimePruner

    return RescaledTimePruner
