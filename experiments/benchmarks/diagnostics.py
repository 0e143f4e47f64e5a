"""What diagnostics cost and how exact they are, each against a plain reference in the same run.

    python experiments/benchmarks/diagnostics.py --check --json experiments/results/diagnostics/cpu.json
    python experiments/benchmarks/diagnostics.py --device cuda --check --json experiments/results/diagnostics/cuda.json

Eigenvalues: the 20 largest in size of the Hessian of a 3-layer MLP of width 256 on 1,024 samples, float64. The baseline
is power iteration with deflation at its usual tolerance, 100 iterations and 1e-3 for each. A dense Hessian of 70,000
parameters takes 39 GB; at this width the reference is a Lanczos run to the end of float64 from another start whose
residuals bound each error, and in the tests, at a width where it is possible, the dense Hessian. The loss is scaled by
1e-8 and 1e8 too. Bars, on one call with max_products=80: relative error 1e-5, 5 × the baseline's speed. Beside it
stands the call without that limit, which goes on until its own estimate and a look for copies of an eigenvalue allow it
to stop; and the least number of products after which any reading of the same Krylov space has the bar's error.

Kernels: the trace NTK of 128 samples against ``vmap(jacrev)``, float64: 50 × faster (convolutions 10 ×), equal to 1e-6.
What a convolution can gain is bounded. With k inputs of a unit, T positions and u units times outputs, gradients and
their inner products take n·u·k·(T + n/2) multiply-adds, pairs of positions n²·T²·(k + u)/2, the baseline n·u·k·(T + n).
Pairs win by much where T is under √k: late layers of wide networks. Elsewhere a factor of 2 is the most that can be
saved in multiply-adds; the rest is how well each runs.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from _paired import argument_parser, machine_and_date, write_json
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import gammaopt
from gammaopt.diagnostics import Curvature, hessian_eigenvalues, ntk
from gammaopt.diagnostics._lanczos import Krylov, Which
from gammaopt.online import CNN, MLP, Digits, Staircase
from gammaopt.online._losses import CRITERIA

K, SAMPLES, WIDTH = 20, 1024, 256
ERROR_BAR, PRODUCTS_BAR, EIGEN_SPEED_BAR = 1e-5, 80, 5.0
POWER_ITERATIONS, POWER_TOL = 100, 1e-3
KERNEL_ERROR_BAR = 1e-6


@dataclass(frozen=True)
class Spectrum:
    """A Hessian to look at: γ, loss, task, and how many steps it was trained."""

    name: str
    gamma: float
    loss: str
    digits: bool
    steps: int = 0
    which: Which = "magnitude"
    scaled: bool = False  # measure under losses of other sizes too
    baseline: bool = False  # time power iteration on it: a minute


SPECTRA = (
    Spectrum("parities, MSE, γ = 1, at the start", 1.0, "mse", False, scaled=True, baseline=True),
    Spectrum("parities, MSE, γ = 1, after 200 steps", 1.0, "mse", False, 200, baseline=True),
    Spectrum("parities, MSE, γ = 1, at the start, positive", 1.0, "mse", False, which="largest"),
    Spectrum("parities, MSE, γ = 30, at the start", 30.0, "mse", False),
    Spectrum("digits, MSE, γ = 1, after 200 steps", 1.0, "mse", True, 200),
    Spectrum("digits, cross-entropy, γ = 1, at the start", 1.0, "cross_entropy", True),
)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="the row of this name, or a word in names; other rows of FILE stay")
    parser.add_argument("--width", type=int, default=WIDTH)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for spectrum in SPECTRA:
        if matches(options, spectrum.name):
            rows += spectrum_rows(spectrum, options.device, options.width)
    for name, build, shape, bar in KERNELS:
        if matches(options, name):
            rows.append(kernel_row(name, build, shape, bar, options))
    busy = {"load": round(os.getloadavg()[0], 1)}  # processes that wanted a core beside ours; ratios are paired
    rows = [{**row, **machine_and_date(), **busy} for row in rows]
    if options.only and options.json and options.json.exists():  # made in parts: the other rows stay
        made = {row["name"] for row in rows}
        rows += [row for row in json.loads(options.json.read_text())["rows"] if row["name"] not in made]
    names = [spectrum.name for spectrum in SPECTRA] + [kernel[0] for kernel in KERNELS]
    rows.sort(key=lambda row: names.index(row["name"].partition(", loss × ")[0]))
    missed = [f"{row['name']}: {what}" for row in rows for what in row["missed"]]
    write_json(options, {"device": options.device, "threads": torch.get_num_threads(), "rows": rows}, missed)


def matches(options: Any, name: str) -> bool:
    """Whether a row was asked for: by its whole name, or by a part if no row has that as its whole name."""
    whole = {spectrum.name for spectrum in SPECTRA} | {kernel[0] for kernel in KERNELS}
    return bool(options.only == name if options.only in whole else options.only in name)


def scaled(criterion: Any, scale: float) -> Callable[[Any, Any], Any]:
    return lambda output, targets: scale * criterion(output, targets)


def spectrum_rows(spectrum: Spectrum, device: str, width: int) -> list[dict[str, Any]]:
    """One row, or three where the loss is scaled; the baseline is timed once."""
    model, data = prepared(spectrum, device, width)
    criterion = CRITERIA[spectrum.loss]
    ask = partial(hessian_eigenvalues, model, data=data, k=K, which=spectrum.which)
    exact = ask(criterion, tol=1e-11, max_products=600, seed=7)
    within = partial(ask, max_products=PRODUCTS_BAR)  # what the bars are on
    least = least_products(Curvature(model, criterion, data), spectrum.which, exact.values)
    around = [timed(partial(within, criterion), device)[0] for _ in range(3)] if spectrum.baseline else []
    power: dict[str, Any] | None = None
    if spectrum.baseline:
        operator = Curvature(model, criterion, data)
        seconds, values = timed(partial(power_iteration, operator, K), device)
        power = {"seconds": seconds, "products": operator.products, "error": off(abs(values), abs(exact.values))}
        # Before and after it, so that a busy spell hits both.
        around += [timed(partial(within, criterion), device)[0] for _ in range(3)]
    rows = []
    for scale in (1.0, 1e-8, 1e8) if spectrum.scaled else (1.0,):
        loss = scaled(criterion, scale)
        ours, found = timed(partial(within, loss), device)
        to_the_end, believed = timed(partial(ask, loss), device)
        row: dict[str, Any] = {
            "name": spectrum.name + (f", loss × {scale:g}" if spectrum.scaled else ""),
            "which": spectrum.which,
            "error": off(found.values, scale * exact.values),
            "reference_residual": float((exact.residuals / abs(exact.values)).max()),
            "products": found.products,
            "seconds": ours,
            "until_converged": {
                "error": off(believed.values, scale * exact.values),
                "products": believed.products,
                "seconds": to_the_end,
            },
            "least_products_of_a_krylov_space": least,
            "power_iteration": power,
            "missed": [],
        }
        if row["error"] > ERROR_BAR:
            row["missed"].append(f"error {row['error']:.1e} with {found.products} products against {ERROR_BAR:g}")
        beside = ""
        if power is not None:
            row["speed"] = power["seconds"] / statistics.median([*around, ours])
            row["until_converged"]["speed"] = power["seconds"] / to_the_end
            beside = f"{row['speed']:.1f} × power iteration ({power['products']} products, error {power['error']:.0e})"
            if row["speed"] < EIGEN_SPEED_BAR:
                row["missed"].append(f"{row['speed']:.1f} × power iteration against {EIGEN_SPEED_BAR:g} ×")
        print(
            f"{row['name']:50} error {row['error']:.0e} with {found.products}, until converged "
            f"{row['until_converged']['error']:.0e} with {believed.products}, least {least}  {beside}",
            flush=True,
        )
        rows.append(row)
    return rows


def off(values: Any, expected: Any) -> float:
    """The largest relative error."""
    return float(abs(values / expected - 1).max())


def least_products(operator: Curvature, which: Which, expected: Any) -> int | None:
    """After how many products the Krylov space of our start holds all values to the bar: no choice in it does better.

    That is told from the values themselves, which a user does not have.
    """
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(operator.size, generator=draw, dtype=torch.float64).to(operator.device)
    space = Krylov(operator, start, 300, draw)
    while not space.full and not space.exhausted:
        space.advance()
        found = space.ritz(K, which).values
        if len(found) == K and off(found, expected) <= ERROR_BAR:
            return space.done
    return None


def prepared(spectrum: Spectrum, device: str, width: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The network, trained as the spectrum says, and the 1,024 samples that its Hessian is taken on."""
    stream = Digits() if spectrum.digits else Staircase(bits=20)
    x, y = (part[0].to(device) for part in stream.batches(0, 0, 1, SAMPLES))
    outputs = 10 if spectrum.digits else 1
    torch.manual_seed(0)
    net = MLP(math.prod(x.shape[1:]), outputs, width=width)
    model = gammaopt.wrap(net, spectrum.gamma, depth=3, parametrization="mean_field").to(device)
    optimizer = gammaopt.SGD(model.parameters(), lr=4.0 if spectrum.digits else 0.3)
    for _ in range(spectrum.steps):
        optimizer.zero_grad()
        CRITERIA[spectrum.loss](model(x), y).backward()
        optimizer.step()
    return model, (x, y)


