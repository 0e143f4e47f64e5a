"""Run cells on one or several processes of this machine, and hand the records back as they finish.

A process trains its share of the cells as one stack, on one thread: a small run leaves even that idle, and several
processes use the cores better than several threads. A run's arithmetic is its own in a stack of any size, so on a
processor the numbers don't depend on how many processes there are, or on where a study was stopped.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing.connection import wait
from types import TracebackType

import torch

from gammaopt._errors import UsageError
from gammaopt.online._stack import Seeds
from gammaopt.online.ensemble import KEPT_SEEDS, together, train_many
from gammaopt.online.record import RunRecord
from gammaopt.online.train import Recipe, Run
from gammaopt.tuning._folder import Cell
from gammaopt.tuning._plan import StudyPlan

SHARE = 96  # cells that a process trains at a time: more gain little, and a kill would cost as much more


class Trainer:
    """Trains cells of one plan in this process, sharing batches and h₀ between cells of the same seed."""

    def __init__(self, recipe: Recipe, stack: int) -> None:
        self.recipe, self.stack = recipe, stack
        self._shared = Seeds(recipe)

    def __call__(self, cells: list[Cell]) -> list[RunRecord]:
        """Their records. ``stack`` is how many may be trained together, or 0 if the network can't be stacked."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return train_many(
                self.recipe,
                [Run(cell.gamma, cell.lr, cell.seed) for cell in cells],
                stack=self.stack or None,
                one_at_a_time=not self.stack,
                shared=self._shared,
            )
        finally:
            self._shared.forget(but=KEPT_SEEDS)
            torch.set_num_threads(threads)


class Workers:
    """``jobs`` processes that train cells; with ``jobs=1`` it is this process. A context manager.

    ``stack`` is how many runs may be trained together, and 0 for none; what :func:`together` finds if ``None``.
    """

    def __init__(self, plan: StudyPlan, jobs: int, stack: int | None = None) -> None:
        self._plan, self._jobs, self._stack = plan, jobs, stack
        self._trainer: Trainer | None = None
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def run(self, cells: Iterable[Cell]) -> Iterator[RunRecord]:
        """Train the cells and yield their records as they finish, in no particular order."""
        cells = list(cells)
        if not cells:
            return
        if self._stack is None:
            self._stack = together(self._plan.recipe())
        shares = _shares(cells, self._jobs, min(SHARE, self._stack or 1))
        if self._jobs == 1:
            self._trainer = self._trainer or Trainer(self._plan.recipe(), self._stack)
            for share in shares:
                yield from self._trainer(share)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            given = self._plan, self._stack
            self._pool = ProcessPoolExecutor(self._jobs, context, initializer=_start_worker, initargs=given)
        try:
            with _sigint_held_back():
                futures: list[Future[list[RunRecord]]] = [self._pool.submit(_run_in_worker, share) for share in shares]
            for future in as_completed(futures):
                yield from future.result()
        except BrokenProcessPool:
            raise UsageError(
                "a worker process died (out of memory, or killed); run the same command again to go on, "
                "with a smaller --jobs if it was memory"
            ) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if kind is not None:  # don't wait for runs whose result nobody will read
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _shares(cells: list[Cell], jobs: int, size: int) -> list[list[Cell]]:
    """Equal shares of at most ``size`` cells, as many for each process, with the cells of a seed side by side."""
    cells = sorted(cells, key=lambda cell: cell.seed)
    rounds = math.ceil(len(cells) / (jobs * size))
    count = min(rounds * jobs, len(cells))
    bounds = [round(i * len(cells) / count) for i in range(count + 1)]
    return [cells[a:b] for a, b in pairwise(bounds)]


@contextmanager
def _sigint_held_back() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C, which reaches the whole group: the parent ends its workers.

    Blocked and not ignored: a Ctrl-C that comes now reaches this process when the block is over.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: Trainer


def _start_worker(plan: StudyPlan, stack: int) -> None:
    global _worker
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = Trainer(plan.recipe(), stack)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _run_in_worker(cells: list[Cell]) -> list[RunRecord]:
    return _worker(cells)
