"""The paper's models, parametric in width and depth."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from gammaopt._errors import at_least


class MLP(nn.Sequential):
    """Fully connected ReLU network: ``depth`` weight layers, all hidden layers ``width`` wide.

    Inputs of any shape are flattened after the batch dimension.

    Args:
        inputs: number of features of one flattened input.
        outputs: number of outputs.
        width: width N of each hidden layer.
        depth: number L of weight layers, readout included, ≥ 1.
        bias: give each layer a bias; without, the effective depth is ``depth`` throughout training.
    """

    def __init__(self, inputs: int, outputs: int, *, width: int = 64, depth: int = 3, bias: bool = False) -> None:
        for name, value in {"inputs": inputs, "outputs": outputs, "width": width, "depth": depth}.items():
            at_least(name, value, 1)
        sizes = [inputs, *[width] * (depth - 1), outputs]
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.ReLU()]
        super().__init__(*layers[:-1])
