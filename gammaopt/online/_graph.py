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

from gammaopt.online._stack import Stack

WARM_UP = 3  # ordinary steps before recording: libraries choose their kernels and take their memory then

Made = tuple[Tensor, Tensor]
Record = Callable[[Callable[[], Made]], Callable[[], Made]]


def cuda_graph(function: Callable[[], Made]) -> Callable[[], Made]:
    """Record what ``function`` starts on the accelerator; what comes back replays it into the same tensors."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = function()

    def replay() -> Made:
        graph.replay()
        return made

    return replay


class Stepper:
    """Takes the steps of a stack, one at each call: recorded and replayed on an accelerator, else as they are.

    Args:
        stack: whose steps; when it loses runs, its next steps are recorded anew.
        record: makes the replay of a function; :func:`cuda_graph` on an accelerator if ``None``.
    """

    def __init__(self, stack: Stack, record: Record | None = None) -> None:
        self._stack = stack
        cuda = torch.device(stack.recipe.device).type == "cuda"
        self._record = record or (cuda_graph if cuda else None)
        self._stream = torch.cuda.Stream() if cuda else None
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
            return self._beside()
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

    def _beside(self) -> Made:
        """An ordinary step on a stream of its own, as recording wants its warm-up."""
        if self._stream is None:
            return self._stack.train_step()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            made = self._stack.train_step()
        torch.cuda.current_stream().wait_stream(self._stream)
        return made

    def _recorded(self, record: Record) -> Callable[[], Made]:
        stack = self._stack
        inputs, targets, frozen = (tensor.clone() for tensor in stack.batch())
        self._places = inputs, targets, frozen
        # float64, as the numbers they stand for: a tensor of no dimensions doesn't widen what it divides.
        places = [torch.ones((), dtype=torch.float64, device=inputs.device) for _ in stack.corrections()]
        self._corrections = cast("tuple[Tensor, Tensor]", tuple(places))
        return record(lambda: stack.advance(inputs, targets, frozen, self._corrections))
