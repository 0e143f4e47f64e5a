"""A study of a user's function after its first process: gone on with, looked at, and confirmed on more seeds."""

from __future__ import annotations

import csv
import functools
import io
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from known_hill import BEST_GAMMA, BEST_LR, SMALL, Study, height, hill, runs_of, whole_study

from gammaopt import EtaLaw, UsageError
from gammaopt.cli import main
from gammaopt.tuning import ObjectiveTrial, confirm, study, tune
from gammaopt.tuning._tune import RIVAL_OCTAVES

pytest_plugins = ["known_studies"]


@pytest.mark.usefixtures("no_report")
def test_a_finished_study_calls_the_function_no_more(whole: Study, copied: Path) -> None:
    def hill(_: ObjectiveTrial) -> float:
        pytest.fail("a finished run was trained again")

    assert replace(whole_study(hill, copied, quiet=True), command=whole.result.command) == whole.result


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("run", [5, 70])  # in the search, and in the confirmation
def test_an_error_in_the_function_names_the_cell_and_the_study_goes_on_after_it(
    whole: Study, tmp_path: Path, run: int
) -> None:
    calls: list[tuple[float, float, int]] = []

    def failing(trial: ObjectiveTrial) -> float:
        calls.append((trial.gamma, trial.lr, trial.seed))
        if len(calls) == run:
            raise ZeroDivisionError("of the user's own")
        return hill(trial)

    failing.__name__ = "hill"
    with pytest.raises(ZeroDivisionError, match="of the user's own") as caught:
        whole_study(failing, tmp_path, quiet=True)
    gamma, lr, seed = calls[-1]
    (note,) = caught.value.__notes__
    assert note.startswith(f"in the run γ = {gamma:.6g}, lr = {lr:.6g}, seed = {seed} of hill; ")
    assert not (tmp_path / "result.json").exists()
    assert runs_of(tmp_path) == calls[:-1]
    whole_study(failing, tmp_path, quiet=True)
    assert (tmp_path / "result.json").read_bytes() == (whole.out / "result.json").read_bytes()
    assert calls[run - 1] == calls[run]  # the one that failed is the only one that ran twice
    assert runs_of(tmp_path) == calls[: run - 1] + calls[run:] == runs_of(whole.out)


KILLED = """
    import os, signal, sys
    import gammaopt
    from gammaopt.tuning import study

    def train(trial):
        with open(sys.argv[2], "a") as log:
            log.write(f"{trial.gamma!r} {trial.lr!r} {trial.seed}\\n")
            runs = log.tell()
        if "kill" in sys.argv and len(open(sys.argv[2]).readlines()) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1 - abs(trial.gamma - 0.3)

    if __name__ == "__main__":
        result = study(train, sys.argv[1], law=gammaopt.EtaLaw(depth=2), base_lr=1.0, steps=10, trials=4, seeds=2,
                       confirm_seeds=2, quiet=True, diverged_score=-99)
"""


