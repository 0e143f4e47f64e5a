"""Every recipe runs as a user would run it, with fewer steps, and ends with an accuracy well above chance."""

from __future__ import annotations

import ast
import importlib.util
import multiprocessing
import os
import re
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
LIMIT = 120  # seconds; a hang is a failure
LINES = 120
PRELOADED = ["torch", "sklearn.datasets", "scipy.stats", "skimage", "torchvision", "tqdm", "gammaopt"]
LAST = re.compile(r"accuracy (\d+\.\d) %(?: at γ = \S+)? \(chance (\d+\.\d) %.*\)")

# Arguments that make it quick, points above chance it must reach, and what it needs beside torch and the extra "tune".
CASES: dict[str, tuple[str, float, tuple[str, ...]]] = {
    "plain_loop": ("--steps 100 --width 64", 20, ()),
    "torchvision_resnet18": ("--steps 40 --batch-size 24", 8, ("torchvision", "skimage")),
    "timm_vit": ("--steps 40", 12, ("timm", "skimage")),
    "lightning_cnn": ("--steps 30", 10, ("lightning", "skimage")),
    "hf_trainer": ("--steps 25", 12, ("transformers", "accelerate", "skimage")),
    "ddp": ("--steps 60 --width 64", 15, ()),
    "fsdp2": ("--steps 80 --width 16 --layers 1", 12, ()),
    "mutransfer": ("--steps 30 --rates 3 --low 0.003 --width 128", 20, ("mup",)),
    "gamma_study": ("--steps 60 --trials 4 --fresh 2", 3, ("optuna",)),
    "param_groups": ("--steps 60 --width 64", 20, ("schedulefree",)),
    "param_groups muon": ("--optimizer muon --steps 60 --width 64", 20, ()),
    "mnist1m_generator": ("--steps 60 --images 40 --sampling-steps 8", 40, ()),
    "language_model": ("--steps 60 --gammas 1 --factors 1 --width 16 --layers 1", 1, ()),
}


def run(script: Path, words: list[str], environment: Mapping[str, str], folder: Path) -> None:
    """What ``python SCRIPT WORDS`` does, in ``folder``, with its output in files there."""
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.argv[:] = [str(script), *words]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def test_a_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["plain_loop.py", "--gamma", "-1"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "recipes" / "plain_loop.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "plain_loop.py: gamma=-1 is not allowed; give a finite gamma > 0\n"
    for name in RECIPES:
        assert (ROOT / "recipes" / f"{name}.py").read_text(encoding="utf-8").endswith("    gammaopt.run_script(main)\n")


@pytest.mark.parametrize("case", CASES)
def test_runs_and_learns(case: str, tmp_path: Path) -> None:
    options, margin, needs = CASES[case]
    for package in ("sklearn", "tqdm", *needs):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    if "muon" in case:
        pytest.importorskip("torch.optim._muon", reason="torch.optim.Muon came with torch 2.9")
    script = ROOT / "recipes" / f"{case.split()[0]}.py"
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    context = multiprocessing.get_context("forkserver")  # torch is imported once for all
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=run, args=(script, options.split(), environment, tmp_path))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
    printed, progress = ((tmp_path / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    assert process.exitcode == 0, progress[-3000:]
    assert re.search(r"^γ = .* s\(γ\) = ", printed, flags=re.MULTILINE), "no plan table"
    assert "effective rate" in printed
    assert "it/s" in progress + printed, "no progress bar"
    last = LAST.search(printed.strip().splitlines()[-1])
    assert last is not None, printed[-500:]
    accuracy, chance = map(float, last.groups())
    assert accuracy > chance + margin


def test_every_recipe_is_tried_here_and_in_the_index() -> None:
    index = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert sorted({case.split()[0] for case in CASES}) == RECIPES
    assert sorted(set(re.findall(r"\[`?(\w+)\.py`?\]\(\1\.py\)", index))) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_is_short_and_says_what_to_expect(name: str) -> None:
    text = (ROOT / "recipes" / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < LINES
    said = ast.get_docstring(ast.parse(text)) or ""
    assert f"python recipes/{name}.py" in said
    assert "What it shows" in said
    assert "What to expect" in said
