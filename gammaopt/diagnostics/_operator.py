r"""Curvature of a loss as products with vectors: the Hessian H and the generalised Gauss–Newton matrix G in θ.

    H v = ∇_θ ⟨∇_θ ℓ, v⟩        G v = Jᵀ (∇²_f ℓ) J v,  J v = ∇_u ⟨Jᵀ u, v⟩

ℓ is the mean (or sum) over all samples of the data, batch by batch. Neither matrix is ever formed. Sources:
Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994; Schraudolph, Neural Computation 2002.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from gammaopt._errors import UsageError, one_of, rate
from gammaopt._probe import Output
from gammaopt.diagnostics._function import (
    DOUBLE,
    Batches,
    Data,
    Function,
    LossFunction,
    loss_function,
    loss_of,
    same_draws_after,
    undisturbed,
)
from gammaopt.diagnostics._layers import make_dense

Matrix = Literal["hessian", "ggn"]
Reduction = Literal["mean", "sum"]


class _Batch(NamedTuple):
    """What stays of a batch between products: its inputs, targets and h₀/γ, all on the device."""

    inputs: Any
    targets: Any
    start: Tensor | None


class NotFiniteError(UsageError):
    """A second derivative is not finite."""


class Curvature:
    """H or G of a loss over data, as a linear operator on flat vectors (n,) that live on the model's device.

    The model is copied once, in float64; the copy sees what the model was then. A single batch keeps its graph of
    first derivatives, so that a product costs one more backward pass only.

    Args:
        model: plain or wrapped; of a wrapped one it is f = (h − h₀)/γ that enters the loss, and θ₀ is constant.
        loss: ``"mse"``, ``"cross_entropy"``, or (output, targets) → scalar.
        data: one (inputs, targets), or an iterable of such that can be passed over again.
        matrix: ``"hessian"`` or ``"ggn"``.
        reduction: whether ``loss`` is the mean or the sum over the samples of its batch.
        output: which part of what a plain model returns is its output; see :func:`gammaopt.wrap`.
        rates: trainable parameter's name → rate r ≥ 0; the matrix is then √R H √R with R = diag(r). 1 by default.
        dtype: to compute in. float32 is twice as fast on most accelerators and right to about 1e-4 of λ_max.

    Attributes:
        size: n, the number of trainable numbers.
        products: how many products were made.
        loss: ℓ over the data, once a product was made.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.eye(2)
        >>> hessian = Curvature(net, "mse", (x, torch.zeros(2, 1)))  # ℓ = Σ w²/2, so H is the identity
        >>> hessian(torch.tensor([1.0, 3.0])).tolist()
        [1.0, 3.0]
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | LossFunction,
        data: Data,
        *,
        matrix: Matrix = "hessian",
        reduction: Reduction = "mean",
        output: Output | None = None,
        rates: Mapping[str, float] | None = None,
        dtype: torch.dtype = DOUBLE,
    ) -> None:
        one_of("matrix", matrix, get_args(Matrix))
        one_of("reduction", reduction, get_args(Reduction))
        self._criterion = loss_function(loss)
        self._batches = Batches(data)
        self._function = Function(model, output, dtype)
        make_dense(self._function.module)
        self._parameters = list(self._function.parameters.values())
        self._ggn, self._mean = matrix == "ggn", reduction == "mean"
        self._starts: list[Tensor | None] = []
        self._graph: tuple[Tensor, ...] | None = None
        self._first: tuple[Tensor, Tensor] | None = None  # a vector and its product
        self._root = None if rates is None else self._roots(rates)
        self.size = self._function.size
        self.device, self.dtype = self._function.device, dtype
        self.products = 0
        self.loss: float | None = None

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with ``vector`` (n,), on its own device and in its own dtype.

        Raises:
            UsageError: if the loss isn't a finite scalar that is the same at each pass, or an operation of the model
                has no second derivative, or a wrong one: each product is held against the first, as ⟨u, Hv⟩ = ⟨v, Hu⟩.
            NotFiniteError: a UsageError too, if a second derivative isn't finite.
        """
        if vector.shape != (self.size,):
            raise UsageError(f"a vector of shape {tuple(vector.shape)} does not fit {self.size} trainable parameters")
        self.products += 1
        direction = vector.detach().to(self.device, self.dtype)
        if self._root is not None:
            direction = direction * self._root
        try:
            with undisturbed(self.device):
                product = self._kept(direction) if self._graph is not None else self._pass(direction)
        except (RuntimeError, NotImplementedError) as error:
            if "derivative" not in str(error):
                raise
            raise UsageError(
                f"an operation of {type(self._function.module).__name__} has no second derivative "
                f"({str(error).splitlines()[0]}); use its plain form in the model"
            ) from None
        if self._root is not None:
            product = product * self._root
        self._hold_symmetric(vector.detach().to(self.device, self.dtype), product)
        return product.to(vector.device, vector.dtype)

    def _hold_symmetric(self, vector: Tensor, product: Tensor) -> None:
        """A derivative that autograd takes for a constant leaves no error behind, only a matrix without symmetry."""
        length = float(product.norm())
        if not math.isfinite(length):
            raise NotFiniteError(
                f"a second derivative of {type(self._function.module).__name__} is not finite, as that of a root or "
                "a norm at 0 is not; use a form that is smooth there"
            )
        if self._first is None:
            self._first = vector.clone(), product.clone()  # the caller may write over both
            return
        other, moved = self._first
        one, two = float(vector @ moved), float(other @ product)
        size = float(vector.norm() * moved.norm() + other.norm() * length)
        # Beyond what rounding makes of two products, in float32 too, and far below what a missing part makes of them.
        if abs(one - two) > torch.finfo(self.dtype).eps ** 0.4 * size:
            raise UsageError(
                f"the curvature of {type(self._function.module).__name__} is not symmetric (⟨u, Hv⟩ = {one:g} and "
                f"⟨v, Hu⟩ = {two:g}), so an operation's backward is not differentiable, as once_differentiable marks "
                "it; use its plain form in the model"
            )

    def _roots(self, rates: Mapping[str, float]) -> Tensor:
        if missing := [name for name in self._function.parameters if name not in rates]:
            raise UsageError(f"rates has no {missing[0]!r}; give one for each trainable parameter, 0 for one at rest")
        roots = {name: rate(f"rates[{name!r}]", rates[name]) ** 0.5 for name in self._function.parameters}
        return torch.cat(
            [
                torch.full((parameter.numel(),), roots[name], dtype=parameter.dtype, device=parameter.device)
                for name, parameter in self._function.parameters.items()
            ]
        )

    def _pass(self, direction: Tensor) -> Tensor:
        """One product over all batches."""
        with same_draws_after(self._batches.data):
            return self._summed(direction)

    def _summed(self, direction: Tensor) -> Tensor:
        total = torch.zeros_like(direction)
        loss, samples = 0.0, 0
        for batch in self._prepared():
            output = self._function(batch.inputs, batch.start)
            value = loss_of(self._criterion, output, batch.targets)
            weight = len(output) if self._mean else 1
            loss, samples = loss + weight * float(value.detach()), samples + weight
            graph = self._ggn_graph(output, batch.targets) if self._ggn else self._hessian_graph(value)
            if self._batches.single:
                self._graph, weight, samples = graph, 1, 1
                loss = float(value.detach())
            total += weight * self._along(graph, direction)
        if not samples:
            raise UsageError("data has no batch; give at least one (inputs, targets)")
        self._note_loss(loss / samples if self._mean else loss)
        return total / samples if self._mean else total

    def _kept(self, direction: Tensor) -> Tensor:
        assert self._graph is not None
        return self._along(self._graph, direction)

    def _prepared(self) -> Any:
        for index, (inputs, targets) in enumerate(self._batches):
            inputs, targets = self._function.to(inputs), self._function.to(targets)
            if not self._batches.kept:
                yield _Batch(inputs, targets, None)
                continue
            if index == len(self._starts):
                self._starts.append(self._function.start(inputs))
            yield _Batch(inputs, targets, self._starts[index])

    def _hessian_graph(self, value: Tensor) -> tuple[Tensor, ...]:
        if not value.requires_grad:
            raise UsageError("the loss does not depend on the model's trainable parameters; nothing to differentiate")
        return (self._flat(torch.autograd.grad(value, self._parameters, create_graph=True, allow_unused=True)),)

    def _ggn_graph(self, output: Tensor, targets: Any) -> tuple[Tensor, ...]:
        if not output.requires_grad:
            raise UsageError("the output does not depend on the model's trainable parameters; nothing to differentiate")
        dummy = torch.zeros_like(output, requires_grad=True)
        pulled = self._flat(torch.autograd.grad(output, self._parameters, dummy, create_graph=True, allow_unused=True))
        free = output.detach().requires_grad_()
        slope = torch.autograd.grad(self._criterion(free, targets), free, create_graph=True)[0]
        return output, dummy, pulled, free, slope

    def _along(self, graph: tuple[Tensor, ...], direction: Tensor) -> Tensor:
        keep = self._graph is not None
        if not self._ggn:
            (gradient,) = graph
            return self._derivative(gradient, direction, keep)
        output, dummy, pulled, free, slope = graph
        (moved,) = torch.autograd.grad(pulled, dummy, direction, retain_graph=True)  # J v
        if slope.requires_grad:
            (bent,) = torch.autograd.grad(slope, free, moved, retain_graph=keep, allow_unused=True)
            moved = torch.zeros_like(moved) if bent is None else bent
        else:
            moved = torch.zeros_like(moved)  # a loss that is linear in f
        return self._derivative(output, moved, keep)

    def _derivative(self, of: Tensor, along: Tensor, keep: bool) -> Tensor:
        if not of.requires_grad:  # linear in θ
            return torch.zeros(self.size, dtype=self.dtype, device=self.device)
        parts = torch.autograd.grad(of, self._parameters, along, retain_graph=keep, allow_unused=True)
        return self._flat(parts).detach()

    def _flat(self, parts: tuple[Tensor | None, ...]) -> Tensor:
        return torch.cat(
            [
                (torch.zeros_like(parameter) if part is None else part).reshape(-1)
                for part, parameter in zip(parts, self._parameters, strict=True)
            ]
        )

    def _note_loss(self, loss: float) -> None:
        """Products belong to one matrix only if each pass sees the same loss."""
        if not math.isfinite(loss):
            raise UsageError(f"the loss on the data is {loss}; curvature is for a model that has not diverged")
        if self.loss is None:
            self.loss = loss
        precision = 1e3 * torch.finfo(self.dtype).eps
        if abs(loss - self.loss) > precision * max(abs(loss), abs(self.loss)):
            raise UsageError(
                f"the loss was {self.loss:g} at one pass over the data and {loss:g} at another; give data without "
                "augmentation, and a model that draws nothing at random"
            )
