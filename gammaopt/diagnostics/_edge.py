r"""The rates of an SGD in units of half of its edge of stability, so that η·λ is 2 there with any momentum.

Source: Cohen et al., "Gradient descent on neural networks typically occurs at the edge of stability", ICLR 2021; the
eigenvalues of the step with momentum are worked out in :func:`rates_of`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gammaopt._errors import UsageError
from gammaopt.optim._multipliers import Multipliers


def rates_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    r"""Parameter name → the rate at which ``optimizer`` steps it now; 0 for one that it doesn't hold.

    In units of half of its edge of stability, which is what the rate would be without momentum. On ℓ = λw²/2 the
    step w, m → w′, m′ has an eigenvalue −1, and so oscillates for ever, at

        ηλ = 2(1 + β)/(1 − τ)  for m′ = βm + (1 − τ)λw, w′ = w − ηm′
        ηλ = (2 + 2β)/(1 + 2β)  for Nesterov's w′ = w − η(λw + βm′), m′ = βm + λw

    Raises:
        UsageError: if none of the model's parameters is in it, or it has no one edge (:func:`no_edge`).
    """
    model = getattr(model, "_orig_mod", model)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    effective = iter(_in_order(optimizer)) if isinstance(optimizer, Multipliers) else None
    rates: dict[str, float] = {}
    held = {id(parameter) for parameter in model.parameters()}
    found = False
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rate = float(group["lr"]) if effective is None else next(effective)
            found = found or id(parameter) in held
            if id(parameter) in names:  # a schedule's last rate may be below 0 by rounding
                rates[names[id(parameter)]] = max(0.0, rate) * _without_momentum(group)
    if not found:
        raise UsageError(
            f"this {type(optimizer).__name__} holds no parameter of {type(model).__name__}; give the one that trains it"
        )
    reason = no_edge(optimizer, model)
    if reason is not None:
        raise UsageError(reason)
    return {name: rates.get(name, 0.0) for name in names.values()}


def no_edge(optimizer: torch.optim.Optimizer, model: nn.Module) -> str | None:
    """Why the SGD that steps ``model`` has no one edge of stability; ``None`` if it has.

    Two momenta couple the directions of the Hessian, and no eigenvalue of one matrix tells where that turns unstable.
    """
    ours = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    groups = [group for group in optimizer.param_groups if any(id(parameter) in ours for parameter in group["params"])]
    if any(group.get("maximize") for group in groups):
        return (
            f"this {type(optimizer).__name__} maximises, and the edge of stability is that of descent; "
            "minimise the negative loss instead, or leave optimizer= out"
        )
    momenta = sorted({(float(group.get("momentum", 0.0)), bool(group.get("nesterov"))) for group in groups})
    if len(momenta) > 1:
        told = " and ".join(f"{beta:g}{' (Nesterov)' if nesterov else ''}" for beta, nesterov in momenta)
        return (
            f"this {type(optimizer).__name__} has the momenta {told}, and no one edge of stability; "
            "give all groups one momentum, or leave optimizer= out"
        )
    return None


def _without_momentum(group: dict[str, Any]) -> float:
    """2 over the edge of a group's SGD, see :func:`rates_of`; torch dampens with a momentum only."""
    beta = float(group.get("momentum", 0.0))
    if group.get("nesterov"):
        return (1 + 2 * beta) / (1 + beta)
    return (1 - float(group.get("dampening", 0.0))) / (1 + beta) if beta else 1.0


def _in_order(optimizer: Multipliers) -> list[float]:
    """The effective rate of each parameter of a gammaopt optimizer, group by group."""
    optimizer.effective_lrs()  # looks the plans up again
    return [
        float(group["lr"]) * scale.lr
        for group, own in zip(optimizer.param_groups, optimizer._scales, strict=True)
        for scale in own.scales
    ]
