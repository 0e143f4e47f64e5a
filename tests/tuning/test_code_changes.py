"""A study that goes on under other code than it began under: told where the runs may mix, refused where they must."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from known_hill import SMALL, hill

from gammaopt import UsageError
from gammaopt.online import Curve, RunRecord
from gammaopt.tuning import ObjectiveTrial, StudyPlan, TuneResult, _folder, confirm, study
from gammaopt.tuning._folder import MIXED, Cell, opened
from gammaopt.tuning._state import read_folder


def run(out: Path, objective: Callable[[ObjectiveTrial], float] = hill) -> TuneResult:
    return study(objective, out, **SMALL, diverged_score=-9.0, quiet=True)


@pytest.fixture(params=["A"])
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A study that was stopped under commit A, or that of the parameter, in its sixth run."""
    monkeypatch.setattr("gammaopt.report.html_report", lambda result: result.in_words())
    monkeypatch.setattr(_folder, "git_commit", lambda _: request.param)
    left = [None] * 5

    def killed(trial: ObjectiveTrial) -> float:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return hill(trial)

    killed.__qualname__, killed.__name__ = hill.__qualname__, hill.__name__
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "x", killed)
    return tmp_path / "x"


def mixed(result: TuneResult) -> list[str]:
    return [note for note in result.notes if note.startswith(MIXED)]


def test_runs_under_two_commits_are_told_in_the_result(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_folder, "git_commit", lambda _: "B")
    result = run(begun)
    assert mixed(result) == [f"{MIXED}A, B; they may differ by more than γ and rate"]
    assert result.git_commit == "A"
    assert mixed(read_folder(begun).result()) == mixed(result)
    monkeypatch.setattr(_folder, "git_commit", lambda _: "C")
    assert mixed(run(begun)) == mixed(result)  # it trained nothing


def test_runs_under_one_commit_or_outside_git_have_no_note(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mixed(run(begun)) == []
    assert not (begun / "commits.jsonl").exists()


@pytest.mark.parametrize("begun", [None], indirect=True)
def test_a_study_begun_outside_git_has_the_commit_it_went_on_under_however_it_is_read(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_folder, "git_commit", lambda _: "B")
    result = run(begun)
    assert result.git_commit == read_folder(begun).result().git_commit == "B"
    assert mixed(result) == mixed(read_folder(begun).result()) == []


def test_a_confirmation_on_more_seeds_under_another_commit_is_told_there_and_not_of_the_study(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = run(begun)
    monkeypatch.setattr(_folder, "git_commit", lambda _: "B")
    assert mixed(confirm(hill, begun, seeds=4)) == [f"{MIXED}A, B; they may differ by more than γ and rate"]
    for result in (run(begun), read_folder(begun).result()):
        assert (mixed(result), result.git_commit) == ([], "A")
        assert result.notes == planned.notes
    assert len(mixed(read_folder(begun).result(4))) == 1


def test_commits_that_an_older_study_json_holds_are_told_of_every_result(begun: Path) -> None:
    content = json.loads((begun / "study.json").read_text())
    (begun / "study.json").write_text(json.dumps({**content, "further_commits": ["B"]}))
    result = run(begun)
    assert (
        mixed(result) == mixed(read_folder(begun).result()) == [f"{MIXED}A, B; they may differ by more than γ and rate"]
    )


def test_of_runs_that_were_made_elsewhere_the_commit_there_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_folder, "git_commit", lambda _: "A")
    there, unknown, _ = cells = [Cell(1.0, 0.5, seed) for seed in range(3)]
    plan = StudyPlan("digits", steps=2, trials=4, seeds=1, confirm_seeds=2)
    with opened(tmp_path, plan) as folder:
        folder.made_under(there, "B")
        folder.made_under(unknown, None)
        for cell in cells:
            folder.add(RunRecord(cell.gamma, cell.lr, cell.seed, 2, 1.0, 0.5, 1.0, 0.5, 1.0, None, Curve((), (), ())))
        assert [folder.commits.of(cell) for cell in cells] == ["B", None, "A"]
    state = read_folder(tmp_path)
    assert [state.commits.under([cell]) for cell in state.runs] == [["B"], [], ["A"]]


def test_a_search_that_began_on_another_grid_is_refused(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = (begun / "runs.jsonl").read_bytes()
    monkeypatch.setattr("gammaopt.tuning._space.Space.digest", lambda *_: "another")
    with pytest.raises(UsageError, match=r"began on another grid \(hash .* there, another here\)"):
        run(begun)
    assert (begun / "runs.jsonl").read_bytes() == runs
