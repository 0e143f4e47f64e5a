"""Plain networks: the MLP and the CNN, homogeneous of degree ``depth`` in their weights."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from gammaopt._errors import UsageError, at_least


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


class CNN(nn.Sequential):
    """Convolutional ReLU network: ``depth`` − 1 layers of 3×3 convolutions, each halving the image, and a readout.

    Inputs are (batch, channels, height, width) with height and width divisible by 2^(``depth`` − 1).

    Args:
        shape: (channels, height, width) of one input.
        outputs: number of outputs.
        width: channels N of every hidden layer.
        depth: number L of weight layers, readout included, ≥ 2.
        bias: give each layer a bias.
    """

    def __init__(
        self, shape: tuple[int, int, int], outputs: int, *, width: int = 32, depth: int = 4, bias: bool = False
    ) -> None:
        for name, value in {"outputs": outputs, "width": width}.items():
            at_least(name, value, 1)
        at_least("depth", depth, 2)
        channels, *size = shape
        halvings = 2 ** (depth - 1)
        if any(side % halvings for side in size):
            raise UsageError(f"shape={shape} can't be halved {depth - 1} times; give sides divisible by {halvings}")
        layers: list[nn.Module] = []
        for fan_in in (channels, *[width] * (depth - 2)):
            layers += [nn.Conv2d(fan_in, width, 3, padding=1, bias=bias), nn.ReLU(), nn.AvgPool2d(2)]
        features = width * size[0] * size[1] // halvings**2
        super().__init__(*layers, nn.Flatten(), nn.Linear(features, outputs, bias=bias))
