"""Accelerate: ``prepare``, ``backward``, and ``save_state``/``load_state`` with θ₀ and the optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gammaopt
from gammaopt import wrap
from gammaopt.online import MLP

accelerate = pytest.importorskip("accelerate", reason="needs the extra 'frameworks'")


def parts(seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = wrap(MLP(6, 3, width=8, depth=3, bias=True), 3.0, depth=3)
    return model, gammaopt.AdamW(model.parameters(), lr=0.01)


def train(backward: Any, model: Any, optimizer: Any, x: Tensor, y: Tensor) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        backward((model(x) - y).square().mean())
        optimizer.step()


def test_prepared_training_equals_the_plain_loop_and_resumes_exactly(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
    engine = accelerate.Accelerator(cpu=True)
    model, optimizer = engine.prepare(*parts(0))
    assert not model(x).any()
    train(engine.backward, model, optimizer, x, y)
    engine.save_state(str(tmp_path / "state"))
    train(engine.backward, model, optimizer, x, y)
    engine.free_memory()

    again = accelerate.Accelerator(cpu=True)
    resumed, its_optimizer = again.prepare(*parts(5))
    again.load_state(str(tmp_path / "state"))
    train(again.backward, resumed, its_optimizer, x, y)

    plain, plain_optimizer = parts(0)
    for _ in range(2):
        train(Tensor.backward, plain, plain_optimizer, x, y)
    for name, value in plain.state_dict().items():
        assert torch.equal(again.unwrap_model(resumed).state_dict()[name], value)
        assert torch.equal(engine.unwrap_model(model).state_dict()[name], value)
