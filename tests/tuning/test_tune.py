"""A whole study with a tiny budget: what it leaves, and that stopping it anywhere changes no number of the result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import optuna
import pytest

import gammaopt.report
import gammaopt.tuning._workers
from gammaopt import UsageError
from gammaopt.online import TASKS, RunRecord
from gammaopt.tuning import Progress, StudyPlan, TuneResult, paired_t, tune
from gammaopt.tuning._result import Rival, Trial, judge
from gammaopt.tuning._search import without_secrets
from gammaopt.tuning._tune import _notes

# Six trials: a batch of four Sobol points, then an uneven batch that TPE proposes.
PLAN = StudyPlan("digits", steps=20, trials=6, seeds=2, confirm_seeds=3, gamma_range=(0.01, 100.0))


@dataclass
class Study:
    out: Path
    result: TuneResult
    events: list[Progress]

    @property
    def json(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.out / "result.json").read_text(), parse_constant=pytest.fail)
        return data

    @property
    def records(self) -> list[RunRecord]:
        return [RunRecord.from_dict(json.loads(line)) for line in (self.out / "runs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The study, run to its end in this process without a stop. Not to be written to."""
    out, events = tmp_path_factory.mktemp("studies") / "whole", list[Progress]()
    return Study(out, tune(PLAN, out, on_progress=events.append), events)


@pytest.fixture
def copied(study: Study, tmp_path: Path) -> Path:
    return Path(shutil.copytree(study.out, tmp_path / "copy"))


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a tiny study's time."""
    monkeypatch.setattr(gammaopt.report, "html_report", lambda result: result.in_words())


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        pytest.fail("a finished run was trained again")

    monkeypatch.setattr(gammaopt.tuning._workers, "train_many", refuse)


def runs_of(out: Path) -> list[tuple[float, float, int]]:
    lines = (out / "runs.jsonl").read_text().splitlines()
    return [(run["gamma"], run["lr"], run["seed"]) for run in map(json.loads, lines)]


def assert_same_study(out: Path, study: Study) -> None:
    """The result is the uninterrupted one's to the byte; the same runs were made, each once."""
    assert (out / "result.json").read_bytes() == (study.out / "result.json").read_bytes()
    runs = Counter(runs_of(out))
    assert max(runs.values()) == 1
    assert runs == Counter(runs_of(study.out))


def test_result_json_holds_what_is_promised_and_is_what_tune_returns(study: Study) -> None:
    data, result = study.json, study.result
    assert data == json.loads(result.to_json())
    assert data["task"] == "digits"
    assert data["baseline"].keys() == {"gamma", "lr"}
    assert data["baseline"]["gamma"] == 1.0
    assert (data["gamma"], data["lr"]) == (result.arms["tuned"].gamma, result.arms["tuned"].lr)
    assert data["baseline"]["lr"] == result.arms["one_equal_budget"].lr
    assert data["arms"].keys() == {"tuned", "one_equal_budget", "one"}
    assert data["confirm"].keys() == {
        "metric", "seeds", "mean_difference", "ci95", "p_value", "differences", "wilcoxon_p", "permutation_p"
    }  # fmt: skip
    assert len(data["rivals"]) == 4
    assert data["spent"]["tuned"]["samples"] == data["spent"]["one_equal_budget"]["samples"] == 6 * 2 * 20 * 32
    assert data["spent"]["tuned"]["flops"] == data["spent"]["one_equal_budget"]["flops"] > 0
    assert data["confirm"]["metric"] == "prequential_accuracy"
    assert data["confirm"]["seeds"] == list(PLAN.fresh_seeds)
    assert data["verdict"] in ("confirmed", "not confirmed", "worse", "range too small")
    assert data["plan"] == PLAN.to_dict()
    assert data["command"] == PLAN.command()
    assert {"gammaopt", "python", "torch", "optuna"} <= data["versions"].keys()


