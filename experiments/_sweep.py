"""What sweeps share: runs on all cores that a kill does not lose, the best rate and the stable edge, and slopes."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from gammaopt._errors import UsageError
from gammaopt.online import Recipe, RunRecord, train
from gammaopt.online.ensemble import Progress
from gammaopt.online.streams import Batches

Task = TypeVar("Task")
Result = TypeVar("Result")


class Job(NamedTuple):
    """One run of a sweep."""

    recipe: Recipe
    gamma: float
    lr: float
    seed: int


LEARNED = 0.8  # of its first loss, at which a run ends that trains


class EdgeJob(NamedTuple):
    """A search for the largest rate that trains; rates in decades of c = η/s(γ).

    A run trains if it ends below ``learned`` of its first loss, that of f = 0. A network that died and answers a
    constant keeps 0.9 of it where there are ten classes. The edge is known within half of ``tolerance``, in decades.
    """

    recipe: Recipe
    gamma: float
    seed: int
    low: float
    high: float
    learned: float = LEARNED
    tolerance: float = 0.05


STEP = 0.4  # decades: first down from the top, then by halves


def run_all(jobs: Mapping[str, Job], kept: Path, cores: int | None = None) -> dict[str, RunRecord]:
    """Train the named jobs, one thread each, on ``cores`` processes (all if ``None``); see :func:`resumed`."""
    done = resumed(_run, jobs, kept, cores)
    return {name: RunRecord.from_dict(json.loads(line)) for name, line in done.items()}


def stable_edges(jobs: Mapping[str, EdgeJob], kept: Path, cores: int | None = None) -> dict[str, float]:
    """log₁₀ η of each named job's stable edge; see :func:`stable_edge` and :func:`resumed`."""
    return resumed(stable_edge, jobs, kept, cores)


def resumed(
    function: Callable[[Task], Result], tasks: Mapping[str, Task], kept: Path, cores: int | None
) -> dict[str, Result]:
    """``function`` of each named task; what the JSON-lines file ``kept`` has of them is not computed again.

    A name must hold all that a result depends on, or the file's own name must. Results are JSON values. A last line
    that was cut off by a kill counts as none.
    """
    found: dict[str, Result] = {}
    for line in kept.read_text(encoding="utf-8").splitlines() if kept.exists() else ():
        try:
            name, result = json.loads(line)
        except ValueError:
            continue
        found[name] = result
    missing = [name for name in tasks if name not in found]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with open(kept, "a", encoding="utf-8") as file:
        file.write("\n" if file.tell() else "")  # after a line that may have been cut off

        def keep(number: int, result: Result) -> None:
            file.write(json.dumps([missing[number], result]) + "\n")
            file.flush()

        fresh = on_all_cores(function, [tasks[name] for name in missing], cores, keep)
    found.update(zip(missing, fresh, strict=True))
    return {name: found[name] for name in tasks}


def progress(what: str) -> Callable[[float, float], None]:
    """``show(done, total)`` on stderr: one line that moves on a terminal, else a line each half minute."""
    terminal, began = sys.stderr.isatty(), time.monotonic()
    every, last = (0.5, 0.0) if terminal else (30.0, began)

    def show(done: float, total: float) -> None:
        nonlocal last
        now, ended = time.monotonic(), done >= total
        if now - last < every and not (terminal and ended):
            return
        last = now
        told = f"  {what}: {done:,.0f} of {total:,.0f} in {now - began:.0f} s"
        print(
            f"\r{told:<70}" if terminal else told,
            end="\n" if ended or not terminal else "",
            file=sys.stderr,
            flush=True,
        )

    return show


def steps_done(what: str) -> Callable[[Progress], None]:
    """:func:`progress` for the run-steps of a portrait."""
    show = progress(f"{what}, run-steps")
    return lambda made: show(made.done, made.total)


