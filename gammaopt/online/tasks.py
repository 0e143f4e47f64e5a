"""The bundled tasks: what ``gammaopt tasks`` lists and ``gammaopt tune TASK`` studies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from gammaopt._errors import one_of
from gammaopt._laws import Loss, OptimizerFamily
from gammaopt.online.models import MLP
from gammaopt.online.streams import Digits, Parity, Stream


@dataclass(frozen=True)
class Task:
    """A named stream with a network for it, and where to start looking for its rate.

    Attributes:
        name: what a user types.
        summary: one line for the list of tasks.
        stream: makes the stream.
        build: makes a fresh network; takes ``width`` and ``depth`` too.
        depth: effective depth of that network.
        losses: losses it can be trained with, the default first.
        base_lr: (optimizer family, loss) → a rate that trains at γ = 1 in mean-field form. Only the centre of the
            searched range, five octaves on either side, for every γ alike.
        steps, batch_size: default budget.
        plateau_steps: loss → T₁, the steps that γ = 1 stays on its plateau at the best rate under SGD; it sets the
            range of γ that a budget can train.
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


def _digits_mlp(width: int = 64, depth: int = 3) -> nn.Module:
    return MLP(144, 10, width=width, depth=depth)


def _parity_mlp(width: int = 64, depth: int = 3) -> nn.Module:
    return MLP(20, 2, width=width, depth=depth)


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
    ]
}


def get_task(name: str) -> Task:
    """The task called ``name``. Raises :class:`UsageError` that lists the known ones."""
    return TASKS[one_of("task", name, TASKS)]