def test_every_arm_has_exactly_its_trials_and_all_of_them_are_complete(study: Study) -> None:
    storage = f"sqlite:///{study.out / 'study.db'}"
    names = optuna.get_all_study_names(storage)
    assert sorted(name.rpartition("/")[2] for name in names) == ["one_equal_budget", "tuned"]
    for name in names:
        states = Counter(trial.state.name for trial in optuna.load_study(study_name=name, storage=storage).trials)
        assert states == {"COMPLETE": PLAN.trials}
    assert Counter(trial.arm for trial in study.result.trials) == {"tuned": 6, "one_equal_budget": 6}
    assert {name: arm.trials for name, arm in study.result.arms.items()} == {
        "tuned": 6,
        "one_equal_budget": 6,
        "one": PLAN.rates,
    }


def test_no_cell_was_tried_twice_and_gamma_is_searched_in_one_arm_only(study: Study) -> None:
    low, high = PLAN.gamma_range
    cells = [(trial.gamma, trial.lr) for trial in study.result.trials]
    assert len(set(cells)) == len(cells)
    for trial in study.result.trials:
        assert trial.gamma == 1.0 if trial.arm == "one_equal_budget" else low <= trial.gamma <= high != trial.gamma
        assert PLAN.base_lr / 32 <= trial.lr <= PLAN.base_lr * 32
        factor = trial.gamma if trial.gamma < 1 else trial.gamma ** (2 / 3)
        assert trial.effective_lr == pytest.approx(trial.lr * factor)


def test_the_small_arm_chooses_among_the_first_rates_of_the_equal_budget(study: Study) -> None:
    first = [t for t in study.result.trials if t.arm == "one_equal_budget"][: PLAN.rates]
    best = max((t for t in first if not t.diverged), key=lambda t: t.score)
    one = study.result.arms["one"]
    assert (one.gamma, one.lr, one.score) == (1.0, best.lr, best.score)


@pytest.mark.parametrize("arm", ["tuned", "one_equal_budget"])
def test_an_arm_chooses_its_best_trial_on_the_mean_over_the_tuning_seeds(study: Study, arm: str) -> None:
    runs = {(r.gamma, r.lr, r.seed): r for r in study.records}
    trials = [t for t in study.result.trials if t.arm == arm]
    for trial in trials:
        of_trial = [runs[trial.gamma, trial.lr, seed] for seed in PLAN.tuning_seeds]
        assert trial.score == pytest.approx(sum(r.prequential_accuracy for r in of_trial) / 2)
        assert trial.diverged == any(r.diverged_at is not None for r in of_trial)
    chosen = study.result.arms[arm]
    assert chosen.score == max(t.score for t in trials if not t.diverged)
    assert chosen.diverged == sum(t.diverged for t in trials)


def test_the_confirmation_is_the_paired_test_of_the_runs_on_fresh_seeds(study: Study) -> None:
    runs = {(r.gamma, r.lr, r.seed): r for r in study.records}
    for name, arm in study.result.arms.items():
        fresh = [runs[arm.gamma, arm.lr, seed] for seed in PLAN.fresh_seeds]
        assert arm.scores == tuple(r.prequential_accuracy for r in fresh)
        assert arm.confirmed_final == pytest.approx(sum(r.final_accuracy for r in fresh) / 3)
        assert study.result.runs[name] == tuple(fresh)
    tuned, base = (study.result.arms[name].scores for name in ("tuned", "one_equal_budget"))
    assert study.result.confirm == paired_t("prequential_accuracy", PLAN.fresh_seeds, tuned, base)
    # Tuned γ has to beat γ = 1 at the rates beside the one it chose too, or to lose to all.
    verdicts = {study.result.confirm.verdict, *(rival.confirm.verdict for rival in study.result.rivals)}
    assert not study.result.at_edge
    assert study.result.verdict == (verdicts.pop() if len(verdicts) == 1 else "not confirmed")