def power_iteration(operator: Curvature, k: int) -> Any:
    """The baseline: one eigenvector after the other, largest |λ| first, each kept out of the next ones' way.

    Iterates until λ changes by less than 1e-3 of itself, at most 100 times.
    """
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    values: list[float] = []
    while len(values) < k:
        vector = torch.randn(operator.size, generator=generator, dtype=torch.float64).to(operator.device)
        last = math.inf
        for _ in range(POWER_ITERATIONS):
            for other in found:
                vector = vector - (other @ vector) * other
            vector = vector / vector.norm()
            product = operator(vector)
            value = float(vector @ product)
            vector = product
            if abs(value - last) <= POWER_TOL * abs(value):
                break
            last = value
        for other in found:
            vector = vector - (other @ vector) * other
        found.append(vector / vector.norm())
        values.append(value)
    return np.array(sorted(values, key=lambda value: -abs(value)))


# The small networks are the package's own. The wide ones are of the widths that people train, on images as small as
# lets the baseline run in seconds: its Jacobians of 128 samples have 4.5 and 12 GB, so it takes the outputs in parts.
KERNELS: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...], float], ...] = (
    ("NTK of an MLP, width 128, 10 outputs", partial(MLP, 144, 10, width=128), (144,), 50.0),
    ("NTK of an MLP, width 256, 10 outputs", partial(MLP, 144, 10, width=256), (144,), 50.0),
    ("NTK of a CNN, 12×12, width 16, 10 outputs", partial(CNN, (1, 12, 12), 10, width=16, depth=3), (1, 12, 12), 10.0),
    ("NTK of a CNN, 16×16×3, width 32, 10 out", partial(CNN, (3, 16, 16), 10, width=32, depth=4), (3, 16, 16), 10.0),
    ("NTK of a CNN, 16×16×3, width 128, 10 out", partial(CNN, (3, 16, 16), 10, width=128, depth=5), (3, 16, 16), 10.0),
    ("NTK of a CNN, 8×8×3, width 256, 10 out", partial(CNN, (3, 8, 8), 10, width=256, depth=4), (3, 8, 8), 10.0),
)  # fmt: skip
JACOBIAN_BYTES = 4e9  # that the baseline may hold at a time
SLOW = 5.0  # seconds that the baseline takes, from which one pair of runs is enough


