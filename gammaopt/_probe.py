"""Running a network for its output h: how inputs are passed, which part is h, and what must not change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gammaopt._errors import UsageError

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
# Which part of what forward returns is h: an entry's name or position, or a function that computes it.
Output = str | int | Callable[[Any], Tensor]


def call(forward: Callable[..., Any], inputs: Inputs) -> Any:
    """``forward`` on a tensor, on a tuple as positional or on a mapping as keyword arguments."""
    if isinstance(inputs, Mapping):
        return forward(**inputs)
    if isinstance(inputs, tuple):
        return forward(*inputs)
    return forward(inputs)


def describe(inputs: Any) -> str:
    """The shapes in ``inputs``, for error messages."""
    if isinstance(inputs, Tensor):
        return f"shape {tuple(inputs.shape)} {str(inputs.dtype).removeprefix('torch.')}"
    if isinstance(inputs, list):
        return "[" + ", ".join(describe(item) for item in inputs) + "]"
    if isinstance(inputs, tuple):
        return "(" + ", ".join(describe(item) for item in inputs) + ")"
    if isinstance(inputs, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in inputs.items()) + "}"
    return f"{type(inputs).__name__}"


def select(returned: Any, output: Output | None, model: nn.Module) -> Tensor:
    """h in what ``model`` returned.

    Raises:
        UsageError: if it isn't there, or is no floating-point tensor with at least one element.
    """
    name = type(model).__name__
    if isinstance(output, (str, int)) and isinstance(returned, Tensor):  # which would be indexed by sample
        raise UsageError(f"{name} returns one {_kind(returned)}, of which output={output!r} is no entry; drop output=")
    if isinstance(output, (str, int)):
        try:
            found = returned[output]
        except (KeyError, IndexError, TypeError):
            raise UsageError(
                f"{name} returns a {_kind(returned)} without entry {output!r}; give another output="
            ) from None
    else:
        found = returned if output is None else output(returned)
    if not (isinstance(found, Tensor) and found.is_floating_point()):
        fix = "output= says which part it is" if output is None else "give another output="
        raise UsageError(f"{name} returns a {_kind(found)}; f = (h − h₀)/γ needs one floating-point tensor: {fix}")
    if found.numel() == 0:
        samples = bool(found.dim() and found.shape[0])
        fix = "give its output at least one unit" if samples else "give a batch with samples"
        raise UsageError(f"{name} returns an empty tensor of shape {tuple(found.shape)}; {fix}")
    return found


def replaced(returned: Any, output: Output | None, value: Tensor) -> Any:
    """What ``returned`` was with h replaced by ``value``; only ``value`` where nothing or a function picked h.

    Raises:
        UsageError: if it also holds a loss, which was computed from h and not from f.
    """
    if not isinstance(output, (str, int)):
        return value
    if isinstance(returned, Mapping):
        if returned.get("loss") is not None:
            raise UsageError(
                "the model computed its loss inside, from h and not from f; "
                "don't pass it the labels, and compute the loss from its output"
            )
        twin: Any = copy.copy(returned)
        twin[output] = value
        return twin
    entries = list(returned)
    entries[output if isinstance(output, int) else 0] = value
    return type(returned)(*entries) if hasattr(returned, "_fields") else type(returned)(entries)


def _kind(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} tensor" if isinstance(value, Tensor) else type(value).__name__


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in its probing state: dropout off, batch statistics on; restore modes, buffers and randomness."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    for module in modes:
        module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


def probe(model: nn.Module, inputs: Inputs, output: Output | None = None) -> Tensor:
    """h(inputs) of a plain or wrapped model: before centring and division by γ.

    Raises:
        UsageError: if the model rejects the inputs or is on the meta device without them, or its output is not as
            :func:`select` needs it.
    """
    if any(p.is_meta for p in model.parameters()) and not all(tensor.is_meta for tensor in _tensors(inputs)):
        raise UsageError(
            f"{type(model).__name__} is on the meta device and the example inputs are not, so nothing can be measured; "
            "give depth= and knee= instead of example_inputs=, or a net with values"
        )
    forward = getattr(model, "_gammaopt_forward", model)
    output = getattr(model, "_gammaopt_output", output) if output is None else output
    try:
        returned = call(forward, inputs)
    except UsageError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = "give one batch of tensors in the shape and dtype that the model takes"
        given: Any = inputs
        if isinstance(given, list):  # some models do take one
            fix = "a list is passed as one argument: give a tensor, or a tuple of the positional arguments"
        raise UsageError(
            f"example inputs of {describe(inputs)} do not fit {type(model).__name__}: {reason}; {fix}"
        ) from error
    found = select(returned, output, model)
    if found.dim() == 0:
        raise UsageError(
            f"{type(model).__name__} returns a scalar, not an output for each sample; "
            "if that is a loss, compute it from the model's output instead, or give output="
        )
    return found


def _tensors(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, (tuple, list, Mapping)):
        for item in inputs.values() if isinstance(inputs, Mapping) else inputs:
            yield from _tensors(item)


def measurable(model: nn.Module, h: Tensor) -> Tensor:
    """``h``, if it has values.

    Raises:
        UsageError: on the meta device, which has none.
    """
    if h.is_meta:
        raise UsageError(
            f"{type(model).__name__} is on the meta device, where nothing can be measured; give depth= and knee=, "
            "or a net and inputs with values"
        )
    return h


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name.

    Raises:
        UsageError: if there is none.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise UsageError(f"{type(model).__name__} has no trainable parameters; there is nothing to measure or train")
    return found


def accumulator(tensor: Tensor) -> torch.dtype:
    """The dtype to sum in: float64, or complex128, where the device has it."""
    if tensor.is_complex():
        return torch.complex64 if tensor.device.type == "mps" else torch.complex128
    return torch.float32 if tensor.device.type == "mps" else torch.float64
