"""What a study found: a dataclass that is the same in a program, in result.json and in the report.

The verdict asks more of ``tuned`` than its interval against the rate that γ = 1 chose. A search on a few seeds misses
the best rate by a little, and paired seeds are sharp enough to see that little: without any effect of γ a study could
be "confirmed" or "worse" for its luck (``experiments/benchmarks/false_positives.py`` counts how often). So γ = 1 is
also run at the rates beside the one it chose, and tuned γ has to beat every one of them, or to lose to every one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from gammaopt.tuning._budget import Plan
from gammaopt.tuning._confirm import Confirmation, Verdict
from gammaopt.tuning._record import Record
from gammaopt.tuning._space import GAMMA, RATE

ENOUGH_SEEDS = 10  # fresh ones, for a result that is shown to others


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
class Rival:
    """γ = 1 at a rate beside the one it chose.

    Attributes:
        lr: the rate.
        confirm: tuned γ minus γ = 1 at this rate, on the fresh seeds.
    """

    lr: float
    confirm: Confirmation


@dataclass(frozen=True)
class Spent:
    """What an arm's search was given, and what it took: a diverged run stops early.

    Attributes:
        runs: trials × seeds.
        samples: given; ``None`` where a step's samples are not known.
        flops: given, forward, backward and the frozen copy's forward; ``None`` where they are not known.
        used: share of the steps, and so of samples and FLOPs, that its runs took.
    """

    runs: int
    samples: int | None
    flops: float | None
    used: float


@dataclass(frozen=True)
class TuneResult:
    """The result of a study.

    Attributes:
        plan: what was run.
        metric: what was maximised and confirmed.
        arms: by name.
        confirm: paired comparison of ``tuned`` with ``one_equal_budget`` on ``metric``: what tuned γ is better by.
        confirm_final: the same on final held-out accuracy; reported, not decisive. ``None`` for a user's own function.
        rivals: γ = 1 at the rates beside the one it chose; ``tuned`` has to beat them all, or to lose to them all.
        spent: arm name → what its search was given and took. Every arm of a verdict is given the same.
        notes: what a reader should know, e.g. a best γ at the end of the searched range.
        versions: of the packages and the interpreter that made it.
        command: the exact command line, folder and storage included: it goes on with the study or remakes its report.
        trials: every cell searched.
        runs: arm name → its records on the fresh seeds, in the order of the seeds.
        git_commit: of the code that its runs were made under, if that is in git; the first of those in a note, if they
            were made under several.
    """

    plan: Plan
    metric: str
    arms: dict[str, Arm]
    confirm: Confirmation
    confirm_final: Confirmation | None
    rivals: tuple[Rival, ...]
    spent: dict[str, Spent]
    notes: tuple[str, ...]
    versions: dict[str, str]
    command: str = field(compare=False)
    trials: tuple[Trial, ...]
    runs: dict[str, tuple[Record, ...]]
    git_commit: str | None = None

    @property
    def at_edge(self) -> tuple[str, ...]:
        """What lies at the end of its searched range, in words. No result then: the optimum may lie beyond.

        An arm that diverged everywhere has its optimum outside for certain. Without this its failure would confirm the
        other arm.
        """
        found = []
        for name in ("tuned", "one_equal_budget"):
            arm = self.arms[name]
            if arm.diverged < arm.trials:
                found += edges(self.plan, name, arm.gamma, arm.lr)
            else:
                found.append(all_diverged(self.plan, name))
        return tuple(found)

    @property
    def p_value(self) -> float:
        """The p of the verdict "confirmed" or "worse": the largest of those against γ = 1 at each of its rates.

        Each of them has to be shown, so the union of their nulls is rejected at this p (R. L. Berger, "Multiparameter
        hypothesis testing and acceptance sampling", Technometrics 24, 1982). Differences of both signs have p = 1.
        It is what :func:`holm` corrects over several studies.
        """
        every = [self.confirm, *(rival.confirm for rival in self.rivals)]
        if len({one.mean_difference > 0 for one in every}) > 1:
            return 1.0
        return max(one.p_value for one in every)

    @property
    def smallest_difference(self) -> float:
        """Of tuned γ and γ = 1 at any of its rates: what the choice of a rate can't explain.

        0 if tuned γ is above γ = 1 at one of the rates, and below it at another.
        """
        every = [self.confirm.mean_difference, *(rival.confirm.mean_difference for rival in self.rivals)]
        return max(min(every), 0.0) if self.confirm.mean_difference > 0 else min(max(every), 0.0)

    @property
    def verdict(self) -> Verdict:
        """``"confirmed"``, ``"not confirmed"``, ``"worse"``, or ``"range too small"``: see :attr:`at_edge`."""
        return judge(self.confirm, self.rivals, edge=bool(self.at_edge))

    def in_words(self) -> str:
        """The verdict as a sentence."""
        tuned, base, shown = self.arms["tuned"], self.arms["one_equal_budget"], self.plan.shown_difference
        low, high = (shown(end) for end in self.confirm.ci95)
        difference = shown(self.confirm.mean_difference)
        if self.verdict == "range too small":
            sentence = f"Range too small: {'; '.join(self.at_edge)}. So far γ = {tuned.gamma:.3g} against γ = 1"
            points = f": {difference}"
        elif self.verdict == "confirmed":
            sentence, points = f"Confirmed: γ = {tuned.gamma:.3g} beats γ = 1", f" by {difference}"
        elif self.verdict == "worse":
            side = "below" if self.plan.direction == "maximize" else "above"
            sentence, points = f"Worse: γ = {tuned.gamma:.3g} is {side} γ = 1", f" by {difference.lstrip('-')}"
        else:
            sentence, points = f"Not confirmed: γ = {tuned.gamma:.3g} can't be told from γ = 1", f": {difference}"
            if self.confirm.verdict == "confirmed":
                hardest = min(self.rivals, key=lambda rival: rival.confirm.ci95[0])
                sentence = f"Not confirmed: γ = {tuned.gamma:.3g} does not beat γ = 1 at lr = {hardest.lr:.3g}"
                points = f" ({shown(hardest.confirm.mean_difference)}), only at the rate it chose: {difference}"
            elif self.confirm.verdict == "worse":
                easiest = max(self.rivals, key=lambda rival: rival.confirm.ci95[1])
                sentence = f"Not confirmed: γ = {tuned.gamma:.3g} does not lose to γ = 1 at lr = {easiest.lr:.3g}"
                points = f" ({shown(easiest.confirm.mean_difference)}), only at the rate it chose: {difference}"
        beside = ""
        if self.verdict in ("confirmed", "worse") and self.smallest_difference != self.confirm.mean_difference:
            least = shown(self.smallest_difference).lstrip("-")  # as above: "worse by"
            beside = f"; against γ = 1 at a rate beside it {least} at least"
        seeds = len(self.confirm.seeds)
        few = "" if seeds >= ENOUGH_SEEDS else f" {seeds} seeds are too few to show it: give {ENOUGH_SEEDS} or more."
        unit = "points of" if self.plan.scale == 100 else "in"
        lower = "" if self.plan.direction == "maximize" else "lower is better: "
        return (
            f"{sentence}{points} {unit} {self.metric.replace('_', ' ')} "
            f"({lower}{self.shown(tuned.confirmed_score)} against {self.shown(base.confirmed_score)}; 95 % interval "
            f"{low} to {high}, p = {self.confirm.p_value:.2g}, {seeds} fresh paired seeds{beside}).{few}"
        )

    def budget_in_words(self) -> str:
        """What both sides of the verdict were given, in trials, samples and FLOPs, and how much of it they took."""
        given, used = self.spent["tuned"], {name: f"{100 * spent.used:.0f} %" for name, spent in self.spent.items()}
        parts = [f"{self.arms['tuned'].trials} trials × {self.plan.seeds} seeds × {self.plan.steps:,} steps"]
        parts += [] if given.samples is None else [f"{given.samples:.3g} samples"]
        parts += [] if given.flops is None else [f"{given.flops:.3g} FLOPs"]
        return (
            f"Tuned γ and γ = 1 were given the same: {' = '.join(parts)}. Diverged runs stop early: "
            f"tuned γ took {used['tuned']} of it, γ = 1 {used['one_equal_budget']}."
        )

    def shown(self, score: float) -> str:
        """See :meth:`Plan.shown`."""
        return self.plan.shown(score)

    def to_dict(self) -> dict[str, Any]:
        """Everything but trials and curves, as JSON values: the content of result.json."""
        tuned, base = self.arms["tuned"], self.arms["one_equal_budget"]
        return {
            **self.plan.names(),
            "gamma": tuned.gamma,
            "lr": tuned.lr,
            "baseline": {"gamma": base.gamma, "lr": base.lr},
            "verdict": self.verdict,
            "p_value": self.p_value,
            "smallest_difference": self.smallest_difference,
            "in_words": self.in_words(),
            "confirm": dataclasses.asdict(self.confirm),
            "confirm_final": None if self.confirm_final is None else dataclasses.asdict(self.confirm_final),
            "rivals": [dataclasses.asdict(rival) for rival in self.rivals],
            "spent": {name: dataclasses.asdict(spent) for name, spent in self.spent.items()},
            "arms": {name: dataclasses.asdict(arm) for name, arm in self.arms.items()},
            "notes": list(self.notes),
            "plan": self.plan.to_dict(),
            "command": self.plan.command(),
            "versions": self.versions,
            "git_commit": self.git_commit,
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as indented JSON, in strict JSON's number format."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def judge(confirm: Confirmation, rivals: tuple[Rival, ...], *, edge: bool) -> Verdict:
    """The verdict: an interval above 0, or below it, against γ = 1 at the rate it chose and at every rate beside it."""
    if edge:
        return "range too small"
    if any(rival.confirm.verdict != confirm.verdict for rival in rivals):
        return "not confirmed"
    return confirm.verdict


def edges(plan: Plan, arm: str, gamma: float, lr: float) -> list[str]:
    """Which coordinates of an arm's best cell lie at the end of their range, each with the option that widens it."""
    point = {GAMMA: math.log2(gamma), RATE: math.log2(lr / plan.base_lr)}
    what = {GAMMA: (f"γ = {gamma:.3g}", "gamma_range"), RATE: (f"lr = {lr:.3g}", "octaves")}
    return [
        f"the best {what[name][0]} of arm {arm} lies at the end of its range; widen {plan.option(what[name][1])}"
        for name in plan.space(arm).at_edge(point)
    ]


def all_diverged(plan: Plan, arm: str) -> str:
    """That an arm's trials all diverged, with the options that may give it one that doesn't."""
    widen = plan.option("octaves") if arm != "tuned" else f"{plan.option('gamma_range')} or {plan.option('octaves')}"
    return f"all trials of arm {arm} diverged; widen {widen}"
