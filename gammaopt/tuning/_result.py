"""What a study found: a dataclass that is the same in a program, in result.json and in the report."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from gammaopt.online.record import RunRecord
from gammaopt.tuning._confirm import Confirmation, Verdict
from gammaopt.tuning._plan import StudyPlan


@dataclass(frozen=True)
class Arm:
    """One arm: what it was allowed, what it chose on the tuning seeds, what that earned on fresh seeds.

    Attributes:
        name: ``"tuned"``, ``"one"`` or ``"one_equal_budget"``.
        trials: cells it could choose from; each was averaged over the same tuning seeds.
        diverged: how many of them diverged on at least one seed.
        gamma, lr, effective_lr: the chosen cell: γ, the optimizer's ``lr`` (at γ = 1), and η = ``lr``·s(γ).
        score: the chosen cell's mean metric on the tuning seeds. It was the best of many and so is optimistic.
        confirmed_score: its mean metric on the fresh seeds.
        confirmed_final: its mean held-out accuracy at the end, on the fresh seeds.
        scores: its metric on each fresh seed.
    """

    name: str
    trials: int
    diverged: int
    gamma: float
    lr: float
    effective_lr: float
    score: float
    confirmed_score: float
    confirmed_final: float
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Trial:
    """One cell of the search and its mean score on the tuning seeds."""

    arm: str
    gamma: float
    lr: float
    effective_lr: float
    score: float
    diverged: bool


@dataclass(frozen=True)
class TuneResult:
    """The result of a study.

    Attributes:
        plan: what was run.
        metric: what was maximised and confirmed.
        arms: by name.
        confirm: paired comparison of ``tuned`` with ``one_equal_budget`` on ``metric``.
        confirm_final: the same on final held-out accuracy; reported, not decisive.
        notes: what a reader should know, e.g. a best γ at the end of the searched range.
        versions: of the packages and the interpreter that made it.
        command: the exact command line, folder and storage included: it goes on with the study or remakes its report.
        trials: every cell searched.
        runs: arm name → its records on the fresh seeds, in the order of the seeds.
    """

    plan: StudyPlan
    metric: str
    arms: dict[str, Arm]
    confirm: Confirmation
    confirm_final: Confirmation
    notes: tuple[str, ...]
    versions: dict[str, str]
    command: str = field(compare=False)
    trials: tuple[Trial, ...]
    runs: dict[str, tuple[RunRecord, ...]]

    @property
    def verdict(self) -> Verdict:
        """``"confirmed"``, ``"not confirmed"`` or ``"worse"``."""
        return self.confirm.verdict

    def in_words(self) -> str:
        """The verdict as a sentence."""
        tuned, base = self.arms["tuned"], self.arms["one_equal_budget"]
        low, high = (100 * end for end in self.confirm.ci95)
        difference = 100 * self.confirm.mean_difference
        points = {
            "confirmed": f" by {difference:+.2f}",
            "not confirmed": f": {difference:+.2f}",
            "worse": f" by {-difference:.2f}",
        }[self.verdict]
        sentence = {
            "confirmed": f"Confirmed: γ = {tuned.gamma:.3g} beats γ = 1",
            "not confirmed": f"Not confirmed: γ = {tuned.gamma:.3g} can't be told from γ = 1",
            "worse": f"Worse: γ = {tuned.gamma:.3g} is below γ = 1",
        }[self.verdict]
        return (
            f"{sentence}{points} points of {self.metric.replace('_', ' ')} "
            f"({100 * tuned.confirmed_score:.2f} % against {100 * base.confirmed_score:.2f} %; 95 % interval "
            f"{low:+.2f} to {high:+.2f}, p = {self.confirm.p_value:.2g}, {len(self.confirm.seeds)} fresh paired seeds)."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but trials and curves, as JSON values: the content of result.json."""
        tuned, base = self.arms["tuned"], self.arms["one_equal_budget"]
        return {
            "task": self.plan.task,
            "loss": self.plan.loss,
            "optimizer": self.plan.optimizer,
            "gamma": tuned.gamma,
            "lr": tuned.lr,
            "baseline": {"gamma": base.gamma, "lr": base.lr},
            "verdict": self.verdict,
            "in_words": self.in_words(),
            "confirm": dataclasses.asdict(self.confirm),
            "confirm_final": dataclasses.asdict(self.confirm_final),
            "arms": {name: dataclasses.asdict(arm) for name, arm in self.arms.items()},
            "notes": list(self.notes),
            "plan": self.plan.to_dict(),
            "command": self.plan.command(),
            "versions": self.versions,
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as indented JSON, in strict JSON's number format."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
