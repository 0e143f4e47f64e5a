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
from gammaopt.online.train import Run


class DamagedCheckpointError(UsageError):
    """A checkpoint that can't be read, e.g. one that was cut off in copying."""


Scores = dict[tuple[Run, int], tuple[float, float]]  # (run, budget) → held-out accuracy and loss


def _identity(stack: Stack, runs: list[Run], ends: list[int]) -> dict[str, Any]:
    """What a checkpoint must agree with. The rates tell depth, knee, base and parametrization as they were measured."""
    recipe, seeds = stack.recipe, stack.seeds
    scales = [seeds.scales(run) for run in runs]
    net = seeds[runs[0].seed].net
    return {
        "runs": [tuple(run) for run in runs],
        "budgets": list(ends),
        "recipe": [recipe.loss, recipe.optimizer, recipe.momentum, recipe.batch_size, recipe.parametrization],
        "inputs": [recipe.stream.name, str(recipe.dtype)],
        "network": [(name, list(parameter.shape)) for name, parameter in net.named_parameters()],
        "law": [recipe.depth, recipe.knee],
        # Six digits: a last bit may differ on the machine that goes on.
        "rates": {name: [f"{s[name].lr:.6g} {s[name].eps:.6g}" for s in scales] for name in stack.parameters},
    }


def save(path: Path, runs: list[Run], ends: list[int], stack: Stack, traces: Traces, scores: Scores) -> None:
    """Replace the checkpoint, whole or not at all: two processes may write it at once, and a disk may be full."""
    content = {
        "of": _identity(stack, runs, ends),
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
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise UsageError(
            f"the checkpoint {path} can't be written ({error.strerror}); "
            "make room, or choose another place, and run the same command to go on"
        ) from None


def restore(path: Path, ends: list[int], stack: Stack, traces: Traces, scores: Scores) -> None:
    """Go on from a checkpoint of the same stack, if there is one; one of anything else is left alone.

    Raises:
        DamagedCheckpointError: if the file is no whole checkpoint.
    """
    content = _read(path, stack.recipe.device)
    runs = stack.runs
    if content is None or content["of"] != _identity(stack, runs, ends):
        return
    stack.keep(content["alive"])
    stack.load(content["step"], content["parameters"], content["states"])
    for there, here in ((content["losses"], traces.losses), (content["shares"], traces.shares)):
        here.update(zip(runs, (trace.cpu() for trace in there), strict=True))  # read onto the stack's device
    scores.update({(runs[i], end): (accuracy, loss) for i, end, accuracy, loss in content["scores"]})


def saved_runs(path: Path) -> list[Run]:
    """The runs of the stack that a checkpoint is of, in its order; none if there is no checkpoint."""
    content = _read(path, "cpu")
    return [] if content is None else [Run(*run) for run in content["of"]["runs"]]


def _read(path: Path, device: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        content["of"]["runs"]
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise DamagedCheckpointError(
            f"{path} can't be read as a checkpoint ({type(error).__name__}); move it away, or give another file"
        ) from error
    return content
