"""Steps inside other machinery: autograd through a step, torch.compile, GradScaler, inference mode."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from reference import (
    NAMES,
    Reference,
    assert_equal_parameters,
    bare,
    deviation,
    model_and_data,
    ours,
    reference,
    run,
    theirs,
    twins,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from gammaopt._plan import Scale

SCALES = [Scale(0.5, 2.0), Scale(4.0, 0.1), Scale(0.5, 2.0)]
THROUGH: dict[str, list[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True, "maximize": True}],
    "Adam": [{}, {"weight_decay": 0.1, "amsgrad": True}],
    "AdamW": [{}, {"weight_decay": 0.1, "maximize": True}],
}


def through_steps(make: Any, name: str, options: dict[str, Any], steps: int) -> list[Tensor]:
    """Derivatives of a loss after differentiable steps: by the start, the gradients, lr."""
    torch.manual_seed(0)
    start = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in SCALES]
    gradients = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in SCALES]
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    params = [tensor.clone() for tensor in start]
    optimizer = make(name, params, SCALES, lr=lr, differentiable=True, **options)
    for t in range(steps):
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.grad = gradient * (1 + t) + gradient.square()
        optimizer.step()
    torch.stack([(i + 1) * p.square().sum() for i, p in enumerate(params)]).sum().backward()
    found = [tensor.grad for tensor in (*start, *gradients, lr)]
    # Torch's first momentum buffer is detached, so that not every derivative is there.
    assert found[-1] is not None
    assert found[-1] != 0
    return [torch.zeros_like(lr) if grad is None else grad for grad in found]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("name", "options"), [(name, options) for name in NAMES for options in THROUGH[name]])
def test_a_gradient_flows_through_steps_as_through_the_reference(
    name: str, options: dict[str, Any], steps: int
) -> None:
    try:
        expected = through_steps(Reference, name, options, steps)
    except RuntimeError:
        # Torch's momentum and running maximum are overwritten by a second step.
        assert steps > 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            through_steps(bare, name, options, steps)
        return
    assert deviation(through_steps(bare, name, options, steps), expected) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_the_derivative_by_lr_is_that_of_finite_differences(name: str) -> None:
    def after_a_step(lr: Tensor) -> Tensor:
        params = [torch.linspace(1, 2, 3, dtype=torch.float64).requires_grad_().clone() for _ in SCALES]
        optimizer = bare(name, params, SCALES, lr=1.0, differentiable=True)
        optimizer.param_groups[0]["lr"] = lr
        for parameter in params:
            parameter.grad = parameter.square() - 2.0
        optimizer.step()
        return torch.stack(params)

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(after_a_step, (lr,))


def compiled_twin(name: str, backend: str, options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """A model after 4 compiled steps of ours, and one after 4 compiled steps of the reference."""
    model, twin, x, y = twins()
    optimizer, plain = ours(name)(model.parameters(), lr=0.01, **options), reference(name, twin, lr=0.01, **options)
    plain.step()  # fills in the rates; there are no gradients yet
    steps = torch.compile(optimizer.step, backend=backend), torch.compile(plain.optimizer.step, backend=backend)
    for _ in range(4):
        for net, itself, step in ((model, optimizer, steps[0]), (twin, plain, steps[1])):
            itself.zero_grad()
            (net(x) - y).square().mean().backward()
            step()
    return model, twin


def check_compiled(name: str, backend: str) -> None:
    options = {"momentum": 0.9, "weight_decay": 0.1} if name == "SGD" else {"weight_decay": 0.1}
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's compiler warns about its own modules
            model, twin = compiled_twin(name, backend, options)
    finally:
        torch._dynamo.reset()
    assert_equal_parameters(model, twin)
    plain, x, y = model_and_data()
    run(plain, ours(name)(plain.parameters(), lr=0.01, **options), x, y, 4)
    # Torch's own compiled Adam counts steps in float32 tensors, which costs it digits.
    assert_equal_parameters(model, plain, rtol=1e-12 if name == "SGD" else 1e-4, atol=1e-14 if name == "SGD" else 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_step_is_the_compiled_references(name: str) -> None:
    check_compiled(name, "eager")


def test_a_scheduled_rate_compiles_a_step_no_more_often_than_torchs() -> None:
    counts = []
    for make in (lambda p: bare("SGD", p, [Scale(3.0)], lr=0.1), lambda p: theirs("SGD")(p, lr=0.1)):
        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        optimizer = make([parameter])
        torch._dynamo.reset()
        counter = CompileCounter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's compiler warns about its own modules
                step = torch.compile(optimizer.step, backend=counter)
                for lr in (0.1, 0.09, 0.08, 0.07):
                    optimizer.param_groups[0]["lr"] = lr
                    step()
        finally:
            torch._dynamo.reset()
        counts.append(counter.frame_count)
    assert counts[0] <= counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_step_compiled_to_kernels_is_the_compiled_references(name: str) -> None:
    check_compiled(name, "inductor")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_grad_scaler_steps_as_without_it_and_skips_an_overflow(name: str, fused: bool) -> None:
    model, twin, x, y = twins()
    optimizer, plain = ours(name)(model.parameters(), lr=0.01, fused=fused), reference(name, twin, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    for step in range(12):
        optimizer.zero_grad()
        overflow = step % 4 == 3
        before = copy.deepcopy((list(model.parameters()), optimizer.state_dict()))
        loss = (model(x) - y).square().mean()
        scaler.scale(loss * torch.inf if overflow else loss).backward()
        if step % 2 and not fused:
            scaler.unscale_(optimizer)  # as for gradient clipping
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before[0], strict=True))
            torch.testing.assert_close(optimizer.state_dict(), before[1], rtol=0, atol=0)
        else:
            run(twin, plain, x, y, 1)
    assert_equal_parameters(model, twin)
    assert 0 < scaler.get_scale() < 8.0 * 2**4
    assert getattr(optimizer, "_step_supports_amp_scaling", False) is fused


@pytest.mark.parametrize("name", NAMES)
def test_foundinf_given_by_hand_stops_every_bucket_of_the_fused_kernel(name: str) -> None:
    model, x, y = model_and_data()
    model.float()
    optimizer = ours(name)(model.parameters(), lr=0.01, fused=True)
    (model(x.float()) - y.float()).square().mean().backward()
    before = copy.deepcopy(list(model.parameters()))
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.grad_scale = torch.tensor(2.0)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_steps_record_no_graph_and_gradients_stay_as_they_were(name: str) -> None:
    model, x, y = model_and_data()
    optimizer = ours(name)(model.parameters(), lr=0.01, weight_decay=0.1)
    (model(x) - y).square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    optimizer.step()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.is_leaf
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    assert not any(t.requires_grad for state in optimizer.state.values() for t in state.values() if t is not None)
