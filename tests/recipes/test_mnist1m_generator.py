"""The generator's files are what the stream ``mnist1m`` reads, and a killed run comes out as one that was not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gammaopt._data_command import check_folder
from gammaopt.online.streams import mnist1m

SCRIPT = Path(__file__).parents[2] / "recipes" / "mnist1m_generator.py"
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")


@pytest.fixture
def generate() -> Callable[..., None]:
    spec = importlib.util.spec_from_file_location("mnist1m_generator", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    words = "--steps 9 --save-every 3 --width 32 --layers 1 --batch-size 16 --images 30 --sampling-steps 3 --out"
    return lambda out, *more: recipe.main([*words.split(), str(out), *more])


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("MNIST_*")}


def test_a_folder_of_another_run_is_left_alone(
    generate: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.random.fork_rng([]):
        generate(tmp_path)
        before = content(tmp_path)
        with pytest.raises(SystemExit):
            generate(tmp_path, "--seed", "1", "--files", "3")
        assert f"{tmp_path} has a run of [('seed', 0)]; give those, or another --out" in capsys.readouterr().err
        assert content(tmp_path) == before
        generate(tmp_path, "--files", "3")
    assert len(content(tmp_path)) == 6


def test_the_stream_reads_what_it_wrote(generate: Callable[[Path], None], tmp_path: Path) -> None:
    with torch.random.fork_rng([]):
        generate(tmp_path)
    assert check_folder(tmp_path, fast=False, on_progress=lambda _: None).problems == []
    stream = mnist1m(tmp_path, held_out=10)
    assert (stream.shape, stream.classes, stream.train_samples) == ((1, 28, 28), 10, 50)
    x, y = stream.batches(0, 0, 5, 10)
    assert x.shape == (5, 10, 1, 28, 28)
    assert float(x.std()) > 0.5
    assert torch.bincount(stream.labels).tolist() == [6] * 10
    assert not (tmp_path / ".gammaopt").exists(), "the files are mapped as they are"
    assert y.dtype == torch.int64


@pytest.mark.parametrize("killed", ["in training", "between files"])
def test_a_killed_run_goes_on_and_comes_out_the_same(
    killed: str, generate: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.random.fork_rng([]):
        generate(tmp_path / "whole")
        calls: list[Any] = []

        def dies(original: Callable[..., Any], after: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                if len(calls) > after:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            if killed == "in training":
                patch.setattr(torch, "save", dies(torch.save, 1))
            else:
                patch.setattr(np, "savez", dies(np.savez, 1))
            with pytest.raises(KeyboardInterrupt):
                generate(tmp_path / "killed")
        assert len(list((tmp_path / "killed").glob("MNIST_images_*.npz"))) == (0 if killed == "in training" else 1)
        generate(tmp_path / "killed")
    assert len(content(tmp_path / "whole")) == 4
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("*.partial"))
