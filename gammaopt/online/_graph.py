"""The steps of a stack on an accelerator: recorded once as a CUDA graph, then replayed.

A step of a small network is a few hundred kernels of some microseconds each, and starting them one by one takes longer
than running them. A replayed graph starts them all with one call. It reads and writes the same memory each time, so
what changes from step to step (batch, h₀, Adam's bias corrections) is copied to fixed places first. The arithmetic is
that of :meth:`Stack.advance`, so is the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from gammaopt.online._device import cuda_device
from gammaopt.online._stack import Stack

WARM_UP = 3  # ordinary steps before recording: libraries choose their kernels and take their memory then

Made = tuple[Tensor, Tensor]
Record = Callable[[Callable[[], Made]], Callable[[], Made]]


class CudaGraphs:
    """Records and replays on one CUDA device, whichever is current: :func:`torch.cuda.graph` by itself captures on a
    stream that it keeps for the whole process, on the device that was current when it was first used.

    Args:
        device: with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], Made]) -> Callable[[], Made]:
        """Record what ``function`` starts on the accelerator; what comes back replays it into the same tensors."""
        with torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                made = function()

        def replay() -> Made:
            with torch.cuda.device(self._device):
                graph.replay()
            return made

        return replay

    def beside(self, function: Callable[[], Made]) -> Made:
        """Call ``function`` on the stream that records, as recording wants its warm-up."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            made = function()
        current.wait_stream(self._stream)
        return made


class Stepper:
    """Takes the steps of a stack, one at each call: recorded and replayed on an accelerator, else as they are.

    Args:
        stack: whose steps; when it loses runs, its next steps are recorded anew.
        record: makes the replay of a function; if ``None``, :class:`CudaGraphs` of the recipe's device if that is one.
    """

    def __init__(self, stack: Stack, record: Record | None = None) -> None:
        self._stack = stack
        device = cuda_device(stack.recipe.device)
        self._graphs = None if device is None else CudaGraphs(device)
        self._record = record or self._graphs
        self._forget()

    def _forget(self) -> None:
        self._runs, self._ordinary = self._stack.runs, WARM_UP
        self._replay: Callable[[], Made] | None = None

    def __call__(self) -> Made:
        """Losses and shares of right answers before the step, (K,)."""
        stack = self._stack
        if self._record is None:
            return stack.train_step()
        if stack.runs is not self._runs:
            self._forget()
        if self._ordinary:
            self._ordinary -= 1
            return self._graphs.beside(stack.train_step) if self._graphs else stack.train_step()
        if self._replay is None:
            try:
                self._replay = self._recorded(self._record)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a module that can't be recorded, e.g. one that reads a number back
                self._record = None
                return stack.train_step()
        for place, tensor in zip(self._places, stack.batch(), strict=True):
            place.copy_(tensor)
        stack.step += 1
        for place, number in zip(self._corrections, stack.corrections(), strict=True):
            place.fill_(number)
        losses, shares = self._replay()
        return losses.clone(), shares.clone()

    def _recorded(self, record: Record) -> Callable[[], Made]:
        stack = self._stack
        inputs, targets, frozen = (tensor.clone() for tensor in stack.batch())
        self._places = inputs, targets, frozen
        # float64, as the numbers they stand for: a tensor of no dimensions doesn't widen what it divides.
        places = [torch.ones((), dtype=torch.float64, device=inputs.device) for _ in stack.corrections()]
        self._corrections = cast("tuple[Tensor, Tensor]", tuple(places))
        return record(lambda: stack.advance(inputs, targets, frozen, self._corrections))
