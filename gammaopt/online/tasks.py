"""The bundled tasks: what ``gammaopt tasks`` lists and ``gammaopt tune TASK`` studies."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from gammaopt._errors import at_least, one_of
from gammaopt._laws import Loss, OptimizerFamily
from gammaopt.online.models import CNN, MLP, ResNet18, ViT
from gammaopt.online.streams import Digits, Hermite, Parity, Photos, Stream


@dataclass(frozen=True)
class Task:
    """A named stream with a network for it, and where to start looking for its rate.

    Attributes:
        name: what a user types.
        summary: one line for the list of tasks.
        stream: makes the stream.
        build: makes a fresh network; takes ``width`` and ``depth`` too.
        depth: effective depth of that network in mean-field form, its number of layers where it is homogeneous.
        losses: losses it can be trained with, the default first.
        base_lr: (optimizer family, loss) → a rate that trains at γ = 1 in mean-field form. Only the centre of the
            searched range, five octaves on either side, for every γ alike.
        steps, batch_size: default budget.
        plateau_steps: loss → T₁, the steps that γ = 1 stays on its plateau at the best rate under SGD; it sets the
            range of γ that a budget can train.
        homogeneous: whether a network of other ``depth`` has that effective depth; it is measured if not.
    """

    name: str
    summary: str
    stream: Callable[[], Stream]
    build: Callable[..., nn.Module]
    depth: float
    losses: tuple[Loss, ...]
    base_lr: Mapping[tuple[OptimizerFamily, Loss], float] = field(hash=False)
    steps: int = 1000
    batch_size: int = 32
    plateau_steps: Mapping[Loss, float] = field(default_factory=dict, hash=False)
    homogeneous: bool = True

    def size(self, width: int | None = None, depth: int | None = None) -> tuple[int, int]:
        """Width and depth of its network: those given, else its own. Raises :class:`UsageError` below 1."""
        own = {name: parameter.default for name, parameter in inspect.signature(self.build).parameters.items()}
        return (
            at_least("width", own["width"] if width is None else width, 1),
            at_least("depth", own["depth"] if depth is None else depth, 1),
        )

    def effective_depth(self, width: int, depth: int) -> float:
        """L of its network of that size: ``depth``, or what is measured at the start in mean-field form."""
        if self.homogeneous:
            return float(depth)
        if (width, depth) == self.size():
            return self.depth
        import torch

        from gammaopt import effective_depth, wrap

        stream = self.stream()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            net = wrap(self.build(width=width, depth=depth), 1.0, depth=1.0, parametrization="mean_field")
        return effective_depth(net, stream.batches(0, 0, 1, 128)[0][0])


def _digits_mlp(width: int = 64, depth: int = 3) -> nn.Module:
    return MLP(144, 10, width=width, depth=depth)


def _parity_mlp(width: int = 64, depth: int = 3) -> nn.Module:
    return MLP(20, 2, width=width, depth=depth)


def _hermite() -> Hermite:
    return Hermite(32, ((1,), (1, 1), (1, 1, 1)), classes=2)


def _hermite_mlp(width: int = 64, depth: int = 3) -> nn.Module:
    return MLP(32, 2, width=width, depth=depth)


def _photos() -> Photos:
    """Easy crops: a few hundred small batches teach something."""
    return Photos(scale=(1.0, 1.25), colour=0.1, brightness=0.05, noise=0.03)


def _photos_cnn(width: int = 8, depth: int = 3) -> nn.Module:
    return CNN((3, 32, 32), 10, width=width, depth=depth)


def _photos_vit(width: int = 32, depth: int = 2) -> nn.Module:
    return ViT((3, 32, 32), 10, width=width, depth=depth, patch=8)


def _photos_resnet18(width: int = 4, depth: int = 2) -> nn.Module:
    return ResNet18((3, 32, 32), 10, width=width, depth=depth)


TASKS: dict[str, Task] = {
    task.name: task
    for task in [
        Task(
            name="digits",
            summary="augmented scikit-learn digits on a 12×12 canvas, 3-layer MLP of width 64",
            stream=lambda: Digits(),
            build=_digits_mlp,
            depth=3.0,
            losses=("cross_entropy", "mse"),
            base_lr={
                ("sgd", "cross_entropy"): 2.0,
                ("sgd", "mse"): 16.0,
                ("adam", "cross_entropy"): 0.5,
                ("adam", "mse"): 0.5,
            },
            # Measured by experiments/benchmarks/plateaus.py: accuracy leaves chance after 12·γ^(1/3) and 23·γ^(1/3)
            # steps, γ = 10 … 1,000.
            plateau_steps={"mse": 12.0, "cross_entropy": 23.0},
        ),
        Task(
            name="parity",
            summary="product of 3 of 20 bits, 3-layer MLP of width 64",
            stream=lambda: Parity(20, 3),
            build=_parity_mlp,
            depth=3.0,
            losses=("cross_entropy", "mse"),
            base_lr={
                ("sgd", "cross_entropy"): 2.0,
                ("sgd", "mse"): 4.0,
                ("adam", "cross_entropy"): 0.5,
                ("adam", "mse"): 0.5,
            },
            # Measured as above: 41·γ^(1/3) steps. Not measured under cross-entropy.
            plateau_steps={"mse": 41.0},
        ),
        Task(
            name="hermite",
            summary="sign of z₁ + z₁z₂ + z₁z₂z₃ in 32 dimensions, 3-layer MLP of width 64",
            stream=_hermite,
            build=_hermite_mlp,
            depth=3.0,
            losses=("cross_entropy", "mse"),
            base_lr={
                ("sgd", "cross_entropy"): 2.0,
                ("sgd", "mse"): 2.0,
                ("adam", "cross_entropy"): 0.25,
                ("adam", "mse"): 0.25,
            },
        ),
        Task(
            name="photos-cnn",
            summary="crops of ten photographs, CNN of width 8 with 3 layers",
            stream=_photos,
            build=_photos_cnn,
            depth=3.0,
            losses=("cross_entropy", "mse"),
            base_lr={
                ("sgd", "cross_entropy"): 0.03,
                ("sgd", "mse"): 0.5,
                ("adam", "cross_entropy"): 0.25,
                ("adam", "mse"): 0.25,
            },
            steps=300,
            batch_size=16,
        ),
        Task(
            name="photos-vit",
            summary="crops of ten photographs, ViT of width 32 with 2 blocks",
            stream=_photos,
            build=_photos_vit,
            depth=2.08,  # gammaopt.effective_depth, mean of 8 seeds (1.7 … 2.3)
            losses=("cross_entropy", "mse"),
            base_lr={
                ("sgd", "cross_entropy"): 0.03,
                ("sgd", "mse"): 0.125,
                ("adam", "cross_entropy"): 0.03,
                ("adam", "mse"): 0.015,
            },
            steps=300,
            batch_size=16,
            homogeneous=False,
        ),
        Task(
            name="photos-resnet18",
            summary="crops of ten photographs, ResNet-18 of width 4, batch norm",
            stream=_photos,
            build=_photos_resnet18,
            depth=2.0,  # gammaopt.effective_depth
            losses=("cross_entropy", "mse"),
            base_lr={
                ("sgd", "cross_entropy"): 0.125,
                ("sgd", "mse"): 0.5,
                ("adam", "cross_entropy"): 0.05,
                ("adam", "mse"): 0.04,
            },
            steps=150,
            batch_size=16,
            homogeneous=False,
        ),
    ]
}


def get_task(name: str) -> Task:
    """The task called ``name``. Raises :class:`UsageError` that lists the known ones."""
    return TASKS[one_of("task", name, TASKS)]