def on_all_cores(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    cores: int | None,
    on_done: Callable[[int, Result], object] | None = None,
) -> list[Result]:
    """``function`` of each task, one thread each, in order; ``on_done`` is told each result and its number at once.

    Where a task fails, those that run end, with those that were handed out already, ``cores`` + 1 at most, and no other
    begins; Ctrl-C ends them all. ``on_done`` is told what was made until then.
    """
    results: dict[int, Result] = {}
    show = progress(getattr(function, "__name__", "runs").strip("_"))

    def keep(number: int, result: Result) -> None:
        if on_done is not None:
            on_done(number, result)
        results[number] = result
        show(len(results), len(tasks))

    cores = cores or len(os.sched_getaffinity(0))
    if cores == 1:  # in this process: starting one costs seconds
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for number, task in enumerate(tasks):
                keep(number, function(task))
        finally:
            torch.set_num_threads(threads)
    else:
        others = set(multiprocessing.active_children())
        with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), initializer=_begin) as pool:
            numbers: dict[Future[Result], int] = {}
            try:
                try:
                    for number, task in enumerate(tasks):
                        numbers[pool.submit(function, task)] = number
                    for future in as_completed(numbers):
                        keep(numbers[future], future.result())
                except Exception:
                    pool.shutdown(cancel_futures=True)
                    raise
            except KeyboardInterrupt:  # also one that comes while the last tasks end
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise
            finally:
                for future, number in numbers.items():
                    if number not in results and not future.cancelled() and future.done() and not future.exception():
                        keep(number, future.result())
    return [results[number] for number in range(len(tasks))]


def _begin() -> None:
    """Of a worker: one thread, and Ctrl-C, which a terminal sends to all processes, is left to the one that waits."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(job: Job) -> str:
    return train(job.recipe, gamma=job.gamma, lr=job.lr, seed=job.seed).to_json()


def stable_edge(job: EdgeJob) -> float:
    """log₁₀ of the largest effective rate η that trains, within half of the job's tolerance.

    A run trains if it does not diverge and has learned, see :class:`EdgeJob`. The search comes from above: far
    below the edge a run at large γ is still on its plateau and does not train either.

    Raises:
        UsageError: if the edge is not between ``low`` and ``high``.
    """
    learned: dict[float, float] = {}
    recipe = job.recipe
    batches = Batches(
        recipe.stream, job.seed, recipe.steps, recipe.batch_size, recipe.device
    )  # made once for all rates

    def trains(c: float) -> bool:
        record = train(recipe, gamma=job.gamma, lr=10**c, seed=job.seed, batches=batches)
        learned[c] = math.log10(record.effective_lr)
        return record.final_loss is not None and record.final_loss < job.learned * record.curve.loss[0]

    high = job.high
    if trains(high):
        raise UsageError(f"γ = {job.gamma:g} trains at the highest rate, c = 10^{high:.2f}; raise it")
    while not trains(low := high - STEP):
        high = low
        if high < job.low:
            raise UsageError(
                f"γ = {job.gamma:g} trains at no rate down to c = 10^{high:.2f}; lower it, or give more steps"
            )
    while high - low > job.tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if trains(middle) else (low, middle)
    return (learned[low] + learned[high]) / 2


def score(record: RunRecord) -> float:
    """Log of the held-out loss, the lower the better; infinite for a diverged run."""
    return math.inf if record.final_loss is None else math.log(max(record.final_loss, 1e-30))


def mean_score(records: Iterable[RunRecord]) -> float:
    """Mean of the runs' scores; infinite if one diverged."""
    scores = [score(record) for record in records]
    return sum(scores) / len(scores)


def best_rate(log10_rates: Sequence[float], scores: Sequence[float]) -> float:
    """log₁₀ of the best rate: the vertex of a parabola through the lowest score and its finite neighbours.

    Raises:
        UsageError: if the lowest score lies at the end of the rates: the grid is too short to tell.
    """
    i = int(np.argmin(scores))
    if i in (0, len(scores) - 1):
        raise UsageError(f"the best rate 10^{log10_rates[i]:.2f} lies at the end of its grid; widen the grid")
    left, middle, right = scores[i - 1], scores[i], scores[i + 1]
    if not math.isfinite(left + right) or left + right - 2 * middle <= 0:
        return log10_rates[i]
    shift = 0.5 * (left - right) / (left + right - 2 * middle)
    return log10_rates[i] + shift * (log10_rates[i + 1] - log10_rates[i])


