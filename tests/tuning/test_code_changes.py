"""A study that goes on under other code than it began under: told where the runs may mix, refused where they must."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from known_hill import SMALL, hill

from gammaopt import UsageError
from gammaopt.tuning import ObjectiveTrial, TuneResult, _folder, study
from gammaopt.tuning._folder import MIXED
from gammaopt.tuning._state import read_folder


def run(out: Path, objective: Callable[[ObjectiveTrial], float] = hill) -> TuneResult:
    return study(objective, out, **SMALL, diverged_score=-9.0, quiet=True)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study that was stopped under commit A, in its sixth run."""
    monkeypatch.setattr("gammaopt.report.html_report", lambda result: result.in_words())
    monkeypatch.setattr(_folder, "git_commit", lambda _: "A")
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
    assert "further_commits" not in json.loads((begun / "study.json").read_text())


def test_a_search_that_began_on_another_grid_is_refused(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = (begun / "runs.jsonl").read_bytes()
    monkeypatch.setattr("gammaopt.tuning._space.Space.digest", lambda *_: "another")
    with pytest.raises(UsageError, match=r"began on another grid \(hash .* there, another here\)"):
        run(begun)
    assert (begun / "runs.jsonl").read_bytes() == runs
