r"""The knee γ_c: where lazy training turns rich in a network that is not in mean-field form.

In mean-field form the laws bend at γ = 1. In torch's standard form (readout std ∝ fan_in^(-1/2)) the plain network is
lazier, and the bend sits at a γ_c ∝ √N: 5.8 at N = 64 and 11 at N = 256 for a 3-layer MLP with weights N(0, 1/fan_in),
1.2 and 2.2 with torch's default, whose weights are √3 times smaller. Layer by layer, the move of a weight that fits
O(1) targets is as large as the weight itself when γ reaches

    γ_ℓ = ‖∂h/∂w_ℓ‖_F · ‖w_ℓ‖_op        rms over samples and outputs; ‖·‖_op is the largest singular value

and γ_c is the geometric mean of γ_ℓ over the layers. The formula is this project's own.

The Jacobian's norm is estimated without forming it: for random signs v over samples and outputs,
E ‖Σ v·∂h/∂w‖²_F = Σ ‖∂h/∂w‖²_F, one backward pass for each draw of v.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gammaopt._errors import UsageError
from gammaopt._probe import Inputs, Output, accumulator, probe, probing, trainable
from gammaopt._roles import rules_for

DRAWS = 32  # of the signs: a relative error of about √(2/32) of γ_ℓ² in the worst layer, less in the mean


def knee(model: nn.Module, inputs: Inputs, *, output: Output | None = None) -> float:
    """γ_c of ``model`` as it is initialised now: where the learning-rate law bends. About 1 in mean-field form.

    Args:
        model: any module; a wrapped model is measured before centring.
        inputs: one batch: a tensor, a tuple of positional or a dict of keyword arguments.
        output: which part of what the model returns is h; see :func:`gammaopt.effective_depth`.

    Returns:
        γ_c > 0.

    Raises:
        UsageError: if no weight of a Linear, Conv or attention layer has any influence on the output.

    Example:
        >>> import torch
        >>> from torch.nn import Linear, ReLU, Sequential
        >>> _ = torch.manual_seed(0)
        >>> net = Sequential(Linear(64, 256), ReLU(), Linear(256, 256), ReLU(), Linear(256, 1))
        >>> 1 < knee(net, torch.randn(64, 64)) < 5
        True
    """
    weights = _weights(model)
    with probing(model), torch.enable_grad():
        h = probe(model, inputs, output)
        squared = dict.fromkeys(weights, 0.0)
        if h.requires_grad:
            signs = torch.Generator().manual_seed(0)
            for draw in range(DRAWS):
                v = (torch.randint(2, h.shape, generator=signs) * 2 - 1).to(h)
                gradients = torch.autograd.grad(
                    h, list(weights.values()), v, allow_unused=True, retain_graph=draw < DRAWS - 1
                )
                for name, gradient in zip(weights, gradients, strict=True):
                    if gradient is not None:
                        squared[name] += gradient.to(accumulator(gradient)).square().sum().item() / DRAWS / h.numel()
    logs = [
        0.5 * math.log(energy) + math.log(norm)
        for name, energy in squared.items()
        if energy > 0 and (norm := _operator_norm(weights[name])) > 0
    ]
    if not logs:
        raise UsageError(
            f"no weight of {type(model).__name__} has any influence on its output there, so its knee can't be "
            "measured; give other inputs, or knee="
        )
    return math.exp(sum(logs) / len(logs))


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = trainable(model)
    rules = rules_for(model, readout=None)
    return {rule.name: parameters[rule.name] for rule in rules if rule.role == "weight" and rule.name in parameters}


def _operator_norm(weight: Tensor) -> float:
    """Largest singular value of a weight as a matrix (outputs × inputs); a kernel's taps count as inputs."""
    matrix = weight.detach().flatten(1).to(accumulator(weight))
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    # The Gram matrix's largest eigenvalue: a sixth of the time of all singular values for a 512×4608 kernel.
    return float(torch.linalg.eigvalsh(matrix @ matrix.T)[-1].clamp(min=0)) ** 0.5