def test_no_run_is_on_disk_that_nobody_asked_for(study: Study) -> None:
    chosen = {(arm.gamma, arm.lr) for arm in study.result.arms.values()}
    chosen |= {(1.0, rival.lr) for rival in study.result.rivals}
    runs = runs_of(study.out)
    assert len(set(runs)) == len(runs) == 2 * PLAN.trials * PLAN.seeds + len(chosen) * PLAN.confirm_seeds
    assert {seed for *_, seed in runs} == {*PLAN.tuning_seeds, *PLAN.fresh_seeds}
    assert {path.name for path in study.out.iterdir()} == {
        "lock", "report.html", "result.json", "runs.jsonl", "study.db", "study.json"
    }  # fmt: skip


def test_progress_counts_up_to_the_end_and_shows_the_best_feasible_trial(study: Study) -> None:
    events = study.events
    runs = [event.runs for event in events]
    assert runs == sorted(runs)
    assert runs[:2] == [0, 1]
    assert events[-1].runs == events[-1].runs_total == events[-1].new_runs == len(runs_of(study.out))
    assert [event.trials for event in events] == sorted(event.trials for event in events)
    assert events[-1].trials == events[-1].trials_total == 12
    stages = list(dict.fromkeys(event.stage for event in events))
    assert stages == ["tuned", "one_equal_budget", "confirm"]
    for stage in stages[:2]:
        last = [event for event in events if event.stage == stage][-1]
        assert last.best is not None
        assert (last.best.gamma, last.best.lr) == (study.result.arms[stage].gamma, study.result.arms[stage].lr)


def test_the_report_of_a_study_says_its_verdict_and_its_command(study: Study) -> None:
    page = (study.out / "report.html").read_text()
    assert study.result.in_words().split(" points")[0].replace("'", "&#x27;") in page
    assert PLAN.command() in page


@pytest.mark.usefixtures("no_report")
def test_the_plan_is_frozen_in_the_attributes_of_every_optuna_study_and_trials_report_on_their_way(
    study: Study,
) -> None:
    storage = f"sqlite:///{study.out / 'study.db'}"
    for name in optuna.get_all_study_names(storage):
        loaded = optuna.load_study(study_name=name, storage=storage)
        attributes = loaded.user_attrs
        assert attributes["budget"] == {"trials": 6, "seeds_per_trial": 2, "steps_per_run": 20}
        assert attributes["tuning_seeds"] == list(PLAN.tuning_seeds)
        assert attributes["fresh_seeds"] == list(PLAN.fresh_seeds)
        assert len(attributes["grid_hash"]) == 8
        assert attributes["law_version"] == PLAN.law_version
        assert attributes["versions"] == study.result.versions
        assert attributes["git_commit"] == study.result.git_commit
        assert attributes["plan"] == PLAN.to_dict()
        for trial in loaded.trials:
            assert len(trial.intermediate_values) <= 40
            assert trial.user_attrs["diverged_seeds"] or trial.last_step == 20
            assert (trial.constraints["diverged"] > 0) == bool(trial.user_attrs["diverged_seeds"])


def test_tuned_has_to_beat_gamma_one_at_the_rates_beside_too_and_an_edge_is_no_result(study: Study) -> None:
    seeds, high, low = range(12), [0.6] * 12, [0.5] * 12
    wins, loses = paired_t("m", seeds, high, low), paired_t("m", seeds, low, high)
    assert judge(wins, (Rival(1.0, wins),), edge=False) == "confirmed"
    assert judge(wins, (Rival(1.0, wins), Rival(2.0, loses)), edge=False) == "not confirmed"
    assert judge(loses, (Rival(1.0, loses),), edge=False) == "worse"
    assert judge(loses, (Rival(1.0, loses), Rival(2.0, wins)), edge=False) == "not confirmed"
    assert judge(wins, (), edge=True) == "range too small"
    arms = {
        name: replace(arm, gamma=100.0 if name == "tuned" else 1.0, diverged=0)
        for name, arm in study.result.arms.items()
    }
    edge = replace(study.result, arms=arms)
    assert edge.verdict == "range too small"
    assert edge.in_words().startswith("Range too small: the best γ = 100 of arm tuned")