def best_rates(
    recipe: Recipe, gammas: Sequence[float], grid: Sequence[float], seeds: int, kept: Path, cores: int | None = None
) -> list[list[float]]:
    """log₁₀ c of each seed's best rate at each γ, (seed, γ), c = η/s(γ): runs of ``recipe`` over γ, the grid and seeds.

    NaN where a seed's best rate lies at the end of the grid.
    """

    def name(gamma: float, c: float, seed: int) -> str:
        return f"{gamma:g} {c:.4f} {seed}"

    jobs = {
        name(gamma, c, seed): Job(recipe, gamma, 10**c, seed) for gamma in gammas for c in grid for seed in range(seeds)
    }
    of = run_all(jobs, kept, cores)

    def best(gamma: float, seed: int) -> float:
        try:
            return best_rate(grid, [score(of[name(gamma, c, seed)]) for c in grid])
        except UsageError:
            return math.nan

    return [[best(gamma, seed) for gamma in gammas] for seed in range(seeds)]


def even(low: float, high: float, count: int) -> list[float]:
    """``count`` evenly spaced numbers, both ends included."""
    return [low + (high - low) * i / (count - 1) for i in range(count)]


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope and its standard error (0 for two points)."""
    design = np.stack([np.asarray(x), np.ones(len(x))], axis=1)
    fit, residual, _, _ = np.linalg.lstsq(design, np.asarray(y), rcond=None)
    if len(x) < 3 or not residual.size:
        return float(fit[0]), 0.0
    variance = float(residual[0]) / (len(x) - 2) / float(((np.asarray(x) - np.mean(x)) ** 2).sum())
    return float(fit[0]), math.sqrt(variance)


ONE_POWER = 0.1  # local slopes that differ by no more are told as one power


def local_slopes(x: Sequence[float], log10_y: Sequence[float], name: str = "γ") -> str:
    """The powers of x between neighbouring ones, of the means of log₁₀ y there, in words. ``log10_y`` may have NaN."""
    at = sorted(set(x))
    means = [float(np.mean([b for a, b in zip(x, log10_y, strict=True) if a == one])) for one in at]
    return powers_in_words(at, neighbour_slopes(at, means), name)


def neighbour_slopes(x: Sequence[float], log10_y: Sequence[float]) -> list[float]:
    """The power of x between each two neighbours; NaN where one of them has no y."""
    return [float(one) for one in np.diff(log10_y) / np.diff(np.log10(x))]


def powers_in_words(x: Sequence[float], slopes: Sequence[float], name: str = "γ") -> str:
    """Whether the powers between neighbouring x are one, their range, where the largest is, and all of them."""
    there = [(slope, a, b) for slope, a, b in zip(slopes, x[:-1], x[1:], strict=True) if math.isfinite(slope)]
    if not there:
        return "no two neighbours were measured"
    low, high = (choose(slope for slope, _, _ in there) for choose in (min, max))
    told = "local slopes " + ", ".join(f"{slope:.2f}" for slope, _, _ in there)
    if len(there) == 1:
        return f"{told}, between {name} = {there[0][1]:.4g} and {there[0][2]:.4g} alone"
    if high - low <= ONE_POWER:
        return f"one power from {name} = {there[0][1]:.4g} to {there[-1][2]:.4g}: {told}"
    _, a, b = max(there, key=lambda one: abs(one[0]))
    return f"no single power: {told}, from {low:.2f} to {high:.2f}, steepest between {name} = {a:.4g} and {b:.4g}"


def parser(description: str | None, name: str, presets: Iterable[str]) -> argparse.ArgumentParser:
    """The arguments every experiment takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--preset", choices=list(presets), default="cpu")
    made.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / name)
    return made


def machine(device: str = "cpu") -> str:
    """The processor's model and how many of its cores there are, after the accelerator's where that is used."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    model = models[0].partition(":")[2].strip() if models else platform.machine()
    processor = f"{model}, {len(os.sched_getaffinity(0))} cores"
    return processor if device == "cpu" else f"{torch.cuda.get_device_name()}; {processor}"


def write(folder: Path, preset: str, content: dict[str, Any], device: str = "cpu") -> Path:
    """Write ``PRESET.json`` with date and machine; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"date": str(datetime.datetime.now(tz=datetime.UTC).date()), "machine": machine(device)}
    path = folder / f"{preset}.json"
    path.write_text(json.dumps({**made, **content}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