def kernel_row(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], bar: float, options: Any
) -> dict[str, Any]:
    """Trace NTK of 128 samples: ours against the usual one, in turn."""
    torch.manual_seed(0)
    net = build().double().to(options.device)
    x = torch.randn(128, *shape, dtype=torch.float64, device=options.device)
    ntk(net, x[:8])  # what is done once only
    first, kernel = timed(partial(ntk, net, x), options.device)
    usual, reference = timed(partial(usual_ntk, net, x), options.device)
    error = float((kernel - reference).norm() / reference.norm())
    pairs = [(first, usual)] if usual > SLOW else []
    end = time.perf_counter() + options.seconds
    while not pairs or (usual <= SLOW and (len(pairs) < 3 or time.perf_counter() < end)):
        ours = statistics.median(timed(partial(ntk, net, x), options.device)[0] for _ in range(5))
        pairs.append((ours, timed(partial(usual_ntk, net, x), options.device)[0]))
    speed = statistics.median(b / a for a, b in pairs)
    print(f"{name:58} error {error:.1e}  {speed:.0f} × vmap(jacrev)  bar {bar:g}", flush=True)
    row: dict[str, Any] = {
        "name": name,
        "error": error,
        "seconds": statistics.median(a for a, _ in pairs),
        "vmap_jacrev_seconds": statistics.median(b for _, b in pairs),
        "speed": speed,
        "pairs": len(pairs),
        "bar": bar,
        "missed": [],
    }
    if speed < bar:
        row["missed"].append(f"{speed:.1f} × against {bar:g} ×")
    if error > KERNEL_ERROR_BAR:
        row["missed"].append(f"error {error:.1e} against {KERNEL_ERROR_BAR:g}")
    return row


def usual_ntk(net: nn.Module, x: Tensor) -> Tensor:
    """The trace NTK by ``vmap(jacrev)``, its Jacobians contracted layer by layer: torch's own tutorial.

    As many outputs at a time as fit the memory: all of them, or in parts that no derivative is taken twice for.
    """
    named = {name: parameter.detach() for name, parameter in net.named_parameters()}
    outputs = net(x[:1]).shape[1]
    each = len(x) * sum(parameter.numel() for parameter in named.values()) * x.element_size()
    step = max(1, min(outputs, int(JACOBIAN_BYTES // each)))
    kernel = x.new_zeros(len(x), len(x))
    for start in range(0, outputs, step):
        some = slice(start, start + step)
        jacobian = vmap(jacrev(partial(some_outputs, net, some)), (None, 0))(named, x)
        for part in jacobian.values():
            rows = part.flatten(2)
            kernel += torch.einsum("ncp,mcp->nm", rows, rows)
    return kernel


def some_outputs(net: nn.Module, some: slice, parameters: dict[str, Tensor], one: Tensor) -> Tensor:
    """Of a network on one sample."""
    made: Tensor = functional_call(net, parameters, (one[None],))[0, some]
    return made


def timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds, and what the call returned."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    made = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, made


if __name__ == "__main__":
    main()
