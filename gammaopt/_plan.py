r"""The plan: each parameter's role, and the factor by which its learning rate differs from the optimizer's ``lr``.

    rate of a parameter = lr · multiplier,    multiplier = width factor · s(γ)

s(γ) is :class:`EtaLaw`, the same for every parameter. The width factor belongs to the parametrization:

``as_is``
    1 for every parameter: the user's initialisation and relative rates stay.
``mean_field``
    Layer = a·W·h + b with W ~ N(0, 1), a = fan_in^(-1/2), but a = 1/fan_in for the readout. Folded into plain torch
    layers (w = a·W, std(w) = a) the same trajectory needs, for SGD and with N the readout's fan-in,
    N·a² on weights, N on hidden biases and normalisation gains, and 1 on the readout's bias.

A plan is keyed by parameter name and knows no tensors, so copies, checkpoints and sharding cannot separate it from
the parameters it describes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from gammaopt._errors import UsageError
from gammaopt._laws import EtaLaw, Loss, OptimizerFamily

Parametrization = Literal["as_is", "mean_field"]
Role = Literal["weight", "bias", "norm", "readout weight", "readout bias", "other"]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class Rule:
    """One parameter: its name, shape, role, and the scale a = std(w) of its weight (``None`` if it is no weight)."""

    name: str
    shape: tuple[int, ...]
    role: Role
    scale: float | None = None


@dataclass(frozen=True)
class Plan:
    """What the optimizer needs to know of a wrapped model; ``model.gammaopt`` is one, and prints as a table.

    Attributes:
        gamma: feature-learning strength of the wrapped model.
        depth: effective depth L, as given or as measured.
        loss: the loss the rates are for; it decides the law below the knee.
        knee: γ_c, where the law bends.
        parametrization: ``"as_is"`` or ``"mean_field"``.
        width: N, the readout's fan-in (``None`` where the model has no Linear or Conv layer).
        rules: one :class:`Rule` for each parameter, in the model's own order.
    """

    gamma: float
    depth: float
    loss: Loss
    knee: float
    parametrization: Parametrization
    width: int | None
    rules: tuple[Rule, ...]

    def law(self, optimizer: OptimizerFamily = "sgd") -> EtaLaw:
        """The learning-rate law of this model under a family of optimizers."""
        return EtaLaw(self.depth, optimizer, self.loss, self.knee)

    def multipliers(self, optimizer: OptimizerFamily = "sgd") -> dict[str, float]:
        """Parameter name → factor on the optimizer's ``lr``."""
        factor = self.law(optimizer).factor(self.gamma)
        return {rule.name: self._width_factor(rule, optimizer) * factor for rule in self.rules}

    def _width_factor(self, rule: Rule, optimizer: OptimizerFamily) -> float:
        if self.parametrization == "as_is":
            return 1.0
        if optimizer != "sgd" or self.width is None:
            raise UsageError(
                f"mean_field rates are defined for SGD, not for {optimizer}; wrap with parametrization='as_is'"
            )
        if rule.scale is not None:
            return self.width * rule.scale**2
        return 1.0 if rule.role == "readout bias" else float(self.width)

    def table(self, lr: float = 1.0, optimizer: OptimizerFamily = "sgd") -> str:
        """The plan as text: parameter, shape, role, multiplier, effective rate ``lr``·multiplier."""
        law = self.law(optimizer)
        rows = [("parameter", "shape", "role", "multiplier", "effective rate")]
        for rule, multiplier in zip(self.rules, self.multipliers(optimizer).values(), strict=True):
            shape = "×".join(map(str, rule.shape)) or "scalar"
            rows.append((rule.name, shape, rule.role, f"{multiplier:.4g}", f"{lr * multiplier:.4g}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        head = (
            f"γ = {self.gamma:g}, L = {self.depth:.3g}, {self.parametrization}, "
            f"{optimizer} under {self.loss}: s(γ) = {law.factor(self.gamma):.4g}, lr = {lr:g}"
        )
        return "\n".join([head, *lines])

    def __str__(self) -> str:
        return self.table()


def fan_in(layer: nn.Module) -> int:
    """Inputs summed by one output of a Linear or Conv layer: C_in/groups · kernel area for a convolution."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return math.prod(weight.shape[1:])


def layers_in_order(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear and Conv layers by qualified name, in the order of registration."""
    return ((name, module) for name, module in net.named_modules() if isinstance(module, LAYERS))


def rules_for(net: nn.Module, parametrization: Parametrization, readout: str | None) -> tuple[Rule, ...]:
    """Give each parameter of ``net`` its role; ``readout`` is the qualified name of the last layer.

    Raises:
        UsageError: under ``mean_field``, for a parameter of a layer whose scaling is not known.
    """
    owners = dict(net.named_modules())
    rules = []
    for name, parameter in net.named_parameters():
        prefix, _, leaf = name.rpartition(".")
        rule = _rule(name, leaf, tuple(parameter.shape), owners[prefix], prefix == readout)
        if parametrization == "mean_field" and rule.role == "other":
            raise UsageError(
                f"parameter {name!r} {tuple(parameter.shape)} of {type(owners[prefix]).__name__} has no known "
                "mean-field scaling; wrap with parametrization='as_is'"
            )
        rules.append(rule)
    return tuple(rules)


def _rule(name: str, leaf: str, shape: tuple[int, ...], owner: nn.Module, is_readout: bool) -> Rule:
    if isinstance(owner, LAYERS) and leaf == "weight":
        inputs = fan_in(owner)
        role: Role = "readout weight" if is_readout else "weight"
        return Rule(name, shape, role, 1.0 / inputs if is_readout else inputs**-0.5)
    if isinstance(owner, LAYERS) and leaf == "bias":
        return Rule(name, shape, "readout bias" if is_readout else "bias")
    if isinstance(owner, NORMS) and leaf in ("weight", "bias"):
        return Rule(name, shape, "norm")
    return Rule(name, shape, "other")
