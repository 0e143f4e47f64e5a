"""The commit that a study or a result is of: the code's, whatever was written beside it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import gammaopt
from gammaopt.tuning import StudyPlan
from gammaopt.tuning._frozen import git_commit


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A repository with code/source.py, code/results/one.json and other.txt, committed."""
    folder = tmp_path / "code"
    (folder / "results").mkdir(parents=True)
    for path in (folder / "source.py", folder / "results" / "one.json", tmp_path / "other.txt"):
        path.write_text("one\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    return folder


def test_only_changes_beside_the_source_make_it_dirty(code: Path) -> None:
    clean = git_commit(code / "source.py")
    assert clean is not None
    assert len(clean) == 40
    (code.parent / "other.txt").write_text("two\n")
    (code / "untracked.py").write_text("new\n")
    assert git_commit(code) == clean
    (code / "results" / "one.json").write_text("two\n")
    assert git_commit(code, but="results") == clean
    assert git_commit(code) == f"{clean}-dirty"
    (code / "source.py").write_text("two\n")
    assert git_commit(code, but="results") == f"{clean}-dirty"


def test_a_task_is_studied_with_the_whole_package() -> None:
    assert gammaopt.__file__ is not None
    assert StudyPlan("digits").source == Path(gammaopt.__file__).parent


def test_what_is_not_in_git_has_no_commit(code: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (code / "untracked.py").write_text("new\n")
    assert git_commit(code / "untracked.py") is None
    assert git_commit(tmp_path_factory.mktemp("elsewhere")) is None
