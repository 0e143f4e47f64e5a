"""Run-steps per second of ``train_many`` against the usual loop, which trains the runs one after another.

    python experiments/benchmarks/ensemble.py --check --json experiments/results/ensemble/cpu.json
    python experiments/benchmarks/ensemble.py --device cuda --check --json experiments/results/ensemble/cuda.json

The usual loop: forward of the network and of a frozen copy, zero_grad, backward, step, ``loss.item()``, at every step.
Both see the same batches, made before, and use the same threads. A run-step is one step of one run; ours counts
everything ``train_many`` does, its held-out scores included. Also told: what fraction of the machine's matrix-multiply
rate (measured in the same run) the engine reaches, and the bytes a run has of its own. Rows of another device than
the one at hand are listed as not measured, with the command that measures them.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from _paired import argument_parser, write_json
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gammaopt
from gammaopt.online import CNN, MLP, Digits, Recipe, Run, Stream, train_many
from gammaopt.online.ensemble import bytes_per_run
from gammaopt.online.streams import Batches, Split


@dataclass(frozen=True)
class Case:
    """One row: a network, how many runs, and by what factor they must be faster."""

    name: str
    device: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    runs: int
    batch_size: int
    bar: float


CASES = (
    Case("MLP width 64", "cpu", partial(MLP, 144, 10, width=64), (1, 12, 12), 81, 32, 5.0),
    Case("MLP width 128", "cpu", partial(MLP, 144, 10, width=128), (1, 12, 12), 81, 32, 2.0),
    Case("MLP width 512", "cpu", partial(MLP, 144, 10, width=512), (1, 12, 12), 32, 32, 1.0),
    Case("CNN width 16", "cpu", partial(CNN, (1, 12, 12), 10, width=16, depth=3), (1, 12, 12), 32, 32, 1.0),
    Case("MLP width 128", "cuda", partial(MLP, 144, 10, width=128), (1, 12, 12), 1024, 64, 300.0),
    Case("CNN 32×32×3", "cuda", partial(CNN, (3, 32, 32), 10, width=64, depth=4), (3, 32, 32), 64, 64, 20.0),
)


class Recorded:
    """A stream made before the clock starts: images of a shape, from Digits where it fits, else noise."""

    classes = 10

    def __init__(self, shape: tuple[int, ...], steps: int, size: int) -> None:
        self.name, self.shape = "recorded", shape
        if shape == Digits.shape:
            self._train = Digits().batches(0, 0, steps, size)
        else:
            self._train = torch.randn(steps, size, *shape), torch.randint(10, (steps, size))

    def batches(self, seed: int, start: int, stop: int, size: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        """See :class:`Stream`."""
        inputs, targets = self._train
        if split == "train":
            return inputs[start:stop], targets[start:stop]
        return inputs.flatten(0, 1)[None, :size], targets.flatten()[None, :size]


SMOKE = tuple(
    replace(case, build=partial(MLP, math.prod(case.shape), 10, width=8), runs=4, batch_size=4) for case in CASES
)
PRESETS = {"full": CASES, "smoke": SMOKE}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose rows to measure")
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    parser.add_argument("--preset", choices=PRESETS, default="full", help="smoke: tiny networks, to try the script")
    options = parser.parse_args(argv)
    cases = PRESETS[options.preset]
    rows = [measure(case, options.steps, options.seconds) for case in cases if case.device == options.device]
    absent = [not_measured(case) for case in cases if case.device != options.device]
    rate = matmul_rate(options.device)
    print(f"{'':22} runs   ours/s   loop/s  factor    bar  of matmul  MB per run")
    for row in rows:
        row["of_matmul"] = row["flops"] / rate
        print(
            f"{label(row)} {row['ours']:8.0f} {row['loop']:8.0f} {row['factor']:7.2f} {row['bar']:6.0f} "
            f"{row['of_matmul']:10.1%} {row['bytes_per_run'] / 1e6:11.2f}"
        )
    for row in absent:
        print(f"{label(row)}  at least {row['bar']:g} × wanted; not measured: {row['command']}")
    print(f"matrix-multiply rate {rate / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads")
    missed = [f"{r['name']}: {r['factor']:.2f} × against {r['bar']:g} ×" for r in rows if r["factor"] < r["bar"]]
    content = {"threads": torch.get_num_threads(), "matmul_flops": rate, "rows": rows, "not_measured": absent}
    write_json(options, content, missed)


def label(row: dict[str, Any]) -> str:
    return f"{row['device'] + ' ' + row['name']:22} {row['runs']:4}"


def not_measured(case: Case) -> dict[str, Any]:
    """What is wanted of a row that this machine can't measure, and the command that measures it on one that can."""
    command = "python experiments/benchmarks/ensemble.py"
    command += f" --device {case.device} --check --json experiments/results/ensemble/{case.device}.json"
    wanted = {key: value for key, value in asdict(case).items() if key in ("name", "device", "runs", "bar")}
    return {**wanted, "command": command}


