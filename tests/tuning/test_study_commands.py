"""``status``, ``report``, ``confirm`` and ``export`` on a study's folder, and what optuna-dashboard shows of it."""

from __future__ import annotations

import csv
import importlib
import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gammaopt import UsageError
from gammaopt.cli import main
from gammaopt.tuning import StudyPlan, TuneResult, tune
from gammaopt.tuning._state import read_folder
from gammaopt.tuning._tune import RIVAL_OCTAVES

PLAN = StudyPlan("digits", steps=20, trials=6, seeds=2, confirm_seeds=3)


class Study(NamedTuple):
    out: Path
    result: TuneResult


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A finished study. Not to be written to."""
    out = tmp_path_factory.mktemp("studies") / "whole"
    return Study(out, tune(PLAN, out))


@pytest.fixture
def copied(study: Study, tmp_path: Path) -> Path:
    return Path(shutil.copytree(study.out, tmp_path / "copy"))


@pytest.fixture
def half(copied: Path) -> Path:
    """A study killed within the second arm."""
    lines = (copied / "runs.jsonl").read_text().splitlines(keepends=True)
    (copied / "runs.jsonl").write_text("".join(lines[:21]) + lines[21][:30])
    (copied / "result.json").unlink()
    return copied


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs the command line in this process."""

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["gammaopt", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        assert isinstance(stopped.value.code, int)
        return Done(stopped.value.code, *capsys.readouterr())

    return run


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_study_read_back_is_the_study_with_or_without_its_database(study: Study, copied: Path) -> None:
    (copied / "study.db").unlink()
    for path in (study.out, copied):
        state = read_folder(path)
        assert tuple(trial for trials in state.trials.values() for trial in trials) == study.result.trials
        assert replace(state.result(), command=study.result.command) == study.result


@pytest.mark.parametrize("name", ["100%", "a%20b", "what?", "a?mode=rwc", "#1", "a b"])
def test_a_database_in_a_folder_of_any_name_is_read_and_no_other_is_made(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    copy = Path(shutil.copytree(study.out, tmp_path / name / "copy"))
    monkeypatch.setattr("gammaopt.tuning._state.search_again", pytest.fail)
    state = read_folder(copy)
    assert tuple(trial for trials in state.trials.values() for trial in trials) == study.result.trials
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert content(copy) == content(study.out)


def of_other_versions(path: Path) -> None:
    content = json.loads((path / "study.json").read_text())
    content["versions"]["optuna"] = "1.0"
    (path / "study.json").write_text(json.dumps(content))


def test_a_study_is_read_under_any_versions_and_its_search_is_made_again_under_its_own(
    copied: Path, here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = here("report", copied).stdout
    of_other_versions(copied)
    with monkeypatch.context() as patch:
        patch.setattr("gammaopt.tuning._state.search_again", pytest.fail)
        assert verdict == here("report", copied).stdout
        assert here("status", copied).stdout.count("6/6 trials") == 2
    (copied / "study.db").unlink()
    # Made again here, the searches ask for the points that were run: they are those of the study.
    assert verdict == here("report", copied).stdout
    assert here("status", copied).stdout.count("6/6 trials") == 2
    lines = (copied / "runs.jsonl").read_text().splitlines(keepends=True)
    (copied / "runs.jsonl").write_text("".join(lines[1:]))
    done = here("status", copied)
    assert done.returncode == 2
    assert "begun under other versions (optuna 1.0 there, " in done.stderr
    assert "restore its study.db: its searches are read from there, or with --storage and --study if" in done.stderr
    assert here("export", copied).returncode == 0  # its runs are there all the same


def test_a_confirmation_under_other_versions_is_told_to_install_those(copied: Path, here: Callable[..., Done]) -> None:
    of_other_versions(copied)
    done = here("confirm", copied, "--seeds", 5)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("its numbers would mix; install the same")


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"COMPLETE": 7}, "0 waiting, 0 running, 7 done"),
        ({"WAITING": 1, "FAIL": 2}, "1 waiting, 0 running, 0 done, 2 lost and queued again"),
        ({"RUNNING": 1, "PRUNED": 3}, "0 waiting, 1 running, 0 done, 3 handed back or given up"),
    ],
)
def test_status_tells_what_became_of_every_cell_of_the_queue(
    study: Study, here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, counts: dict[str, int], words: str
) -> None:
    state = replace(read_folder(study.out), queue=Counter(counts))
    monkeypatch.setattr("gammaopt.tuning._state.read_folder", lambda _: state)
    (line,) = [line for line in here("status", study.out).stdout.splitlines() if line.startswith("  cells")]
    assert line.removeprefix("  cells").strip() == words


