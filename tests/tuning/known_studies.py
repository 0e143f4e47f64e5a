"""Fixtures around the study of a training function with a known optimum, which several tests look at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from known_hill import Study, hill, whole_study

import gammaopt.report


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a fake study's time."""
    monkeypatch.setattr(gammaopt.report, "html_report", lambda result: result.in_words())


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of ``hill``, run to its end. Not to be written to."""
    out = tmp_path_factory.mktemp("studies") / "whole"
    return Study(out, whole_study(hill, out, quiet=True))


@pytest.fixture
def copied(whole: Study, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.out, tmp_path / "copy"))