def measure(case: Case, steps: int, seconds: float) -> dict[str, Any]:
    """Both in turn for at least ``seconds`` and five times; medians, and the median of the paired ratios."""
    stream: Stream = Recorded(case.shape, steps, case.batch_size)
    recipe = Recipe(
        case.build, stream, "cross_entropy", steps=steps, batch_size=case.batch_size, depth=3.0, device=case.device
    )
    side = math.ceil(case.runs**0.5)
    runs = [Run(10.0 ** (i // side / side - 0.5), 10.0 ** (i % side / side - 1.0), 0) for i in range(case.runs)]
    few = runs[:: max(1, len(runs) // 4)][:4]
    batches = Batches(stream, 0, steps, case.batch_size, case.device)
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < 5 or time.perf_counter() < end:
        ours = case.runs * steps / timed(partial(train_many, recipe, runs), case.device)
        loop = len(few) * steps / timed(partial(one_after_another, recipe, few, batches), case.device)
        pairs.append((ours, loop))
    ours = statistics.median(a for a, _ in pairs)
    return {
        "name": case.name,
        "device": case.device,
        "runs": case.runs,
        "ours": ours,
        "loop": statistics.median(b for _, b in pairs),
        "factor": statistics.median(a / b for a, b in pairs),
        "bar": case.bar,
        "flops": ours * flops(recipe),
        "bytes_per_run": bytes_per_run(recipe),
    }


def one_after_another(recipe: Recipe, runs: list[Run], batches: Batches) -> None:
    """The usual loop."""
    for run in runs:
        torch.manual_seed(run.seed)
        net = gammaopt.wrap(recipe.build(), 1.0, depth=recipe.depth, parametrization="mean_field", center="none")
        gammaopt.unwrap(net).to(recipe.device)
        start = copy.deepcopy(net).requires_grad_(False)
        optimizer = torch.optim.SGD(net.parameters(), lr=run.lr)
        for step in range(recipe.steps):
            inputs, targets = batches[step]
            with torch.no_grad():
                at_start = start(inputs)
            loss = nn.functional.cross_entropy((net(inputs) - at_start) / run.gamma, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()


def timed(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def flops(recipe: Recipe) -> float:
    """Floating-point operations of one run-step: forward and backward of one network on one batch."""
    net, counter = recipe.build(), FlopCounterMode(display=False)
    with counter:
        net(torch.randn(recipe.batch_size, *recipe.stream.shape)).sum().backward()
    return float(counter.get_total_flops())


def matmul_rate(device: str, size: int | None = None) -> float:
    """Floating-point operations per second of a large float32 matrix product: the best of ten.

    Large enough to fill the device: an accelerator needs 8,192 rows where 1,024 fill a processor.
    """
    size = size or (8192 if device == "cuda" else 1024)
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    return 2 * size**3 / min(timed(partial(torch.mm, a, b), device) for _ in range(10))


if __name__ == "__main__":
    main()
