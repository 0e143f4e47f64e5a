"""The recipes' data sets: each sample once, with workers too, and as many as they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]
pytest.importorskip("skimage")


def recipe(name: str, needs: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The recipe as a module that a worker process can import by its name."""
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"needs {needs}")
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
    samples = recipe("hf_trainer", "transformers", monkeypatch).PhotoSamples(104, 16)  # 6.5 batches
    loader: DataLoader[Any] = DataLoader(samples, batch_size=16, num_workers=workers)
    images = [image for batch in loader for image in batch["pixel_values"]]
    assert len(samples) == len(images) == distinct(images) == 104
    assert len(loader) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_sees_each_batch_once_in_workers_and_processes(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data import DistributedSampler

    batches = recipe("lightning_cnn", "lightning", monkeypatch).PhotoBatches(6, 16)
    images = []
    for rank in range(2):  # as Lightning deals a data set to two processes
        sampler = DistributedSampler(batches, 2, rank, shuffle=False)
        loader: DataLoader[Any] = DataLoader(batches, batch_size=None, sampler=sampler, num_workers=workers)
        images += [image for inputs, _ in loader for image in inputs]
    assert len(images) == distinct(images) == 96
