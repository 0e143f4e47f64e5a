"""The numbers that a training loop tells at each step, kept where they are: reading one would wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024  # steps whose numbers are moved at once


class Told:
    """A number of each step, in blocks on the device that it came from, so that no step waits; full ones on the CPU."""

    def __init__(self) -> None:
        self._full: list[Tensor] = []
        self._block = torch.empty(0)
        self._used = 0

    def add(self, value: Tensor | float) -> None:
        """Keep a number; a tensor is not read."""
        device = value.device if isinstance(value, Tensor) else torch.device("cpu")
        if self._used == len(self._block) or device != self._block.device:
            self._full.append(self._rest())
            with torch.inference_mode(False):
                precision = torch.float32 if device.type == "mps" else torch.float64
                self._block, self._used = torch.empty(BLOCK, dtype=precision, device=device), 0
        self._block[self._used] = value.detach().reshape(()) if isinstance(value, Tensor) else value
        self._used += 1

    def _rest(self) -> Tensor:
        return self._block[: self._used].to("cpu", torch.float64, copy=True)

    def all(self) -> Tensor:
        """All numbers so far (float64, on the CPU)."""
        return torch.cat([*self._full, self._rest()])
