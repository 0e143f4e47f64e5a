"""``study``: a user's own training function gets the whole apparatus, and every mistake in it is told in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from known_hill import BEST_GAMMA, SMALL, Study, height, hill, runs_of
from torch import nn

import gammaopt
import gammaopt.report
from gammaopt import EtaLaw, UsageError
from gammaopt.tuning import ObjectiveTrial, study
from gammaopt.tuning._result import Trial
from gammaopt.tuning._state import plan_from, read_folder
from gammaopt.tuning._tune import RIVAL_OCTAVES, best_trial

pytest_plugins = ["known_studies"]


def test_a_known_optimum_is_found_and_confirmed_against_gamma_one(whole: Study) -> None:
    result, tuned, one = whole.result, whole.result.arms["tuned"], whole.result.arms["one_equal_budget"]
    assert result.verdict == "confirmed"
    assert abs(math.log2(tuned.gamma / BEST_GAMMA)) < 1.5
    assert (one.gamma, one.trials, tuned.trials) == (1.0, 16, 16)
    true = height(tuned.gamma, tuned.lr) - height(1.0, one.lr)
    assert result.confirm.mean_difference == pytest.approx(true, abs=0.003)
    assert result.confirm.seeds == tuple(result.plan.fresh_seeds)
    assert len(result.confirm.seeds) == 10
    assert max(result.confirm.p_value, result.confirm.wilcoxon_p, result.confirm.permutation_p) < 0.01
    assert len(result.rivals) == len(RIVAL_OCTAVES)
    assert result.spent["tuned"].samples == result.spent["one_equal_budget"].samples == 16 * 2 * 100 * 8


def test_every_run_is_trained_once_and_both_arms_see_the_same_seeds(whole: Study) -> None:
    runs = runs_of(whole.out)
    assert len(set(runs)) == len(runs)
    for arm in ("tuned", "one_equal_budget"):
        for trial in (t for t in whole.result.trials if t.arm == arm):
            assert {seed for g, lr, seed in runs if (g, lr) == (trial.gamma, trial.lr)} >= {0, 1}
    assert {path.name for path in whole.out.iterdir()} == {
        "lock", "report.html", "result.json", "runs.jsonl", "study.db", "study.json"
    }  # fmt: skip


def test_the_plan_is_frozen_in_folder_and_storage_and_is_read_back(whole: Study) -> None:
    import optuna

    plan = whole.result.plan
    assert plan_from(json.loads((whole.out / "study.json").read_text())["plan"]) == plan
    storage = f"sqlite:///{whole.out / 'study.db'}"
    names = optuna.get_all_study_names(storage)
    assert sorted(name.rpartition("/")[2] for name in names) == ["one_equal_budget", "tuned"]
    for name in names:
        attributes = optuna.load_study(study_name=name, storage=storage).user_attrs
        assert attributes["plan"] == plan.to_dict()
        assert attributes["budget"] == {"trials": 16, "seeds_per_trial": 2, "steps_per_run": 100}
        assert {"grid_hash", "law_version", "versions", "git_commit", "fresh_seeds"} <= attributes.keys()


def test_the_report_names_function_metric_budget_and_the_call_that_made_it(whole: Study) -> None:
    page = (whole.out / "report.html").read_text()
    assert "γ study: hill, cross entropy, sgd" in page
    assert "points of accuracy" in page
    assert "16 trials × 2 seeds × 100 steps = 2.56e+04 samples" in page
    assert "gammaopt.tuning.study(hill, " in page
    assert "reported nothing" in page  # and not that it diverged
    call = whole.result.command.replace("&#x27;", "'")
    again = eval(call, {"gammaopt": Recorder(), "hill": hill, "EtaLaw": EtaLaw})
    assert again == {**SMALL, "trials": 16, "seeds": 2, "confirm_seeds": 10, "metric": "accuracy", "percent": True,
                     "diverged_score": -9.0, "batch_size": 8, "gamma_range": [0.01, 10.0]}  # fmt: skip


class Recorder:
    """Stands for the package, and gives back the keyword arguments of a call of ``study``."""

    @property
    def tuning(self) -> Recorder:
        return self

    def study(self, *_: object, **options: object) -> dict[str, object]:
        return options


@pytest.mark.usefixtures("no_report")
def test_a_loss_is_minimised_and_a_positive_difference_is_an_improvement(tmp_path: Path) -> None:
    import optuna

    def loss(trial: ObjectiveTrial) -> float:
        return 1.0 - hill(trial) if trial.lr < 8 else math.nan

    options = {**SMALL, "trials": 16, "seeds": 2, "confirm_seeds": 10}
    result = study(loss, tmp_path, **options, direction="minimize", metric="loss", diverged_score=10.0, quiet=True)
    assert result.verdict == "confirmed"
    assert result.confirm.mean_difference > 0.01
    tuned = result.arms["tuned"]
    assert tuned.confirmed_score < result.arms["one_equal_budget"].confirmed_score
    assert tuned.score == min(t.score for t in result.trials if t.arm == "tuned" and not t.diverged)
    assert tuned.diverged > 0
    assert "in loss (lower is better: " in result.in_words()
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    for name in optuna.get_all_study_names(storage):
        found = optuna.load_study(study_name=name, storage=storage)
        assert found.direction.name == "MINIMIZE"
        assert all(t.value == 10.0 for t in found.trials if len(t.user_attrs["diverged_seeds"]) == 2)


def test_the_best_trial_of_a_minimised_score_is_its_lowest() -> None:
    trials = [Trial("tuned", 1.0, 1.0, 1.0, score, score == 0.1) for score in (0.5, 0.1, 0.3)]
    assert (best_trial(trials, "minimize").score, best_trial(trials, "maximize").score) == (0.3, 0.5)
    assert best_trial(trials[1:2], "minimize").score == 0.1


def test_the_figures_of_a_minimised_score_cut_off_the_high_ones(tmp_path: Path) -> None:
    from gammaopt.report import gamma_curve, html_report, plane

    def loss(trial: ObjectiveTrial) -> float:
        return -height(trial.gamma, trial.lr) + 1e-3 * trial.seed % 1

    result = study(
        loss, tmp_path, **{**SMALL, "trials": 8}, direction="minimize", metric="loss", diverged_score=50.0, quiet=True
    )
    scores = sorted(t.score for t in result.trials)
    (axes, *_) = gamma_curve(result).axes
    low, high = axes.get_ylim()
    assert low < scores[0] < high < scores[-1]
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_title().get_text().endswith("trials lie above the frame")
    colours = plane(result).axes[0].collections[0]
    assert colours.get_cmap().name == "viridis_r"
    assert "γ = 1 − tuned γ" in html_report(result)


@pytest.mark.usefixtures("no_report")
def test_an_optimum_at_the_edge_is_reported_as_range_too_small(tmp_path: Path) -> None:
    def rising(trial: ObjectiveTrial) -> float:
        return 10 + math.log2(trial.gamma) - 0.1 * math.log2(trial.lr) ** 2

    options = {**SMALL, "trials": 24, "confirm_seeds": 10}
    result = study(rising, tmp_path, **options, gamma_range=(0.1, 4.0), quiet=True)
    assert result.verdict == "range too small"
    assert result.in_words().startswith("Range too small: the best γ = ")
    assert "widen `gamma_range`" in result.in_words()


@pytest.mark.usefixtures("no_report")
def test_an_arm_that_diverged_everywhere_confirms_nothing_for_the_other(tmp_path: Path) -> None:
    def rich_diverges(trial: ObjectiveTrial) -> float:
        return math.inf if trial.gamma > 0.5 else hill(trial)

    options = {**SMALL, "trials": 8, "confirm_seeds": 3}
    result = study(rich_diverges, tmp_path, **options, diverged_score=-9, quiet=True)
    assert (result.arms["one_equal_budget"].diverged, result.confirm.verdict) == (8, "confirmed")
    assert result.arms["tuned"].diverged < 8
    assert result.verdict == "range too small"
    assert "all trials of arm one_equal_budget diverged; widen `octaves`" in result.in_words()


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({}, 0.01, 10.0),  # a tenth of 100 steps is shorter than the plateau: ten at least
        ({"steps": 1000}, 0.01, 64.0),  # (100/25)^(3/(3−2))
        ({"steps": 1000, "plateau_steps": 20.0}, 0.01, 125.0),
        ({"steps": 100_000}, 0.01, 1000.0),
    ],
)
def test_the_range_of_gamma_comes_from_the_steps_and_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], low: float, high: float
) -> None:
    result = study(hill, tmp_path, **{**SMALL, **options}, diverged_score=-9)
    assert result.plan.gamma_range == (low, high)
    bound = {10.0: "least", 1000.0: "widest"}.get(high)
    steps = options.get("steps", 100)
    why = f"what {steps:,} steps can train" if bound is None else f"the {bound} range that is searched by default"
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == f"γ from {low:g} to {high:g}: {why}; `gamma_range` sets it"
    assert second.startswith("0 % · tuning γ · 0/8 trials")


@pytest.mark.usefixtures("no_report")
def test_a_given_range_is_used_and_not_printed_and_quiet_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = study(hill, tmp_path / "a", **SMALL, gamma_range=(0.5, 2.0), diverged_score=-9)
    assert all(0.5 <= trial.gamma <= 2.0 for trial in result.trials)
    assert "γ from" not in capsys.readouterr().err
    study(hill, tmp_path / "b", **SMALL, diverged_score=-9, quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("no_report")
def test_the_gaussian_process_tunes_a_function_too_and_is_part_of_the_plan(tmp_path: Path) -> None:
    result = study(hill, tmp_path, **{**SMALL, "trials": 12}, sampler="gp", diverged_score=-9, quiet=True)
    assert abs(math.log2(result.arms["tuned"].gamma / BEST_GAMMA)) < 1.5
    with pytest.raises(UsageError, match="sampler: gp there, tpe here"):
        study(hill, tmp_path, **{**SMALL, "trials": 12}, diverged_score=-9, quiet=True)


@pytest.mark.usefixtures("no_report")
def test_a_plain_torch_loop_is_tuned_and_a_rate_that_blows_up_is_told_as_diverged(tmp_path: Path) -> None:
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] * x[:, 1] > 0).long()

    def train(trial: ObjectiveTrial) -> None:
        torch.manual_seed(trial.seed)
        net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        model = gammaopt.wrap(net, trial.gamma, depth=2, parametrization="mean_field", loss="mse")
        optimizer = gammaopt.SGD(model.parameters(), lr=trial.lr)
        for step in range(trial.steps):
            batch = torch.randint(512, (32,))
            outputs = model(x[batch])
            loss = nn.functional.mse_loss(outputs, nn.functional.one_hot(y[batch], 2).float())
            trial.report(step, (outputs.argmax(1) == y[batch]).float().mean() if loss < 1e3 else math.nan)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    result = study(
        train, tmp_path, law=EtaLaw(2), base_lr=4.0, steps=40, trials=6, seeds=1, confirm_seeds=2, percent=True,
        metric="prequential accuracy", octaves=8.0, quiet=True,
    )  # fmt: skip
    assert any(trial.diverged for trial in result.trials)
    assert max(trial.score for trial in result.trials) > 0.55
    records = list(read_folder(tmp_path).runs.values())
    ended = [record for record in records if record.diverged_at is not None]
    assert ended
    assert all(record.reports[-1][0] == 39 for record in records if record.diverged_at is None)
    assert all(record.score == 0.0 for record in ended)  # type: ignore[attr-defined]
    assert 0 < result.spent["tuned"].used < 1
