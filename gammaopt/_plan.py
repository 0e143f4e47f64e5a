r"""The plan: each parameter's role, and the factor by which its learning rate differs from the optimizer's ``lr``.

    rate of a parameter = lr · multiplier,    multiplier = width factor · s(γ)

s(γ) is :class:`EtaLaw`, the same for every parameter. The width factor w belongs to the parametrization:

``as_is``
    w = 1 for every parameter: the user's initialisation and relative rates stay.
``mean_field``
    Layer = a·W·h + b with W ~ N(0, 1), a = fan_in^(-1/2), but a = 1/fan_in for the readout. Folded into plain torch
    layers (w = a·W, std(w) = a) the same trajectory needs, with N the readout's fan-in,

        role                        SGD      Adam
        weight, readout weight      N·a²     1/fan_in
        embedding, bias, norm       N        1
        readout bias, scalar        1        1

    since Adam's step does not depend on the gradient's size. For Muon's matrices see :mod:`gammaopt.optim._muon`.
``as_is`` with a base network
    w = the target's mean-field factor over the base network's: 1 at the base's own width, so that rates tuned there
    serve every other width.

Adam's eps must scale like the gradient it is compared with: ∝ 1/γ, and ∝ 1/N on all but the readout's parameters.

With a depth rule (:mod:`gammaopt._residual`) the parameters inside residual blocks have one more factor on both.

A plan is keyed by parameter name and knows no tensors, so copies, checkpoints and sharding cannot separate it from
the parameters it describes. Sources: Yang et al., Tensor Programs V (arXiv 2203.03466) for width; the mean-field
form's rates are tested here against that form written out.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from gammaopt._errors import rate
from gammaopt._laws import EtaLaw, Loss, OptimizerFamily
from gammaopt._residual import DepthRule
from gammaopt._roles import Rule

Parametrization = Literal["as_is", "mean_field"]


class Scale(NamedTuple):
    """Factors on what the user gave the optimizer, for one parameter: on ``lr``, and on ``eps``."""

    lr: float
    eps: float = 1.0


@dataclass(frozen=True)
class Base:
    """The network that rates are relative to: its rules by parameter name, and its N."""

    rules: Mapping[str, Rule]
    width: float


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
        readout: qualified name of the layer whose output is the network's.
        base: the network that rates were tuned on, if it was given.
        residual: the depth rule of a residual network, if it was given.
        stated: which of ``"depth"`` and ``"knee"`` the user gave: a checkpoint replaces only what was measured.
    """

    gamma: float
    depth: float
    loss: Loss
    knee: float
    parametrization: Parametrization
    width: float | None
    rules: tuple[Rule, ...]
    readout: str | None = None
    base: Base | None = None
    residual: DepthRule | None = None
    stated: tuple[str, ...] = field(default=(), compare=False)  # one rank may measure it and give it to the others

    def law(self, optimizer: OptimizerFamily = "sgd") -> EtaLaw:
        """The learning-rate law of this model under a family of optimizers."""
        return EtaLaw(self.depth, optimizer, self.loss, self.knee)

    def multipliers(self, optimizer: OptimizerFamily = "sgd") -> dict[str, float]:
        """Parameter name → factor on the optimizer's ``lr``."""
        return {name: scale.lr for name, scale in self.scales(optimizer).items()}

    def scales(self, optimizer: OptimizerFamily = "sgd", *, adjust_lr_fn: str | None = None) -> dict[str, Scale]:
        """Parameter name → factors on the optimizer's ``lr`` and ``eps``; ``adjust_lr_fn`` is Muon's."""
        factor = self.law(optimizer).factor(self.gamma)
        scales = {}
        for rule in self.rules:
            width = self._width_factors(rule, optimizer, adjust_lr_fn)
            lr, eps = self.residual.factors(rule.name, optimizer) if self.residual else (1.0, 1.0)
            scales[rule.name] = Scale(width.lr * factor * lr, width.eps / self.gamma * eps)
        return scales

    def _width_factors(self, rule: Rule, optimizer: OptimizerFamily, adjust_lr_fn: str | None) -> Scale:
        if self.width is None or (self.parametrization == "as_is" and self.base is None):
            return Scale(1.0)
        target = _mean_field(rule, self.width, optimizer, adjust_lr_fn)
        if self.base is None:
            return target
        base = _mean_field(self.base.rules[rule.name], self.base.width, optimizer, adjust_lr_fn)
        return Scale(target.lr / base.lr, target.eps / base.eps)

    @cached_property
    def fingerprint(self) -> float:
        """A number that tells these width factors from those of another base or of other roles.

        0 where the width changes no rate, else from 1 to 2: small enough for a half-precision checkpoint. Kept, because
        every ``state_dict()`` asks for it.
        """
        families: tuple[OptimizerFamily, ...] = ("sgd", "adam")
        factors = [self._width_factors(rule, family, None).lr for family in families for rule in self.rules]
        if all(factor == 1 for factor in factors):
            return 0.0
        # To 7e-4, on a grid that no ratio of widths is on: a decimal one would turn a last bit into another number.
        cells = (round(1e3 * math.sqrt(2) * math.log(factor) + 0.3) for factor in factors)
        return 1.0 + zlib.crc32(" ".join(map(str, cells)).encode()) / 2**32

    def table(self, lr: float = 1.0, optimizer: OptimizerFamily = "sgd") -> str:
        """The plan as text: parameter, shape, role, multiplier, effective rate ``lr``·multiplier.

        A parameter that was frozen when the network was wrapped has "frozen" for its rate; unfrozen, it has its
        multiplier.

        Raises:
            UsageError: for an ``lr`` that is negative or not finite.
        """
        lr = rate("lr", lr)
        law = self.law(optimizer)
        rows = [("parameter", "shape", "role", "multiplier", "effective rate")]
        for rule, multiplier in zip(self.rules, self.multipliers(optimizer).values(), strict=True):
            shape = "×".join(map(str, rule.shape)) or "scalar"
            stepped = "frozen" if rule.frozen else f"{lr * multiplier:.4g}"
            rows.append((rule.name, shape, rule.role, f"{multiplier:.4g}", stepped))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        head = (
            f"γ = {self.gamma:g}, L = {self.depth:.3g}, {self.parametrization}, "
            f"{optimizer} under {self.loss}: s(γ) = {law.factor(self.gamma):.4g}, lr = {lr:g}"
        )
        if self.residual is not None:
            m, branch = self.residual.ratio, self.residual.branch
            blocks = len(self.residual.blocks)
            head += f"\n{blocks} residual blocks, m = {m:g}, α = {self.residual.alpha:g}: branches × {branch:.4g}"
        return "\n".join([head, *lines])

    def __str__(self) -> str:
        return self.table() + "\nRates at lr = 1; the optimizer's effective_lrs() tells them at its own."


