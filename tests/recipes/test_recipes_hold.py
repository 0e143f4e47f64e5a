"""What the recipes' first lines say: each sample comes once, with workers too; the law's rate is the best of three."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]


def recipe(name: str, needs: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The recipe as a module that a worker process can import by its name."""
    for package in needs.split():
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    spec = importlib.util.spec_from_file_location(f"_recipe_{name}", ROOT / "recipes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def distinct(images: list[torch.Tensor]) -> int:
    return len({image.numpy().tobytes() for image in images})


@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainer_sees_each_crop_once_and_all_of_them(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = recipe("hf_trainer", "transformers skimage", monkeypatch).PhotoSamples(104, 16)  # 6.5 batches
    loader: DataLoader[Any] = DataLoader(samples, batch_size=16, num_workers=workers)
    images = [image for batch in loader for image in batch["pixel_values"]]
    assert len(samples) == len(images) == distinct(images) == 104
    assert len(loader) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_sees_each_batch_once_in_workers_and_processes(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data import DistributedSampler

    batches = recipe("lightning_cnn", "lightning skimage", monkeypatch).PhotoBatches(6, 16)
    images = []
    for rank in range(2):  # as Lightning deals a data set to two processes
        sampler: DistributedSampler[Any] = DistributedSampler(batches, 2, rank, shuffle=False)
        loader: DataLoader[Any] = DataLoader(batches, batch_size=None, sampler=sampler, num_workers=workers)
        images += [image for inputs, _ in loader for image in inputs]
    assert len(images) == distinct(images) == 96


def test_adams_law_has_the_lowest_loss_in_the_language_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At γ = 16 the law's rate is 4 × that of γ = 1: the left column is no law at all, the right one that of SGD."""
    words = "--gammas 16 --steps 100 --width 16 --layers 1 --context 16"
    monkeypatch.setattr(sys, "argv", ["language_model.py", *words.split()])
    with torch.random.fork_rng([]):
        recipe("language_model", "tqdm", monkeypatch).main()
    table = capsys.readouterr().out.splitlines()[-3:-1]
    assert re.findall(r"(\S+) × law", table[0]) == ["0.25", "1", "4"]
    gamma, factor, *losses = map(float, table[1].split())
    assert gamma == 16
    assert factor == pytest.approx(4, rel=0.1)
    assert losses[1] < min(losses[0], losses[2]) - 0.02
