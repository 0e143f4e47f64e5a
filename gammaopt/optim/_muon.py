r"""Muon with γ-aware rates: torch's own, stepped with lr·m on each matrix.

Muon steps a matrix by an orthogonalised update: all its singular values are about 1, whatever the gradient's size.
So in γ it is of Adam's family: η* ∝ γ below the knee and γ^(1/L) above.

The width factor follows from the spectral condition: inputs x with coordinates of order 1 have ‖x‖ ≈ √fan_in, and the
step's output should have coordinates of order lr, ‖ΔW·x‖ ≈ lr·√fan_out. Hence ‖ΔW‖_op = lr·√(fan_out/fan_in) for
every matrix, the readout included, whose initialisation alone is smaller. Torch gives ‖ΔW‖_op = lr·adjustment:

    adjust_lr_fn             torch's adjustment              factor in mean-field form
    original (default)       √max(1, fan_out/fan_in)         √min(1, fan_out/fan_in)
    spectral_unclamped       √(fan_out/fan_in)               1
    match_rms_adamw          0.2·√max(fan_out, fan_in)       √(fan_out/fan_in)/√max(fan_out, fan_in)

the 0.2 being the user's choice of unit. An embedding is read row by row: a row of an orthogonalised matrix, after
"original", has norm about 1, and coordinates of order 1 need √columns. With a base network the factor is the ratio of
the target's to the base's; as is, it is 1.

Weight decay is decoupled and divided by m, so lr·weight_decay stays what the user set. eps is compared with the
gradient's norm and scales with it, as Adam's does.

Source: Yang, Simon, Bernstein, "A Spectral Condition for Feature Learning" (arXiv 2310.17813).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, muon
from torch.optim.optimizer import ParamsT

from gammaopt._laws import Loss, OptimizerFamily
from gammaopt._plan import Plan, Scale
from gammaopt.optim._multipliers import GroupScales, Multipliers


class Muon(Multipliers, torch.optim.Muon):
    """Drop-in ``torch.optim.Muon``, for torch ≥ 2.9: ``lr`` is the rate tuned at γ = 1, for 2-D parameters only.

    The rates come from the model that holds the parameters, wrapped by :func:`gammaopt.wrap` before; give it the
    hidden matrices, and the rest to a second optimizer such as :class:`gammaopt.AdamW`, as with torch's.

    Args:
        params, lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in
            ``torch.optim.Muon``, in the same order. ``lr`` must be finite. Each step shrinks a weight by
            lr·weight_decay, whatever its multiplier.
        gamma, depth, loss, knee: as in :class:`gammaopt.SGD`.

    Raises:
        UsageError: a ``ValueError``, for ``lr`` < 0, or for parameters whose γ is not known.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = Muon([weight], lr=0.1, gamma=8.0, depth=3)
        >>> round(optimizer.effective_lrs()["parameter 0"], 6)
        0.2
    """

    _family: ClassVar[OptimizerFamily] = "muon"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (DEFAULT_A, DEFAULT_B, DEFAULT_C),
        eps: float = EPS,
        ns_steps: int = DEFAULT_NS_STEPS,
        adjust_lr_fn: str | None = None,
        *,
        gamma: float | None = None,
        depth: float | None = None,
        loss: Loss = "mse",
        knee: float = 1.0,
    ) -> None:
        self._check_lr(lr)
        self._set_law(gamma, depth, loss, knee)
        torch.optim.Muon.__init__(
            self,
            params,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )

    def _plan_scales(self, plan: Plan, group: dict[str, Any]) -> dict[str, Scale]:
        return plan.scales("muon", adjust_lr_fn=group["adjust_lr_fn"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._version = -1  # adjust_lr_fn may be another now, and the factors with it

    # Torch's Muon has no differentiable= and so no default by which the mixin's step would choose.
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; with ``closure``, after evaluating it. Returns the closure's loss, or ``None``."""
        return self._step(closure)

    def _step_group(self, group: dict[str, Any], scales: GroupScales) -> None:
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        buffers: list[Tensor] = []
        has_complex = self._init_group(group, parameters, gradients, buffers)
        for scale, members in scales.buckets(group["params"], len(parameters)):
            muon(
                [parameters[i] for i in members],
                [gradients[i] for i in members],
                [buffers[i] for i in members],
                lr=group["lr"] * scale.lr,
                weight_decay=group["weight_decay"] / scale.lr,
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                ns_coefficients=group["ns_coefficients"],
                eps=group["eps"] * scale.eps,
                ns_steps=group["ns_steps"],
                adjust_lr_fn=group["adjust_lr_fn"],
                has_complex=has_complex,
            )
