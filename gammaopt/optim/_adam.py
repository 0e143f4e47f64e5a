r"""Adam and AdamW with γ-aware rates: torch's own, stepped with lr·m and eps·e on each parameter.

eps is compared with the gradient, so it scales with the gradient's size: e ∝ 1/γ, and 1/N in mean-field form; then
the update is the same at every γ and width. Decoupled weight decay is divided by m, so lr·weight_decay stays what the
user set. Coupled (L2) decay is another thing: λ·w is added to the gradient and goes through the normalisation with it,
so only its ratio to the gradient counts, and no rate does: λ·e keeps that ratio, as it keeps eps's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

from gammaopt._laws import Loss, OptimizerFamily
from gammaopt._plan import Scale
from gammaopt.optim._multipliers import GroupScales, Multipliers, dense, plain, wants_foreach


class _AdamStep(Multipliers):
    """The step that Adam and AdamW share; which of them it is stands in the group, as in torch."""

    _family: ClassVar[OptimizerFamily] = "adam"

    def _before_step(self) -> None:
        name = "_accelerator_graph_capture_health_check"
        # Older torch, which this package still supports, calls it otherwise; newer torch warns about that name.
        getattr(self, name if hasattr(self, name) else "_cuda_graph_capture_health_check")()

    def _step_group(self, group: dict[str, Any], scales: GroupScales) -> None:
        if self._step_directly(group, scales):
            return
        state: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
        parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = state
        has_complex = self._init_group(group, *state)  # type: ignore[attr-defined]
        beta1, beta2 = group["betas"]
        for scale, members in scales.buckets(group["params"], len(parameters)):
            adam(
                [parameters[i] for i in members],
                [gradients[i] for i in members],
                [exp_avgs[i] for i in members],
                [exp_avg_sqs[i] for i in members],
                [max_exp_avg_sqs[i] for i in members] if group["amsgrad"] else [],
                [steps[i] for i in members],
                amsgrad=group["amsgrad"],
                has_complex=has_complex,
                beta1=beta1,
                beta2=beta2,
                # lr is never changed in place: a tensor lr is shared with the scheduler.
                lr=group["lr"] * scale.lr,
                weight_decay=_decay(group, scale),
                eps=group["eps"] * scale.eps,
                maximize=group["maximize"],
                foreach=group["foreach"],
                capturable=group["capturable"],
                differentiable=group["differentiable"],
                fused=group["fused"],
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                decoupled_weight_decay=group["decoupled_weight_decay"],
            )

    def _step_directly(self, group: dict[str, Any], scales: GroupScales) -> bool:
        """Step several buckets without torch's function, in the usual case; or do nothing and return False."""
        special = group["amsgrad"] or group["maximize"] or group["capturable"]
        if len(scales.whole) <= 1 or special or not plain(group, self):
            return False
        if not group["fused"] and wants_foreach(group):
            return False
        parameters = group["params"]
        gradients = [parameter.grad for parameter in parameters]
        if not dense(parameters, gradients) or parameters[0].is_complex():
            return False
        states = [self.state[parameter] for parameter in parameters]
        if not all(states):  # the first step: torch's way makes the states
            return False
        exp_avgs = [state["exp_avg"] for state in states]
        exp_avg_sqs = [state["exp_avg_sq"] for state in states]
        steps = [state["step"] for state in states]
        if group["fused"]:
            _fused(group, scales, parameters, gradients, exp_avgs, exp_avg_sqs, steps)
        else:
            _for_loop(group, scales, parameters, gradients, exp_avgs, exp_avg_sqs, steps)
        return True


def _decay(group: dict[str, Any], scale: Scale) -> Any:
    """The weight decay of one bucket."""
    decay = group["weight_decay"]
    return decay / scale.lr if group["decoupled_weight_decay"] else decay * scale.eps


