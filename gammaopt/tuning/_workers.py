"""Run cells on one or several processes of this machine, and hand the records back as they finish.

Each run is small and single-threaded, so several at once use the cores better than one run with several threads; and
the numbers don't depend on how many there are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import TracebackType

import torch

from gammaopt._errors import UsageError
from gammaopt.online.record import RunRecord
from gammaopt.online.streams import Batches
from gammaopt.online.train import Recipe, train
from gammaopt.tuning._folder import Cell
from gammaopt.tuning._plan import StudyPlan

KEPT_SEEDS = 4  # whose batches a process keeps: the tuning seeds come round with every trial


class Trainer:
    """Trains cells of one plan in this process, sharing batches between cells of the same seed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._batches: OrderedDict[int, Batches] = OrderedDict()

    def __call__(self, cell: Cell) -> RunRecord:
        recipe = self.recipe
        if cell.seed not in self._batches:
            self._batches[cell.seed] = Batches(recipe.stream, cell.seed, recipe.steps, recipe.batch_size, recipe.device)
        self._batches.move_to_end(cell.seed)
        if len(self._batches) > KEPT_SEEDS:
            self._batches.popitem(last=False)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            batches = self._batches[cell.seed]
            return train(recipe, gamma=cell.gamma, lr=cell.lr, seed=cell.seed, batches=batches)
        finally:
            torch.set_num_threads(threads)


class Workers:
    """``jobs`` processes that train cells; with ``jobs=1`` it is this process. A context manager."""

    def __init__(self, plan: StudyPlan, jobs: int) -> None:
        self._plan, self._jobs = plan, jobs
        self._trainer: Trainer | None = None
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def run(self, cells: Iterable[Cell]) -> Iterator[RunRecord]:
        """Train the cells and yield their records as they finish, in no particular order."""
        cells = list(cells)
        if self._jobs == 1 or not cells:
            self._trainer = self._trainer or Trainer(self._plan.recipe())
            yield from map(self._trainer, cells)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._jobs, context, initializer=_start_worker, initargs=(self._plan,))
        try:
            with _sigint_held_back():
                futures: list[Future[RunRecord]] = [self._pool.submit(_run_in_worker, cell) for cell in cells]
            for future in as_completed(futures):
                yield future.result()
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


def _start_worker(plan: StudyPlan) -> None:
    global _worker
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = Trainer(plan.recipe())


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _run_in_worker(cell: Cell) -> RunRecord:
    return _worker(cell)
