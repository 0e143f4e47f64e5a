"""Every configuration that torch tests, on every kernel and at multipliers ≠ 1: the plain reference's trajectory."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from reference import (
    EXACT,
    NAMES,
    Reference,
    assert_equal_parameters,
    bare,
    deviation,
    model_and_data,
    ours,
    reference,
    run,
    scales_of,
    theirs,
    twins,
)
from torch import Tensor, nn
from torch_cases import torch_cases

import gammaopt
from gammaopt._plan import Scale

STEPS = 20
# Beyond torch's own cases: what they leave at its default, or try on another device only.
MORE: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "SGD": [
        ("dampening and weight decay", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
        ("nesterov and maximize", {"momentum": 0.9, "nesterov": True, "maximize": True}),
        ("tensor weight decay", {"weight_decay": torch.tensor(0.1, dtype=torch.float64)}),
        ("tensor lr of one dimension", {"lr": torch.tensor([0.01], dtype=torch.float64)}),
    ],
    "Adam": [
        ("large eps", {"eps": 0.05}),
        ("other betas", {"betas": (0.5, 0.8), "weight_decay": 0.1, "eps": 0.0}),
        ("decoupled", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ],
    "AdamW": [
        ("large eps", {"eps": 0.05, "weight_decay": 0.3}),
        ("amsgrad and maximize", {"amsgrad": True, "maximize": True}),
    ],
}
for _name in ("Adam", "AdamW"):
    MORE[_name] += [
        ("tensor lr", {"lr": torch.tensor(0.01, dtype=torch.float64)}),
        ("tensor betas", {"betas": (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64))}),
    ]
KERNELS: dict[str, dict[str, Any]] = {
    "torch's choice": {},
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "differentiable": {"differentiable": True},
}


def all_inputs(name: str) -> list[tuple[str, dict[str, Any]]]:
    return torch_cases()[name].inputs + MORE[name]


def refused(name: str, options: dict[str, Any]) -> str | None:
    """What torch says if it does not take these options, or ``None``."""
    # A differentiable step writes on the parameters inside the graph, where leaves that need gradients can't be.
    parameter = torch.ones(2, dtype=torch.float64, requires_grad=not options.get("differentiable"))
    parameter.grad = torch.ones_like(parameter)
    try:
        theirs(name)([parameter], **copy.deepcopy(options)).step()
    except (ValueError, RuntimeError, AssertionError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NAMES)
def test_every_input_of_torchs_tests_gives_the_reference_trajectory(name: str, kernel: str) -> None:
    assert set(torch_cases()[name].impls) <= {"foreach", "fused", "differentiable"}, "torch has a new kernel"
    compared = 0
    for what, options in all_inputs(name):
        given = {**copy.deepcopy(options), **KERNELS[kernel]}
        if (message := refused(name, given)) is not None:
            model, x, y = model_and_data()
            with pytest.raises((ValueError, RuntimeError, AssertionError)) as caught:
                run(model, ours(name)(model.parameters(), **given), x, y, steps=1)
            assert str(caught.value) == message, what
            continue
        model, twin, x, y = twins()
        start = copy.deepcopy(list(model.parameters()))
        if kernel == "differentiable":
            gap = differentiable_deviation(name, options)
        else:
            run(model, ours(name)(model.parameters(), **given), x, y, STEPS)
            run(twin, reference(name, twin, **copy.deepcopy(options), foreach=False), x, y, STEPS)
            gap = deviation(model.parameters(), twin.parameters())
            assert deviation(model.parameters(), start) > 1e-4, what
        assert gap <= EXACT, f"{what}: {gap:.1e}"
        compared += 1
    assert compared >= 4


def differentiable_deviation(name: str, options: dict[str, Any]) -> float:
    model, _, _ = model_and_data()
    scales = scales_of(name, model)
    torch.manual_seed(1)
    sequence = [[torch.randn_like(p) for p in model.parameters()] for _ in range(STEPS)]
    results = []
    for kind in ("ours", "reference"):
        params = [p.detach().clone() for p in model.parameters()]
        given = copy.deepcopy(options)
        if kind == "ours":
            optimizer: Any = bare(name, params, scales, **given, differentiable=True)
        else:
            # Torch's differentiable Adam counts steps in float32 tensors: only itself compares with it.
            optimizer = Reference(name, params, scales, **given, differentiable=True)
        for gradients in sequence:
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
        results.append(params)
    return deviation(*results)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_torch_keeps_for_accelerators_are_refused_as_torch_refuses_them(name: str) -> None:
    new = [(what, o) for what, o in torch_cases()[name].accelerator_inputs if o.get("capturable")]
    assert bool(new) == ("capturable" in inspect.signature(theirs(name)).parameters)
    for what, options in new:
        message = refused(name, options)
        assert message is not None
        assert "capturable" in message
        parameter = nn.Parameter(torch.ones(2, dtype=torch.float64))
        parameter.grad = torch.ones_like(parameter)
        with pytest.raises((ValueError, RuntimeError, AssertionError)) as caught:
            bare(name, [parameter], [Scale(2.0)], **options).step()
        assert str(caught.value) == message, what


@pytest.mark.parametrize("kernel", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("name", NAMES)
def test_groups_with_options_of_their_own_and_edited_between_steps(name: str, kernel: str) -> None:
    model, twin, x, y = twins()
    options = {"weight_decay": 0.1, **KERNELS[kernel]}

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[::2], "lr": 0.02}, {"params": []}, {"params": params[1::2], "weight_decay": 0.3}]

    scales = scales_of(name, model)
    optimizer = ours(name)(groups(list(model.parameters())), lr=0.01, **options)
    plain = Reference(name, groups(list(twin.parameters())), scales[::2] + scales[1::2], lr=0.01, weight_decay=0.1)
    for step in range(STEPS):
        for settings in (optimizer.param_groups, plain.settings.param_groups):
            settings[0]["lr"] = 0.02 / (1 + step)
            settings[2]["weight_decay"] = 0.05 * step
            settings[0]["maximize"] = step % 5 == 4
        run(model, optimizer, x, y, 1)
        run(twin, plain, x, y, 1)
    assert_equal_parameters(model, twin)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_gradient_are_left_alone_and_come_back(name: str) -> None:
    model, twin, x, y = twins()
    optimizers = [ours(name)(model.parameters(), lr=0.01), reference(name, twin, lr=0.01)]
    for step in range(STEPS):
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            net[1].requires_grad_(step % 3 != 0)
            net[5].bias.requires_grad_(step % 2 == 0)
            run(net, optimizer, x, y, 1)
    assert_equal_parameters(model, twin)


def drive(params: list[nn.Parameter], optimizer: Any, loss: Any) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(params).backward()
        optimizer.step()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_complex_and_real_parameters_of_several_multipliers_share_a_group(name: str, foreach: bool) -> None:
    assert torch_cases()[name].complex
    scales = [Scale(0.5, 3.0), Scale(4.0, 0.1), Scale(0.5, 3.0), Scale(2.0, 1.0)]

    def loss(params: list[nn.Parameter]) -> Tensor:
        return torch.stack([(p * (1.5 - i) - 0.3).abs().square().sum() for i, p in enumerate(params)]).sum()

    for what, options in all_inputs(name):
        if foreach and refused(name, {**options, "foreach": True}):
            continue
        torch.manual_seed(0)
        dtypes = (torch.complex128, torch.float64, torch.float64, torch.complex128)
        a = [nn.Parameter(torch.randn(3, 2, dtype=dtype)) for dtype in dtypes]
        b = copy.deepcopy(a)
        drive(a, bare(name, a, scales, **copy.deepcopy(options), foreach=foreach), loss)
        drive(b, Reference(name, b, scales, **copy.deepcopy(options), foreach=False), loss)
        assert deviation(a, b) <= EXACT, what


@pytest.mark.parametrize("kernel", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes_share_a_bucket(name: str, kernel: str) -> None:
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float64, torch.float16)
    start = [torch.randn(3, 2).to(dtype) for dtype in dtypes]
    scales = [Scale(0.5, 2.0), Scale(0.5, 2.0), Scale(0.5, 2.0), Scale(4.0), Scale(4.0)]
    results = []
    makes: tuple[Any, ...] = (bare, Reference)
    for make in makes:
        params = [nn.Parameter(t.clone()) for t in start]
        drive(
            params,
            make(name, params, scales, lr=0.01, **KERNELS[kernel]),
            lambda ps: sum(p.double().square().sum() for p in ps),
        )
        results.append(params)
    assert [p.dtype for p in results[0]] == list(dtypes)
    assert deviation(*results) <= EXACT


@pytest.mark.parametrize("maximize", [False, True])
def test_sparse_gradients_beside_dense_ones(maximize: bool) -> None:
    case = torch_cases()["SGD"]
    assert case.sparse
    options = {**case.sparse_options, "maximize": maximize}
    for foreach in (False, True):
        results = []
        makes: tuple[Any, ...] = (bare, Reference)
        for make in makes:
            torch.manual_seed(0)
            net = nn.Sequential(nn.Embedding(9, 4, sparse=True, dtype=torch.float64), nn.Linear(4, 2).double())
            rows = torch.tensor([1, 5, 5, 8])
            optimizer = make("SGD", net.parameters(), [Scale(3.0), Scale(3.0), Scale(0.2)], **options, foreach=foreach)
            for _ in range(STEPS):
                optimizer.zero_grad()
                net(rows).square().mean().backward()
                assert next(net.parameters()).grad.is_sparse  # type: ignore[union-attr]
                optimizer.step()
            results.append(list(net.parameters()))
        assert deviation(*results) <= EXACT


def test_a_wrapped_model_with_a_sparse_embedding_trains_as_the_dense_one() -> None:
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(9, 8, sparse=sparse), nn.Linear(8, 2)).double()
        model = gammaopt.wrap(net, 3.0, depth=2, parametrization="mean_field")
        optimizer = gammaopt.SGD(model.parameters(), lr=0.01)
        assert len(set(optimizer.effective_lrs().values())) > 1
        for _ in range(STEPS):
            optimizer.zero_grad()
            (model(torch.tensor([1, 5, 5, 8])) - 1).square().mean().backward()
            optimizer.step()
        results.append(list(model.parameters()))
    assert deviation(*results) <= EXACT


@pytest.mark.parametrize("name", NAMES)
def test_a_group_added_later_is_stepped_at_its_own_rates(name: str) -> None:
    model, twin, x, y = twins()
    params, copies, scales = list(model.parameters()), list(twin.parameters()), scales_of(name, model)
    optimizer = ours(name)(params[:2], lr=0.01)
    optimizer.add_param_group({"params": params[2:], "lr": 0.002})
    groups: list[dict[str, Any]] = [{"params": copies[:2]}, {"params": copies[2:], "lr": 0.002}]
    plain = Reference(name, groups, scales, lr=0.01)
    run(model, optimizer, x, y, STEPS)
    run(twin, plain, x, y, STEPS)
    assert_equal_parameters(model, twin)


@pytest.mark.parametrize("name", NAMES)
def test_gamma_one_as_is_is_bit_identical_to_torch(name: str) -> None:
    for what, options in all_inputs(name):
        model, twin, x, y = twins(1.0, parametrization="as_is")
        run(model, ours(name)(model.parameters(), **copy.deepcopy(options)), x, y)
        run(twin, theirs(name)(twin.parameters(), **copy.deepcopy(options)), x, y)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)), what


def test_adams_rate_and_eps_follow_gradient_and_width_in_mean_field_form() -> None:
    """One Adam step written out: lr·s/fan_in for weights and lr·s for biases; eps/γ at the readout, eps/(γN) before."""
    gamma, depth, width, lr, eps = 5.0, 3.0, 8, 0.01, 1e-2
    model, x, y = model_and_data(gamma)
    before = copy.deepcopy(dict(model.named_parameters()))
    run(model, gammaopt.Adam(model.parameters(), lr=lr, eps=eps), x, y, steps=1)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        fan_in = parameter.shape[1] if name.endswith("weight") else 1
        local_eps = eps / gamma / (1 if name.startswith("5.") else width)
        update = lr * gamma ** (1 / depth) / fan_in * parameter.grad / (parameter.grad.abs() + local_eps)
        torch.testing.assert_close(parameter, before[name] - update, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_lr_times_weight_decay_is_what_the_user_set(name: str) -> None:
    model, _, _ = model_and_data()
    options = {"decoupled_weight_decay": True} if name == "Adam" else {}
    optimizer = ours(name)(model.parameters(), lr=0.01, weight_decay=0.5, **options)
    before = copy.deepcopy(list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert deviation(model.parameters(), [p * (1 - 0.01 * 0.5) for p in before]) <= EXACT