def test_status_of_a_finished_study_has_its_figures_and_its_verdict(study: Study, here: Callable[..., Done]) -> None:
    before = content(study.out)
    done = here("status", study.out)
    assert done.returncode == 0
    assert done.stdout.count("6/6 trials") == 2
    assert study.result.in_words() in done.stdout
    assert content(study.out) == before
    figures = json.loads(here("status", study.out, "--json").stdout)
    assert figures["confirm"]["runs"] == figures["confirm"]["runs_total"]
    assert figures["arms"]["tuned"]["best"]["gamma"] == study.result.arms["tuned"].gamma
    assert figures["in_words"] == study.result.in_words()


def test_status_of_a_study_at_work_counts_what_is_finished_and_touches_nothing(
    half: Path, here: Callable[..., Done]
) -> None:
    before = content(half)
    done = here("status", half)
    assert done.returncode == 0
    assert "6/6 trials" in done.stdout
    assert "4/6 trials" in done.stdout
    assert "0 runs on fresh seeds" in done.stdout
    assert max(map(len, done.stdout.splitlines()[1:])) <= 80
    assert content(half) == before  # the half-written line belongs to the process that writes it


def test_report_is_the_one_that_tune_wrote(study: Study, copied: Path, here: Callable[..., Done]) -> None:
    (copied / "report.html").unlink()
    done = here("report", copied)
    assert (done.returncode, done.stdout.strip()) == (0, study.result.in_words())
    mine, theirs = (path / "report.html" for path in (copied, study.out))
    assert len(mine.read_text().splitlines()) == len(theirs.read_text().splitlines())
    assert f"{study.result.arms['tuned'].gamma:.3g}" in mine.read_text()


def test_confirm_on_more_seeds_trains_those_only_and_keeps_them(
    study: Study, copied: Path, here: Callable[..., Done]
) -> None:
    runs = len(read_folder(copied).runs)
    done = here("confirm", copied, "--seeds", 5, "--json")
    assert done.returncode == 0
    assert "100 % · confirming" in done.stderr
    found = json.loads(done.stdout)
    assert found["confirm"]["seeds"] == list(replace(PLAN, confirm_seeds=5).fresh_seeds)
    assert found["confirm"]["differences"][:3] == list(study.result.confirm.differences)
    chosen = {(arm.gamma, arm.lr) for arm in study.result.arms.values()}
    assert len(read_folder(copied).runs) == runs + 2 * (len(chosen) + len(RIVAL_OCTAVES))
    assert (copied / "confirm-5.html").exists()
    assert any("another look: 3 fresh seeds were planned, and 5 include them" in note for note in found["notes"])
    assert not any("another look" in note for note in study.result.notes)
    # The study itself is what it was.
    assert replace(tune(PLAN, copied), command=study.result.command) == study.result


def test_confirm_on_fewer_seeds_than_planned_is_refused(study: Study) -> None:
    with pytest.raises(UsageError, match="seeds=2 is fewer than the 3 that the study planned; give 3 or more"):
        read_folder(study.out).result(2)


