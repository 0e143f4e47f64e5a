"""Per-parameter multipliers beside a torch optimizer's groups, without touching the groups.

``param_groups`` and ``state_dict()`` stay exactly torch's (same groups, order and keys), so torch checkpoints load
both ways and schedulers that write absolute rates stay right. The multipliers stand in a list parallel to each
group's ``params``: by position, because deepcopy, pickling and sharding replace the tensors but keep their order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _default_to_fused_or_foreach, _use_grad_for_differentiable

from gammaopt import _registry
from gammaopt._errors import UsageError, rate
from gammaopt._laws import EtaLaw, Loss, OptimizerFamily
from gammaopt._plan import Plan, Scale

Buckets = list[tuple[Scale, list[int]]]


@dataclass(frozen=True)
class GroupScales:
    """The scales and names of one group's parameters, in the group's order.

    ``whole`` are the buckets of a step in which every parameter has a gradient: the usual one, so they are kept.
    """

    scales: tuple[Scale, ...]
    names: tuple[str, ...]
    whole: Buckets = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "whole", _buckets(self.scales))

    def buckets(self, parameters: list[Tensor], stepped: int) -> Buckets:
        """Scale → positions, among the ``stepped`` parameters that have a gradient, of those that share it.

        One call of torch's kernel serves a bucket.
        """
        if stepped == len(self.scales):
            return self.whole
        pairs = zip(parameters, self.scales, strict=True)
        return _buckets(scale for parameter, scale in pairs if parameter.grad is not None)


def _buckets(scales: Iterable[Scale]) -> Buckets:
    buckets: dict[Scale, list[int]] = {}
    for position, scale in enumerate(scales):
        buckets.setdefault(scale, []).append(position)
    return list(buckets.items())


class Baked(list[Any]):
    """The parameters of a group of :func:`gammaopt.param_groups`, whose rate has γ in it. Torch keeps a plain list."""


class Multipliers(Optimizer):
    """Mixin for a torch optimizer: finds each parameter's scale when a group is added, keeps it, steps with it.

    A subclass names its ``_family``, calls :meth:`_set_law` before torch's ``__init__``, and steps one bucket of
    parameters that share a scale in ``_step_bucket``.
    """

    _family: ClassVar[OptimizerFamily]
    _law: tuple[EtaLaw, float] | None
    _scales: list[GroupScales]
    _version: int = -1  # of the live plans that the scales were looked up in

    def _set_law(self, gamma: float | None, depth: float | None, loss: Loss, knee: float) -> None:
        """Keep the law for parameters of no wrapped model, from the optimizer's own ``gamma=`` and ``depth=``."""
        self._scales, self._version = [], _registry.version()
        self._law = None
        if gamma is None and depth is None:
            return
        if gamma is None or depth is None:
            given, missing = ("gamma", "depth") if depth is None else ("depth", "gamma")
            raise UsageError(f"{given}= was given without {missing}=; give both, or neither after gammaopt.wrap")
        law = EtaLaw(depth, self._family, loss, knee)
        law.factor(gamma)  # a bad gamma is reported here, before torch sees the parameters
        self._law = law, gamma

    @staticmethod
    def _check_lr(lr: float | Tensor) -> None:
        # A tensor of several elements is torch's to report. 0 is where a warm-up may start.
        if not isinstance(lr, Tensor) or lr.numel() == 1:
            rate("lr", float(lr.detach()) if isinstance(lr, Tensor) else lr)

    def _check_group_lr(self, index: int, at_least: float = -math.inf) -> None:
        """Refuse a group's own lr that is no number, not finite, or too small; torch checks the constructor's only.

        A new group's must be >= 0, as the constructor's. Later a scheduler may write 0, and by rounding, or one step
        after its last, a negative one (``LinearLR`` to 0, a linear ``OneCycleLR``): torch steps with that, and so do
        we. Numbers only: reading a tensor would wait for its device at every step. Not in a compiled step either,
        which would be compiled anew for each value.
        """
        lr = self.param_groups[index]["lr"]
        if isinstance(lr, Tensor) or torch.compiler.is_compiling():
            return
        if not _is_number(lr) or not at_least <= lr or not math.isfinite(lr):
            wanted = "" if at_least == -math.inf else f" >= {at_least:g}"
            raise UsageError(f"lr={lr!r} of param_groups[{index}] is not allowed; give a finite lr{wanted}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and isinstance(param_group.get("params"), Baked):
            raise UsageError(
                "these groups are of gammaopt.param_groups, whose rates have γ in them already, and "
                f"{type(self).__name__} would count it twice; give it model.parameters(), "
                "or the groups to an optimizer of torch"
            )
        super().add_param_group(param_group)
        try:
            self._check_group_lr(len(self.param_groups) - 1, at_least=0)
            scales = self._resolve(self.param_groups[-1]["params"])
        except BaseException:
            self.param_groups.pop()
            raise
        self._scales.append(scales)

    def _resolve(self, parameters: list[Tensor]) -> GroupScales:
        start = sum(len(group.scales) for group in self._scales)
        if self._law is not None:
            return self._from_law(parameters, start)
        return self._owned(self.param_groups[-1], start)

    def _owned(self, group: dict[str, Any], start: int = 0) -> GroupScales:
        scales, names = owned_scales(group["params"], lambda plan: self._plan_scales(plan, group), start)
        return GroupScales(tuple(scales), tuple(names))

    def _plan_scales(self, plan: Plan, group: dict[str, Any]) -> dict[str, Scale]:
        """Parameter name → scale, for a model of this plan under this group's settings."""
        return plan.scales(self._family)

    def _from_law(self, parameters: list[Tensor], start: int) -> GroupScales:
        assert self._law is not None
        law, gamma = self._law
        for owner in _registry.owners(parameters):
            if owner is not None:
                raise UsageError(
                    f"parameter {owner.name!r} belongs to a model wrapped with γ = {owner.plan.gamma:g}, "
                    f"but gamma={gamma:g} was given too; drop gamma= and depth= here"
                )
        names = tuple(f"parameter {start + index}" for index in range(len(parameters)))
        return GroupScales((Scale(law.factor(gamma), 1.0 / gamma),) * len(parameters), names)

    def _look_up_again(self) -> None:
        """Take the scales anew if a plan changed: by wrapping again, or by a checkpoint, which has its own."""
        if self._version == _registry.version():
            return
        if self._law is not None:
            for group in self.param_groups:
                self._from_law(group["params"], 0)  # refuses what a model that was wrapped since has taken
        else:
            fresh = [self._refreshed(*pair) for pair in zip(self.param_groups, self._scales, strict=False)]
            self._scales = fresh + self._scales[len(fresh) :]
        self._version = _registry.version()

    def _refreshed(self, group: dict[str, Any], kept: GroupScales) -> GroupScales:
        """The scales of a group as the live plans have them.

        Parameters of no model at all, as in a copy of the optimizer alone, keep the rates they had. A network that was
        unwrapped is refused: it computes h, whose rates are not those of f.
        """
        parameters = group["params"]
        live = [owner is not None for owner in _registry.owners(parameters)]
        for parameter, name, owned in zip(parameters, kept.names, live, strict=False):
            if not owned and _registry.was_unwrapped(parameter):
                raise UsageError(
                    f"the model of parameter {name!r} was unwrapped since this {type(self).__name__} was built, "
                    "and its rates are those of the wrapped one; build a torch.optim optimizer for the plain "
                    "network, or wrap it again"
                )
        if len(parameters) != len(kept.scales) or not any(live):
            return kept
        found = self._owned({**group, "params": [each for each, owned in zip(parameters, live, strict=True) if owned]})
        new, old = (iter(zip(each.scales, each.names, strict=True)) for each in (found, kept))
        merged = [(next(old), next(new))[1] if owned else next(old) for owned in live]
        return GroupScales(tuple(scale for scale, _ in merged), tuple(name for _, name in merged))

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_scales": self._scales, "_law": self._law}
        return {**super().__getstate__(), **kept}

    def effective_lrs(self) -> dict[str, float]:
        """Parameter name → the rate it is stepped with now: the group's ``lr`` times its multiplier.

        Where several wrapped models share a name, the second one's is followed by " (2)", and so on.
        """
        self._check_groups()
        rates: dict[str, float] = {}
        seen: Counter[str] = Counter()
        for index, (group, scales) in enumerate(zip(self.param_groups, self._scales, strict=True)):
            if not isinstance(group["lr"], Tensor) and not _is_number(group["lr"]):
                raise UsageError(f"lr={group['lr']!r} of param_groups[{index}] is not a number; give a finite lr")
            lr = float(torch.as_tensor(group["lr"], dtype=torch.float64).detach())
            for name, scale in zip(scales.names, scales.scales, strict=True):
                seen[name] += 1
                rates[name if seen[name] == 1 else f"{name} ({seen[name]})"] = lr * scale.lr
        return rates

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; with ``closure``, after evaluating it. Returns the closure's loss, or ``None``."""
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        self._before_step()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_groups()
        for index in range(len(self.param_groups)):
            self._check_group_lr(index)
        for group, scales in zip(self.param_groups, self._scales, strict=True):
            self._step_group(group, scales)
        return loss

    def _check_groups(self) -> None:
        """Scales are kept by position: they would be a neighbour's if parameters had come or gone by hand."""
        self._look_up_again()
        now = [len(group["params"]) for group in self.param_groups]
        then = [len(group.scales) for group in self._scales]
        if now != then:
            held, added = (" + ".join(map(str, counts)) or "no" for counts in (now, then))
            raise UsageError(
                f"param_groups hold {held} parameters, but {added} were added; add parameters with "
                f"add_param_group, and build a new {type(self).__name__} to drop some"
            )

    def _before_step(self) -> None:
        """Checks that torch's own class does first."""

    def _step_group(self, group: dict[str, Any], scales: GroupScales) -> None:
        raise TypeError(f"{type(self).__name__} does not say how a group is stepped")


def _is_number(lr: Any) -> bool:
    return hasattr(lr, "__float__") and not isinstance(lr, bool)


# torch's functions prepare each call: they group by device and dtype, read tensor rates, bring a scaler's tensors to
# the device. For a bucket of ten tensors that costs more than the step. These tell when a group needs none of it,
# so that its buckets may go to torch's kernels directly; everything else takes torch's own way.


def plain(group: dict[str, Any], optimizer: Optimizer) -> bool:
    """Whether a group's settings are numbers, and no gradient scaler and no compiler is at work."""
    return not (
        torch.compiler.is_compiling()
        or isinstance(group["lr"], Tensor)
        or isinstance(group["weight_decay"], Tensor)
        or any(isinstance(beta, Tensor) for beta in group.get("betas", ()))
        or group["differentiable"]
        or getattr(optimizer, "grad_scale", None) is not None
        or getattr(optimizer, "found_inf", None) is not None
    )


def dense(parameters: list[Any], gradients: list[Any]) -> bool:
    """Whether every parameter has a dense gradient, all on one device and of one dtype."""
    if has_none(gradients) or any(gradient.layout is not torch.strided for gradient in gradients):
        return False
    return len(Optimizer._group_tensors_by_device_and_dtype([parameters, gradients])) == 1


def has_none(tensors: list[Any]) -> bool:
    """Whether a tensor is missing; ``in`` would compare tensors."""
    return type(None) in set(map(type, tensors))


def wants_foreach(group: dict[str, Any]) -> bool:
    """Whether torch would step this group by its foreach kernels: as asked, else by default on accelerators."""
    if group["foreach"] is None and not group["fused"]:
        return _default_to_fused_or_foreach(group["params"], group["differentiable"])[1]
    return bool(group["foreach"])


def owned_scales(
    parameters: list[Tensor], scales_of: Callable[[Plan], dict[str, Scale]], start: int = 0
) -> tuple[list[Scale], list[str]]:
    """Scale and name of each parameter, from the wrapped model that holds it.

    Raises:
        UsageError: for a parameter of no wrapped model; ``start`` is the number of the first one, for the message.
    """
    tables: dict[int, dict[str, Scale]] = {}
    scales, names = [], []
    for index, (parameter, owner) in enumerate(zip(parameters, _registry.owners(parameters), strict=True)):
        if owner is None:
            raise UsageError(
                f"parameter {start + index} {tuple(parameter.shape)} belongs to no wrapped model; "
                "call gammaopt.wrap(net, gamma=…) first and keep the model (one that is referenced nowhere is gone), "
                "or give gamma= and depth= to the optimizer"
            )
        if id(owner.plan) not in tables:
            tables[id(owner.plan)] = scales_of(owner.plan)
        scales.append(tables[id(owner.plan)][owner.name])
        names.append(owner.name)
    return scales, names
