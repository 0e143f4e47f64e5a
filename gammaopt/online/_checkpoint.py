"""The state of a stack in training on disk, so that a killed job goes on where it stopped."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from gammaopt._errors import UsageError
from gammaopt._files import write_atomically
from gammaopt.online._stack import Stack, Traces
from gammaopt.online.train import Recipe, Run


class DamagedCheckpointError(UsageError):
    """A checkpoint that can't be read, e.g. one that was cut off in copying."""


Scores = dict[tuple[Run, int], tuple[float, float]]  # (run, budget) → held-out accuracy and loss


def _identity(recipe: Recipe, runs: list[Run]) -> dict[str, Any]:
    """What a checkpoint must agree with."""
    return {
        "runs": [tuple(run) for run in runs],
        "recipe": [recipe.loss, recipe.optimizer, recipe.momentum, recipe.batch_size, recipe.parametrization],
        "inputs": [recipe.stream.name, str(recipe.dtype)],
    }


def save(path: Path, runs: list[Run], stack: Stack, traces: Traces, scores: Scores) -> None:
    """Replace the checkpoint, whole or not at all: two processes may write it at once, and a disk may be full."""
    content = {
        "of": _identity(stack.recipe, runs),
        "step": stack.step,
        "alive": [runs.index(run) for run in stack.runs],
        "parameters": {name: stacked.detach() for name, stacked in stack.parameters.items()},
        "states": stack.states,
        "losses": list(traces.losses.values()),
        "shares": list(traces.shares.values()),
        "scores": [(runs.index(run), end, *score) for (run, end), score in scores.items()],
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise UsageError(
            f"the checkpoint {path} can't be written ({error.strerror}); "
            "make room, or choose another place, and run the same command to go on"
        ) from None


def restore(path: Path, stack: Stack, traces: Traces, scores: Scores) -> None:
    """Go on from a checkpoint of the same stack, if there is one; one of other runs is left alone.

    Raises:
        DamagedCheckpointError: if the file is no whole checkpoint.
    """
    if not path.exists():
        return
    try:
        content = torch.load(path, map_location=stack.recipe.device, weights_only=True)
        whose = content["of"]
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise DamagedCheckpointError(
            f"{path} can't be read as a checkpoint ({type(error).__name__}); remove it"
        ) from error
    runs = stack.runs
    if whose != _identity(stack.recipe, runs):
        return
    stack.keep(content["alive"])
    stack.load(content["step"], content["parameters"], content["states"])
    traces.losses = dict(zip(runs, content["losses"], strict=True))
    traces.shares = dict(zip(runs, content["shares"], strict=True))
    scores.update({(runs[i], end): (accuracy, loss) for i, end, accuracy, loss in content["scores"]})