def test_a_study_killed_with_9_goes_on_and_trains_no_finished_run_again(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(KILLED))
    words = [sys.executable, "-W", "error", str(tmp_path / "script.py"), str(tmp_path / "out"), str(tmp_path / "log")]
    assert subprocess.run([*words, "kill"], check=False).returncode == -9
    assert len(runs_of(tmp_path / "out")) == 6
    subprocess.run(words, check=True)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[6] == lines[7]  # the one in work when it was killed
    assert len(set(lines)) == len(lines) - 1 == len(runs_of(tmp_path / "out"))


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_lr": 0.7}, r"base_lr: 0.5 there, 0.7 here"),
        ({"law": EtaLaw(depth=2, loss="cross_entropy")}, r"depth: 3 there, 2 here"),
        ({"settings": {"width": 8}}, r"settings: \{\} there, \{'width': 8\} here"),
        ({"metric": "reward"}, "metric: score there, reward here"),
    ],
)
def test_another_setting_in_the_same_folder_is_refused_in_words(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    study(hill, tmp_path, **SMALL, diverged_score=-9, quiet=True)
    before = (tmp_path / "runs.jsonl").read_bytes()
    with pytest.raises(UsageError, match=message) as caught:
        study(hill, tmp_path, **{**SMALL, **change}, diverged_score=-9, quiet=True)
    assert str(caught.value).endswith("choose another folder with `out`")
    assert (tmp_path / "runs.jsonl").read_bytes() == before


@pytest.mark.usefixtures("no_report")
def test_a_task_and_a_function_do_not_share_a_folder(whole: Study, copied: Path) -> None:
    from gammaopt.tuning import StudyPlan

    with pytest.raises(UsageError, match="holds a study of a function of its own; choose another folder with --out"):
        tune(StudyPlan("digits", steps=3, trials=4, seeds=1, confirm_seeds=2), copied)
    with pytest.raises(UsageError, match=r"objective: hill there, height here"):
        study(functools.partial(height, lr=1.0), copied, **SMALL, quiet=True)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gammaopt", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, *capsys.readouterr()

    return run


def test_status_report_and_export_know_its_folder(
    whole: Study, copied: Path, here: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = here("status", copied)
    assert code == 0
    assert f"{copied}: hill, cross entropy, sgd, 100 steps" in out
    assert out.count("16/16 trials") == 2
    assert whole.result.in_words() in out
    (copied / "report.html").unlink()
    assert here("report", copied)[:2] == (0, whole.result.in_words() + "\n")
    assert (copied / "report.html").exists()
    rows = list(csv.DictReader(io.StringIO(here("export", copied)[1])))
    assert [(float(r["gamma"]), float(r["lr"]), int(r["seed"])) for r in rows] == runs_of(whole.out)
    lines = here("export", copied, "--format", "jsonl")[1].splitlines()
    assert lines == (whole.out / "runs.jsonl").read_text().splitlines()


SCRIPT = f"""
import math
import sys
BEST_GAMMA, BEST_LR = {BEST_GAMMA}, {BEST_LR}

def hill(trial):
    luck = math.sin(trial.seed) + 0.1 * math.sin(trial.seed + 100 * trial.lr)
    good = -0.01 * math.log2(trial.gamma / BEST_GAMMA) ** 2 - 0.01 * math.log2(trial.lr / BEST_LR) ** 2
    return 0.9 + good + 0.01 * luck

def other(trial):
    return 0.5
"""


@pytest.mark.usefixtures("no_report")
def test_confirm_on_more_seeds_from_the_command_line_or_a_program_trains_those_only(
    whole: Study, copied: Path, tmp_path: Path, here: Callable[..., tuple[int, str, str]]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    code, out, err = here("confirm", copied, "--seeds", 12)
    assert (code, out) == (2, "")
    assert "trains with your function hill; give --objective FILE.py:NAME" in err
    before = len(runs_of(copied))
    code, out, err = here("confirm", copied, "--seeds", 12, "--json", "--objective", f"{script}:hill")
    assert code == 0, err
    found = json.loads(out)
    assert found["confirm"]["differences"][:10] == list(whole.result.confirm.differences)
    assert len(found["confirm"]["seeds"]) == 12
    chosen = {(arm.gamma, arm.lr) for arm in whole.result.arms.values()}
    assert len(runs_of(copied)) == before + 2 * (len(chosen) + len(RIVAL_OCTAVES))
    result = confirm(hill, copied, seeds=13)
    assert result.confirm.differences[:12] == tuple(found["confirm"]["differences"])
    assert (copied / "confirm-13.html").exists()
    for words, message in {
        f"{script}:other": "the study is of the function hill, and this is other; give that one",
        f"{script}:nothing": "has no function 'nothing'",
        "nowhere.py:hill": "nowhere.py is no file",
        "nomodule:hill": "there is no module 'nomodule'",
        "hill": "'hill' names no function; give FILE.py:NAME",
    }.items():
        code, out, err = here("confirm", copied, "--seeds", 15, "--objective", words)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
