"""A study that goes on under other code than it began under: told where the runs may mix, refused where they must."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import optuna
import pytest
from known_hill import SMALL, hill
from memory_storage import MemoryStorage

from gammaopt import UsageError
from gammaopt.online import Curve, RunRecord
from gammaopt.tuning import ObjectiveTrial, Remote, StudyPlan, TuneResult, _folder, _tune, confirm, study, tune
from gammaopt.tuning._folder import MIXED, Cell, opened
from gammaopt.tuning._search import Search, search
from gammaopt.tuning._state import read_folder

PLAN = StudyPlan("digits", steps=2, trials=4, seeds=1, confirm_seeds=2)


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
    with opened(tmp_path, PLAN) as folder:
        folder.made_under(there, "B")
        folder.made_under(unknown, None)
        for cell in cells:
            folder.add(RunRecord(cell.gamma, cell.lr, cell.seed, 2, 1.0, 0.5, 1.0, 0.5, 1.0, None, Curve((), (), ())))
        assert [folder.commits.of(cell) for cell in cells] == ["B", None, "A"]
    state = read_folder(tmp_path)
    assert [state.commits.under([cell]) for cell in state.runs] == [["B"], [], ["A"]]


def test_runs_that_another_commit_had_begun_are_told_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(1.0, 0.5, 0)
    record = RunRecord(cell.gamma, cell.lr, cell.seed, 2, 1.0, 0.5, 1.0, 0.5, 1.0, None, Curve((), (), ()))
    for name, stack in (("none", ()), ("begun", ("stack-1.pt",))):
        monkeypatch.setattr(_folder, "git_commit", lambda _: "A")
        with opened(tmp_path / name, PLAN):
            pass
        for file in stack:  # a process was killed in the midst of it
            (tmp_path / name / file).write_bytes(b"")
        monkeypatch.setattr(_folder, "git_commit", lambda _: "B")
        with opened(tmp_path / name, PLAN) as folder:
            folder.add(record)
            expected = ["A", "B"] if stack else ["B"]
            assert folder.commits.under([cell]) == expected
        assert read_folder(tmp_path / name).commits.under([cell]) == expected


def test_a_search_that_began_on_another_grid_is_refused(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = (begun / "runs.jsonl").read_bytes()
    monkeypatch.setattr("gammaopt.tuning._space.Space.digest", lambda *_: "another")
    with pytest.raises(UsageError, match=r"began on another grid \(hash .* there, another here\)") as told:
        run(begun)
    assert str(told.value).endswith("or choose another folder with `out`")
    assert (begun / "runs.jsonl").read_bytes() == runs


@pytest.mark.parametrize(
    ("named", "another"), [(True, "another name with --study"), (False, "another folder with --out")]
)
def test_a_search_on_another_grid_is_given_another_name_where_it_has_one(
    monkeypatch: pytest.MonkeyPatch, named: bool, another: str
) -> None:
    class KilledError(Exception): ...

    def again() -> None:
        search(PLAN, "mine", Search("tuned", PLAN.space("tuned"), 4), storage, Mock(side_effect=KilledError), Mock(),
               named=named)  # fmt: skip

    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(KilledError):
        again()
    monkeypatch.setattr("gammaopt.tuning._space.Space.digest", lambda *_: "another")
    with pytest.raises(UsageError, match=f"or choose {another}$"):
        again()


def test_a_study_of_a_function_under_other_versions_is_told_its_own_argument(begun: Path) -> None:
    of_other_versions(begun)
    with pytest.raises(UsageError, match=r"install those, or choose another folder with `out`$"):
        run(begun)


def test_a_named_study_under_other_versions_needs_another_name_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, PLAN):
        pass
    of_other_versions(tmp_path)
    monkeypatch.setattr(_tune, "_open", lambda *_: MemoryStorage())
    monkeypatch.setattr(_tune, "_workers", lambda *_: nullcontext())
    with pytest.raises(UsageError, match=r"or choose another folder with --out and another name with --study$"):
        tune(PLAN, tmp_path, storage="postgresql://x", remote=Remote("mine"))


def of_other_versions(path: Path) -> None:
    content = json.loads((path / "study.json").read_text())
    content["versions"]["torch"] = "1.0"
    (path / "study.json").write_text(json.dumps(content))
