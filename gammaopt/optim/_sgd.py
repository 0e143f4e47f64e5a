r"""SGD with γ-aware rates: torch's SGD, stepped with lr·m on each parameter.

With weight decay λ the step is  w ← w − lr·m·(∇w + (λ/m)·w) = w − lr·m·∇w − lr·λ·w,  so lr·λ stays what the user
set. Momentum and Nesterov act on that same gradient, as in torch.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from gammaopt._laws import Loss, OptimizerFamily
from gammaopt.optim._multipliers import GroupScales, Multipliers, dense, has_none, plain, wants_foreach


class SGD(Multipliers, torch.optim.SGD):
    """Drop-in ``torch.optim.SGD``: ``lr`` is the rate tuned at γ = 1, each parameter is stepped with its own share.

    The rates come from the model that holds the parameters, wrapped by :func:`gammaopt.wrap` before. For parameters
    of no wrapped model give ``gamma`` and ``depth``: then all of them are stepped with lr·s(γ).

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused:
            as in ``torch.optim.SGD``, in the same order. ``lr`` must be finite. A number that
            is not, in a group or from a scheduler, is refused at the next step; tensors are not read.
        gamma: feature-learning strength, for parameters of no wrapped model.
        depth: effective depth, together with ``gamma``.
        loss: ``"mse"`` or ``"cross_entropy"``, together with ``gamma``; it matters for γ < 1 only.
        knee: γ_c, together with ``gamma``.

    Raises:
        UsageError: a ``ValueError``, for ``lr`` < 0, or for parameters whose γ is not known.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SGD([weight], lr=0.1, gamma=8.0, depth=3)
        >>> round(optimizer.effective_lrs()["parameter 0"], 6), optimizer.param_groups[0]["lr"]
        (0.4, 0.1)
    """

    _family: ClassVar[OptimizerFamily] = "sgd"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        gamma: float | None = None,
        depth: float | None = None,
        loss: Loss = "mse",
        knee: float = 1.0,
    ) -> None:
        self._check_lr(lr)
        self._set_law(gamma, depth, loss, knee)
        torch.optim.SGD.__init__(
            self,
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    def _step_group(self, group: dict[str, Any], scales: GroupScales) -> None:
        if self._step_directly(group, scales):
            return
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group(group, parameters, gradients, buffers)
        momentum = group["momentum"] != 0
        for scale, members in scales.buckets(group["params"], len(parameters)):
            of_bucket = [buffers[i] for i in members] if momentum else []
            sgd(
                [parameters[i] for i in members],
                [gradients[i] for i in members],
                of_bucket,
                # lr is never changed in place: a tensor lr is shared with the scheduler.
                lr=group["lr"] * scale.lr,
                weight_decay=group["weight_decay"] / scale.lr,
                momentum=group["momentum"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                has_sparse_grad=has_sparse_grad,
                foreach=group["foreach"],
                fused=group["fused"],
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )
            if momentum:
                for i, buffer in zip(members, of_bucket, strict=True):
                    self.state[parameters[i]]["momentum_buffer"] = buffer

    def _step_directly(self, group: dict[str, Any], scales: GroupScales) -> bool:
        """Step several buckets by torch's kernels themselves, in the usual case; or do nothing and return False."""
        parameters, momentum = group["params"], group["momentum"] != 0
        if len(scales.whole) <= 1 or group["maximize"] or not plain(group, self):
            return False
        if group["fused"] and getattr(self, "_need_device_dtype_check_for_fused", True):
            return False  # torch's way reports what the fused kernel can't do, at the first step
        gradients = [parameter.grad for parameter in parameters]
        if not dense(parameters, gradients):
            return False
        buffers = [self.state[parameter].get("momentum_buffer") for parameter in parameters] if momentum else []
        if has_none(buffers):
            return False
        kernel = _fused if group["fused"] else _foreach if wants_foreach(group) else _for_loop
        for scale, members in scales.whole:
            kernel(
                [parameters[i] for i in members],
                [gradients[i] for i in members],
                [buffers[i] for i in members] if momentum else [],
                lr=group["lr"] * scale.lr,
                weight_decay=group["weight_decay"] / scale.lr,
                momentum=group["momentum"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
            )
        return True


def _fused(parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], **settings: Any) -> None:
    torch._fused_sgd_(parameters, gradients, buffers, maximize=False, is_first_step=False, **settings)


def _foreach(
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> None:
    updates: list[Tensor] | tuple[Tensor, ...] = gradients
    if weight_decay != 0:
        updates = torch._foreach_add(updates, parameters, alpha=weight_decay)
    if momentum != 0:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, updates, alpha=1 - dampening)
        updates = torch._foreach_add(updates, buffers, alpha=momentum) if nesterov else buffers
    torch._foreach_add_(parameters, updates, alpha=-lr)


def _for_loop(
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> None:
    for parameter, gradient, buffer in zip_longest(parameters, gradients, buffers):
        update = gradient.add(parameter, alpha=weight_decay) if weight_decay != 0 else gradient
        if momentum != 0:
            buffer.mul_(momentum).add_(update, alpha=1 - dampening)
            update = update.add(buffer, alpha=momentum) if nesterov else buffer
        parameter.add_(update, alpha=-lr)