def test_what_is_worse_is_told_without_a_sign_against_every_rate(study: Study) -> None:
    low, high, between = [0.4] * 12, [0.6] * 12, [0.5] * 12
    result = replace(
        study.result,
        arms={name: replace(arm, gamma=0.5, lr=PLAN.base_lr, diverged=0) for name, arm in study.result.arms.items()},
        confirm=paired_t("m", range(12), low, high),
        rivals=(Rival(1.0, paired_t("m", range(12), low, between)),),
    )
    assert result.verdict == "worse"
    assert " is below γ = 1 by 20.00 points" in result.in_words()
    assert "; against γ = 1 at a rate beside it 10.00 at least)" in result.in_words()


def test_another_base_seed_is_another_study(study: Study, tmp_path: Path) -> None:
    other = tune(replace(PLAN, seed=1, steps=2, trials=4, seeds=1, confirm_seeds=2), tmp_path)
    assert not {t.lr for t in other.trials} & {t.lr for t in study.result.trials}
    assert not {run[2] for run in runs_of(tmp_path)} & {run[2] for run in runs_of(study.out)}


@pytest.mark.usefixtures("no_training")
def test_a_finished_study_trains_nothing_and_writes_only_its_report_again(study: Study, copied: Path) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    (copied / "report.html").write_text("old")
    events = list[Progress]()
    again = tune(PLAN, copied, jobs=2, on_progress=events.append)
    assert replace(again, command=study.result.command) == study.result
    (copied / "report.html").write_text((copied / "report.html").read_text().replace(str(copied), str(study.out)))
    after = {path.name: path.read_bytes() for path in copied.iterdir()}
    assert {name for name in before if before[name] != after.get(name)} <= {"study.db"}
    assert after.keys() == before.keys()
    assert events[-1].new_runs == 0


@pytest.mark.usefixtures("no_training", "no_report")
def test_progress_of_a_finished_study_ends_at_its_total(copied: Path) -> None:
    events = list[Progress]()
    tune(PLAN, copied, on_progress=events.append)
    assert events[-1].runs == events[-1].runs_total


@pytest.mark.usefixtures("no_training")
def test_a_lost_result_and_a_lost_database_are_made_anew_from_the_runs(study: Study, copied: Path) -> None:
    for name in ("result.json", "report.html", "study.db"):
        (copied / name).unlink()
    tune(PLAN, copied)
    assert_same_study(copied, study)
    report = (copied / "report.html").read_text()
    assert report.replace(str(copied), str(study.out)) == (study.out / "report.html").read_text()


class StopHereError(Exception):
    """Not one of the package's own."""


# Between two seeds of a trial that TPE proposed, and in the confirmation.
@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("runs", [9, 26])
def test_a_study_stopped_after_any_run_goes_on_to_the_same_result(study: Study, tmp_path: Path, runs: int) -> None:
    def stop(progress: Progress) -> None:
        if progress.new_runs == runs:
            raise StopHereError

    with pytest.raises(StopHereError):
        tune(PLAN, tmp_path, on_progress=stop)
    assert len(runs_of(tmp_path)) == runs
    assert not (tmp_path / "result.json").exists()
    events = list[Progress]()
    tune(PLAN, tmp_path, on_progress=events.append)
    assert events[-1].new_runs == len(runs_of(study.out)) - runs
    assert_same_study(tmp_path, study)


# A process can also be killed between two words with the database, when a batch is half asked for or half told.
@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("method", "call"),
    [("ask", 2), ("ask", 6), ("tell", 3), ("tell", 6)],
)
def test_a_study_killed_between_two_words_with_the_database_goes_on_to_the_same_result(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, call: int
) -> None:
    done: Callable[..., Any] = getattr(optuna.Study, method)
    calls = 0

    def stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise StopHereError
        return done(*args, **kwargs)

    (tmp_path / "runs").mkdir()
    shutil.copy(study.out / "study.json", tmp_path / "runs")
    shutil.copy(study.out / "runs.jsonl", tmp_path / "runs")  # nothing to train: this is about the database
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, method, stop)
        with pytest.raises(StopHereError):
            tune(PLAN, tmp_path / "runs")
    tune(PLAN, tmp_path / "runs")
    assert_same_study(tmp_path / "runs", study)


