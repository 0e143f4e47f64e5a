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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gammaopt._roles import CONVS

TRIAL_TOL = 1e3  # times the dtype's epsilon, relative: the sum of the parts against autograd's gradient
SUM_TOL = 10.0  # times epsilon, of ‖δ‖ ‖a‖: what a gradient that is zero in theory may be instead
GRAM_BYTES = 2**28  # for an intermediate matrix
CACHE_BYTES = 2**22  # of it at a time on a CPU: made and used up before it leaves the cache
LEAST_UNITS = 64  # whose gradients are made at a time, if memory allows
ROWS = 32  # samples whose rows of a symmetric matrix are made at a time, up to the diagonal
# What an entry costs beside a multiply-add in a large matrix product, in such multiply-adds; measured in float64.
PAIR_COST = 20.0  # to multiply two entries and add them up
SMALL_PRODUCT_COST = 2.0  # a multiply-add of a sample's own gradient, in a product of small matrices


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

    def patches(self, n: int, chosen: Tensor | None = None) -> Tensor:
        """a: (n, groups, inputs of one output unit, positions); of the ``chosen`` samples alone, if given."""
        value = self.input.detach()
        value = value.reshape(n, -1, *value.shape[1:])
        value = (value if chosen is None else value[chosen]).flatten(0, 1)
        if isinstance(self.module, nn.Linear):
            n = n if chosen is None else len(chosen)
            return value.reshape(n, 1, -1, value.shape[-1]).transpose(2, 3)
        return unfolded(value, self.module)

    def deltas(self, gradient: Tensor, n: int) -> Tensor:
        """δ: (n, groups, units of one group, positions), from a gradient of the layer's output."""
        if isinstance(self.module, nn.Linear):
            return gradient.reshape(n, 1, -1, gradient.shape[-1]).transpose(2, 3)
        return gradient.reshape(n, self.groups, gradient.shape[1] // self.groups, -1)

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
    """The patches of (n, C_in, *S): (n, groups, C_in/groups · kernel in the order of the weight, positions)."""
    n, channels = value.shape[:2]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    if any(conv._reversed_padding_repeated_twice):
        value = F.pad(value, conv._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, step, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        value = value.unfold(2 + axis, (size - 1) * dilation + 1, step)[..., ::dilation]
    dims = len(conv.kernel_size)
    value = value.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return value.reshape(n, conv.groups, channels // conv.groups * math.prod(conv.kernel_size), -1)


def make_dense(model: nn.Module) -> None:
    """Let embeddings of a copy have plain gradients: sparse ones are for optimizers, and have no second derivative."""
    for part in model.modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            part.sparse = False


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
    chosen = torch.randperm(n, generator=generator)[: max(1, n // 2)].to(output.device)
    inside = torch.zeros(n, dtype=torch.bool, device=output.device)
    inside[chosen] = True
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    direction = direction * inside.view(n, *[1] * (output.dim() - 1))
    own = list(parameters.values())
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(
        output, [*own, *(layer.output for layer in candidates)], direction, retain_graph=True, allow_unused=True
    )
    expected = dict(zip(parameters, grads[: len(own)], strict=True))
    good: list[Layer] = []
    names: set[str] = set()
    for layer, gradient in zip(candidates, grads[len(own) :], strict=True):
        if gradient is None:
            continue
        delta = layer.deltas(gradient, n)
        reached = delta.flatten(1).any(1)
        if (reached & ~inside).any() or not reached.any():  # of those inside, some may have all units dead
            continue
        delta = delta[chosen]
        made: dict[str, tuple[Tensor, Tensor, float]] = {}  # by us and by autograd; a bound on the sum
        for leaf in ("weight", "bias"):
            name = f"{layer.name}.{leaf}".removeprefix(".")
            if name not in parameters or (whole := expected[name]) is None:
                continue
            if leaf == "bias":
                terms = delta.shape[0] * delta.shape[3]
                made[name] = delta.sum((0, 3)).flatten(), whole, float(delta.norm()) * terms**0.5
                continue
            # A random combination of the rows of the weight's gradient says as much as all of them, and costs less.
            mix = torch.randn(delta.shape[1:3], generator=generator, dtype=torch.float64).to(delta)
            mixed = torch.einsum("ngdt,gd->ngt", delta, mix)
            patches = layer.patches(n, chosen)
            ours = torch.einsum("ngt,ngkt->gk", mixed, patches)
            bound = float(delta.norm()) * float(mix.norm()) * float(patches.norm())
            made[name] = ours, torch.einsum("gdk,gd->gk", whole.reshape(*mix.shape, -1), mix), bound
        if made and all(_agree(*each, output.dtype) for each in made.values()):
            good.append(layer)
            names.update(made)
    return good, names


def _agree(value: Tensor, expected: Tensor, bound: float, dtype: torch.dtype) -> bool:
    """Whether two sums are equal but for rounding, which a sum that cancels has of what it is made of: of its bound."""
    epsilon = torch.finfo(dtype).eps
    allowed = TRIAL_TOL * epsilon * float(expected.norm()) + SUM_TOL * epsilon * bound
    return float((value - expected).norm()) <= allowed


def trace_gram(a: Tensor, delta: Tensor) -> Tensor:
    """Σ_c of inner products of per-sample weight gradients, (n, n), by the cheaper of two ways.

    Args:
        a: (n, groups, k, T) inputs.
        delta: (n, groups, C, d, T) backpropagated from each of C outputs.
    """
    n, groups, outputs, d, positions = delta.shape
    k, units = a.shape[2], outputs * d
    below = (1 + min(1.0, _rows(a, n) / n)) / 2  # share of a symmetric matrix that is made
    by_pairs = below * (n * positions) ** 2 * (k + units + PAIR_COST)
    by_gradients = n * units * k * (below * n + SMALL_PRODUCT_COST * positions)
    way = _add_pairs if by_pairs <= by_gradients else _add_gradients
    total = a.new_zeros(n, n)
    for g in range(groups):
        way(total, a[:, g], delta[:, g].flatten(1, 2))
    return mirrored(total)


def full_gram(a: Tensor, delta: Tensor, other: Tensor | None = None) -> Tensor:
    """Inner products of per-sample weight gradients of all pairs of outputs, (n, C, n, C).

    Args:
        a, delta: see :func:`trace_gram`.
        other: (n, groups, C', d, T) of other outputs to pair those of ``delta`` with: (n, C, n, C').
    """
    n, groups, outputs, d, positions = delta.shape
    across = outputs if other is None else other.shape[2]
    total = a.new_zeros(n * outputs, n * across)
    for g in range(groups):
        left, right = a[:, g], delta[:, g]  # (n, k, T), (n, C, d, T)
        facing = right if other is None else other[:, g]
        if positions == 1:
            inputs = left[..., 0] @ left[..., 0].T
            product = right.reshape(n * outputs, d) @ facing.reshape(n * across, d).T
            total += (product.view(n, outputs, n, across) * inputs[:, None, :, None]).view(n * outputs, -1)
            continue
        units = max(1, GRAM_BYTES // (a.element_size() * n * max(outputs, across) * a.shape[2]))
        for start in range(0, d, units):
            one = _gradients(left, right[:, :, start : start + units]).view(n * outputs, -1)
            if other is None:
                _add_gram(total, one)
            else:
                total.addmm_(one, _gradients(left, facing[:, :, start : start + units]).view(n * across, -1).T)
    return (mirrored(total) if other is None else total).view(n, outputs, n, across)


def _gradients(a: Tensor, delta: Tensor) -> Tensor:
    """The weight gradients of each sample and output, (n, C · d, k), of (n, k, T) and (n, C, d, T) factors."""
    return torch.bmm(delta.flatten(1, 2), a.transpose(1, 2))


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix of which the part up to the diagonal is given."""
    return lower.tril() + lower.tril(-1).T


def _rows(like: Tensor, n: int) -> int:
    """Rows of a symmetric matrix to make at a time: an accelerator wants large products."""
    return min(n, ROWS) if like.device.type == "cpu" else n


def _bytes(like: Tensor) -> int:
    return min(GRAM_BYTES, CACHE_BYTES) if like.device.type == "cpu" else GRAM_BYTES


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """Add the inner products of rows, up to the diagonal."""
    n = len(rows)
    step = _rows(rows, n)
    for start in range(0, n, step):
        stop = min(start + step, n)
        total[start:stop, :stop].addmm_(rows[start:stop], rows[:stop].T)


def _add_pairs(total: Tensor, a: Tensor, delta: Tensor) -> None:
    """Σ_{t,s} (a_it·a_js)(δ_it·δ_js) of (n, ·, T) factors, some samples i and all j up to them at a time."""
    n, _, positions = a.shape
    if positions == 1:
        one, two = total.new_zeros(n, n), total.new_zeros(n, n)
        _add_gram(one, a[..., 0])
        _add_gram(two, delta[..., 0])
        total += one.mul_(two)
        return
    a, delta = (value.permute(1, 2, 0).contiguous() for value in (a, delta))  # (·, T, n): sums run along samples
    rows = max(1, min(_rows(a, n), _bytes(a) // (a.element_size() * positions * n * positions)))
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        one, two = (value[..., start:stop].flatten(1).T @ value[..., :stop].flatten(1) for value in (a, delta))
        product = one.mul_(two).view(positions, stop - start, positions, stop)
        total[start:stop, :stop] += product.sum(2).sum(0)


def _add_gradients(total: Tensor, a: Tensor, delta: Tensor) -> None:
    """The inner products of G_i = Σ_t δ_it a_itᵀ for (n, ·, T) factors, some units at a time."""
    n, k, _ = a.shape
    units = delta.shape[1]
    one = a.element_size() * n * k
    step = min(units, max(1, min(GRAM_BYTES // one, max(LEAST_UNITS, _bytes(a) // one))))
    made = a.new_empty(n * step * k)
    for start in range(0, units, step):
        some = delta[:, start : start + step]
        gradient = made[: n * some.shape[1] * k].view(n, -1, k)
        torch.bmm(some, a.transpose(1, 2), out=gradient)
        _add_gram(total, gradient.flatten(1))
