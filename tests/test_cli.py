"""The command line: one clear line and exit code 2 for a mistake, results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from gammaopt._progress import range_line
from gammaopt.cli import main
from gammaopt.tuning import StudyPlan

TINY = ["--steps", "20", "--trials", "4", "--seeds", "1", "--confirm-seeds", "2", "--jobs", "1"]


def gammaopt(*words: object, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``python -m gammaopt``; ``code`` runs before it in the same process."""
    script = f"{code}\nimport runpy, sys; sys.argv[0] = 'gammaopt'; runpy.run_module('gammaopt', run_name='__main__')"
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


class Done(NamedTuple):
    """What a command that ran in this process left."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Done]:
    """Runs the command line in this process and an empty folder: torch is imported already."""

    def run(*words: object) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["gammaopt", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        assert isinstance(stopped.value.code, int)
        return Done(stopped.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("cli") / "study"
    return out, gammaopt("tune", "digits", *TINY, "--out", out, "--json")


def test_json_is_all_of_stdout_and_is_result_json(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = finished
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stderr.splitlines()
    assert first == "γ from 0.01 to 10: the least range that is searched by default; --gamma-range sets it"
    assert second.startswith("0 % · tuning γ")
    assert json.loads(done.stdout) == json.loads((out / "result.json").read_text())
    assert "100 % · confirming" in done.stderr
    assert f"Report: {out / 'report.html'}" in done.stderr


def test_the_printed_range_is_what_the_budget_can_train() -> None:
    """γ_max = (T/10/T₁)^(L/(L−2)) with L = 3: (100/23)³ under cross-entropy, (100/12)³ under MSE, (200/23)³."""
    for plan, high in {
        StudyPlan("digits"): "82.19",
        StudyPlan("digits", "mse"): "578.7",
        StudyPlan("digits", steps=2000): "657.5",
    }.items():
        line = f"γ from 0.01 to {high}: what {plan.steps:,} steps can train; --gamma-range sets it"
        assert range_line(plan) == line


def test_a_range_that_the_budget_does_not_set_is_not_said_to_come_from_it() -> None:
    least, most = (range_line(StudyPlan("digits", steps=steps)) for steps in (30, 100_000))
    assert least == "γ from 0.01 to 10: the least range that is searched by default; --gamma-range sets it"
    assert most == "γ from 0.01 to 1000: the widest range that is searched by default; --gamma-range sets it"


def test_a_given_range_is_the_one_searched_and_none_is_printed(here: Callable[..., Done], tmp_path: Path) -> None:
    out = tmp_path / "given"
    done = here("tune", "digits", *TINY, "--steps", 3, "--sampler", "gp", "--gamma-range", 0.5, 2, "--out", out)
    assert done.returncode == 0
    assert "γ from" not in done.stderr
    gammas = {json.loads(line)["gamma"] for line in (out / "runs.jsonl").read_text().splitlines()}
    assert len(gammas) > 3
    assert all(0.5 <= gamma <= 2.0 for gamma in gammas)
    assert json.loads((out / "study.json").read_text())["plan"]["sampler"] == "gp"


def test_finished_study_says_so_and_only_its_report_is_written(
    finished: tuple[Path, subprocess.CompletedProcess[str]], here: Callable[..., Done]
) -> None:
    out, first = finished
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()}
    again = here("tune", "digits", *TINY, "--out", out)
    assert again.returncode == 0
    assert again.stderr.startswith("This study is finished; writing its report again.\n")
    assert "trials" not in again.stderr
    assert again.stdout.strip() == json.loads(first.stdout)["in_words"]
    after = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()}
    assert {name for name in after if after[name] != before[name]} <= {"report.html"}
    assert after["report.html"][0] > before["report.html"][0]


def test_quiet_says_nothing_on_stderr(
    finished: tuple[Path, subprocess.CompletedProcess[str]], here: Callable[..., Done]
) -> None:
    out, _ = finished
    done = here("tune", "digits", *TINY, "--out", out, "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tune", "digit"], "unknown task 'digit'; choose one of: digits"),
        (["tune", "digits", "--loss", "nll"], "unknown loss 'nll'; choose one of: cross_entropy, mse"),
        (["tune", "digits", "--optimizer", "lion"], "unknown optimizer 'lion'; choose one of: sgd, adam, adamw"),
        (["tune", "digits", "--gamma-range", "0", "1"], "gamma=0 is not allowed; give a finite gamma > 0"),
        (["tune", "digits", "--gamma-range", "nan", "1"], "gamma=nan is not allowed; give a finite gamma > 0"),
        (["tune", "digits", "--gamma-range", "10", "1"], "gamma_range=10 1 is empty; give the lower γ first"),
        (["tune", "digits", "--steps", "0"], "steps=0 is too small; give at least 1"),
        (["tune", "digits", "--steps", "many"], "Invalid value for '--steps'"),
        (["tune", "digits", "--trials", "3"], "trials=3 is too small; give at least 4"),
        (["tune", "digits", "--confirm-seeds", "1"], "confirm_seeds=1 is too small; give at least 2"),
        (["tune", "digits", "--seed", "-1"], "seed=-1 is too small; give at least 0"),
        (["tune", "digits", "--jobs", "0"], "jobs=0 is too small; give at least 1"),
        (["tune", "digits", "--device", "toaster"], "unknown device 'toaster'; choose cpu"),
        (["tune", "digits", "--storage", "nonsense"], "the storage nonsense can't be opened"),
        (["tune", "digits", "--stpes", "3"], "No such option: --stpes"),
        (["tune"], "Missing argument 'task'"),
        (["tnue", "digits"], "No such command 'tnue'"),
    ],
)
def test_mistake_is_one_line_and_exit_code_two(
    words: list[str], message: str, tmp_path: Path, here: Callable[..., Done]
) -> None:
    done = here(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gammaopt: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("study.json", '{"plan": {"task": "dig', "is not a readable study"),
        ("study.db", "no database " * 999, "can't be opened"),
        ("result.json", '{"task": "dig', "result.json is damaged; delete it"),
        ("runs.jsonl", '{"gamma": 1.0}\n', "runs.jsonl line 1 is not a run record"),
    ],
)
def test_damaged_file_is_named_and_nothing_is_changed(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    here: Callable[..., Done],
    name: str,
    content: str,
    message: str,
) -> None:
    out = tmp_path / "copy"
    out.mkdir()
    for path in finished[0].iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    (out / name).write_text(content)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = here("tune", "digits", *TINY, "--out", out)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_folder_of_another_study_or_of_other_files_is_refused(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, here: Callable[..., Done]
) -> None:
    other = here("tune", "digits", *TINY, "--loss", "mse", "--out", finished[0])
    assert other.returncode == 2
    assert "holds another study (loss: cross_entropy there, mse here); choose another folder with --out" in other.stderr
    (tmp_path / "thesis.tex").write_text("x")
    strange = here("tune", "digits", *TINY, "--out", tmp_path)
    assert strange.returncode == 2
    assert "holds other files (thesis.tex) and no study; choose an empty folder with --out" in strange.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_interrupted_study_says_how_to_go_on_and_goes_on(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    words = ["tune", "digits", *TINY, "--out", str(tmp_path / "study")]
    process = subprocess.Popen(
        [sys.executable, "-m", "gammaopt", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    runs = tmp_path / "study" / "runs.jsonl"
    deadline = time.monotonic() + 60
    while not (runs.exists() and runs.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "gammaopt: stopped; run the same command again to go on" in errors
    assert "Traceback" not in errors
    done = gammaopt(*words, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == json.loads(finished[1].stdout)


@pytest.mark.parametrize("missing", ["typer", "optuna"])
def test_missing_extra_is_named_with_the_command_that_installs_it(missing: str, tmp_path: Path) -> None:
    blocker = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name={missing!r})
sys.meta_path.insert(0, Blocker())
"""
    done = gammaopt("tune", "digits", *TINY, "--out", tmp_path / "study", code=blocker)
    assert done.returncode == 2
    assert "pip install 'gammaopt[tune]'" in done.stderr
    assert missing in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("words", [["--help"], [], ["tune", "--help"], ["--version"]])
