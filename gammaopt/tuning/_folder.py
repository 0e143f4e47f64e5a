"""The folder of a study: what is in it, who may use it, and how a killed study finds what it had finished.

study.json    the frozen plan, the versions and the git commit it began under, written first; the folder belongs to it.
              Further commits are those of runs that one process began and another ended
runs.jsonl    one line for each finished run; a run found here is never trained again
commits.jsonl the commit of each run that was made under another one
stack-….pt    the runs in training, one file for each process, while there are some
stack-….jsonl the finished ones of them, until they stand in runs.jsonl
study.db      Optuna's SQLite storage, unless another storage was given
result.json   the result, and report.html
lock          held while a process works here
"""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gammaopt._errors import UsageError
from gammaopt._files import locked, write_for_user
from gammaopt.online._run_file import RunFile, read_runs
from gammaopt.tuning._budget import Plan
from gammaopt.tuning._frozen import git_commit
from gammaopt.tuning._frozen import versions as versions
from gammaopt.tuning._objective import ObjectivePlan
from gammaopt.tuning._plan import StudyPlan
from gammaopt.tuning._record import Record

MIXED = "runs were made under the commits "


@dataclass(frozen=True)
class Cell:
    """One run to do: a γ, the optimizer's ``lr``, and a seed."""

    gamma: float
    lr: float
    seed: int


@dataclass(frozen=True)
class Commits:
    """The commits of the code that a study's runs were made under.

    Attributes:
        begun: the one that the study began under, and each run that ``others`` doesn't name; ``None`` outside git.
        others: cell → its commit, of runs made under another one; ``None`` where it is not known.
        anywhere: further ones, of no run in particular, as an older study.json has them.
    """

    begun: str | None = None
    others: Mapping[Cell, str | None] = field(default_factory=dict)
    anywhere: Sequence[str] = ()

    def of(self, cell: Cell) -> str | None:
        """That of one run."""
        return self.others.get(cell, self.begun)

    def under(self, cells: Iterable[Cell]) -> list[str]:
        """Those of several runs, as far as they are known; the one that the study began under is the first."""
        found = dict.fromkeys((*map(self.of, cells), *self.anywhere))
        return sorted((commit for commit in found if commit is not None), key=lambda commit: commit != self.begun)


@dataclass(frozen=True)
class _Made:
    """A line of commits.jsonl: a run, and the commit that it was made under."""

    gamma: float
    lr: float
    seed: int
    commit: str | None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def _made(values: dict[str, Any]) -> _Made:
    return _Made(**values)


def _by_cell(made: Iterable[_Made]) -> dict[Cell, str | None]:
    return {Cell(each.gamma, each.lr, each.seed): each.commit for each in made}


def commits_in(path: Path) -> Commits:
    """The commits of a folder's runs. Changes nothing.

    Raises:
        UsageError: for a damaged commits.jsonl.
    """
    made, _ = read_runs(path / "commits.jsonl", _made)
    return _commits(path, _by_cell(made))


def _commits(path: Path, others: Mapping[Cell, str | None]) -> Commits:
    content = _read_json(path / "study.json")
    return Commits(content.get("git_commit"), others, content.get("further_commits", ()))


def notes_on(commits: Sequence[str]) -> tuple[str, ...]:
    """What a reader should know of a result whose runs were made under several commits."""
    return (f"{MIXED}{', '.join(commits)}; they may differ by more than γ and rate",) if len(commits) > 1 else ()


def plan_from(values: Mapping[str, Any]) -> Plan:
    """The plan that its ``to_dict`` gave."""
    kind: type[StudyPlan | ObjectivePlan] = StudyPlan if "task" in values else ObjectivePlan
    return kind(**{**values, "gamma_range": tuple(values["gamma_range"])})


@contextmanager
def opened(path: Path, plan: Plan) -> Iterator[Folder]:
    """Take the folder for ``plan``: make it, or go on in it if it holds the same plan.

    Raises:
        UsageError: if it holds another study, other files, or a file that can't be read, or is in use. Nothing in it
            is changed then.
    """
    _check_contents(path, plan)
    with locked(path):
        _check_contents(path, plan)  # again: another process may have taken the folder in between
        if not (path / "study.json").exists():
            commit = git_commit(plan.source)
            content = {"plan": plan.to_dict(), "versions": versions(), "id": secrets.token_hex(4), "git_commit": commit}
            write_for_user(path / "study.json", json.dumps(content, indent=2) + "\n")
        folder = Folder(path, plan)
        try:
            yield folder
        finally:
            folder.close()


