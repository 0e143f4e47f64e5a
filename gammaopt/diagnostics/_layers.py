r"""Per-sample gradients of Linear and Conv layers, factored: what a tangent kernel needs of them, never formed whole.

A layer's weight gradient for sample i and output c is Σ_t δ_{ict} a_{it}ᵀ: a the layer's input (for a convolution the
patches that its kernel sees), t the positions, δ what backpropagation from f_c brings to the layer's output. Hence

    Θ_ij = Σ_c ⟨∇_W f_c(x_i), ∇_W f_c(x_j)⟩ = Σ_{t,s} (a_it·a_js) (Σ_c δ_ict·δ_jcs)

A layer is trusted only after a trial: from a random direction in the outputs of half of the samples, nothing may reach
the other half, and Σ_it δ_it a_itᵀ must be autograd's own gradient. That finds weights that are tied, used beside their
layer or parametrized, layers that run twice, and batch dimensions that stand elsewhere.

Sources: Novak, Sohl-Dickstein and Schoenholz, "Fast finite width neural tangent kernel", ICML 2022; Dangel, Kunstner
and Hennig, "BackPACK", ICLR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gammaopt._roles import CONVS

TRIAL_TOL = 1e3  # times the dtype's epsilon, relative: the sum of the parts against autograd's gradient
GRAM_BYTES = 2**28  # for an intermediate matrix


@dataclass
class Layer:
    """One run of a Linear or Conv layer: its module, input and output on a batch of n samples."""

    name: str
    module: nn.Module
    calls: int = 0
    input: Tensor = field(default_factory=lambda: torch.empty(0))
    output: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def groups(self) -> int:
        """1 for a Linear layer."""
        return int(getattr(self.module, "groups", 1))

    def patches(self, n: int) -> Tensor:
        """a: (n, groups, positions, inputs of one output unit)."""
        value = self.input.detach()
        if isinstance(self.module, nn.Linear):
            return value.reshape(n, 1, -1, value.shape[-1])
        weight = cast("Tensor", self.module.weight)
        return unfolded(value, self.module).reshape(n, self.groups, -1, math.prod(weight.shape[1:]))

    def deltas(self, gradient: Tensor, n: int) -> Tensor:
        """δ: (n, groups, positions, units of one group), from a gradient of the layer's output."""
        if isinstance(self.module, nn.Linear):
            return gradient.reshape(n, 1, -1, gradient.shape[-1])
        split = gradient.reshape(n, self.groups, gradient.shape[1] // self.groups, -1)
        return split.transpose(2, 3)

    def fits(self, n: int) -> bool:
        """Whether input and output have the samples as their first dimension, or in it."""
        return (
            self.calls == 1
            and self.input.dim() >= 2
            and self.output.requires_grad
            and self.input.shape[0] % n == 0
            and (isinstance(self.module, nn.Linear) or self.input.shape[0] == n)
            and self.input.shape[0] == self.output.shape[0]
        )


def unfolded(value: Tensor, conv: Any) -> Tensor:
    """The patches of (n, C_in, *S): (n, groups, positions, C_in/groups · kernel), in the order of the weight."""
    n, channels = value.shape[:2]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    if any(conv._reversed_padding_repeated_twice):
        value = F.pad(value, conv._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, step, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        value = value.unfold(2 + axis, (size - 1) * dilation + 1, step)[..., ::dilation]
    dims = len(conv.kernel_size)
    positions = math.prod(value.shape[2 : 2 + dims])
    value = value.reshape(n, conv.groups, channels // conv.groups, positions, math.prod(conv.kernel_size))
    return value.transpose(2, 3).flatten(3)


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Layer]]:
    """The Linear and Conv layers that run inside, with their inputs and outputs."""
    layers: dict[str, Layer] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            layer = layers.setdefault(name, Layer(name, module))
            layer.calls += 1
            if len(args) != 1 or not isinstance(args[0], Tensor):
                layer.calls += 1  # not the usual call: not trusted
                return None
            layer.input, layer.output = args[0], output
            return output.clone()  # an operation in place that follows must not change what was recorded

        return hook

    every = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, *CONVS))]
    handles = [module.register_forward_hook(hook_for(name)) for name, module in every]
    found: list[Layer] = []
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found.extend(layers.values())


