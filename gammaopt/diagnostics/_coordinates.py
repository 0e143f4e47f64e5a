r"""Coordinate check: do the activations move as much at every width?

A parametrization transfers rates across width only if each layer's output changes by the same amount per step at any
width. After a few steps the root mean square of the change of each layer's output, over samples and coordinates, is
fitted as a power of the width; a slope of 0 is right, one above says that wide networks move too much (they will
diverge), one below that they freeze.

Source: Yang et al., Tensor Programs V (arXiv 2203.03466), appendix on coordinate checking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gammaopt._errors import UsageError, at_least
from gammaopt._probe import Inputs, call
from gammaopt._roles import layers_in_order

Step = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class LayerSlope:
    """One layer: rms of the change of its output at each width, and the exponent of that in the width."""

    name: str
    changes: tuple[float, ...]
    slope: float


@dataclass(frozen=True)
class CoordinateCheck:
    """The slopes of all layers, in the order in which they run, and of f itself as the last, named ``"output"``."""

    widths: tuple[int, ...]
    layers: tuple[LayerSlope, ...]
    tolerance: float

    @property
    def worst(self) -> LayerSlope:
        """The layer whose slope is furthest from 0."""
        return max(self.layers, key=lambda layer: abs(layer.slope))

    @property
    def ok(self) -> bool:
        """Whether every slope is within the tolerance of 0."""
        return abs(self.worst.slope) <= self.tolerance

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        rows = [f"{layer.name:{width}}  slope {layer.slope:+.2f}" for layer in self.layers]
        verdict = "transfers across width" if self.ok else f"does not transfer: {self.worst.name} has the worst slope"
        return "\n".join([*rows, verdict])


def coordinate_check(
    build: Callable[[int], nn.Module],
    widths: Sequence[int],
    inputs: Inputs,
    loss: Callable[[Tensor], Tensor],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    steps: int = 4,
    seeds: int = 3,
    tolerance: float = 0.2,
) -> CoordinateCheck:
    """Train networks of several widths for a few steps and fit how far their activations move.

    Args:
        build: width → a fresh model, wrapped as it will be trained; called after seeding torch.
        widths: at least two widths, all different.
        inputs: one batch, on which all steps are taken and the changes are measured.
        loss: the model's output → a scalar.
        optimizer: model → its optimizer.
        steps: steps to take before measuring, ≥ 1.
        seeds: initialisations to average over, ≥ 1.
        tolerance: largest slope, up or down, that passes.

    Returns:
        Slopes and verdict; ``print`` shows them as a table.

    Raises:
        UsageError: for fewer than two different widths, ``steps`` < 1, or activations that stop being finite.

    Example:
        >>> import torch, gammaopt
        >>> from gammaopt.online import MLP
        >>> x, y = torch.randn(32, 10), torch.randn(32, 1)
        >>> def build(width):
        ...     return gammaopt.wrap(MLP(10, 1, width=width), 1.0, depth=3, parametrization="mean_field")
        >>> check = coordinate_check(
        ...     build, [32, 64, 128], x, lambda out: (out - y).square().mean(),
        ...     lambda model: gammaopt.SGD(model.parameters(), lr=0.1))
        >>> len(check.layers), check.widths
        (4, (32, 64, 128))
    """
    at_least("steps", steps, 1), at_least("seeds", seeds, 1)
    if len(set(widths)) < 2:
        raise UsageError(f"widths={list(widths)} can't give a slope; give at least two different widths")
    changes = [_changes(build, width, inputs, loss, optimizer, steps, seeds) for width in widths]
    x = [math.log(width) for width in widths]
    layers = []
    for name in changes[0]:
        row = tuple(change[name] for change in changes)
        layers.append(LayerSlope(name, row, _slope(x, [math.log(value) for value in row])))
    return CoordinateCheck(tuple(widths), tuple(layers), tolerance)


def _changes(
    build: Callable[[int], nn.Module],
    width: int,
    inputs: Inputs,
    loss: Callable[[Tensor], Tensor],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    steps: int,
    seeds: int,
) -> dict[str, float]:
    """Layer → rms of the change of its output after ``steps``, over seeds, samples and coordinates."""
    squares: dict[str, float] = {}
    for seed in range(seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(width)
        before = _activations(model, inputs)
        stepper = optimizer(model)
        for _ in range(steps):
            stepper.zero_grad()
            loss(call(model, inputs)).backward()
            stepper.step()
        for name, value in _activations(model, inputs).items():
            change = float((value - before[name]).double().square().mean())
            squares[name] = squares.get(name, 0.0) + change / seeds
    for name, square in squares.items():
        if not (math.isfinite(square) and square > 0):
            raise UsageError(
                f"the output of layer {name!r} changed by {math.sqrt(square):g} at width {width}; "
                "give a smaller rate, or a layer's gradient that is not 0"
            )
    return {name: math.sqrt(square) for name, square in squares.items()}


def _activations(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    with torch.no_grad(), _recording(model) as outputs:
        output = call(model, inputs)
    return {**outputs, "output": output.detach()}


@contextmanager
def _recording(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The outputs of the Linear and Conv layers by name, in the order in which they run."""
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            outputs[name] = output.detach()

        return hook

    handles = [layer.register_forward_hook(record(name)) for name, layer in layers_in_order(model)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