def test_help_and_version_answer_without_torch(words: list[str]) -> None:
    code = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    done = gammaopt(*words, code=code)
    assert done.returncode == 0
    assert done.stderr.strip() == "False"
    assert "gammaopt" in done.stdout or done.stdout.strip() == "0.1.0"


def test_tasks_lists_the_bundled_tasks_within_eighty_columns(here: Callable[..., Done]) -> None:
    done = here("tasks")
    assert done.returncode == 0
    assert "digits: " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_console_script_is_the_same_program() -> None:
    script = Path(sys.executable).with_name("gammaopt")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.stdout == gammaopt("--help").stdout


PORTRAIT = ["portrait", "digits", "--loss", "mse", "--gammas", 0.1, 10, 5, "--rates", 0.5, 512, 6, "--width", 16]


def test_portrait_prints_exponents_and_leaves_data_and_a_picture(here: Callable[..., Done], tmp_path: Path) -> None:
    done = here(*PORTRAIT, "--steps", 60, "--steps", 30, "--out", "p")
    assert done.returncode == 0
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["steps", "exponent", "of", "the", "where", "predicted", "measured", "95", "%", "interval"]
    assert rows
    assert all(len(line) <= 80 for line in (head, *rows))
    assert "run-steps/s" in done.stderr
    assert "Picture: p/portrait.png" in done.stderr
    names = {path.name for path in (tmp_path / "p").iterdir()}
    assert names == {"portrait.json", "runs.jsonl", "portrait.npz", "portrait.png", "exponents.json", "lock"}
    again = here(*PORTRAIT, "--steps", 60, "--steps", 30, "--out", "p", "--json", "--quiet")
    assert again.stderr == ""
    assert json.loads(again.stdout) == json.loads((tmp_path / "p" / "exponents.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["portrait", "didgits"],
            "unknown task 'didgits'; choose one of: digits, parity, hermite, photos-cnn, photos-vit, photos-resnet18",
        ),
        (["portrait", "digits", "--steps", 0], "steps=0 is too small; give at least 1"),
        (["portrait", "digits", "--steps", 5, "--steps", 5], "steps=[5, 5] has a budget twice; give each once"),
        (["portrait", "digits", "--seeds", 0], "seeds=0 is too small; give at least 1"),
        (["portrait", "digits", "--gammas", 10, 1, 3], "gammas from 10 to 1 is empty; give the lower end first"),
        (["portrait", "digits", "--unit", "gamma"], "unknown unit 'gamma'; choose one of: law, eta"),
        (["portrait", "digits", "--unit", "eta"], "unit=eta has no default rates; give --rates LO HI N"),
        (
            ["portrait", "digits", "--device", "nope"],
            "unknown device 'nope'; choose cpu, or cuda on a machine that has it",
        ),
        (["portrait", "digits", "--optimizer", "lion"], "unknown optimizer 'lion'; choose one of: sgd, adam, adamw"),
    ],
)
def test_mistakes_in_a_portrait(here: Callable[..., Done], words: list[object], message: str, tmp_path: Path) -> None:
    done = here(*words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"gammaopt: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_warning_is_one_line_on_stderr(tmp_path: Path) -> None:
    out = tmp_path / "study"
    out.mkdir()
    code = (
        "import warnings, gammaopt.tuning as t\n"
        "real = t.tune\n"
        "def warned(*words, **options):\n"
        "    warnings.warn('a stack is damaged', stacklevel=2)\n"
        "    return real(*words, **options)\n"
        "t.tune = warned\n"
    )
    done = gammaopt("tune", "digits", *TINY, "--out", out, "--json", code=code)
    assert done.returncode == 0, done.stderr
    assert "gammaopt: a stack is damaged\n" in done.stderr
    assert "UserWarning" not in done.stderr