def trusted(
    layers: Sequence[Layer], output: Tensor, parameters: dict[str, nn.Parameter], generator: torch.Generator
) -> tuple[list[Layer], set[str]]:
    """The layers that pass the trial, and the names of the parameters that they account for."""
    n = len(output)
    candidates = [
        layer
        for layer in layers
        if layer.fits(n) and any(f"{layer.name}.{leaf}".removeprefix(".") in parameters for leaf in ("weight", "bias"))
    ]
    if not candidates:
        return [], set()
    inside = torch.zeros(n, dtype=torch.bool)
    inside[torch.randperm(n, generator=generator)[: max(1, n // 2)]] = True
    inside = inside.to(output.device)
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    direction = direction * inside.view(n, *[1] * (output.dim() - 1))
    own = list(parameters.values())
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(
        output, [*own, *(layer.output for layer in candidates)], direction, retain_graph=True, allow_unused=True
    )
    expected = dict(zip(parameters, grads[: len(own)], strict=True))
    tolerance = TRIAL_TOL * torch.finfo(output.dtype).eps
    good: list[Layer] = []
    names: set[str] = set()
    for layer, gradient in zip(candidates, grads[len(own) :], strict=True):
        if gradient is None:
            continue
        delta = layer.deltas(gradient, n)
        if bool(delta[~inside].any()) or not all(bool(delta[i].any()) for i in inside.nonzero().flatten()):
            continue
        made = {"bias": delta.sum((0, 2)).reshape(-1)}
        if cast("Tensor", layer.module.weight).requires_grad:
            made["weight"] = torch.einsum("ngtd,ngtk->gdk", delta, layer.patches(n))
        mine = {
            name: made[leaf]
            for leaf in made
            if (name := f"{layer.name}.{leaf}".removeprefix(".")) in parameters and expected[name] is not None
        }
        errors = [
            float((value - expected[name].reshape(value.shape)).norm()) / (float(expected[name].norm()) or 1.0)  # type: ignore[union-attr]
            for name, value in mine.items()
        ]
        if mine and max(errors) <= tolerance:
            good.append(layer)
            names.update(mine)
    return good, names


def trace_gram(a: Tensor, delta: Tensor) -> Tensor:
    """Σ_c of inner products of per-sample weight gradients, (n, n), by the cheaper of two ways.

    Args:
        a: (n, groups, T, k) inputs.
        delta: (C, n, groups, T, d) backpropagated from each of C outputs.
    """
    outputs, n, groups, positions, d = delta.shape
    k = a.shape[-1]
    by_pairs = (n * positions) ** 2 * (k + outputs * d)
    by_gradients = n * outputs * d * k * (positions + n)
    total = a.new_zeros(n, n)
    for g in range(groups):
        left, right = a[:, g], delta[:, :, g]
        if by_pairs <= by_gradients:
            total += _pairs(left, right.permute(1, 2, 0, 3).flatten(2))
        else:
            for c in range(outputs):
                total += _gradients(left, right[c])
    return total


def _pairs(a: Tensor, delta: Tensor) -> Tensor:
    """Σ_{t,s} (a_it·a_js)(δ_it·δ_js) for (n, T, ·) factors, some rows at a time."""
    n, positions = a.shape[:2]
    if positions == 1:
        return (a[:, 0] @ a[:, 0].T) * (delta[:, 0] @ delta[:, 0].T)
    flat_a, flat_delta = a.flatten(0, 1), delta.flatten(0, 1)
    rows = max(1, GRAM_BYTES // (2 * a.element_size() * positions * n * positions))
    parts = []
    for start in range(0, n, rows):
        one = a[start : start + rows].flatten(0, 1) @ flat_a.T
        two = delta[start : start + rows].flatten(0, 1) @ flat_delta.T
        parts.append((one * two).view(-1, positions, n, positions).sum((1, 3)))
    return torch.cat(parts)


def _gradients(a: Tensor, delta: Tensor) -> Tensor:
    """The Gram matrix of G_i = Σ_t δ_it a_itᵀ, some units at a time."""
    n, d, k = len(a), delta.shape[-1], a.shape[-1]
    units = max(1, GRAM_BYTES // (a.element_size() * n * k))
    total = a.new_zeros(n, n)
    for start in range(0, d, units):
        gradient = torch.bmm(delta[..., start : start + units].transpose(1, 2), a).flatten(1)
        total += gradient @ gradient.T
    return total


def full_gram(a: Tensor, delta: Tensor) -> Tensor:
    """Inner products of per-sample weight gradients of all pairs of outputs, (n, C, n, C). See :func:`trace_gram`."""
    outputs, n, groups, positions, d = delta.shape
    total = a.new_zeros(n * outputs, n * outputs)
    for g in range(groups):
        left, right = a[:, g], delta[:, :, g].transpose(0, 1)  # (n, T, k), (n, C, T, d)
        if positions == 1:
            flat = right.flatten(0, 1)[:, 0]
            product = (flat @ flat.T).view(n, outputs, n, outputs)
            total += (product * (left[:, 0] @ left[:, 0].T)[:, None, :, None]).view(n * outputs, -1)
            continue
        units = max(1, GRAM_BYTES // (a.element_size() * n * outputs * a.shape[-1]))
        for start in range(0, d, units):
            gradient = torch.einsum("nctd,ntk->ncdk", right[..., start : start + units], left).flatten(2).flatten(0, 1)
            total += gradient @ gradient.T
    return total.view(n, outputs, n, outputs)
