"""What a person at a terminal sees: progress, and Ctrl-C."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console

from gammaopt._progress import _bar, study_progress
from gammaopt.tuning import Progress, StudyPlan
from gammaopt.tuning._result import Trial

PLAN = StudyPlan("digits")


def test_a_plain_line_comes_at_every_tenth_and_tells_trials_and_the_best_so_far(
    capsys: pytest.CaptureFixture[str],
) -> None:
    best = Trial("tuned", 0.25, 1.0, 0.25, 0.873, False)
    with study_progress(PLAN, quiet=False) as show:
        for runs in range(41):
            show(Progress("tuned", runs // 5, 8, runs, 40, runs, best if runs >= 5 else None))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[0] == "0 % · tuning γ · 0/8 trials"
    assert lines[2] == "20 % · tuning γ · 1/8 trials · best γ = 0.25: 87.3 %"


def test_on_a_terminal_a_bar_shows_trials_done_the_best_so_far_and_the_time_left() -> None:
    screen = io.StringIO()
    best = Trial("tuned", 0.25, 1.0, 0.25, 0.873, False)
    with _bar(Console(file=screen, force_terminal=True, width=80), PLAN) as show:
        # 10 of 40 runs were done by an earlier process.
        show(Progress("tuned", 2, 8, 10, 40, 0, None))
        show(Progress("tuned", 3, 8, 25, 40, 15, best))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    last = [line for line in re.split(r"[\r\n]+", text) if line.strip()][-1]
    assert last.startswith("tuning γ")
    assert "3/8 trials" in last
    assert "best γ = 0.25: 87.3 %" in last
    assert re.search(r"-:--:--|\d:\d\d:\d\d", last)
    assert len(last) <= 80


class Interrupted(NamedTuple):
    code: int
    out: str
    err: str
    open_to_sigint: list[int]


def interrupted(out: Path, jobs: int) -> Interrupted:
    """Start a study that takes a while and press Ctrl-C as a terminal does, at the first sign of work.

    That is the first finished run, or with several jobs the first sight of all workers: then they still import.
    """
    command = [sys.executable, "-m", "gammaopt", "tune", "digits", *SLOW, "--jobs", str(jobs), "--out", str(out)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as study:
        try:
            deadline, runs, exposed = time.monotonic() + 60, out / "runs.jsonl", list[int]()
            while time.monotonic() < deadline and study.poll() is None:
                found = workers(study.pid) if jobs > 1 else []
                if len(found) == jobs or (runs.exists() and runs.stat().st_size):
                    exposed = [pid for pid in found if not shielded(pid)]
                    break
                time.sleep(0.005)
            os.killpg(study.pid, signal.SIGINT)
            stdout, stderr = study.communicate(timeout=30)
        finally:
            study.kill()
        return Interrupted(study.returncode, stdout, stderr, exposed)


def workers(parent: int) -> list[int]:
    """Worker processes that ``parent`` has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            its_parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if its_parent == parent and "spawn_main" in (stat.parent / "cmdline").read_text():
                found.append(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def shielded(pid: int) -> bool:
    """Whether a process blocks or ignores SIGINT."""
    masks = re.findall(r"^Sig(?:Blk|Ign):\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return any(int(mask, 16) >> (signal.SIGINT - 1) & 1 for mask in masks)


SLOW = ["--steps", "40", "--trials", "5", "--seeds", "2", "--confirm-seeds", "2"]
GO_ON = "gammaopt: stopped; run the same command again to go on"


def test_ctrl_c_never_reaches_a_worker_not_even_while_it_starts(tmp_path: Path) -> None:
    code, stdout, stderr, open_to_sigint = interrupted(tmp_path / "study", jobs=2)
    assert (code, stdout) == (130, "")
    assert open_to_sigint == [], "a traceback of these workers may be printed over the line that says how to go on"
    # Before it, the range of γ that the budget can train and the first progress; no traceback of anybody.
    assert stderr.rstrip().splitlines()[-1] == GO_ON
    assert "Traceback" not in stderr
    assert stderr.count("gammaopt:") == 1
    assert len(stderr.strip().splitlines()) <= 4, stderr