def _fused(group: dict[str, Any], scales: GroupScales, *tensors: list[Tensor]) -> None:
    parameters, gradients, exp_avgs, exp_avg_sqs, steps = tensors
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    torch._foreach_add_(steps, 1)
    for scale, members in scales.whole:
        kernel(
            [parameters[i] for i in members],
            [gradients[i] for i in members],
            [exp_avgs[i] for i in members],
            [exp_avg_sqs[i] for i in members],
            [],
            [steps[i] for i in members],
            lr=group["lr"] * scale.lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=_decay(group, scale),
            eps=group["eps"] * scale.eps,
            amsgrad=False,
            maximize=False,
        )


def _for_loop(group: dict[str, Any], scales: GroupScales, *tensors: list[Tensor]) -> None:
    """In the parameters' own order, not by bucket: there its temporaries find freed memory of their size."""
    beta1, beta2 = group["betas"]
    decay, decoupled = group["weight_decay"], group["decoupled_weight_decay"]
    for parameter, gradient, exp_avg, exp_avg_sq, step, scale in zip(*tensors, scales.scales, strict=True):
        step += 1
        lr, count = group["lr"] * scale.lr, step.item()
        update = gradient
        if decay != 0 and decoupled:
            parameter.mul_(1 - group["lr"] * decay)
        elif decay != 0:
            update = gradient.add(parameter, alpha=decay * scale.eps)
        exp_avg.lerp_(update, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(update, update, value=1 - beta2)
        root = (exp_avg_sq.sqrt() / (1 - beta2**count) ** 0.5).add_(group["eps"] * scale.eps)
        parameter.addcdiv_(exp_avg, root, value=-lr / (1 - beta1**count))


class Adam(_AdamStep, torch.optim.Adam):
    """Drop-in ``torch.optim.Adam``: ``lr`` is the rate tuned at γ = 1, each parameter is stepped with its own share.

    The rates come from the model that holds the parameters, wrapped by :func:`gammaopt.wrap` before; η* ∝ γ below the
    knee and γ^(1/L) above. For parameters of no wrapped model give ``gamma`` and ``depth``.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable, differentiable, fused,
        decoupled_weight_decay: as in ``torch.optim.Adam``, in the same order. ``lr`` must be finite. Without
            ``decoupled_weight_decay`` the term weight_decay·w is part of the gradient, and is scaled by the same
            factor as ``eps`` (1/γ, and 1/N in mean-field form): the balance of loss and decay in Adam's normalised
            update is then the same at every γ and width. With it, each step shrinks a weight by lr·weight_decay.
        gamma, depth, loss, knee: as in :class:`gammaopt.SGD`.

    Raises:
        UsageError: a ``ValueError``, for ``lr`` < 0, or for parameters whose γ is not known.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Adam([weight], lr=0.1, gamma=8.0, depth=3)
        >>> round(optimizer.effective_lrs()["parameter 0"], 6)
        0.2
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        gamma: float | None = None,
        depth: float | None = None,
        loss: Loss = "mse",
        knee: float = 1.0,
    ) -> None:
        self._check_lr(lr)
        self._set_law(gamma, depth, loss, knee)
        torch.optim.Adam.__init__(
            self,
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )


class AdamW(_AdamStep, torch.optim.AdamW):
    """Drop-in ``torch.optim.AdamW``: as :class:`gammaopt.Adam`, with decoupled weight decay.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused: as in
            ``torch.optim.AdamW``, in the same order. Each step shrinks a weight by lr·weight_decay, whatever its
            multiplier.
        gamma, depth, loss, knee: as in :class:`gammaopt.SGD`.

    Raises:
        UsageError: a ``ValueError``, for ``lr`` < 0, or for parameters whose γ is not known.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        gamma: float | None = None,
        depth: float | None = None,
        loss: Loss = "mse",
        knee: float = 1.0,
    ) -> None:
        self._check_lr(lr)
        self._set_law(gamma, depth, loss, knee)
        torch.optim.AdamW.__init__(
            self,
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
