"""What torch refuses, ours refuses in the same words; beyond that only a rate that is not positive."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from reference import NAMES, bare, model_and_data, ours, theirs
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


@pytest.mark.parametrize("lr", [0.0, -1e-3, float("nan"), float("inf"), torch.tensor(0.0), torch.tensor([-1.0])])
@pytest.mark.parametrize("name", NAMES)
def test_a_rate_that_is_not_positive_is_a_usage_error(name: str, lr: float | Tensor) -> None:
    model, _, _ = model_and_data()
    with pytest.raises(UsageError, match=r"^lr=\S+ is not allowed; give a finite lr > 0$"):
        ours(name)(model.parameters(), lr=lr)


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
