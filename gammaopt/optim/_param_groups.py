r"""Baked parameter groups, for optimizers that gammaopt does not have: one group per distinct multiplier m.

    group:  lr·m,  weight_decay/m (weight_decay·e where Adam couples it),  eps·e

The optimizer then needs to know nothing of γ, and one of gammaopt's, which would count it twice, refuses the groups.
What is baked in is fixed: a scheduler that writes absolute rates into the groups (OneCycleLR, CyclicLR, a minimum rate)
flattens it, where :class:`gammaopt.SGD` would not.
"""

from __future__ import annotations

from typing import Any, get_args

from torch import nn

from gammaopt import _registry
from gammaopt._errors import UsageError, one_of, positive
from gammaopt._laws import OptimizerFamily
from gammaopt._plan import Scale
from gammaopt.optim._multipliers import Baked, owned_scales


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    optimizer: OptimizerFamily = "sgd",
    weight_decay: float | None = None,
    eps: float | None = None,
    coupled: bool = False,
) -> list[dict[str, Any]]:
    r"""Parameter groups of a wrapped model at the rates that :class:`gammaopt.SGD` or ``Adam`` would use.

    For any other optimizer that takes groups: schedule-free ones, Lion, another Muon, DeepSpeed's. Use
    schedulers that multiply rates (``LambdaLR``, ``StepLR``, ``CosineAnnealingLR`` down to 0); absolute ones need a
    list with one value per group.

    Args:
        model: a model wrapped by :func:`gammaopt.wrap`, or one that holds such models.
        lr: the rate tuned at γ = 1.
        optimizer: family of the update. ``"sgd"``: the step is proportional to the gradient. ``"adam"``: it does not
            depend on the gradient's size, as in Adam and Lion. ``"muon"``: matrices are stepped by an orthogonalised
            update times √max(1, rows/columns), and the rest by Adam.
        weight_decay: if given, each group gets weight_decay/m, so that lr·weight_decay stays what it is here.
            Without it the optimizer's own default is used, undivided.
        coupled: whether an optimizer of the families ``"adam"`` and ``"muon"`` adds weight_decay·w to the gradient, as
            ``torch.optim.Adam`` and ``RAdam`` do by default. weight_decay is then scaled like ``eps``, see
            :class:`gammaopt.Adam`. In SGD that is the same thing as decoupled decay.
        eps: if given, each group gets eps times the factor of the gradient's size; for optimizers like Adam.

    Returns:
        One dict for each distinct multiplier, in the order of ``model.parameters()``: ``params`` and ``lr``, and
        ``weight_decay`` and ``eps`` if given.

    Raises:
        UsageError: a ``ValueError``, for a model that is not wrapped, or ``lr`` ≤ 0.

    Example:
        >>> import torch, gammaopt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> model = gammaopt.wrap(net, gamma=4.0, depth=2, parametrization="mean_field")
        >>> groups = param_groups(model, lr=0.1, optimizer="adam", weight_decay=0.01)
        >>> [(len(group["params"]), group["lr"]) for group in groups]
        [(1, 0.05), (2, 0.2), (1, 0.025)]
        >>> optimizer = torch.optim.RAdam(groups, decoupled_weight_decay=True)
        >>> matrices = [{**g, "params": [p for p in g["params"] if p.ndim == 2]} for g in groups]
        >>> [len(group["params"]) for group in matrices if group["params"]]
        [1, 1]
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is a {type(model).__name__}; give the wrapped torch.nn.Module, not its parameters")
    lr = positive("lr", lr)
    one_of("optimizer", optimizer, get_args(OptimizerFamily))
    for name, value in (("weight_decay", weight_decay), ("eps", eps)):
        if value is not None and value != 0:
            positive(name, value)

    groups: dict[Scale, dict[str, Any]] = {}
    for parameter, scale in zip(model.parameters(), _scales(model, optimizer), strict=True):
        by_size = coupled and optimizer != "sgd" and weight_decay is not None
        # Where nothing follows the gradient's size, its factor must not split a group.
        key = scale if eps is not None or by_size else Scale(scale.lr)
        if key not in groups:
            groups[key] = {"params": Baked(), "lr": lr * scale.lr}
            if weight_decay is not None:
                groups[key]["weight_decay"] = weight_decay * scale.eps if by_size else weight_decay / scale.lr
            if eps is not None:
                groups[key]["eps"] = eps * scale.eps
        groups[key]["params"].append(parameter)
    return list(groups.values())


def _scales(model: nn.Module, family: OptimizerFamily) -> list[Scale]:
    named = dict(model.named_parameters())
    orphans = [name for name, owner in zip(named, _registry.owners([*named.values()]), strict=True) if owner is None]
    if not named or len(orphans) == len(named):
        raise UsageError(f"this {type(model).__name__} is not wrapped; call gammaopt.wrap(net, gamma=…) first")
    if orphans:
        raise UsageError(
            f"parameter {orphans[0]!r} {tuple(named[orphans[0]].shape)} of this {type(model).__name__} "
            "belongs to no wrapped model; call gammaopt.wrap(net, gamma=…) on the whole of it"
        )
    return owned_scales([*named.values()], lambda plan: plan.scales(family))[0]
