"""What experiments share: training a grid of runs on all cores, finding the best rate, and writing a result."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gammaopt.online import Recipe, RunRecord, train


class Job(NamedTuple):
    """One run of a sweep."""

    recipe: Recipe
    gamma: float
    lr: float
    seed: int


def run_all(jobs: Iterable[Job]) -> list[RunRecord]:
    """Train the jobs, one thread each, on as many processes as there are cores; records in the jobs' order."""
    with ProcessPoolExecutor(
        len(os.sched_getaffinity(0)),
        multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        return list(pool.map(_run, jobs))


def _run(job: Job) -> RunRecord:
    return train(job.recipe, gamma=job.gamma, lr=job.lr, seed=job.seed)


def score(record: RunRecord) -> float:
    """Log of the held-out loss, the lower the better; infinite for a diverged run."""
    return math.inf if record.final_loss is None else math.log(max(record.final_loss, 1e-30))


def best_rate(log10_rates: Sequence[float], scores: Sequence[float]) -> float:
    """log₁₀ of the best rate: the vertex of a parabola through the lowest score and its finite neighbours.

    Raises:
        ValueError: if the lowest score lies at the end of the rates: the grid is too short to tell.
    """
    i = int(np.argmin(scores))
    if i in (0, len(scores) - 1):
        raise ValueError(f"the best rate 10^{log10_rates[i]:.2f} lies at the end of its grid; widen the grid")
    left, middle, right = scores[i - 1], scores[i], scores[i + 1]
    if not math.isfinite(left + right) or left + right - 2 * middle <= 0:
        return log10_rates[i]
    shift = 0.5 * (left - right) / (left + right - 2 * middle)
    return log10_rates[i] + shift * (log10_rates[i + 1] - log10_rates[i])


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope and its standard error (0 for two points)."""
    design = np.stack([np.asarray(x), np.ones(len(x))], axis=1)
    fit, residual, _, _ = np.linalg.lstsq(design, np.asarray(y), rcond=None)
    if len(x) < 3 or not residual.size:
        return float(fit[0]), 0.0
    variance = float(residual[0]) / (len(x) - 2) / float(((np.asarray(x) - np.mean(x)) ** 2).sum())
    return float(fit[0]), math.sqrt(variance)


def parser(description: str | None, name: str, presets: Iterable[str]) -> argparse.ArgumentParser:
    """The arguments every experiment takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--preset", choices=list(presets), default="cpu")
    made.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / name)
    return made


def machine() -> str:
    """The processor's model and how many of its cores there are."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    model = models[0].partition(":")[2].strip() if models else platform.machine()
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def write(folder: Path, preset: str, content: dict[str, Any]) -> Path:
    """Write ``PRESET.json`` with date and machine; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"date": str(datetime.datetime.now(tz=datetime.UTC).date()), "machine": machine()}
    path = folder / f"{preset}.json"
    path.write_text(json.dumps({**made, **content}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
