"""RescaledTimePruner against Optuna's own pruners and none, on curves of real runs.

    python experiments/benchmarks/pruners.py --check --json experiments/results/pruners/cpu.json

A trial is a cell of a table in results/surrogates: a γ and a rate whose runs were trained (see surrogates.py), and
whose online accuracy is reported at the table's log-spaced steps as if it were training now. Each study asks TPE for 64
cells, one after another, and every pruner does the same ten studies, which differ in the sampler's seed. Two scores:

    online   accuracy over the whole pass, which is what ``gammaopt tune`` maximises
    end      accuracy over the last stretch of the pass, when a large γ has had its time; on the digits only, because
             nearly all γ end with the same one on the parity

Told of each pruner: regret, how far its study's best cell is below the table's; compute, steps taken over steps of all
trials (a diverged run stops by itself in every study); killed, the share of the trials in the table's best tenth that
were stopped. The bars: at most a quarter of what the mildest of Optuna's pruners kills, and a regret that paired
studies can't tell from that of no pruner.

The default quantile of RescaledTimePruner, a third, was chosen on these tables, by a search that was not TPE. All have
the same number of trials: with the steps it saves, a pruner could start more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from _paired import write_json
from _studies import in_processes, studies_parser
from numpy.typing import NDArray
from surrogates import Surrogate, read

from gammaopt._errors import require
from gammaopt.online import get_task
from gammaopt.tuning import RescaledTimePruner, paired_t
from gammaopt.tuning._space import OCTAVES

if TYPE_CHECKING:
    import optuna

CASES = (
    ("digits-mse", "online"),
    ("digits-cross_entropy", "online"),
    ("parity-mse", "online"),
    ("digits-mse", "end"),
    ("digits-cross_entropy", "end"),
)
PRUNERS = ("none", "median", "successive halving", "hyperband", "rescaled time")
STOCK = PRUNERS[1:4]
BAR = 0.25  # of the share of the top tenth that the mildest of them kills
PRESETS = {"smoke": (2, 12), "cpu": (10, 64)}  # studies, trials
table = cache(read)


class Study(NamedTuple):
    """What one study came to: ``top`` trials were in the table's best tenth, and ``killed`` of them stopped."""

    regret: float
    compute: float
    killed: int
    top: int


def pruner(name: str, surrogate: Surrogate) -> optuna.pruners.BasePruner:
    """The pruner called ``name``, with its defaults."""
    pruners = require("optuna", "tune").pruners
    task, _, loss = surrogate.name.partition("-")
    made: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
        "none": pruners.NopPruner,
        "median": pruners.MedianPruner,
        "successive halving": pruners.SuccessiveHalvingPruner,
        "hyperband": lambda: pruners.HyperbandPruner(min_resource=1, max_resource=surrogate.steps),
        "rescaled time": lambda: RescaledTimePruner(surrogate.law, get_task(task).plateau_steps[loss]),  # type: ignore[index]
    }
    return made[name]()


def final_scores(surrogate: Surrogate, score: str) -> NDArray[np.float64]:
    """(γ, octave) → what a whole run earns."""
    return surrogate.mean if score == "online" else surrogate.curves[..., -1]


def study(case: tuple[str, str], name: str, seed: int, trials: int) -> Study:
    """One study of ``trials`` cells under the pruner called ``name``."""
    optuna = require("optuna", "tune")
    optuna.logging.set_verbosity(logging.WARNING)
    surrogate = table(case[0])
    columns = np.flatnonzero(np.abs(surrogate.octaves) <= OCTAVES)
    earned = final_scores(surrogate, case[1])[:, columns]
    valid = np.where(surrogate.diverged[:, columns], -1.0, earned)  # a cell that diverged is never the best
    best_tenth = valid >= np.quantile(valid, 0.9)
    made = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed), pruner=pruner(name, surrogate)
    )
    taken = killed = top = 0
    found = 0.0
    for _ in range(trials):
        trial = made.ask()
        i = trial.suggest_int("gamma_index", 0, len(surrogate.gammas) - 1)
        j = trial.suggest_int("rate_index", 0, len(columns) - 1)
        trial.set_user_attr("gamma", float(surrogate.gammas[i]))
        steps, stopped = train(trial, surrogate, surrogate.curves[i, columns[j]])
        made.tell(trial, None if stopped else float(earned[i, j]), optuna.trial.TrialState.PRUNED if stopped else None)
        taken, top, killed = taken + steps, top + bool(best_tenth[i, j]), killed + bool(best_tenth[i, j] and stopped)
        found = found if stopped else max(found, float(valid[i, j]))
    return Study(float(valid.max()) - found, taken / (trials * surrogate.steps), killed, top)


