"""Paired timing: ours and the baseline in turn, in one process, so that a noisy machine disturbs both alike."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gammaopt.tuning._frozen import git_commit


@dataclass(frozen=True)
class Row:
    """One comparison: seconds per call as medians, the median of the paired ratios, and the bar (0: none)."""

    name: str
    ours: float
    baseline: float
    ratio: float
    bar: float

    @property
    def holds(self) -> bool:
        """Whether the ratio is within its bar."""
        return not self.bar or self.ratio <= self.bar


def compare(
    name: str, ours: Callable[[], object], baseline: Callable[[], object], *, bar: float, seconds: float
) -> Row:
    """Time both in alternating order for about ``seconds``; the ratio is the median over pairs."""
    for _ in range(3):
        ours(), baseline()
    began = _timed(ours) + _timed(baseline)
    repeats = max(1, int(0.02 / max(began, 1e-9)))  # a sample is at least about 10 ms of each
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(pairs) < 9:
        if len(pairs) % 2:
            a, b = _timed(ours, repeats), _timed(baseline, repeats)
        else:
            b, a = _timed(baseline, repeats), _timed(ours, repeats)
        pairs.append((a, b))
    ratio = statistics.median(a / b for a, b in pairs)
    return Row(name, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio, bar)


def _timed(call: Callable[[], object], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """``--json FILE``, ``--check`` and ``--seconds`` for each comparison."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--check", action="store_true", help="exit 1 and name each bar that is missed")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each comparison")
    return parser


def report(rows: list[Row], options: argparse.Namespace) -> None:
    """Print the table, write JSON if asked, and exit 1 under ``--check`` if a bar is missed."""
    width = max(len(row.name) for row in rows)
    print(f"{'':{width}}   ours ms   base ms   ratio    bar")
    for row in rows:
        bar = f"{row.bar:6.2f}" if row.bar else "     –"
        print(f"{row.name:{width}} {1e3 * row.ours:9.3f} {1e3 * row.baseline:9.3f} {row.ratio:7.3f} {bar}")
    missed = [f"{row.name}: {row.ratio:.3f} against at most {row.bar:.2f}" for row in rows if not row.holds]
    write_json(options, {"rows": [asdict(row) for row in rows]}, missed)


def processor() -> str:
    """The processor's model, as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


@functools.cache  # once, ahead of what the benchmark writes itself
def commit() -> str | None:
    """The commit that is measured; written results are no change of it."""
    return git_commit(Path(__file__).parents[2], but="experiments/results")


def machine_and_date() -> dict[str, str | None]:
    """Where, when and of which commit a number was made."""
    return {
        "date": str(datetime.datetime.now(tz=datetime.UTC).date()),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "processor": processor(),
        "torch": torch.__version__,
        "git_commit": commit(),
    }


def write_json(options: argparse.Namespace, content: dict[str, object], missed: list[str]) -> None:
    """Write what was measured if asked, name the missed bars, and exit 1 for them under ``--check``."""
    if options.json:
        options.json.write_text(json.dumps({**machine_and_date(), **content}, indent=1, ensure_ascii=False) + "\n")
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    if options.check and missed:
        sys.exit(1)