KILLED = """
    import sys, time
    from gammaopt.tuning import StudyPlan, tune

    def stop(progress):
        if progress.new_runs == 5:
            print("ready", flush=True)
            time.sleep(60)

    if __name__ == "__main__":
        plan = StudyPlan("digits", steps=20, trials=6, seeds=2, confirm_seeds=3, gamma_range=(0.01, 100.0))
        tune(plan, sys.argv[1], jobs=2, on_progress=stop)
"""


def living(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_session) == session and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, int]]:
    """A study whose parent process was killed with -9 at work: its folder, its session, and how many had worked."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "script.py").write_text(textwrap.dedent(KILLED))
    command = [sys.executable, "-W", "error", str(folder / "script.py"), str(folder / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            working = len(living(process.pid))
        finally:
            process.kill()
        yield folder / "out", process.pid, working
        for pid in living(process.pid):
            os.kill(pid, signal.SIGKILL)


def test_no_process_outlives_a_killed_parent(killed: tuple[Path, int, int]) -> None:
    _, session, working = killed
    assert working >= 3, "two workers and their parent were expected at work"
    deadline = time.monotonic() + 10
    while living(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert living(session) == []


@pytest.mark.usefixtures("no_report")
def test_a_study_killed_at_work_and_finished_by_two_processes_gives_the_result_of_one(
    study: Study, killed: tuple[Path, int, int]
) -> None:
    out, *_ = killed
    assert len(runs_of(out)) == 5
    tune(PLAN, out, jobs=2)
    assert_same_study(out, study)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("damage", ["garbage", "cut"])
def test_a_damaged_database_is_told_in_one_line_and_left_as_it_is(copied: Path, damage: str) -> None:
    path = copied / "study.db"
    path.write_bytes(b"not a database at all, " * 999 if damage == "garbage" else path.read_bytes()[:20_000])
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    with pytest.raises(UsageError, match=r"study\.db.* can't be opened \(.*\); restore it, or remove it") as caught:
        tune(PLAN, copied)
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before


@pytest.mark.parametrize("name", ["what?x=1", "per%20cent", "ein Ordner #γ"])
@pytest.mark.usefixtures("no_report", "no_training")
def test_the_database_lies_in_the_folder_whatever_the_folder_is_called(study: Study, tmp_path: Path, name: str) -> None:
    out = Path(shutil.copytree(study.out, tmp_path / name))
    (out / "study.db").unlink()
    tune(PLAN, out)
    assert (out / "study.db").exists()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.usefixtures("no_report", "no_training")
def test_a_storage_elsewhere_is_used_and_none_is_made_in_the_folder(study: Study, copied: Path, tmp_path: Path) -> None:
    (copied / "study.db").unlink()
    (copied / "result.json").unlink()
    tune(PLAN, copied, storage=f"sqlite:///{tmp_path / 'mine.db'}")
    assert not (copied / "study.db").exists()
    assert len(optuna.get_all_study_names(f"sqlite:///{tmp_path / 'mine.db'}")) == 2
    assert_same_study(copied, study)


@pytest.mark.parametrize("storage", ["nonsense", "sqlite:////nowhere/at/all/study.db"])
def test_a_storage_that_cannot_be_opened_takes_no_folder(tmp_path: Path, storage: str) -> None:
    with pytest.raises(UsageError, match=rf"the storage {storage} can't be opened .*give another --storage") as caught:
        tune(PLAN, tmp_path / "out", storage=storage)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_study_begun_under_other_versions_is_not_mixed_with_these(copied: Path) -> None:
    (copied / "result.json").unlink()
    plan = json.loads((copied / "study.json").read_text())
    plan["versions"]["torch"] = "1.0"
    (copied / "study.json").write_text(json.dumps(plan))
    before = (copied / "runs.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"other versions \(torch 1.0 there, .* here\).*choose another folder"):
        tune(PLAN, copied)
    assert (copied / "runs.jsonl").read_bytes() == before


@pytest.mark.usefixtures("no_training", "no_report")
def test_a_finished_study_of_other_versions_keeps_the_versions_that_made_it(copied: Path) -> None:
    for name in ("study.json", "result.json"):
        data = json.loads((copied / name).read_text())
        data["versions"]["torch"] = "1.0"
        (copied / name).write_text(json.dumps(data))
    before = (copied / "result.json").read_bytes()
    assert tune(PLAN, copied).versions["torch"] == "1.0"
    assert (copied / "result.json").read_bytes() == before


@pytest.mark.parametrize("jobs", [0, -1, 1.5])
def test_a_bad_number_of_jobs_is_refused_before_a_folder_is_made(tmp_path: Path, jobs: int) -> None:
    with pytest.raises(UsageError, match=rf"jobs={jobs} is"):
        tune(PLAN, tmp_path / "out", jobs=jobs)
    assert not (tmp_path / "out").exists()


def test_a_study_in_which_every_run_diverges_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hot = replace(TASKS["digits"], base_lr={("sgd", "mse"): 1e12})
    monkeypatch.setitem(TASKS, "digits", hot)
    plan = StudyPlan("digits", "mse", steps=4, trials=4, seeds=1, confirm_seeds=2, gamma_range=(0.5, 2.0))
    result = tune(plan, tmp_path)
    assert all(trial.diverged for trial in result.trials)
    assert [arm.diverged for arm in result.arms.values()] == [4, 4, 4]
    assert {f"all trials of arm {name} diverged" for name in result.arms} <= {
        note.partition(";")[0] for note in result.notes
    }
    written = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert written["verdict"] == "range too small"  # not "not confirmed": nothing was compared that trains
    assert (tmp_path / "report.html").read_text().count("<svg") == 3


def cell(arm: str, gamma: float, octave: float, *, diverged: bool = False) -> Trial:
    lr = PLAN.base_lr * 2**octave
    return Trial(arm, gamma, lr, PLAN.law.lr(lr, gamma), 0.5, diverged)


@pytest.mark.parametrize(
    ("tuned", "base", "expected"),
    [
        (cell("tuned", 0.5, 0), cell("one_equal_budget", 1, 0), []),
        (cell("tuned", 0.0101, 0), cell("one_equal_budget", 1, 0), ["the best γ = 0.0101 of arm tuned"]),
        (cell("tuned", 99, -4.9), cell("one_equal_budget", 1, 0), ["γ = 99 of arm tuned", "lr = 0.067 of arm tuned"]),
        (cell("tuned", 0.5, 0), cell("one_equal_budget", 1, 4.9), ["lr = 59.7 of arm one_equal_budget"]),
        (cell("tuned", 0.5, 0, diverged=True), cell("one_equal_budget", 1, 0), ["all trials of arm tuned diverged"]),
    ],
)
def test_a_best_cell_at_the_end_of_its_range_is_noted(tuned: Trial, base: Trial, expected: list[str]) -> None:
    notes = _notes(replace(PLAN, confirm_seeds=10), {"tuned": tuned, "one_equal_budget": base, "one": base})
    assert len(notes) == len(expected)
    assert all(words in note for words, note in zip(expected, notes, strict=True))
    assert all("widen --gamma-range" in note for note in notes if "γ" in note)


def test_few_fresh_seeds_are_noted(study: Study) -> None:
    assert "3 fresh seeds are few; give --confirm-seeds 10 or more" in study.result.notes


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://me:hunter2@host/db?sslpassword=hunter2", "postgresql+psycopg://me:***@host/db"),
        ("sqlite:////tmp/s.db?password=hunter2", "sqlite:////tmp/s.db"),
        ("no url me:hunter2@host", "host"),
    ],
)
def test_a_storage_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert without_secrets(url) == shown