def train(trial: optuna.Trial, surrogate: Surrogate, curve: NDArray[np.float64]) -> tuple[int, bool]:
    """Report a cell's curve until it ends, diverges on every seed or is stopped: (steps taken, whether stopped)."""
    answered = np.flatnonzero(curve)
    ends = min(int(answered[-1]) + 1 if len(answered) else 0, len(curve) - 1)
    for k in range(ends):
        trial.report(float(curve[k]), surrogate.curve_steps[k])
        if trial.should_prune():
            return surrogate.curve_steps[k], True
    return surrogate.curve_steps[ends], False


def measure(studies: int, trials: int, jobs: int) -> list[dict[str, Any]]:
    """A row for each case and pruner."""
    work = [(case, name, seed, trials) for case in CASES for name in PRUNERS for seed in range(studies)]
    found = dict(zip(work, in_processes(study, work, jobs), strict=True))
    rows = []
    for case in CASES:
        of_case = {name: [found[case, name, seed, trials] for seed in range(studies)] for name in PRUNERS}
        rows += [row(case, name, of_case[name], of_case["none"]) for name in PRUNERS]
    return rows


def row(case: tuple[str, str], name: str, done: Sequence[Study], unpruned: Sequence[Study]) -> dict[str, Any]:
    """Means over the studies, and the regret that the pruner adds, paired by study."""
    more = paired_t("regret", range(len(done)), [each.regret for each in done], [each.regret for each in unpruned])
    return {
        "table": case[0],
        "score": case[1],
        "pruner": name,
        "regret": float(np.mean([each.regret for each in done])),
        "regret_more_than_none": more.mean_difference,
        "regret_more_ci95": list(more.ci95),
        "compute": float(np.mean([each.compute for each in done])),
        "killed": sum(each.killed for each in done) / max(1, sum(each.top for each in done)),
        "top_tenth_trials": sum(each.top for each in done),
    }


def missed_bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is above its bar, in words."""
    missed = []
    for ours in (row for row in rows if row["pruner"] == "rescaled time"):
        where = f"{ours['table']}, {ours['score']}"
        same = [row for row in rows if (row["table"], row["score"]) == (ours["table"], ours["score"])]
        bar = BAR * min(row["killed"] for row in same if row["pruner"] in STOCK)
        if ours["killed"] > bar:
            missed.append(f"{where}: {100 * ours['killed']:.1f} % of the top tenth killed, at most {100 * bar:.1f} %")
        if ours["regret_more_ci95"][0] > 0:
            missed.append(f"{where}: regret {100 * ours['regret_more_than_none']:.2f} points above that of no pruner")
    return missed


def main(argv: Sequence[str] | None = None) -> None:
    options = studies_parser(__doc__, PRESETS).parse_args(argv)
    studies, trials = PRESETS[options.preset]
    rows = measure(studies, trials, options.jobs)
    print(f"{studies} studies of {trials} trials; regret in points, and 95 % interval of what it is above no pruner's")
    for row in rows:
        if row["pruner"] == "none":
            print(f"{row['table']}, {row['score']}")
        low, high = (100 * end for end in row["regret_more_ci95"])
        print(f"    {row['pruner']:18} regret {100 * row['regret']:5.2f} ({low:+6.2f} … {high:+6.2f})", end="")
        print(f"  compute {100 * row['compute']:3.0f} %  top tenth killed {100 * row['killed']:5.1f} %", end="")
        print(f" of {row['top_tenth_trials']}")
    write_json(options, {"studies": studies, "trials": trials, "rows": rows}, missed_bars(rows))


if __name__ == "__main__":
    main()
