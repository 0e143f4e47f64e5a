"""What torch does with a model besides calling it: functional calls, vmap, averaging, checkpointing, autocast, …"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import gammaopt
from gammaopt import UsageError, unwrap, wrap
from gammaopt.online import MLP


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(8, 6, generator=generator).double(), torch.randn(8, 3, generator=generator).double()


def make(seed: int = 0, gamma: float = 0.5, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return wrap(MLP(6, 3, width=8, depth=3, bias=True).double(), gamma, **{"depth": 3, **options})


def moved(seed: int = 0, **options: Any) -> nn.Module:
    model = make(seed, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("center", ["copy", "none"])
def test_functional_call_and_per_sample_gradients(center: str) -> None:
    x, y = data()
    model = moved(center=center)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    doubled = {name: 2 * parameter for name, parameter in parameters.items()}
    other = copy.deepcopy(model)
    other.load_state_dict(doubled, strict=False)
    assert torch.equal(functional_call(model, doubled, (x,)), other(x))
    assert torch.equal(functional_call(model, model.state_dict(), (x,)), model(x))

    def loss(theta: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        f: Tensor = functional_call(model, theta, (one[None],))[0]
        return (f - target).square().mean()

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    (model(x) - y).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(per_sample[name].mean(0), parameter.grad, rtol=1e-12, atol=1e-13)


def test_ensemble_of_parameters_under_one_theta0() -> None:
    x, _ = data()
    models = [moved(seed, center="zero_readout", example_inputs=x) for seed in range(3)]
    parameters, buffers = stack_module_state(models)
    outputs = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(outputs, torch.stack([model(x) for model in models]), rtol=1e-12, atol=1e-13)


def test_moving_average_keeps_theta0() -> None:
    x, y = data()
    model = make()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = gammaopt.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        train(model, optimizer, x, y, steps=1)
        average.update_parameters(model)
    expected = copy.deepcopy(model)
    expected.load_state_dict(dict(average.module.named_parameters()), strict=False)
    assert torch.equal(average(x), expected(x))
    loaded = AveragedModel(make(seed=4), multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    loaded.load_state_dict(average.state_dict())
    assert torch.equal(loaded(x), average(x))


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    x, y = data()
    model, twin = make(), make()
    ours, theirs = (gammaopt.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, twin))
    for _ in range(3):
        ours.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            ((model(x[part]) - y[part]).square().mean() / 2).backward()
        ours.step()
    train(twin, theirs, x, y)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_activation_checkpointing_of_parts_and_of_the_whole() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.ReLU())
            self.head = nn.Linear(8, 3)
            self.saving = False

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self.block, x, use_reentrant=False) if self.saving else self.block(x)
            return self.head(h)  # type: ignore[no-any-return]

    x, y = data()
    found = []
    for saving, whole in ((False, False), (True, False), (False, True)):
        torch.manual_seed(0)
        net = Blocks().double()
        net.saving = saving
        model = wrap(net, 0.5, depth=2)
        assert not model(x).any()
        optimizer = gammaopt.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(3)
        for _ in range(3):
            optimizer.zero_grad()
            f = checkpoint(model, x, use_reentrant=False) if whole else model(x)
            (f - y).square().mean().backward()
            optimizer.step()
        found.append(list(model.parameters()))
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


def test_autocast_and_grad_scaler() -> None:
    x, y = (tensor.float() for tensor in data())
    model = make().float()
    optimizer = gammaopt.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            f = model(x)
            assert step > 0 or not f.any()
        loss = (f.float() - y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert scaler.get_scale() == 64.0


def test_channels_last_computes_the_same() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()
    x = torch.randn(2, 3, 6, 6).double()
    model = wrap(net, 0.5, example_inputs=x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    theta0: Any = last.gammaopt_theta0
    assert theta0[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not last(x.contiguous(memory_format=torch.channels_last)).any()
    for each in (model, last):
        optimizer = gammaopt.SGD(each.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            (each(x) - 1).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(last(x), model(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("assign", [True, False])
def test_meta_device_to_empty_and_a_checkpoint(assign: bool, tmp_path: Path) -> None:
    x, y = data()
    source = moved()
    torch.save(source.state_dict(), tmp_path / "model.pt")
    with torch.device("meta"):
        model = wrap(MLP(6, 3, width=8, depth=3, bias=True).double(), 0.5, depth=3)
    if not assign:
        model.to_empty(device="cpu")
        with pytest.raises(UsageError, match=r"to_empty\(\) made its memory without values; load a checkpoint"):
            model(x)
        twin = copy.deepcopy(model)
        with pytest.raises(UsageError, match="to_empty"):
            twin(x)
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), assign=assign)
    assert torch.equal(model(x), source(x))
    for each in (model, source):
        train(each, gammaopt.SGD(each.parameters(), lr=0.05), x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    assert "_gammaopt_empty" not in vars(unwrap(model))
