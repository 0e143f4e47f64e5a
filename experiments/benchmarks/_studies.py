"""What benchmarks over many simulated studies share: their options, and doing the studies in several processes."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from _paired import argument_parser

Result = TypeVar("Result")


def studies_parser(description: str | None, presets: Iterable[str]) -> argparse.ArgumentParser:
    """The options of every benchmark, ``--preset`` and ``--jobs``."""
    parser = argument_parser(description)
    parser.add_argument("--preset", choices=presets, default="cpu")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    return parser


def in_processes(function: Callable[..., Result], work: Sequence[tuple[Any, ...]], jobs: int) -> list[Result]:
    """``function(*arguments)`` for each piece of work, in order; in this process if there is one job."""
    if jobs == 1:
        return [function(*arguments) for arguments in work]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, *zip(*work, strict=True), chunksize=max(1, len(work) // (4 * jobs))))