def test_export_gives_every_run_and_every_trial(study: Study, here: Callable[..., Done], tmp_path: Path) -> None:
    state = read_folder(study.out)
    rows = list(csv.DictReader(io.StringIO(here("export", study.out).stdout)))
    assert {(float(r["gamma"]), float(r["lr"]), int(r["seed"])) for r in rows} == {
        (cell.gamma, cell.lr, cell.seed) for cell in state.runs
    }
    # What each was for: three seeds of every trial, and of every choice the fresh ones.
    told = Counter(arm for row in rows for arm in row["arms"].split(", "))
    trials_of = Counter(trial.arm for trial in study.result.trials)
    assert told["tuned"] == trials_of["tuned"] * PLAN.seeds
    assert told["one_equal_budget"] == trials_of["one_equal_budget"] * PLAN.seeds
    assert told["confirm tuned"] == told["confirm rival +0.25"] == PLAN.confirm_seeds
    tuned = study.result.arms["tuned"]
    assert {(float(r["gamma"]), float(r["lr"])) for r in rows if "confirm tuned" in r["arms"]} == {
        (tuned.gamma, tuned.lr)
    }
    trials = list(csv.DictReader(io.StringIO(here("export", study.out, "--what", "trials").stdout)))
    assert [float(row["score"]) for row in trials] == [trial.score for trial in study.result.trials]
    assert here("export", study.out, "--format", "jsonl", "--out", tmp_path / "runs.jsonl").returncode == 0
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert sorted(lines) == sorted((study.out / "runs.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status"], "which study? Give its folder, or --storage URL --study NAME"),
        (["status", "nowhere"], "nowhere holds no study; give the folder that `gammaopt tune` wrote"),
        (["status", "--storage", "sqlite:///x.db", "--study", "mine"], "keeps its runs in its folder; give that"),
        (
            ["status", "--storage", "postgres://h/d", "--study", "mine"],
            "is of no known kind; for PostgreSQL write",
        ),
        (["worker", "--storage", "postgres://h/d", "--study", "mine"], "for PostgreSQL write postgresql+psycopg://"),
        (["export", "nowhere", "--what", "everything"], "unknown what 'everything'; choose one of: runs, trials"),
        (["worker", "--storage", "sqlite:///x.db", "--study", "mine"], "give a PostgreSQL one, postgresql+psycopg://"),
        (
            ["confirm", "--storage", "x", "--study", "mine", "--jobs", "2"],
            "jobs=2 would train here, and the workers of",
        ),
        (
            ["confirm", "--storage", "x", "--study", "mine", "--objective", "f.py:f"],
            "objective=f.py:f would train here",
        ),
        (["worker", "--study", "mine"], "Missing option '--storage'"),
        (["tune", "digits", "--study", "mine"], "study='mine' needs a storage that its workers share; give --storage"),
        (["tune", "digits", "--study", "mine", "--jobs", "2"], "jobs=2 would train here"),
    ],
)
def test_mistakes_are_told_in_one_line(
    here: Callable[..., Done], words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = here(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_study_that_is_not_finished_says_what_it_lacks(half: Path, here: Callable[..., Done]) -> None:
    for command in ("report", "confirm"):
        done = here(command, half)
        assert done.returncode == 2
        assert "is still searching (tuned 6/6, one_equal_budget 4/6 trials)" in done.stderr


def test_optuna_dashboard_shows_the_arms_in_the_laws_coordinates(study: Study) -> None:
    dashboard = pytest.importorskip("optuna_dashboard", reason="pip install 'gammaopt[dashboard]'")
    import optuna

    storage = optuna.storages.RDBStorage(f"sqlite:///{study.out / 'study.db'}")
    app = dashboard.wsgi(storage)

    def get(path: str) -> Any:
        answers: list[str] = []
        environ = {
            "REQUEST_METHOD": "GET", "PATH_INFO": path, "SERVER_NAME": "x", "SERVER_PORT": "80", "QUERY_STRING": "",
            "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO(), "wsgi.url_scheme": "http",
        }  # fmt: skip
        answer = app(environ, lambda status, *_: answers.append(status))
        body = b"".join(answer)
        getattr(answer, "close", lambda: None)()
        assert answers[0].startswith("200"), (path, answers)
        return body

    assert b"<html" in get("/dashboard").lower()
    summaries = json.loads(get("/api/studies"))["study_summaries"]
    assert sorted(s["study_name"].rpartition("/")[2] for s in summaries) == ["one_equal_budget", "tuned"]
    for summary in summaries:
        assert summary["directions"] == ["maximize"]
        detail = json.loads(get(f"/api/studies/{summary['study_id']}"))
        assert detail["objective_names"] == ["prequential_accuracy"]
        arm = summary["study_name"].rpartition("/")[2]
        wanted = {"log2_c"} | ({"log2_gamma"} if arm == "tuned" else set())
        assert len(detail["trials"]) == PLAN.trials
        for trial in detail["trials"]:
            assert {param["name"] for param in trial["params"]} == wanted
            assert {"gamma", "lr", "effective_lr", "scores"} <= {attr["key"] for attr in trial["user_attrs"]}
            reported = trial["intermediate_values"]
            assert len(reported) <= 40
            assert trial["state"] == "Complete"
            if not any(attr["key"] == "diverged_seeds" and attr["value"] != "[]" for attr in trial["user_attrs"]):
                assert reported[-1]["step"] == PLAN.steps
                assert 0 <= reported[-1]["value"] <= 1
    storage.engine.dispose()


def test_optunas_own_plots_show_history_plane_and_runs_in_time(study: Study) -> None:
    import optuna

    from gammaopt.tuning._search import experiments_allowed

    plots: Any = importlib.import_module("optuna.visualization.matplotlib")
    storage = f"sqlite:///{study.out / 'study.db'}"
    (name,) = [name for name in optuna.get_all_study_names(storage) if name.endswith("/tuned")]
    loaded = optuna.load_study(study_name=name, storage=storage)
    with experiments_allowed():
        history = plots.plot_optimization_history(loaded)
        shown = sorted(float(y) for _, y in history.collections[0].get_offsets())
        assert shown == pytest.approx(
            sorted(t.score for t in study.result.trials if t.arm == "tuned" and not t.diverged)
        )
        slices = plots.plot_slice(loaded)
        assert [axes.get_xlabel() for axes in slices] == ["log2_c", "log2_gamma"]
        assert len(plots.plot_intermediate_values(loaded).lines) == PLAN.trials
        contour = plots.plot_contour(loaded, params=["log2_gamma", "log2_c"])
        assert (contour.get_xlabel(), contour.get_ylabel()) == ("log2_c", "log2_gamma")
