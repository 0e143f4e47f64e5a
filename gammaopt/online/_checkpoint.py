"""The state of a stack in training on disk, so that a killed job goes on where it stopped."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from gammaopt._errors import UsageError
from gammaopt._files import write_atomically
from gammaopt.online._stack import Seeds, Stack
from gammaopt.online._traces import Traces
from gammaopt.online.train import Recipe, Run


class DamagedCheckpointError(UsageError):
    """A checkpoint that can't be read, e.g. one that was cut off in copying."""


Scores = dict[tuple[Run, int], tuple[float, float]]  # (run, budget) → held-out accuracy and loss


def _settings(recipe: Recipe, ends: list[int]) -> dict[str, Any]:
    """The part of what a checkpoint must agree with that needs no network."""
    from gammaopt import __version__

    return {
        "versions": [__version__, str(torch.__version__)],
        "budgets": list(ends),
        "recipe": [recipe.loss, recipe.optimizer, recipe.momentum, recipe.batch_size, recipe.parametrization],
        "inputs": [recipe.stream.name, str(recipe.dtype)],
        "law": [recipe.depth, recipe.knee],
    }


def _identity(seeds: Seeds, runs: list[Run], ends: list[int]) -> dict[str, Any]:
    """What a checkpoint must agree with. The rates tell depth, knee, base and parametrization as they were measured."""
    scales = [seeds.scales(run) for run in runs]
    net = seeds[runs[0].seed].net
    shapes = {name: list(parameter.shape) for name, parameter in net.named_parameters()}
    trainable = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    return {
        **_settings(seeds.recipe, ends),
        "runs": [tuple(run) for run in runs],
        "network": list(shapes.items()),
        # What has no parameters, e.g. the activations, and the modules' settings.
        "modules": hashlib.blake2b(repr(net).encode(), digest_size=16).hexdigest(),
        # Six digits: a last bit may differ on the machine that goes on.
        "rates": {name: [f"{s[name].lr:.6g} {s[name].eps:.6g}" for s in scales] for name in trainable},
    }


def save(path: Path, runs: list[Run], ends: list[int], stack: Stack, traces: Traces, scores: Scores) -> None:
    """Replace the checkpoint, whole or not at all: two processes may write it at once, and a disk may be full."""
    content = {
        "of": _identity(stack.seeds, runs, ends),
        "step": stack.step,
        "alive": [runs.index(run) for run in stack.runs],
        "parameters": {name: stacked.detach() for name, stacked in stack.parameters.items()},
        "states": stack.states,
        "losses": traces.losses[:, : traces.step].clone(),  # a view would be written with all that is behind it
        "shares": traces.shares[:, : traces.step].clone(),
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


def restore(path: Path, ends: list[int], stack: Stack, traces: Traces, scores: Scores) -> bool:
    """Go on from a checkpoint that holds the stack's runs, these alone or among others; any other is left alone.

    Returns:
        Whether there was one.

    Raises:
        DamagedCheckpointError: if the file is no whole checkpoint.
    """
    content = _read(path, stack.recipe.device)
    runs, asked = stack.runs, set(stack.runs)
    if content is None:
        return False
    saved = _runs(content)
    if not asked <= set(saved) or not _agrees(content, stack.seeds, ends):
        return False
    alive = [saved[i] for i in content["alive"]]
    rows = [i for i, run in enumerate(alive) if run in asked]
    stack.keep([runs.index(alive[i]) for i in rows])
    chosen = torch.tensor(rows, dtype=torch.long, device=stack.recipe.device)
    parameters, *states = (
        {name: stacked[chosen] for name, stacked in state.items()}
        for state in (content["parameters"], *content["states"])
    )
    stack.load(content["step"], parameters, states)
    held = [saved.index(run) for run in runs]
    traces.load(content["losses"].cpu()[held], content["shares"].cpu()[held])  # read onto the stack's device
    scores.update({(saved[i], end): (accuracy, loss) for i, end, accuracy, loss in content["scores"]})
    return True


def begun_runs(path: Path, seeds: Seeds, ends: list[int]) -> list[Run]:
    """The runs of a checkpoint that a stack of this recipe and these budgets can go on from, in its order."""
    content = _read(path, "cpu")
    return _runs(content) if content is not None and _agrees(content, seeds, ends) else []


def _runs(content: dict[str, Any]) -> list[Run]:
    return [Run(*run) for run in content["of"]["runs"]]


def _agrees(content: dict[str, Any], seeds: Seeds, ends: list[int]) -> bool:
    of, settings = content["of"], _settings(seeds.recipe, ends)
    same: bool = all(of.get(name) == value for name, value in settings.items())
    return same and of == _identity(seeds, _runs(content), ends)


def saved_runs(path: Path) -> list[Run]:
    """The runs of the stack that a checkpoint is of, in its order; none if there is no checkpoint."""
    content = _read(path, "cpu")
    return [] if content is None else _runs(content)


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
