"""The device that a run trains on: its name checked, and CUDA's current device set to it while the run works.

Streams, graphs and random generators that name no device are made on CUDA's *current* device. A run on ``cuda:1``
must therefore work with that one current, and ``cuda`` means the current one, whichever that is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gammaopt._errors import UsageError


def check_device(name: str) -> None:
    """Raise :class:`UsageError` unless torch knows the device and this machine has it."""
    try:
        torch.device(name)
    except (RuntimeError, TypeError):
        raise UsageError(f"unknown device {name!r}; choose cpu, or cuda on a machine that has it") from None
    try:
        torch.empty(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        raise UsageError(f"device {name!r} can't be used: {reason}; choose cpu") from None


def cuda_device(name: str | torch.device) -> torch.device | None:
    """The CUDA device of that name with its index, or ``None`` for a device of another kind."""
    device = torch.device(name)
    if device.type != "cuda":
        return None
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


@contextmanager
def on_device(name: str | torch.device) -> Iterator[None]:
    """CUDA's current device is this one inside; nothing for a device of another kind."""
    device = cuda_device(name)
    if device is None:
        yield
        return
    with torch.cuda.device(device):
        yield


@contextmanager
def seeded(name: str | torch.device, seed: int) -> Iterator[None]:
    """The global generators of the processor and of this device, seeded for a run and given back as they were.

    ``torch.manual_seed`` would seed those of all other devices too, which nobody would give back.
    """
    device = cuda_device(name)
    with torch.random.fork_rng([] if device is None else [device]):
        torch.default_generator.manual_seed(seed)
        if device is not None:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
