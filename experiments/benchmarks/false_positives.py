"""How often a study "confirms" a γ that does nothing: hundreds of studies on real runs at γ = 1.

    python experiments/benchmarks/false_positives.py --check --json experiments/results/false_positives/cpu.json

The scores are those of results/surrogates/seeds.json: 33 rates at γ = 1, a quarter of an octave apart, 64 seeds each,
every run trained (see surrogates.py), and between two rates a seed's score is linear in log c. γ's effect is taken out,
and the plane of (γ, c) that tuned γ searches shows that line of rates in a disguise:

    exact      the score at (γ, c) is the score at c
    shifted    it is the score at c·2^sin(log₂ γ): the best rate moves with γ by up to an octave, the best score doesn't

Each study draws its own tuning and fresh seeds from the 64, without repeats, and goes the package's own way: the
default plan of the task (32 trials of each arm, 3 tuning and 12 fresh seeds) through its Sobol points, its TPE and its
batches, the choice of a cell, γ = 1 at the rates beside it, the paired t intervals and the verdict. Only the training
is looked up, and Optuna keeps its trials in memory. No γ is better or worse than γ = 1 here, so "confirmed" and
"worse" are false: at most 5 % may be confirmed, and at most 5 % worse. Told beside it: what the share of confirmed ones
would be if tuned γ had to beat the chosen rate alone.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
from _paired import write_json
from _studies import in_processes, studies_parser
from surrogates import Surrogate, read

from gammaopt._errors import require
from gammaopt.online import RunRecord
from gammaopt.online.record import Curve
from gammaopt.tuning import Confirmation, StudyPlan, paired_t
from gammaopt.tuning._folder import Cell
from gammaopt.tuning._record import Record
from gammaopt.tuning._result import Rival, Trial, edges, judge
from gammaopt.tuning._search import Search, search
from gammaopt.tuning._tune import best_trial, places_to_confirm

BAR = 0.05
SHIFTS = {"exact": 0.0, "shifted": 1.0}  # octaves that the best rate moves with γ, at most
PLAN = StudyPlan("digits", "cross_entropy", steps=300)
PRESETS = {"smoke": (3, replace(PLAN, trials=8)), "cpu": (400, PLAN)}  # studies, plan
table = cache(partial(read, "seeds"))


@dataclass(frozen=True)
class Found:
    """One study's verdict, and whether its interval against the rate that γ = 1 chose was above 0."""

    verdict: str
    beats_chosen_rate: bool


class LookedUp:
    """Records of the cells of one study, from the table instead of a training."""

    def __init__(self, plan: StudyPlan, table: Surrogate, shift: float) -> None:
        self._plan, self._table, self._shift = plan, table, shift
        columns = np.random.default_rng(plan.seed).permutation(table.scores.shape[-1]).tolist()
        self._columns = dict(zip([*plan.tuning_seeds, *plan.fresh_seeds], columns, strict=False))

    def records(self, cells: Sequence[Cell]) -> dict[Cell, Record]:
        """A record for each cell."""
        return {cell: self._record(cell) for cell in cells}

    def trials(self, arm: str) -> list[Trial]:
        """The trials of an arm: the package's own search of the plan's space."""
        plan, storage = self._plan, require("optuna", "tune").storages.InMemoryStorage()
        return search(plan, "", Search(arm, plan.space(arm), plan.trials), storage, self.records, lambda _: None)

    def _record(self, cell: Cell) -> RunRecord:
        octaves, steps = self._table.octaves, self._table.steps
        octave = math.log2(cell.lr / self._table.base_lr) + self._shift * math.sin(math.log2(cell.gamma))
        score = float(np.interp(octave, octaves, self._table.scores[0, :, self._columns[cell.seed]]))
        diverged = bool(self._table.diverged[0, np.abs(octaves - octave).argmin()])
        rate = self._plan.law.lr(cell.lr, cell.gamma)
        at, nothing = steps if diverged else None, Curve((), (), ())
        return RunRecord(cell.gamma, cell.lr, cell.seed, steps, rate, score, None, 0.0, None, at, nothing)


