"""The pruner on curves that wait on a plateau ∝ γ^(1−2/L) and then rise: whom it stops, whom never, and when."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Literal

import optuna
import pytest
from optuna.trial import TrialState

from gammaopt import EtaLaw, UsageError
from gammaopt.tuning import RescaledTimePruner

LAW = EtaLaw(depth=3)
AT_ONE, STEPS = 20.0, 2000
REPORTS = [*sorted({round(10 ** (k / 10)) for k in range(34)}), STEPS]


def rise(t_over_tau: float, quality: float) -> float:
    """The curve that all γ share in t/τ: nothing on the plateau, then towards ``quality``."""
    return quality * max(0.0, 1.0 - math.exp(1.0 - t_over_tau))


def values_of(gamma: float, quality: float, *, late: float = 1.0) -> dict[int, float]:
    """Step → value; ``late`` times the plateau that the law predicts."""
    tau = late * LAW.plateau_steps(gamma, AT_ONE)
    return {step: rise(step / tau, quality) for step in REPORTS}


def finished(gamma: float, quality: float, sign: float = 1.0) -> optuna.trial.FrozenTrial:
    values = {step: sign * value for step, value in values_of(gamma, quality).items()}
    return optuna.create_trial(value=values[STEPS], intermediate_values=values, user_attrs={"gamma": gamma})


def study_of(
    *trials: optuna.trial.FrozenTrial, direction: Literal["maximize", "minimize"] = "maximize"
) -> optuna.Study:
    study = optuna.create_study(direction=direction)
    study.add_trials(trials)
    return study


FAST = study_of(*(finished(gamma, quality) for gamma in (0.1, 0.3, 1.0) for quality in (0.7, 0.8, 0.9)))
PRUNER = RescaledTimePruner(LAW, AT_ONE)
MEASURING = RescaledTimePruner(LAW)
MEDIAN = RescaledTimePruner(LAW, AT_ONE, quantile=0.5)


def stopped_at(
    pruner: optuna.pruners.BasePruner, study: optuna.Study, values: dict[int, float], gamma: float
) -> int | None:
    """The step at which a run that reports these values is stopped; ``None`` if never."""
    trial = study.ask()
    trial.set_user_attr("gamma", gamma)
    try:
        for step, value in values.items():
            trial.report(value, step)
            if pruner.prune(study, study._storage.get_trial(trial._trial_id)):
                return step
        return None
    finally:
        study.tell(trial, state=TrialState.FAIL)


@pytest.mark.parametrize("pruner", [PRUNER, MEASURING], ids=["T1 given", "T1 measured"])
@pytest.mark.parametrize("gamma", [0.01, 1.0, 10.0, 100.0, 1000.0])
def test_a_run_that_has_not_moved_is_left_alone_on_its_predicted_plateau_and_stopped_after_it(
    pruner: RescaledTimePruner, gamma: float
) -> None:
    still = dict.fromkeys(REPORTS, 0.0)
    stopped = stopped_at(pruner, FAST, still, gamma)
    tau = LAW.plateau_steps(gamma, AT_ONE)
    assert stopped is not None
    assert 2 * tau < stopped < 8 * tau


def test_the_median_pruner_stops_a_good_large_gamma_and_this_one_does_not() -> None:
    slow = values_of(1000.0, 0.95)
    assert stopped_at(optuna.pruners.MedianPruner(), FAST, slow, 1000.0) is not None
    assert stopped_at(PRUNER, FAST, slow, 1000.0) is None
    assert stopped_at(MEASURING, FAST, slow, 1000.0) is None


@pytest.mark.parametrize("late", [1.5, 1.9])
def test_a_plateau_longer_than_predicted_is_within_the_margin(late: float) -> None:
    for step, value in values_of(100.0, 0.95, late=late).items():
        if step <= late * LAW.plateau_steps(100.0, AT_ONE):
            assert value == 0.0
            assert stopped_at(PRUNER, FAST, {step: value}, 100.0) is None


@pytest.mark.parametrize("gamma", [0.1, 1.0, 100.0])
def test_runs_are_compared_at_equal_rescaled_time(gamma: float) -> None:
    """The bar is the median of the others at the same t/τ: a little above it goes on, a little below it stops."""
    tau = PRUNER.plateau(gamma, AT_ONE)
    for step in (s for s in REPORTS if 3 * tau < s < 8 * tau):
        bar = rise(step / tau, 0.8)
        assert stopped_at(MEDIAN, FAST, {step: bar + 0.02}, gamma) is None
        assert stopped_at(MEDIAN, FAST, {step: bar - 0.02}, gamma) == step
        assert stopped_at(RescaledTimePruner(LAW, AT_ONE, quantile=0.1), FAST, {step: bar - 0.02}, gamma) is None


def test_finished_runs_that_never_came_so_far_in_their_own_time_are_no_measure() -> None:
    """γ = 1,000 ends at t/τ = 10; a run of γ = 1 at t/τ = 50 has nobody to be compared with."""
    slow = study_of(*(finished(1000.0, quality) for quality in (0.6, 0.7, 0.8, 0.9, 1.0)))
    assert stopped_at(PRUNER, slow, {1000: 0.0}, 1.0) is None
    assert stopped_at(PRUNER, slow, {158: 0.0}, 1.0) == 158


def test_a_trial_that_was_stopped_counts_as_worse_so_good_runs_do_not_thin_each_other_out() -> None:
    """Of five finished and five stopped trials the median is the worst finished one, not the middle one."""
    qualities = (0.6, 0.7, 0.8, 0.9, 1.0)
    left = [finished(1.0, quality) for quality in qualities]
    gone = [
        optuna.create_trial(state=TrialState.PRUNED, intermediate_values={50: value}, user_attrs={"gamma": 1.0})
        for value in (0.0, 0.1, 0.2, 0.3, math.nan)
    ]
    assert stopped_at(MEDIAN, study_of(*left), {1000: 0.65}, 1.0) == 1000
    assert stopped_at(MEDIAN, study_of(*left, *gone), {1000: 0.65}, 1.0) is None
    assert stopped_at(MEDIAN, study_of(*left, *gone[:2]), {1000: 0.65}, 1.0) == 1000


def test_fewer_finished_trials_than_asked_for_judge_nobody() -> None:
    few = study_of(*(finished(1.0, 0.8) for _ in range(4)))
    assert stopped_at(PRUNER, few, {1000: 0.0}, 1.0) is None
    assert stopped_at(RescaledTimePruner(LAW, AT_ONE, n_startup_trials=4), few, {1000: 0.0}, 1.0) == 1000


def test_a_loss_is_compared_the_other_way_round() -> None:
    losses = study_of(*(finished(1.0, quality, -1.0) for quality in (0.6, 0.7, 0.8, 0.9, 1.0)), direction="minimize")
    for pruner in (PRUNER, MEASURING):
        assert stopped_at(pruner, losses, {200: -0.9}, 1.0) is None
        assert stopped_at(pruner, losses, {200: -0.5}, 1.0) == 200


def test_t1_is_measured_too_long_rather_than_too_short() -> None:
    trials = FAST.get_trials(states=(TrialState.COMPLETE,))
    measured = MEASURING._measured(trials, 1.0)
    assert measured is not None
    assert AT_ONE <= measured < 1.5 * AT_ONE
    assert MEASURING._measured([finished(1.0, 0.0)], 1.0) is None


def test_tau_is_the_longer_of_two_formulas_where_the_depth_leaves_a_choice() -> None:
    just_above = RescaledTimePruner(EtaLaw(depth=2.1), 1.0)
    assert just_above.plateau(100.0, 1.0) == pytest.approx(1 + math.log(100))
    assert RescaledTimePruner(EtaLaw(depth=5), 1.0).plateau(1000.0, 1.0) == pytest.approx(1000**0.6)
    assert RescaledTimePruner(EtaLaw(3, "adam"), 1.0).plateau(1000.0, 1.0) == 1.0
    assert RescaledTimePruner(LAW, 1.0).plateau(0.01, 7.0) == 7.0


def test_a_value_that_is_no_number_stops_its_run_even_on_the_plateau() -> None:
    assert stopped_at(PRUNER, FAST, {1: math.nan}, 1000.0) == 1


def test_finished_trials_that_blew_up_are_worse_than_anything() -> None:
    """Between a finite and an infinite loss, linear interpolation is no number."""
    broken = {30: 0.5, 100: 0.5, 101: math.inf, STEPS: math.inf}
    trials = [optuna.create_trial(value=1e9, intermediate_values=broken, user_attrs={"gamma": 1.0})] * 3
    losses = study_of(*(finished(1.0, quality, -1.0) for quality in (0.7, 0.8, 0.9)), *trials, direction="minimize")
    assert stopped_at(MEDIAN, losses, {1000: -0.5}, 1.0) is None
    assert stopped_at(MEDIAN, losses, {1000: math.inf}, 1.0) is None
    assert stopped_at(RescaledTimePruner(LAW, AT_ONE, quantile=0.7), losses, {1000: -0.5}, 1.0) == 1000


def test_it_works_in_a_plain_optuna_study() -> None:
    """Whole studies: it stops bad runs of every γ and none of the best, which the median pruner mostly stops."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    killed: dict[str, list[bool]] = {}
    spent: dict[str, int] = {}
    for pruner in (optuna.pruners.MedianPruner(), PRUNER, optuna.pruners.NopPruner()):
        name = type(pruner).__name__
        killed[name], spent[name] = [], 0

        def objective(trial: optuna.Trial, name: str = name) -> float:
            gamma = 2.0 ** trial.suggest_float("log2_gamma", -3.0, 10.0)
            # The later a curve rises, the higher it ends: rich runs win, as they do with a long enough budget.
            quality = trial.suggest_float("quality", 0.2, 1.0) * (0.7 + 0.1 * math.log10(gamma))
            stopped = False
            for step, value in list(values_of(gamma, quality).items())[7::3]:
                trial.report(value, step)
                stopped = trial.should_prune()
                if stopped:
                    break
            spent[name] += step
            if quality > 0.7:
                killed[name].append(stopped)
            if stopped:
                raise optuna.TrialPruned
            return value

        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0), pruner=pruner)
        study.optimize(objective, n_trials=60)
    assert len(killed["NopPruner"]) >= 5
    assert sum(killed["RescaledTimePruner"]) == 0
    assert sum(killed["MedianPruner"]) > 0.5 * len(killed["MedianPruner"])
    assert spent["RescaledTimePruner"] < 0.8 * spent["NopPruner"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"plateau_steps": 0}, "plateau_steps=0 is not allowed"),
        ({"margin": 0.5}, "margin=0.5 ends before the plateau does; give at least 1"),
        ({"quantile": 1.0}, "quantile=1 is no share of the trials; give 0 < quantile < 1"),
        ({"n_startup_trials": 0}, "n_startup_trials=0 is too small; give at least 1"),
    ],
)
def test_bad_values_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RescaledTimePruner(LAW, **given)  # type: ignore[arg-type]


def test_a_trial_that_does_not_tell_its_gamma_is_refused_with_the_fix_and_a_function_can_tell_it() -> None:
    study = optuna.create_study(direction="maximize")
    trial = study.ask()
    trial.report(0.5, 1)
    frozen = study._storage.get_trial(trial._trial_id)
    with pytest.raises(UsageError, match=r"trial 0 does not tell its γ: .* give RescaledTimePruner\(gamma=…\)"):
        PRUNER.prune(study, frozen)
    assert RescaledTimePruner(LAW, AT_ONE, gamma=lambda trial: 3.0).prune(study, frozen) is False


def test_importing_tuning_does_not_import_optuna() -> None:
    code = "import sys, gammaopt.tuning; assert 'optuna' not in sys.modules; gammaopt.tuning.RescaledTimePruner"
    subprocess.run([sys.executable, "-c", code], check=True)
