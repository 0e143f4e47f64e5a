"""`make experiments` tells what failed, whatever failed, and gives the preset paper its data."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from gallery import ORDER

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(venv: Path, *words: str, fails: str = "none") -> subprocess.CompletedProcess[str]:
    """`make experiments` with a made-up python, which tells its words and fails for one script."""
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "ran $*"\ncase "$1" in *{fails}*) exit 1;; esac\n')
    python.chmod(0o755)
    for stamp in (".made", ".test"):
        (venv / stamp).touch()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    env["DATA"] = "/somebody/elses"  # a variable of the shell is none of make's command line
    command = ["make", "experiments", f"VENV={venv}", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("fails", ["depth", "gallery"])
def test_what_failed_is_told_after_all_have_run(fails: str, tmp_path: Path) -> None:
    made = make(tmp_path / "venv", fails=fails)
    assert made.returncode != 0
    assert made.stdout.splitlines()[-1] == f"failed: {fails}"
    ran = {line.split()[1] for line in made.stdout.splitlines() if line.startswith("ran ")}
    assert ran == {f"experiments/{name}.py" for name in (*ORDER, "gallery")}
    assert "--data" not in made.stdout


def test_the_preset_paper_has_its_data_and_is_refused_without(tmp_path: Path) -> None:
    made = make(tmp_path / "venv", "PRESET=paper", "DATA=/data/my images")
    assert made.returncode == 0
    lines = [line for line in made.stdout.splitlines() if line.startswith("ran ") and "gallery" not in line]
    names = [name for name in ORDER if "paper" in importlib.import_module(name).PRESETS]
    assert set(lines) == {f"ran experiments/{name}.py --preset paper --data /data/my images" for name in names}
    made = make(tmp_path / "other", "PRESET=paper")
    assert made.returncode != 0
    assert "ran " not in made.stdout
    (line,) = made.stderr.splitlines()
    assert "give its folder: DATA=PATH" in line