def study(number: int, plan: StudyPlan) -> dict[str, Found]:
    """One study in each disguise, from its first Sobol point to its verdict; ``number`` seeds all of it."""
    require("optuna", "tune").logging.set_verbosity(logging.WARNING)
    plan = replace(plan, seed=number)
    found: dict[str, Found] = {}
    base: Trial | None = None
    for name, shift in SHIFTS.items():
        runs = LookedUp(plan, table(), shift)
        base = base or best_trial(runs.trials("one_equal_budget"))  # no disguise changes the rates at γ = 1
        found[name] = verdict(plan, runs, {"tuned": best_trial(runs.trials("tuned")), "one_equal_budget": base})
    return found


def verdict(plan: StudyPlan, runs: LookedUp, chosen: dict[str, Trial]) -> Found:
    """The verdict on the chosen cells, from the fresh seeds."""
    places = places_to_confirm(chosen)
    records = runs.records([Cell(*place, seed) for place in places.values() for seed in plan.fresh_seeds])

    def compare(name: str) -> Confirmation:
        tuned, other = (
            [float(getattr(records[Cell(*places[arm], seed)], plan.metric)) for seed in plan.fresh_seeds]
            for arm in ("tuned", name)
        )
        return paired_t(plan.metric, plan.fresh_seeds, tuned, other)

    confirm = compare("one_equal_budget")
    # Where the interval holds 0 the rates beside don't matter.
    beside = [name for name in places if name not in chosen] if confirm.verdict != "not confirmed" else []
    rivals = tuple(Rival(places[name][1], compare(name)) for name in beside)
    edge = any(edges(plan, arm, best.gamma, best.lr) for arm, best in chosen.items())
    return Found(judge(confirm, rivals, edge=edge), confirm.verdict == "confirmed")


def measure(studies: int, plan: StudyPlan, jobs: int) -> list[dict[str, Any]]:
    """A row for each disguise: the verdicts of all studies in it."""
    return rows(in_processes(study, [(number, plan) for number in range(studies)], jobs))


def rows(studies: Sequence[dict[str, Found]]) -> list[dict[str, Any]]:
    """Verdicts counted, with Clopper and Pearson's interval of the share that is confirmed."""
    from scipy.stats import binomtest

    made = []
    for name in SHIFTS:
        found = [of[name] for of in studies]
        verdicts = Counter(each.verdict for each in found)
        interval = binomtest(verdicts["confirmed"], len(found)).proportion_ci()
        made.append(
            {
                "name": name,
                "studies": len(found),
                "verdicts": dict(verdicts.most_common()),
                "confirmed": verdicts["confirmed"] / len(found),
                "ci95": [float(interval.low), float(interval.high)],
                "worse": verdicts["worse"] / len(found),
                "bar": BAR,
                "at_chosen_rate_alone": sum(each.beats_chosen_rate for each in found) / len(found),
            }
        )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = studies_parser(__doc__, PRESETS).parse_args(argv)
    studies, plan = PRESETS[options.preset]
    found = measure(studies, plan, options.jobs)
    print(f"{studies} studies without an effect of γ, {plan.trials} trials an arm")
    print(f"{'':9} confirmed  95 % interval   bar     against the chosen rate alone")
    for row in found:
        low, high = (100 * end for end in row["ci95"])
        print(f"{row['name']:9} {100 * row['confirmed']:7.2f} %  {low:4.1f} – {high:4.1f} %", end="")
        print(f"  {100 * BAR:3.0f} %  {100 * row['at_chosen_rate_alone']:7.2f} %")
    for row in found:
        print(f"{row['name']:9} {', '.join(f'{count} {verdict}' for verdict, count in row['verdicts'].items())}")
    missed = [
        f"{row['name']}: {100 * row[verdict]:.2f} % {verdict} against at most {100 * BAR:g} %"
        for row in found
        for verdict in ("confirmed", "worse")
        if row[verdict] > BAR
    ]
    content = {"trials": plan.trials, "seeds": plan.seeds, "confirm_seeds": plan.confirm_seeds, "rows": found}
    write_json(options, content, missed)


if __name__ == "__main__":
    main()
