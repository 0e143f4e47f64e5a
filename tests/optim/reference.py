"""The plain reference that gammaopt's optimizers are tested against, and the small models the tests train.

    one torch group for each tensor, at  lr·m,  weight_decay/m,  eps·e;  weight_decay·e in Adam where it is coupled

Slow, and plainly right: it is torch's own class throughout. What the user would set on the groups (by hand or by a
scheduler) is set on ``Reference.settings``, a torch optimizer with the user's own groups.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import gammaopt
from gammaopt import Plan
from gammaopt._plan import Scale
from gammaopt.online import MLP
from gammaopt.optim._multipliers import GroupScales, Multipliers

NAMES = ("SGD", "Adam", "AdamW")
# What the tests ask of float64 trajectories.
EXACT = 1e-12


def theirs(name: str) -> Any:
    """Torch's class of that name."""
    return getattr(torch.optim, name)


def ours(name: str) -> Any:
    """gammaopt's class of that name."""
    return getattr(gammaopt, name)


class Reference:
    """Torch's class ``name`` with one group per tensor, at rates that follow ``settings``.

    Args:
        name: of a class in ``torch.optim``.
        params: tensors, or groups of them, as an optimizer takes them.
        scales: one for each tensor, in order.
        options: of the optimizer.
    """

    def __init__(
        self, name: str, params: Iterable[Tensor] | Iterable[dict[str, Any]], scales: Iterable[Scale], **options: Any
    ) -> None:
        given = list(params)
        groups = cast("list[dict[str, Any]]", given if isinstance(given[0], dict) else [{"params": given}])
        # Schedulers look for groups and for calls of step(): stand-ins without gradients give them both.
        self.settings: Any = theirs(name)([{**group, "params": [torch.zeros(1, 1)]} for group in groups], **options)
        tensors = [[{"params": [tensor]} for tensor in group["params"]] for group in groups]
        self._members = [
            range(sum(map(len, tensors[:i])), sum(map(len, tensors[: i + 1]))) for i in range(len(tensors))
        ]
        self.optimizer: Any = theirs(name)([group for of_group in tensors for group in of_group], **options)
        self._scales = list(scales)
        assert len(self._scales) == len(self.optimizer.param_groups)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of torch's own class, each tensor at its own rate."""
        self.settings.step()
        for settings, members in zip(self.settings.param_groups, self._members, strict=True):
            for member in members:
                scale, group = self._scales[member], self.optimizer.param_groups[member]
                group.update({key: value for key, value in settings.items() if key != "params"})
                group["lr"] = settings["lr"] * scale.lr
                coupled = not settings.get("decoupled_weight_decay", True)
                group["weight_decay"] = settings["weight_decay"] * (scale.eps if coupled else 1 / scale.lr)
                if "eps" in settings:
                    group["eps"] = settings["eps"] * scale.eps
        return self.optimizer.step(closure)

    def zero_grad(self) -> None:
        """As an optimizer's."""
        self.optimizer.zero_grad()


def plan_of(model: nn.Module) -> Plan:
    """The plan of a wrapped model."""
    assert isinstance(model.gammaopt, Plan)
    return model.gammaopt


def scales_of(name: str, model: nn.Module) -> list[Scale]:
    """Scales of a wrapped model's parameters, in their order, for the optimizer called ``name``."""
    return list(plan_of(model).scales("sgd" if name == "SGD" else "adam").values())


def reference(name: str, model: nn.Module, **options: Any) -> Reference:
    """The reference for all parameters of a wrapped model, in one group."""
    return Reference(name, model.parameters(), scales_of(name, model), **options)


def bare(name: str, params: Iterable[Any], scales: Sequence[Scale], **options: Any) -> Any:
    """gammaopt's optimizer over tensors of no model, each with a scale of the test's choosing."""
    optimizer = ours(name)(params, gamma=2.0, depth=3, **options)
    assert isinstance(optimizer, Multipliers)
    rest = iter(scales)
    optimizer._scales = [GroupScales(tuple(next(rest) for _ in kept.scales), kept.names) for kept in optimizer._scales]
    return optimizer


def model_and_data(gamma: float = 5.0, **kwargs: Any) -> tuple[MLP, Tensor, Tensor]:
    """A mean-field MLP in float64 with four distinct multipliers (γ ≠ 1), ten inputs and targets."""
    torch.manual_seed(0)
    net = MLP(6, 3, width=8, depth=3, bias=True).double()
    options = {"depth": 3, "parametrization": "mean_field", **kwargs}
    return gammaopt.wrap(net, gamma, **options), torch.randn(10, 6).double(), torch.randn(10, 3).double()


def twins(gamma: float = 5.0, **kwargs: Any) -> tuple[MLP, MLP, Tensor, Tensor]:
    """Two equal models and their data."""
    model, x, y = model_and_data(gamma, **kwargs)
    return model, copy.deepcopy(model), x, y


def run(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, steps: int = 10) -> None:
    """Train by mean squared error."""
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def deviation(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """Largest ‖a − b‖/‖b‖ over the pairs of tensors; ``inf`` where one is not finite."""
    worst = 0.0
    for left, right in zip(a, b, strict=True):
        assert left.dtype == right.dtype
        assert torch.isfinite(left).all()
        scale = float(right.detach().abs().max()) if right.numel() else 0.0
        gap = float((left - right).detach().abs().max()) if right.numel() else 0.0
        worst = max(worst, gap / scale if scale else gap)
    return worst


def assert_equal_parameters(a: nn.Module, b: nn.Module, **tolerance: Any) -> None:
    """Parameters of two models agree, by default to 1e-12."""
    for left, right in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(left, right, **{"rtol": EXACT, "atol": 1e-14, **tolerance})
