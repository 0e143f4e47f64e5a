"""torch.compile: of the model in one graph, and of a training step; same numbers as without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gammaopt
from gammaopt import wrap
from gammaopt.online import MLP

CENTERS = ("copy", "zero_readout", "none")


class Convolutional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )


CASES: dict[str, Any] = {
    "mlp": (lambda: MLP(6, 3, width=8, depth=3, bias=True), (5, 6)),
    "conv": (Convolutional, (5, 1, 6, 6)),
    "attention": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(8, 3)),
        (5, 3, 8),
    ),
}


def make(name: str, center: str = "copy", gamma: float = 0.5) -> tuple[nn.Module, Tensor]:
    torch.compiler.reset()
    torch.manual_seed(0)
    build, shape = CASES[name]
    x = torch.randn(*shape)
    return wrap(build(), gamma, example_inputs=x, center=center), x  # type: ignore[arg-type]


def train(model: Any, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for mine, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("name", "center"), [*(("mlp", center) for center in CENTERS), ("conv", "copy"), ("attention", "copy")]
)
def test_model_in_one_graph_trains_alike(name: str, center: str, backend: str) -> None:
    model, x = make(name, center)
    twin = copy.deepcopy(model)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    if center != "none":
        assert not compiled(x).any()
    train(compiled, gammaopt.SGD(compiled.parameters(), lr=0.05, momentum=0.9), x)
    twin(x)  # batch statistics have seen as many batches
    train(twin, gammaopt.SGD(twin.parameters(), lr=0.05, momentum=0.9), x)
    assert_same(model, twin)


@pytest.mark.parametrize(("cls", "backend"), [(gammaopt.SGD, "eager"), (gammaopt.AdamW, "aot_eager")])
def test_training_step_compiled_as_a_whole(cls: Any, backend: str) -> None:
    model, x = make("mlp")
    twin = copy.deepcopy(model)
    optimizer = cls(model.parameters(), lr=0.01)

    @torch.compile(backend=backend)
    def step() -> None:
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step()
    train(twin, cls(twin.parameters(), lr=0.01), x)
    assert_same(model, twin)


# Handing the random state back splits the graph, and torch's own code looks at .grad of tensors in between.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_dropout_draws_the_same_masks_compiled() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    model = wrap(net, 0.5, depth=2)
    compiled: Any = torch.compile(model, backend="aot_eager")
    assert not compiled(torch.randn(4, 6)).any()


@pytest.mark.slow
def test_inductor_trains_alike() -> None:
    model, x = make("mlp")
    twin = copy.deepcopy(model)
    compiled: Any = torch.compile(model, fullgraph=True)
    train(compiled, gammaopt.SGD(compiled.parameters(), lr=0.05), x)
    train(twin, gammaopt.SGD(twin.parameters(), lr=0.05), x)
    assert_same(model, twin)