def _check_contents(path: Path, plan: Plan) -> None:
    out = plan.option("out")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; choose a folder with {out}")
    study = path / "study.json"
    if not study.exists():
        # A process killed before its plan was written leaves a lock and perhaps a half-written plan.
        entries = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
        strangers = [name for name in entries if name != "lock" and not name.startswith(".study.json.")]
        if strangers:
            raise UsageError(
                f"{path} holds other files ({', '.join(strangers[:3])}) and no study; choose an empty folder with {out}"
            )
        return
    try:
        content = json.loads(study.read_text(encoding="utf-8"))
        found, _, _ = content["plan"], content["versions"], content["id"]
        same_kind = ("task" in found) == ("task" in plan.to_dict())
        differing = [name for name, value in plan.to_dict().items() if found[name] != value] if same_kind else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{study} is not a readable study ({type(error).__name__}: {error}); "
            f"restore it, or choose another folder with {out}"
        ) from None
    try:
        _read_json(path / "result.json")
    except (OSError, ValueError):
        raise UsageError(
            f"{path / 'result.json'} is damaged; delete it and run the same command to make it anew from the runs"
        ) from None
    if not same_kind:
        what = f"the bundled task {found['task']}" if "task" in found else "a function of its own"
        raise UsageError(f"{path} holds a study of {what}; choose another folder with {out}")
    if differing:
        name = differing[0]
        raise UsageError(
            f"{path} holds another study ({name}: {found[name]} there, {plan.to_dict()[name]} here); "
            f"choose another folder with {out}"
        )


class Folder:
    """An opened folder: the finished runs, and where the rest goes."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self._source = path, plan.source
        self._file: RunFile[Record] = RunFile(path / "runs.jsonl", plan.read_record)
        self._commits: RunFile[_Made] = RunFile(path / "commits.jsonl", _made)
        self._others = _by_cell(self._commits.records)
        self._told: set[Cell] = set()  # made elsewhere, under a commit that was said
        self._begun_before = any(path.glob("stack-*"))  # runs that a killed process was in the midst of
        self.runs = {Cell(record.gamma, record.lr, record.seed): record for record in self._file.records}

    def add(self, record: Record) -> None:
        """Keep a finished run before this returns, as :meth:`RunFile.add` does."""
        cell = Cell(record.gamma, record.lr, record.seed)
        if cell not in self._told:
            self._take_over()
            self._keep_commit(cell, self._commit_here)
        self._file.add(record)
        self.runs[cell] = record

    def made_under(self, cell: Cell, commit: str | None) -> None:
        """Say which commit a run was made under elsewhere, before it is added; ``None`` if that is not known."""
        self._told.add(cell)
        self._keep_commit(cell, commit)

    def _take_over(self) -> None:
        """Say that some run, nobody knows which, was begun under the commit of the study, if it ends under another."""
        begun = self.commits.begun
        if self._begun_before and begun not in (None, self._commit_here, *self.commits.anywhere):
            content = _read_json(self.path / "study.json")
            content["further_commits"] = [*self.commits.anywhere, begun]
            write_for_user(self.path / "study.json", json.dumps(content, indent=2) + "\n")
            del self.commits  # read anew
        self._begun_before = False

    def _keep_commit(self, cell: Cell, commit: str | None) -> None:
        if commit != self.commits.of(cell):
            self._commits.add(_Made(cell.gamma, cell.lr, cell.seed, commit))
            self._others[cell] = commit

    @functools.cached_property
    def _commit_here(self) -> str | None:
        return git_commit(self._source)

    @functools.cached_property
    def commits(self) -> Commits:
        """The commits that its runs were made under; it grows with them."""
        return _commits(self.path, self._others)

    def close(self) -> None:
        """Close its files."""
        self._file.close()
        self._commits.close()

    def write(self, name: str, text: str) -> Path:
        """Write a text file into the folder, whole or not at all."""
        write_for_user(self.path / name, text)
        return self.path / name

    @property
    def finished(self) -> bool:
        """Whether the study's result has been written."""
        return (self.path / "result.json").exists()

    def differs(self, result: str) -> bool:
        """Whether the written result is another than this one; the versions and commit it tells of are its own."""
        written = _read_json(self.path / "result.json")
        own = {"versions": None, "git_commit": None}
        if not isinstance(written, dict):
            return True

        def without_its_own(of: dict[str, Any]) -> dict[str, Any]:
            return {**of, **own, "notes": [note for note in of["notes"] if not note.startswith(MIXED)]}

        return "notes" not in written or without_its_own(json.loads(result)) != without_its_own(written)

    @property
    def study_id(self) -> str:
        """What tells this folder's study from others of the same plan, in a storage that they share."""
        return str(_read_json(self.path / "study.json")["id"])

    @property
    def versions(self) -> dict[str, str]:
        """The versions that the study began under."""
        found: dict[str, str] = _read_json(self.path / "study.json")["versions"]
        return found


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
