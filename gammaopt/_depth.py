r"""Effective depth: the degree of homogeneity of a network's output in its parameters, from one backward pass.

Euler's identity for a homogeneous h is Σ_p θ_p·∂h/∂θ_p = L·h. Taking the inner product with h gives, for any network,

    L_eff = ⟨θ, ∇_θ ½‖h(x; θ)‖²⟩ / ‖h(x; θ)‖²

A bias at 0, a weight ahead of a normalisation layer (scale-invariant) and a frozen parameter contribute nothing.
Measured at initialisation: 3.00 for a 3-layer ReLU MLP and 2.00 for torchvision's resnet18; about 2 for timm's
vit_tiny, where it depends on the images (1.9 to 2.3 over seeds and noise inputs).

The formula is this project's own. Reverse mode only: torch's CPU attention kernel has no forward-mode derivative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gammaopt._errors import UsageError
from gammaopt._probe import Inputs, Output, accumulator, measurable, probe, probing, trainable

# How torch's layers name their biases: bias, bias_ih_l0 and bias_k, in_proj_bias.
BIASES = ("bias", "in_proj_bias")


def effective_depth(
    model: nn.Module, inputs: Inputs, *, output: Output | None = None, zero_biases: bool = True
) -> float:
    """Effective depth L of ``model`` on one batch: the depth to give to :class:`EtaLaw`.

    Batch normalisation uses the batch's own statistics and dropout is off. The model's gradients, buffers, modes
    and the random state are left as they were.

    Args:
        model: any module; a wrapped model is measured before centring.
        inputs: one batch: a tensor, a tuple of positional or a dict of keyword arguments.
        output: which part of what the model returns is h, if that is not one tensor: an entry's name or position, or
            a function of it.
        zero_biases: measure with all biases at 0, as :func:`gammaopt.wrap` does. Biases lower the degree only until
            the weights have grown past them, and torch draws them at random: without them the depth is that of the
            rich regime, and the same for every initialisation of a plain network. ``False`` measures the network as
            it is.

    Returns:
        L_eff, a float; not a whole number for networks with normalisation, gains or residual branches. A weight that
        is 0, as a low-rank adapter's second factor is at the start, counts as nothing and hides what it multiplies:
        the rich regime's depth, where it has grown, is larger.

    Raises:
        UsageError: if the model has no trainable parameter, does not accept the inputs, or its output is 0 or not
            finite there.

    Example:
        >>> import torch
        >>> from torch.nn import Linear, ReLU, Sequential
        >>> net = Sequential(Linear(4, 8, bias=False), ReLU(), Linear(8, 1, bias=False))
        >>> round(effective_depth(net, torch.ones(2, 4)), 4)
        2.0
    """
    parameters = list(trainable(model).values())
    with probing(model), _zeroed(model, zero_biases), torch.enable_grad():
        h = measurable(model, probe(model, inputs, output))
        energy = h.to(accumulator(h)).square().sum()
        gradients = torch.autograd.grad(energy / 2, parameters, allow_unused=True) if h.requires_grad else ()
        pairs = zip(parameters, gradients, strict=bool(gradients))
        # A complex parameter is two real ones: Re(θ̄·∂h/∂θ) is their sum.
        radial = sum((p.detach().to(accumulator(p)).conj() * g).sum().real.item() for p, g in pairs if g is not None)
    squared = energy.item()
    if not (math.isfinite(squared) and squared > 0):
        raise UsageError(
            f"the output of {type(model).__name__} on the example inputs has squared norm {squared:g}; "
            "its depth can only be measured where the output is finite and not 0: give other inputs, or depth="
        )
    return radial / squared


def hidden_by_zeros(model: nn.Module, inputs: Inputs, output: Output | None, depth: float) -> str | None:
    """What to say where trainable weights that are 0 hide a part of the depth; ``None`` where they don't.

    They do if the depth is another with these weights drawn at the usual size. Which one it becomes depends on how far
    they grow, so no number is put in its place.
    """
    zeros = {
        name: parameter
        for name, parameter in trainable(model).items()
        if not name.rpartition(".")[2].startswith(BIASES) and parameter.numel() and not parameter.any()
    }
    if not zeros:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in zeros.values():
                columns = parameter.shape[1:].numel() if parameter.dim() > 1 else 1
                draw = torch.randn(parameter.shape, generator=generator, device="cpu") / math.sqrt(columns)
                parameter.copy_(draw if parameter.dim() > 1 else torch.ones_like(draw))
        drawn = effective_depth(model, inputs, output=output)
    except UsageError:  # a network that these weights hold back may overflow without
        return None
    finally:
        with torch.no_grad():
            for parameter in zeros.values():
                parameter.zero_()
    if not drawn > 1.1 * depth:
        return None
    return (
        f"{next(iter(zeros))!r} is 0 at the start, which hides it and what it multiplies ({drawn:.3g} with it drawn at "
        "random, more as it grows); give depth=, the number of trained layers in the longest product, fewer where they "
        "are normalised or residual"
    )


@contextmanager
def _zeroed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Biases at 0 for a while."""
    parameters = dict(model.named_parameters())
    biases = [parameters[name] for name in parameters if wanted and name.rpartition(".")[2].startswith(BIASES)]
    kept = [bias.detach().clone() for bias in biases]
    try:
        with torch.no_grad():
            for bias in biases:
                bias.zero_()
        yield
    finally:
        with torch.no_grad():
            for bias, value in zip(biases, kept, strict=True):
                bias.copy_(value)
