"""A study whose files were lost or can't be written: a line that says so, and the same command mends it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gammaopt.report
from gammaopt import EtaLaw, UsageError
from gammaopt.tuning import ObjectiveTrial, TuneResult, confirm, study


def hill(trial: ObjectiveTrial) -> float:
    return 1.0 - abs(trial.gamma - 0.3) - 0.01 * trial.lr + 0.001 * (trial.seed % 7)


def run(out: Path) -> TuneResult:
    options: dict[str, Any] = {"base_lr": 1.0, "steps": 10, "trials": 4, "seeds": 1, "confirm_seeds": 2}
    return study(hill, out, law=EtaLaw(depth=2), quiet=True, diverged_score=-99, **options)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gammaopt.report, "html_report", lambda result: result.in_words())


def full_for(name: str) -> Callable[..., tuple[int, str]]:
    """``mkstemp`` on a disk that has no room for the file ``name``."""
    real = tempfile.mkstemp

    def mkstemp(*args: Any, **kwargs: Any) -> tuple[int, str]:
        if kwargs["prefix"] == f".{name}.":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    return mkstemp


def test_runs_of_the_search_that_were_lost_are_trained_again(tmp_path: Path) -> None:
    whole = run(tmp_path)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(UsageError, match=r"1 of its runs are missing in runs\.jsonl; .*remove result\.json"):
        run(tmp_path)
    (tmp_path / "result.json").unlink()
    assert run(tmp_path) == whole
    assert sorted((tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)


@pytest.mark.parametrize("name", ["study.json", "result.json", "report.html"])
def test_a_disk_full_at_any_file_is_told_in_one_line_and_the_study_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", full_for(name))
        with pytest.raises(UsageError, match=rf"{name} can't be written \(No space left on .*\); make room") as told:
            run(tmp_path)
    assert "\n" not in str(told.value)
    run(tmp_path)
    assert (tmp_path / name).exists()
    if name == "report.html":
        monkeypatch.setattr(tempfile, "mkstemp", full_for("confirm-2.html"))
        with pytest.raises(UsageError, match=r"confirm-2\.html can't be written \(No space left on device\)"):
            confirm(hill, tmp_path, seeds=2)
