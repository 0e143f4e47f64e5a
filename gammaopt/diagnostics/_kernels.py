r"""Kernels of a network on a batch: the neural tangent kernel, the feature kernel, and how they align.

    Θ_ij = Σ_c ⟨∇_θ f_c(x_i), ∇_θ f_c(x_j)⟩       trace form; full: Θ_{ic,jd} = ⟨∇_θ f_c(x_i), ∇_θ f_d(x_j)⟩
    Φ_ij = φ(x_i)·φ(x_j)/N                        φ: the N inputs of the readout
    A(K, K') = ⟨K, K'⟩_F / (‖K‖_F ‖K'‖_F)         alignment; centred: K → HKH, H = 1 − 11ᵀ/n; with targets K' = yyᵀ

A lazy run keeps its Θ; a rich one turns it towards the targets, and under small initialisation (large γ) before the
loss moves. Sources: Cristianini et al., NeurIPS 2001 (alignment); Cortes, Mohri and Rostamizadeh, JMLR 2012 (centred);
Atanasov, Bordelon and Pehlevan, "Neural networks as kernel learners: the silent alignment effect", ICLR 2022.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gammaopt._errors import UsageError, at_least
from gammaopt._probe import Inputs, Output
from gammaopt._roles import layers_in_order
from gammaopt.diagnostics._function import DOUBLE, Function, undisturbed
from gammaopt.diagnostics._layers import Layer, full_gram, make_dense, recorded, trace_gram, trusted

DELTA_BYTES = 2**29  # for what is backpropagated from several outputs at a time
JACOBIAN_BYTES = 2**29


def ntk(
    model: nn.Module,
    x: Inputs,
    *,
    full: bool = False,
    layerwise: bool = True,
    chunk: int | None = None,
    output: Output | None = None,
    dtype: torch.dtype = DOUBLE,
) -> Tensor:
    r"""The neural tangent kernel Θ of f on a batch, in the trainable parameters.

    Linear and Conv layers are done from their inputs and what is backpropagated to their outputs, no gradient of a
    sample being formed whole; all other parameters (norms' gains, embeddings, tied weights) sample by sample.

    Args:
        model: plain or wrapped; a wrapped one enters as f = (h − h₀)/γ, so that Θ ∝ 1/γ² at the start. Left as it was.
        x: one batch of n samples, as given to the model.
        full: all pairs of outputs instead of the trace over them.
        layerwise: ``False`` does everything sample by sample.
        chunk: samples whose gradients are held at a time where that is needed; by default within 512 MiB.
        output: which part of what a plain model returns is its output; see :func:`gammaopt.wrap`.
        dtype: to compute in.

    Returns:
        (n, n), or with ``full`` (n, n, C, C) for C outputs, outputs of several dimensions being flattened. On the
        model's device.

    Raises:
        UsageError: for a model that normalises with the statistics of its batch.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 3, bias=False)  # ∇ f_c = x for each of 3 outputs
        >>> ntk(net, torch.eye(2)).tolist()
        [[3.0, 0.0], [0.0, 3.0]]
    """
    if chunk is not None:
        at_least("chunk", chunk, 1)
    function = Function(model, output, dtype)
    function.refuse_batch_statistics("the NTK")
    make_dense(function.module)
    x = function.to(x)
    with undisturbed(function.device):
        with recorded(function.module) as layers:
            f = function.uncentred(x)  # the centring is constant in θ
        f = f.flatten(1) if f.dim() > 1 else f[:, None]
        if not f.requires_grad:
            raise UsageError("the output does not depend on the model's trainable parameters; there is no NTK")
        n, outputs = f.shape
        kernel = torch.zeros((n, outputs, n, outputs) if full else (n, n), dtype=dtype, device=function.device)
        found, done = (
            trusted(layers, f, function.parameters, torch.Generator().manual_seed(0)) if layerwise else ([], set())
        )
        size = max(1, sum(layer.output.numel() for layer in found) * f.element_size())
        held = 2 if full else 1  # blocks of outputs at a time: a full kernel pairs them
        step = max(1, min(outputs, DELTA_BYTES // (held * size)))
        blocks = [range(start, min(start + step, outputs)) for start in range(0, outputs if found else 0, step)]
        for i, rows in enumerate(blocks):
            deltas = _pulled(f, found, rows)
            if not full:
                for layer, delta in zip(found, deltas, strict=True):
                    for a, part in _factors(layer, n, delta, done):
                        kernel += trace_gram(a, part)
                continue
            for columns in blocks[i:]:
                others = None if columns is rows else _pulled(f, found, columns)
                for place, (layer, delta) in enumerate(zip(found, deltas, strict=True)):
                    factors = _factors(layer, n, delta, done)
                    facing = None if others is None else _factors(layer, n, others[place], done)
                    for which, (a, part) in enumerate(factors):
                        gram = full_gram(a, part, None if facing is None else facing[which][1])
                        here, there = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
                        kernel[:, here, :, there] += gram
                        if facing is not None:
                            kernel[:, there, :, here] += gram.permute(2, 3, 0, 1)
        del f
        rest = [parameter for name, parameter in function.parameters.items() if name not in done]
        if rest:
            kernel += _sample_by_sample(function, x, n, outputs, rest, full, chunk)
    return kernel.permute(0, 2, 1, 3).contiguous() if full else kernel


def _factors(layer: Layer, n: int, delta: Tensor, done: set[str]) -> list[tuple[Tensor, Tensor]]:
    """Of the weight's gradients and of the bias's, (a, δ) whose products they are; of those that the layer is for."""
    prefix = f"{layer.name}." if layer.name else ""
    made = []
    if prefix + "weight" in done:
        made.append((layer.patches(n), delta))
    if prefix + "bias" in done:
        made.append((torch.ones_like(delta[:, :, 0, :1, :1]), delta.sum(4, keepdim=True)))
    return made


def _pulled(f: Tensor, layers: list[Layer], outputs: range) -> list[Tensor]:
    """What backpropagation from each of some outputs brings to each layer: (n, groups, outputs, units, positions)."""
    stacked: list[Tensor] = []
    for place, c in enumerate(outputs):
        one = torch.zeros_like(f)
        one[:, c] = 1.0
        gradients = torch.autograd.grad(f, [layer.output for layer in layers], one, retain_graph=True)
        parts = [layer.deltas(gradient, len(f)) for layer, gradient in zip(layers, gradients, strict=True)]
        if not stacked:
            stacked = [part.new_empty(*part.shape[:2], len(outputs), *part.shape[2:]) for part in parts]
        for whole, part in zip(stacked, parts, strict=True):
            whole[:, :, place] = part
    return stacked


def _sample_by_sample(
    function: Function, x: Any, n: int, outputs: int, parameters: list[nn.Parameter], full: bool, chunk: int | None
) -> Tensor:
    """The kernel in ``parameters`` from Jacobians, a block of samples against another at a time."""
    row = outputs * sum(parameter.numel() for parameter in parameters) * torch.finfo(function.dtype).bits // 8
    size = max(1, min(n, JACOBIAN_BYTES // (2 * row))) if chunk is None else min(chunk, n)
    blocks = [range(start, min(start + size, n)) for start in range(0, n, size)]
    kernel = torch.zeros((n, outputs, n, outputs) if full else (n, n), dtype=function.dtype, device=function.device)
    for i, rows in enumerate(blocks):
        left = _jacobians(function, x, rows, parameters)
        for columns in blocks[i:]:
            right = left if columns is rows else _jacobians(function, x, columns, parameters)
            part = torch.einsum("icp,jdp->icjd" if full else "icp,jcp->ij", left, right)
            here, there = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
            if full:
                kernel[here, :, there] = part
                kernel[there, :, here] = part.permute(2, 3, 0, 1)
            else:
                kernel[here, there] = part
                kernel[there, here] = part.T
    return kernel


def _jacobians(function: Function, x: Any, samples: range, parameters: list[nn.Parameter]) -> Tensor:
    """∇f_c(x_i): (samples, C, numbers)."""
    return torch.stack([_jacobian(function, _sample(x, i), parameters) for i in samples])


def _jacobian(function: Function, x: Any, parameters: list[nn.Parameter]) -> Tensor:
    f = function.uncentred(x).reshape(-1)
    eye = torch.eye(len(f), dtype=f.dtype, device=f.device)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # of what torch can't batch
            parts = torch.autograd.grad(f, parameters, eye, retain_graph=True, allow_unused=True, is_grads_batched=True)
    except RuntimeError:  # an operation whose derivative can't be batched at all
        each = [torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) for value in f]
        parts = tuple(
            torch.stack([torch.zeros_like(p) if part is None else part for part in column])
            for p, column in zip(parameters, zip(*each, strict=True), strict=True)
        )
    rows = [
        f.new_zeros(len(f), p.numel()) if part is None else part.reshape(len(f), -1)
        for part, p in zip(parts, parameters, strict=True)
    ]
    return torch.cat(rows, dim=1)


def _sample(x: Any, i: int) -> Any:
    """Sample ``i`` of the tensors in ``x``, as a batch of one."""
    if isinstance(x, Tensor):
        return x[i : i + 1] if x.dim() else x
    if isinstance(x, dict):
        return {key: _sample(value, i) for key, value in x.items()}
    if isinstance(x, tuple):
        return tuple(_sample(value, i) for value in x)
    return x


def ntk_eigenvalues(model: nn.Module, x: Inputs, **settings: Any) -> Tensor:
    """Eigenvalues of the trace NTK on a batch, (n,), the largest first; over n they estimate those of the operator.

    Args:
        model, x, settings: see :func:`ntk`; with ``full``, all n·C of the full one.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)  # Θ = x xᵀ
        >>> [round(value, 6) for value in ntk_eigenvalues(net, torch.diag(torch.tensor([1.0, 3.0]))).tolist()]
        [9.0, 1.0]
    """
    kernel = ntk(model, x, **settings)
    if kernel.dim() == 4:
        n, _, outputs, _ = kernel.shape
        kernel = kernel.permute(0, 2, 1, 3).reshape(n * outputs, n * outputs)
    values: Tensor = torch.linalg.eigvalsh(kernel)
    return values.flip(0)


def feature_kernel(
    model: nn.Module,
    x: Inputs,
    *,
    layer: str | None = None,
    output: Output | None = None,
    dtype: torch.dtype = DOUBLE,
) -> Tensor:
    """The kernel of the last hidden layer: inner products of what enters the readout, over their number. (n, n).

    Args:
        model, x, output, dtype: see :func:`ntk`.
        layer: qualified name of the Linear or Conv layer whose inputs are the features; the readout by default, which
            is the layer that ran last, or a wrapped model's own.

    Raises:
        UsageError: for an unknown ``layer``, or one that does not run or whose input isn't one row for each sample.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> feature_kernel(net, torch.tensor([[2.0, -1.0], [0.0, 4.0]])).tolist()
        [[2.0, 0.0], [0.0, 8.0]]
    """
    function = Function(model, output, dtype)
    function.refuse_batch_statistics("a feature kernel")
    known = [name for name, _ in layers_in_order(function.module)]
    if layer is not None and layer not in known:
        raise UsageError(
            f"{layer!r} is no Linear or Conv layer of {type(model).__name__}; choose one of: {', '.join(known)}"
        )
    x = function.to(x)
    ran: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: ran.append((name, args[0])))
        for name, module in layers_in_order(function.module)
    ]
    try:
        with undisturbed(function.device), torch.no_grad():
            n = len(function.uncentred(x))
    finally:
        for handle in handles:
            handle.remove()
    plan = getattr(function.module, "gammaopt", None)
    wanted = layer or getattr(plan, "readout", None) or (ran[-1][0] if ran else None)
    inputs = [value for name, value in ran if name == wanted]
    if not inputs or len(inputs[-1]) != n:
        what = "has no Linear or Conv layer that ran" if not inputs else f"calls {wanted!r} on other than {n} samples"
        raise UsageError(f"{type(model).__name__} {what}; give layer=")
    features = inputs[-1].flatten(1)
    return features @ features.T / features.shape[1]


def kernel_target_alignment(kernel: Tensor, targets: Tensor, *, centred: bool = True) -> float:
    """How far a kernel points at the targets: A(K, yyᵀ), 1 if K ∝ yyᵀ.

    Args:
        kernel: (n, n), as of :func:`ntk` or :func:`feature_kernel`.
        targets: (n,) or (n, C) floats, or (n,) whole numbers for classes from 0, which become one-hot.
        centred: take the mean out of both first.

    Example:
        >>> import torch
        >>> y = torch.tensor([1.0, -1.0, 1.0])
        >>> round(kernel_target_alignment(torch.outer(y, y), y), 6)
        1.0
    """
    if not targets.is_floating_point() and targets.numel() and int(targets.min()) < 0:
        raise UsageError(
            f"targets are whole numbers down to {int(targets.min())}, and classes count from 0; give targets.float() "
            "if they are numbers"
        )
    if targets.is_floating_point():
        rows = targets.reshape(len(targets), -1).to(kernel)
    else:
        rows = torch.nn.functional.one_hot(targets.reshape(-1).long()).to(kernel)
    return centred_kernel_alignment(kernel, rows @ rows.T, centred=centred)


def centred_kernel_alignment(kernel: Tensor, other: Tensor, *, centred: bool = True) -> float:
    """A(K, K') of two kernels on the same samples (CKA): of two models, or of one at two times.

    Raises:
        UsageError: for kernels that are not both (n, n), or one that is 0 but for rounding after centring.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
        >>> moved = 3 * x.flip(1) + 5  # a rotation, a scale and a shift: the same kernel but for its mean
        >>> round(centred_kernel_alignment(x @ x.T, moved @ moved.T), 5)
        1.0
    """
    if kernel.shape != other.shape or kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1]:
        raise UsageError(
            f"kernels of shapes {tuple(kernel.shape)} and {tuple(other.shape)} can't be aligned; "
            "give two (n, n) kernels of the same samples"
        )
    other = other.to(kernel)
    rounding = len(kernel) * torch.finfo(kernel.dtype).eps
    floors = [rounding * float(matrix.norm()) for matrix in (kernel, other)]
    if centred:
        kernel, other = _centred(kernel), _centred(other)
    sizes = [float(matrix.norm()) for matrix in (kernel, other)]
    if not all(size > floor for size, floor in zip(sizes, floors, strict=True)):
        raise UsageError("one of the kernels is constant over the samples, so it has no direction; give other samples")
    return float((kernel * other).sum()) / math.prod(sizes)


def _centred(kernel: Tensor) -> Tensor:
    return kernel - kernel.mean(0, keepdim=True) - kernel.mean(1, keepdim=True) + kernel.mean()
