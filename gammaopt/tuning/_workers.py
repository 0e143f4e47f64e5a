"""Run cells on one or several processes of this machine, and hand the records back as they finish.

A process trains its share of the cells as one stack, on one thread: a small run leaves even that idle, and several
processes use the cores better than several threads. A run's arithmetic is its own in a stack of any size, so on a
processor the numbers don't depend on how many processes there are, or on where a study was stopped.

A share in training has a checkpoint in the study's folder, ``stack-….pt``. Where it is found, its runs are a share
again, whatever else is to do: a killed study goes on in the midst of its stacks. Its finished runs stand in
``stack-….jsonl`` until all of them were handed over: training has removed the checkpoint by then.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType

import torch

from gammaopt._errors import UsageError
from gammaopt.online._checkpoint import DamagedCheckpointError, saved_runs
from gammaopt.online._run_file import RunFile, read_runs
from gammaopt.online._stack import Seeds
from gammaopt.online.ensemble import KEPT_SEEDS, together, train_many
from gammaopt.online.record import RunRecord
from gammaopt.online.train import Recipe, Run
from gammaopt.tuning._folder import Cell
from gammaopt.tuning._plan import StudyPlan

SHARE = 96  # cells that a process trains at a time: more gain little
CHECKPOINT_SECONDS = 10.0  # of training that a kill costs each process at most; writing 96 small runs takes 0.1 s


class Trainer:
    """Trains cells of one plan in this process, sharing batches and h₀ between cells of the same seed."""

    def __init__(self, recipe: Recipe, stack: int) -> None:
        self.recipe, self.stack = recipe, stack
        self._shared = Seeds(recipe)

    def __call__(self, cells: list[Cell], checkpoint: Path | None = None) -> list[RunRecord]:
        """Their records, also written beside the checkpoint as they come.

        ``stack`` is how many may be trained together, or 0 if the network can't be stacked.
        """
        threads = torch.get_num_threads()
        file = None if checkpoint is None else RunFile(finished_beside(checkpoint), RunRecord.from_dict)
        torch.set_num_threads(1)
        try:
            return train_many(
                self.recipe,
                [Run(cell.gamma, cell.lr, cell.seed) for cell in cells],
                stack=self.stack or None,
                one_at_a_time=not self.stack,
                shared=self._shared,
                checkpoint=checkpoint,
                checkpoint_seconds=CHECKPOINT_SECONDS,
                on_done=None if file is None else lambda _, records: file.add(*records),
            )
        finally:
            if file is not None:
                file.close()
            self._shared.forget(but=KEPT_SEEDS)
            torch.set_num_threads(threads)


class Workers:
    """``jobs`` processes that train cells; with ``jobs=1`` it is this process. A context manager.

    ``stack`` is how many runs may be trained together, and 0 for none; what :func:`together` finds if ``None``.
    ``checkpoints`` is the folder for the state of what is in training; without one a kill loses whole shares.
    """

    def __init__(self, plan: StudyPlan, jobs: int, stack: int | None = None, checkpoints: Path | None = None) -> None:
        self._plan, self._jobs, self._stack, self._checkpoints = plan, jobs, stack, checkpoints
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
        if self._checkpoints is not None:
            for record in _finished(self._checkpoints, cells):
                cells.remove(Cell(record.gamma, record.lr, record.seed))
                yield record
        begun = {} if self._checkpoints is None else _begun(self._checkpoints, cells)
        taken = {cell for share in begun.values() for cell in share}
        fresh = _shares([cell for cell in cells if cell not in taken], self._jobs, min(SHARE, self._stack or 1))
        shares = [*((share, path) for path, share in begun.items()), *((share, self._path(share)) for share in fresh)]
        if self._jobs == 1:
            self._trainer = self._trainer or Trainer(self._plan.recipe(), self._stack)
            for share, path in shares:
                yield from self._trainer(share, path)
                _handed_over(path)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            given = self._plan, self._stack
            self._pool = ProcessPoolExecutor(self._jobs, context, initializer=_start_worker, initargs=given)
        try:
            with _sigint_held_back():
                futures: dict[Future[list[RunRecord]], Path | None] = {
                    self._pool.submit(_run_in_worker, share, path): path for share, path in shares
                }
            for future in as_completed(futures):
                yield from future.result()
                _handed_over(futures[future])
        except BrokenProcessPool:
            raise UsageError(
                "a worker process died (out of memory, or killed); run the same command again to go on, "
                "with a smaller --jobs if it was memory"
            ) from None

    def _path(self, share: list[Cell]) -> Path | None:
        """Where the checkpoint of a share goes: a name of its own."""
        if self._checkpoints is None:
            return None
        return self._checkpoints / f"stack-{hashlib.blake2b(repr(share).encode(), digest_size=6).hexdigest()}.pt"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if kind is not None:  # don't wait for runs whose result nobody will read
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _begun(folder: Path, cells: list[Cell]) -> dict[Path, list[Cell]]:
    """Checkpoint → the cells of the share that it is of, for shares of these cells that a killed process had begun."""
    left, begun = set(cells), {}
    for path in sorted(folder.glob("stack-*.pt")):
        try:
            share = [Cell(*run) for run in saved_runs(path)]
        except DamagedCheckpointError:
            _set_aside(path, ".damaged")
            continue
        # A kill between two of its runs' records leaves a checkpoint of which some are done.
        if share := [cell for cell in share if cell in left]:
            begun[path] = share
            left.difference_update(share)
    return begun


def _set_aside(path: Path, suffix: str) -> None:
    """Rename a file that can't be read, and say so: what it held costs time, and no result."""
    kept = path.replace(path.with_suffix(suffix))
    warnings.warn(
        f"{path} is damaged and is kept as {kept.name}; the runs that it held are trained again", stacklevel=2
    )


def finished_beside(checkpoint: Path) -> Path:
    """Where the finished runs of a share are kept until all of them were handed over."""
    return checkpoint.with_suffix(".jsonl")


def _finished(folder: Path, cells: list[Cell]) -> Iterator[RunRecord]:
    """The records of these cells that a killed process had finished and not handed over."""
    left = set(cells)
    for path in sorted(folder.glob("stack-*.jsonl")):
        try:
            records, _ = read_runs(path, RunRecord.from_dict)
        except UsageError:  # a help to go on from, as the checkpoint is: what it held is trained again
            _set_aside(path, ".damaged-runs")
            continue
        for record in records:
            if (cell := Cell(record.gamma, record.lr, record.seed)) in left:
                left.remove(cell)
                yield record
        path.unlink()


def _handed_over(checkpoint: Path | None) -> None:
    if checkpoint is not None:
        finished_beside(checkpoint).unlink(missing_ok=True)


def forget_begun(folder: Path) -> None:
    """Remove what a finished study no longer needs: checkpoints, and runs that stand in its own file."""
    # The dotted ones a kill left that came as they were written; this process holds the folder.
    for path in [*folder.glob("stack-*.pt"), *folder.glob("stack-*.jsonl"), *folder.glob(".stack-*.pt.*")]:
        path.unlink(missing_ok=True)


def _shares(cells: list[Cell], jobs: int, size: int) -> list[list[Cell]]:
    """Equal shares of at most ``size`` cells, as many for each process, with the cells of a seed side by side."""
    cells = sorted(cells, key=lambda cell: cell.seed)
    if not cells:
        return []
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


def _run_in_worker(cells: list[Cell], checkpoint: Path | None) -> list[RunRecord]:
    return _worker(cells, checkpoint)
