"""What torch refuses, ours refuses in the same words; beyond that only rates that can't be meant."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from reference import NAMES, bare, model_and_data, ours, plan_of, run, theirs
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch_cases import Bad, torch_cases

import gammaopt
from gammaopt import UsageError
from gammaopt._plan import Scale


def raised(make: Any) -> tuple[type[Exception], str] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            make()
        except Exception as error:
            return type(error), str(error)
    return None


def parameters_of(case: Bad) -> Any:
    return [nn.Parameter(torch.ones(1, 1))] if case.params is None else case.params


@pytest.mark.parametrize("name", NAMES)
def test_every_error_input_of_torchs_tests_is_refused_in_the_same_words(name: str) -> None:
    cases = torch_cases()[name].errors
    # torch 2.15 has one more for SGD than the releases before it.
    assert len(cases) >= (8 if name != "SGD" or torch.__version__ >= TorchVersion("2.15") else 7)
    for case in cases:
        assert case.raised_on == "CONSTRUCTION_ERROR", case.what
        expected = raised(lambda case=case: theirs(name)(parameters_of(case), **case.options))
        assert expected is not None, case.what
        assert issubclass(expected[0], case.error), case.what
        # Parameters of a wrapped model, or a gamma of one's own: the same words either way.
        given = raised(lambda case=case: ours(name)(parameters_of(case), gamma=3.0, depth=2, **case.options))
        assert given == expected, case.what
        if case.params is None:
            model, _, _ = model_and_data()
            assert raised(lambda case=case, model=model: ours(name)(model.parameters(), **case.options)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"lr": torch.tensor([0.1, 0.2])},
        {"lr": torch.tensor([])},
        {"weight_decay": -1.0},
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_other_bad_options_too(name: str, options: dict[str, Any]) -> None:
    expected = raised(lambda: theirs(name)([torch.ones(2)], **options))
    assert expected is not None
    assert raised(lambda: ours(name)([torch.ones(2)], gamma=3.0, depth=2, **options)) == expected


@pytest.mark.parametrize(
    "make", [lambda: [], lambda: [torch.ones(2, requires_grad=True) * 2], lambda: [3.0], lambda: 3]
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_parameters(name: str, make: Any) -> None:
    expected = raised(lambda: theirs(name)(make()))
    assert expected is not None
    assert raised(lambda: ours(name)(make(), gamma=3.0, depth=2)) == expected


@pytest.mark.parametrize("sparse_with", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("name", NAMES)
def test_sparse_gradients_are_refused_where_torch_refuses_them(name: str, sparse_with: dict[str, Any]) -> None:
    def step(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        parameter.grad = torch.ones(2, 2).to_sparse()
        optimizer.step()

    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    expected = raised(lambda: step(theirs(name)([a], **sparse_with), a))
    assert (expected is None) == (name == "SGD" and "fused" not in sparse_with)
    assert raised(lambda: step(bare(name, [b], [Scale(2.0)], **sparse_with), b)) == expected


@pytest.mark.parametrize("lr", [-1e-3, float("nan"), float("inf"), torch.tensor([-1.0])])
@pytest.mark.parametrize("name", NAMES)
def test_a_rate_that_is_negative_or_not_finite_is_a_usage_error(name: str, lr: float | Tensor) -> None:
    model, _, _ = model_and_data()
    with pytest.raises(UsageError, match=r"^lr=\S+ is not allowed; give a finite lr >= 0$"):
        ours(name)(model.parameters(), lr=lr)


@pytest.mark.parametrize("lr", [0, 0.0, torch.tensor(0.0)])
@pytest.mark.parametrize("name", NAMES)
def test_a_rate_of_zero_is_accepted_as_by_torch_and_moves_nothing(name: str, lr: float | Tensor) -> None:
    model, x, y = model_and_data()
    theirs(name)(nn.Linear(2, 2).parameters(), lr=lr)
    optimizer = ours(name)(model.parameters(), lr=lr, weight_decay=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    run(model, optimizer, x, y, 1)
    assert set(optimizer.effective_lrs().values()) == {0.0}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


BAD_RATES = [-1e-3, float("nan"), float("inf"), "0.1", None, True]


@pytest.mark.parametrize("lr", BAD_RATES)
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_rate_of_one_group_is_refused_when_it_is_added_and_when_it_is_written(name: str, lr: Any) -> None:
    """Torch checks the constructor's lr only, and would step with these: ours does with a negative one alone."""
    model, x, y = model_and_data()
    first, *rest = model.parameters()
    words = rf"^lr={lr!r} of param_groups\[1\] is not allowed; give a finite lr >= 0$"
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": [first], "lr": lr}]
    with pytest.raises(UsageError, match=words):
        ours(name)(groups, lr=0.1)
    optimizer = ours(name)(rest, lr=0.1)
    with pytest.raises(UsageError, match=words):
        optimizer.add_param_group({"params": [first], "lr": lr})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [first], "lr": 0.0})  # held still
    (model(x) - y).square().mean().backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    assert torch.equal(first, before[0])
    optimizer.param_groups[1]["lr"] = lr
    before = [parameter.detach().clone() for parameter in model.parameters()]
    if lr == -1e-3:  # as torch, see the test of the schedulers that end there
        assert min(optimizer.effective_lrs().values()) < 0
        optimizer.step()
        assert not torch.equal(first, before[0])
        return
    with pytest.raises(UsageError, match=words.removesuffix(" >= 0$") + "$"):
        optimizer.step()
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
    assert optimizer.state[first].get("exp_avg") is None or optimizer.state[first]["exp_avg"].isfinite().all()
    if isinstance(lr, float):  # what went wrong can be looked at
        assert str(optimizer.effective_lrs()[next(iter(plan_of(model).multipliers()))]) == str(lr)
    else:
        with pytest.raises(UsageError, match=rf"^lr={lr!r} of param_groups\[1\] is not a number; give a finite lr$"):
            optimizer.effective_lrs()


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_torch_with_a_rate_below_zero_loads_and_steps(name: str) -> None:
    """A linear OneCycleLR leaves one."""
    model, x, y = model_and_data()
    plain = theirs(name)(model.parameters(), lr=0.1)
    (model(x) - y).square().mean().backward()
    plain.step()
    plain.param_groups[0]["lr"] = -0.007
    optimizer = ours(name)(model.parameters(), lr=0.1)
    optimizer.load_state_dict(plain.state_dict())
    assert max(optimizer.effective_lrs().values()) < 0
    optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_rates_of_zero_and_tensors_are_stepped_with_as_a_scheduler_writes_them(name: str) -> None:
    model, x, y = model_and_data()
    optimizer = ours(name)(model.parameters(), lr=0.1, foreach=False)
    (model(x) - y).square().mean().backward()
    for lr in (0, 0.0, torch.tensor(0.0), torch.tensor(0.1)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step()
        moved = not all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
        assert moved == bool(lr > 0)


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf"), "fast"])
def test_a_table_at_a_bad_rate_is_refused(lr: Any) -> None:
    plan: Any = model_and_data()[0].gammaopt
    with pytest.raises(UsageError, match=rf"^lr={lr!r} is not a number|^lr={lr} is not allowed|^lr=-1 is not allowed"):
        plan.table(lr=lr)
    assert "lr = 0\n" in plan.table(lr=0.0)  # after a scheduler came to its end


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_group_leaves_the_optimizer_as_it_was(name: str) -> None:
    model, x, y = model_and_data()
    optimizer = ours(name)(list(model.parameters())[:3], lr=0.01)
    before = optimizer.effective_lrs()
    for bad in ([nn.Parameter(torch.ones(2))], [next(model.parameters())], [3.0]):
        assert raised(lambda bad=bad: optimizer.add_param_group({"params": bad})) is not None
    assert optimizer.effective_lrs() == before
    assert len(optimizer.param_groups) == 1
    (model(x) - y).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_groups_taken_away_by_hand_are_named(name: str) -> None:
    model, x, y = model_and_data()
    params = list(model.parameters())
    optimizer = ours(name)([{"params": params[:2]}, {"params": params[2:]}], lr=0.01)
    (model(x) - y).square().mean().backward()
    optimizer.param_groups[1]["params"].pop()
    with pytest.raises(UsageError, match=r"param_groups hold 2 \+ 3 parameters, but 2 \+ 4 were added"):
        optimizer.step()
    optimizer.param_groups.pop()
    with pytest.raises(UsageError, match=r"param_groups hold 2 parameters, but 2 \+ 4 were added; add parameters with"):
        optimizer.effective_lrs()


@pytest.mark.parametrize("name", NAMES)
def test_signature_opens_with_torchs_own(name: str) -> None:
    mine = list(inspect.signature(ours(name)).parameters.values())
    torchs = list(inspect.signature(theirs(name)).parameters.values())
    assert [(p.name, p.kind, p.default) for p in mine[: len(torchs)]] == [(p.name, p.kind, p.default) for p in torchs]
    assert [(p.name, p.kind) for p in mine[len(torchs) :]] == [
        (name, inspect.Parameter.KEYWORD_ONLY) for name in ("gamma", "depth", "loss", "knee")
    ]
    assert issubclass(getattr(gammaopt, name), theirs(name))
