"""Samples per second of the streams: made ones against a bar per processor core, mapped files against the disk.

    python experiments/benchmarks/streams.py --check --json experiments/results/streams/cpu.json
    python experiments/benchmarks/streams.py --device cuda --check --json experiments/results/streams/cuda.json

Bars: 50,000 digits and 10,000 photo crops in a second of one core's time (one thread; the clock is the process's). A
shuffled pass over a data set in CIFAR-5M's form that is not in memory must come at 0.9 of the rate at which the same
files are read from end to end just before and after: as uint8, which is what goes to the device. Also told: the same
with the pixels normalised on the processor, and, on a GPU, with half of the images kept there.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from _paired import argument_parser, write_json

from gammaopt.online import Digits, Photos, Stream
from gammaopt.online.streams import cifar5m

BATCH, CHUNK = 128, 64  # samples of a batch; batches asked for at once, as gammaopt.online.Batches does
MADE: dict[str, tuple[Callable[[], Stream], float]] = {"digits": (Digits, 50_000), "photos": (Photos, 10_000)}
OF_DISK = 0.9
PIECE = 2**20


@dataclass(frozen=True)
class Row:
    """Samples per second, what they are compared with, their ratio, and the bar on it (0: none)."""

    name: str
    device: str
    rate: float
    baseline: float
    ratio: float
    bar: float


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where samples are made")
    parser.add_argument("--images", type=int, default=360_000, help="in the files of CIFAR-5M's form, 3 kB each")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the files are removed at the end")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [made(name, options.seconds) for name in MADE] if options.device == "cpu" else []
        rows += from_disk(options)
    finally:
        torch.set_num_threads(threads)
    print(f"{'':34} samples/s   against    ratio   bar")
    for row in rows:
        bar = f"{row.bar:5.2f}" if row.bar else "    –"
        print(f"{row.device + ' ' + row.name:34} {row.rate:9.0f} {row.baseline:9.0f} {row.ratio:8.2f} {bar}")
    if options.device == "cpu":
        print(
            "cuda cifar5m, half of it on the GPU: not measured (python experiments/benchmarks/streams.py --device cuda)"
        )
    missed = [
        f"{row.name}: {row.rate:,.0f} samples/s, {row.ratio:.2f} of {row.baseline:,.0f}, at least {row.bar:.2f} wanted"
        for row in rows
        if row.ratio < row.bar
    ]
    write_json(options, {"images": options.images, "rows": [asdict(row) for row in rows]}, missed)


def made(name: str, seconds: float) -> Row:
    """Samples in a second of one core's time: the median over calls for about ``seconds``."""
    build, wanted = MADE[name]
    stream = build()
    stream.batches(0, 0, CHUNK, BATCH)
    rates: list[float] = []
    end, step = time.perf_counter() + seconds, 0
    while len(rates) < 5 or time.perf_counter() < end:
        begin = time.process_time()
        stream.batches(0, step, step + CHUNK, BATCH)
        rates.append(CHUNK * BATCH / (time.process_time() - begin))
        step += CHUNK
    rate = statistics.median(rates)
    return Row(name, "cpu", rate, wanted, rate / wanted, 1.0)


def from_disk(options: argparse.Namespace) -> list[Row]:
    """Passes over mapped files against reading them from end to end."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for part in range(2):
            write_part(folder / f"part{part}.npz", options.images // 2, part)
        files = sorted(folder.iterdir())
        for file in files:
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())  # what is not written yet can't leave the page cache
        whole = sum(file.stat().st_size for file in files) / options.images  # bytes for an image
        if options.device == "cuda":
            half = options.images // 2 * 3072
            return [against_disk("cifar5m, half of it on the GPU", folder, files, whole, options, half, False)]
        return [
            against_disk("cifar5m, uint8", folder, files, whole, options, 0, True),
            against_disk("cifar5m, normalised here", folder, files, whole, options, 0, False),
        ]


def against_disk(
    name: str, folder: Path, files: list[Path], whole: float, options: argparse.Namespace, resident: int, raw: bool
) -> Row:
    """Passes and plain reads by turns, at least three passes; the median of the ratios."""
    pairs: list[tuple[float, float]] = []
    reads = [read_all(files) / whole]
    end = time.perf_counter() + 3 * options.seconds
    while len(pairs) < 3 or time.perf_counter() < end:
        rate = one_pass(folder, files, len(pairs), options.device, resident, raw)
        reads.append(read_all(files) / whole)
        pairs.append((rate, (reads[-2] + reads[-1]) / 2))
    ratio = statistics.median(a / b for a, b in pairs)
    rates = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return Row(name, options.device, rates[0], rates[1], ratio, OF_DISK if raw else 0.0)


def write_part(file: Path, count: int, seed: int) -> None:
    """A part as CIFAR-5M has them: an uncompressed npz of X and Y; noise, which no disk can shrink."""
    draw = np.random.default_rng(seed)
    np.savez(file, X=draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), Y=draw.integers(0, 10, count))


def one_pass(folder: Path, files: list[Path], seed: int, device: str, resident: int, raw: bool) -> float:
    """Images per second of a whole pass with the files not in memory; opening them is not counted."""
    forget(files)
    stream = cifar5m(folder, resident=resident).to(device)
    forget(files)  # what opening has read: labels, and the images that the statistics are taken from
    steps, ask = stream.train_samples // BATCH, stream.pixels if raw else stream.batches
    begin = time.perf_counter()
    for start in range(0, steps, CHUNK):
        ask(seed, start, min(start + CHUNK, steps), BATCH)
    if device == "cuda":
        torch.cuda.synchronize()
    rate = steps * BATCH / (time.perf_counter() - begin)
    del stream
    gc.collect()  # a mapped page stays in memory
    return rate


def read_all(files: list[Path]) -> float:
    """Bytes per second of a plain read from end to end, with the files not in memory."""
    forget(files)
    buffer, count = bytearray(PIECE), 0
    begin = time.perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while got := opened.readinto(buffer):
                count += got
    return count / (time.perf_counter() - begin)


def forget(files: list[Path]) -> None:
    """Drop the files from the page cache.

    Raises:
        RuntimeError: if a tenth of them stays there: the file system has no such thing, and nothing can be measured.
    """
    for file in files:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    stays = statistics.mean(in_memory(file) for file in files)
    if stays > 0.1:
        raise RuntimeError(f"{stays:.0%} of the files in {files[0].parent} stays in memory; give another --folder")


def in_memory(file: Path) -> float:
    """Share of a file's pages that are in the page cache: mincore(2), which reads none."""
    mapped = np.memmap(file, np.uint8, "r")
    pages = np.empty(-(-mapped.size // mmap.PAGESIZE), np.uint8)
    begin, length, told = mapped.ctypes.data, ctypes.c_size_t(mapped.size), pages.ctypes.data
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(begin), length, ctypes.c_void_p(told)):
        raise RuntimeError(f"can't tell whether {file} is in memory")
    return float((pages & 1).mean())


if __name__ == "__main__":
    main()