def _mean_field(rule: Rule, width: float, optimizer: OptimizerFamily, adjust_lr_fn: str | None) -> Scale:
    """Width factors of one parameter in mean-field form, natural parametrization: the table above."""
    of_readout = rule.role in ("readout weight", "readout bias", "scalar")
    if optimizer != "sgd":
        adam = Scale(1.0 / rule.fan_in if rule.fan_in else 1.0, 1.0 if of_readout else 1.0 / width)
        return adam if optimizer == "adam" else _muon(rule, adam, adjust_lr_fn)
    if rule.scale is not None:
        return Scale(width * rule.scale**2)
    return Scale(1.0 if of_readout else width)


def _muon(rule: Rule, adam: Scale, adjust_lr_fn: str | None) -> Scale:
    """Factors of a matrix whose update is orthogonalised: what its size should be over what torch makes it.

    Everything else has Adam's, for Muons that step the rest by Adam.
    """
    if len(rule.shape) < 2 or not (rule.fan_in or rule.role == "embedding"):
        return adam
    rows, columns = rule.shape[0], math.prod(rule.shape[1:])
    larger = math.sqrt(max(rows, columns))
    unclamped = math.sqrt(rows / columns)
    # What torch takes for outputs × inputs may be inputs × outputs: √(outputs/inputs) is read off the fan-in.
    wanted = math.sqrt(rows * columns / rule.fan_in / rule.fan_in) if rule.fan_in else larger
    given = {"match_rms_adamw": larger, "spectral_unclamped": unclamped}.get(str(adjust_lr_fn), max(1.0, unclamped))
    # eps is compared with the norm of the whole gradient, Adam's with an entry.
    return Scale(wanted / given, adam.eps * math.sqrt(rows * columns))
