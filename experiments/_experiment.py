"""The shape of an experiment: presets, claims with their intervals, one result file, one picture, one table.

An experiment's file has a docstring whose first line is its title, ``PRESETS`` and ``measure(preset, place)``, which
returns :class:`Found`; :func:`run` does the rest. gallery.py reads the result files alone: all it shows is in them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from _sweep import write
from matplotlib.figure import Figure
from scipy.stats import t as student

import gammaopt
from gammaopt._errors import MissingExtraError, UsageError
from gammaopt._files import locked
from gammaopt.online import Digits, Stream, build_stream
from gammaopt.online._device import check_device
from gammaopt.online.streams._layouts import recognise
from gammaopt.tuning._frozen import git_commit, versions

Preset = TypeVar("Preset")
HERE = Path(__file__).parent
ON_CUDA = ("gpu", "paper")  # presets that run on a GPU


@dataclass(frozen=True)
class Claim:
    """One number: what was predicted and measured, its 95 % interval, and whether it holds.

    Attributes:
        what: the quantity, and of which case.
        predicted: in words, with the tolerance within which it holds: ``"0.67 ± 0.1"``, ``"> 0"``.
        measured: the number; ``None`` or not finite where there is none.
        interval: its 95 % interval, where there is one; an end without a number is ``None`` or not finite.
        holds: whether ``measured`` is what was predicted, within the tolerance.
        why: where it does not hold, or is off beyond noise, what is known of the reason.
        centre: the number that was predicted, where it was one and not a bound.
    """

    what: str
    predicted: str
    measured: float | None
    interval: tuple[float | None, float | None] | None
    holds: bool
    why: str = ""
    centre: float | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Claim:
        """As it was before JSON, which has lists for tuples."""
        return cls(**{**values, "interval": None if values["interval"] is None else tuple(values["interval"])})

    @property
    def off(self) -> float | None:
        """How far it is from the prediction, where that lies outside of the interval: more than noise can explain."""
        ends = known(*(self.interval or ()), self.measured)
        if self.centre is None or len(ends) < 3 or ends[0] <= self.centre <= ends[1]:
            return None
        return ends[2] - self.centre

    @property
    def row(self) -> str:
        """Of the table predicted | measured | interval | holds."""
        between = "" if self.interval is None else " … ".join(map(number, self.interval))
        told = "yes" if self.holds else "no"
        told += "" if self.off is None else f", off by {self.off:+.2g}"
        told += f": {self.why}" if self.why else ""
        return f"| {self.what} | {self.predicted} | {number(self.measured)} | {between} | {told} |"


def known(*numbers: float | None) -> list[float]:
    """Those that are numbers; JSON has ``None`` for others."""
    return [one for one in numbers if one is not None and math.isfinite(one)]


def number(value: float | None, form: str = ".3g") -> str:
    """A number in words, also where there is none."""
    return f"{value:{form}}" if value is not None and math.isfinite(value) else "none"


HEAD = "| what | predicted | measured | 95 % interval | holds |\n|---|---|---|---|---|"


def near(
    what: str,
    predicted: float,
    tolerance: float,
    measured: float,
    interval: tuple[float, float] | None = None,
    why: str = "",
) -> Claim:
    """A number that is predicted within ± ``tolerance``; ``why`` is told where it is not, or is off beyond noise."""
    holds = abs(measured - predicted) <= tolerance
    if not holds and not why:
        why = _missed(measured, interval, predicted - tolerance, predicted + tolerance)
    made = Claim(what, f"{predicted:.2f} ± {tolerance:g}", measured, interval, holds, why, predicted)
    return replace(made, why="") if holds and made.off is None else made


def above(
    what: str, bound: float, measured: float, interval: tuple[float, float] | None = None, why: str = ""
) -> Claim:
    """A number that is predicted above a bound; where it has an interval, that lies above it too."""
    holds = measured > bound and (interval is None or interval[0] > bound)
    return Claim(
        what, f"> {bound:g}", measured, interval, holds,
        "" if holds else why or _missed(measured, interval, bound, math.inf),
    )  # fmt: skip


def below(
    what: str, bound: float, measured: float, interval: tuple[float, float] | None = None, why: str = ""
) -> Claim:
    """A number that is predicted below a bound; where it has an interval, that lies below it too."""
    holds = measured < bound and (interval is None or interval[1] < bound)
    return Claim(
        what, f"< {bound:g}", measured, interval, holds,
        "" if holds else why or _missed(measured, interval, -math.inf, bound),
    )  # fmt: skip


def _missed(measured: float, interval: tuple[float, float] | None, low: float, high: float) -> str:
    """Why a number is not one between ``low`` and ``high``, as far as the numbers themselves tell."""
    if not math.isfinite(measured):
        return "not measured"
    beyond = measured - high if measured > low else low - measured
    if interval is None:
        return f"beyond by {beyond:.2g}"
    if interval[1] < low or interval[0] > high:
        return f"its whole interval lies {'above' if interval[0] > high else 'below'}"
    if math.isinf(low) or math.isinf(high):
        return "its interval contains the bound"
    return "its interval reaches into the tolerance"


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of a mean of independent values; ``None`` for one value."""
    if len(values) < 2:
        return None
    half = float(student.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


@dataclass(frozen=True)
class Place:
    """Where an experiment runs.

    Attributes:
        work: folder for finished cells; a killed run goes on in it.
        device: ``"cpu"`` or ``"cuda"``.
        cores: processes on the CPU.
        data: folder of a data set, for the preset ``paper``.
    """

    work: Path
    device: str = "cpu"
    cores: int | None = None
    data: Path | None = None

    @property
    def stream(self) -> Stream:
        """Classified images: the data set's, of any layout known to ``gammaopt data check``, or augmented digits."""
        if self.data is None:
            return Digits()
        layout = recognise(self.data)
        folders = {"imagefolder": "imagefolder", "tinyimagenet": "imagefolder"}
        root = "root" if layout in ("cifar10", "mnist") else "path"
        return build_stream(folders.get(layout, layout), **{root: self.data})

    def steps(self, wanted: int, batch_size: int) -> int:
        """As many steps as are wanted, or as one pass over the data has."""
        there: int | None = getattr(self.stream, "train_samples", None)
        return wanted if there is None else min(wanted, there // batch_size)

    def file(self, name: str, preset: object) -> Path:
        """A file of ``work`` for results of this very preset, device, data set and version of torch and gammaopt.

        Those of others are left alone, and not mixed with these.
        """
        made_with = versions()
        what = preset, self.device, self.data and self.data.resolve(), made_with["torch"], made_with["gammaopt"]
        digest = hashlib.blake2b(repr(what).encode(), digest_size=6).hexdigest()
        return self.work / f"{digest}-{name}"


@dataclass(frozen=True)
class Found:
    """What an experiment found.

    Attributes:
        claims: each prediction beside what was measured.
        meaning: one sentence on what the picture shows, made from the numbers.
        figure: the picture.
        data: what it shows, as JSON values.
        table: more Markdown for the gallery.
    """

    claims: Sequence[Claim]
    meaning: str
    figure: Figure
    data: Mapping[str, Any] = field(default_factory=dict)
    table: str = ""


def run(
    name: str,
    description: str | None,
    presets: Mapping[str, Preset],
    measure: Callable[[Preset, Place], Found],
    argv: Sequence[str] | None = None,
) -> Path:
    """Run a preset of an experiment, write ``results/NAME/PRESET.json`` and ``.png``, and print its table.

    A mistake is one line and exit code 2, Ctrl-C one line and 130.
    """
    options = _options(name, description, presets, argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped run ends its processes, and says so
    try:
        return _run(name, description, presets, measure, options)
    except (UsageError, MissingExtraError) as error:
        # The command line's name for a folder of cells is --work; a path may hold the other word.
        told, code = re.sub(r"(?<!\S)--out(?=$|[\s.,;:)])", "--work", str(error)), 2
    except OSError as error:
        told, code = f"{error.filename or options.results}: {error.strerror}; give another --work or --results", 2
    except KeyboardInterrupt:  # and SIGTERM
        told, code = "stopped; run the same command again to go on", 130
    print(f"{name}.py: {told}", file=sys.stderr)
    raise SystemExit(code)


def _run(
    name: str,
    description: str | None,
    presets: Mapping[str, Preset],
    measure: Callable[[Preset, Place], Found],
    options: argparse.Namespace,
) -> Path:
    work, usual = options.work / options.preset, "cuda" if options.preset in ON_CUDA else "cpu"
    device = options.device or usual
    check_device(device)
    options.results.mkdir(parents=True, exist_ok=True)
    cells = work / code_digest(name)
    with locked(work):
        others = sorted(path.name for path in work.iterdir() if path.is_dir() and path != cells)
        if others and not cells.exists():
            told = f"{work} has cells of other code ({', '.join(others)}); kept, and not used"
            print(f"{name}.py: {told}", file=sys.stderr)
        cells.mkdir(exist_ok=True)
        commit = kept(cells / "commit.json", partial(git_commit, HERE.parent, but="experiments/results"))
        with timed(cells / "seconds") as seconds:
            place = Place(cells, device, options.cores, options.data)
            found = measure(presets[options.preset], place)
    given = " --data PATH" * (options.data is not None) + f" --device {device}" * (device != usual)
    content = {
        "title": (description or name).strip().splitlines()[0].rstrip("."),
        "command": f"python experiments/{name}.py --preset {options.preset}{given}",
        "device": device,
        **({} if options.data is None else {"data_set": place.stream.name}),
        "versions": versions(),
        "commit": commit,
        "seconds": round(seconds[0]),
        "meaning": found.meaning,
        "claims": [asdict(claim) for claim in found.claims],
        "table": found.table,
        **found.data,
    }
    path = write(options.results, options.preset, _finite(content), device)
    found.figure.savefig(path.with_suffix(".png"), dpi=110)
    print("\n".join([HEAD, *(claim.row for claim in found.claims)]))
    print(("\n" + found.table + "\n" if found.table else "") + f"\n{found.meaning}\n{path}")
    return path


def code_digest(name: str) -> str:
    """Twelve hex digits of the code that an experiment's cells come from: its own, that of all, and the package's.

    Cells of other code are other cells. Comments and docstrings are no code.
    """
    package = Path(gammaopt.__file__).parent.rglob("*.py")
    files = [path for path in (HERE / f"{name}.py", *HERE.glob("_*.py"), *package) if path.exists()]
    return hashlib.blake2b("".join(map(_code, sorted(files))).encode(), digest_size=6).hexdigest()


@cache
def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return f"{path.name}: {ast.dump(tree)}"


@contextmanager
def timed(path: Path, every: float = 5.0) -> Iterator[list[float]]:
    """Seconds spent in the block, with those that earlier calls left in ``path``: a run that goes on took them all.

    They are written ``every`` few seconds, so a kill loses no more.
    """
    try:
        before = float(path.read_text())
    except (OSError, ValueError):  # none, or torn by a kill
        before = 0.0
    began, total, ended = time.monotonic(), [before], threading.Event()

    def keep() -> None:
        total[0] = before + time.monotonic() - began
        path.write_text(f"{total[0]:.1f}\n")

    def go_on() -> None:
        while not ended.wait(every):
            keep()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield total
    finally:
        ended.set()
        thread.join()
        keep()


def _options(
    name: str, description: str | None, presets: Mapping[str, Any], argv: Sequence[str] | None
) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--preset", choices=list(presets), default="cpu", help="how much to run (default: cpu)")
    made.add_argument("--results", type=Path, default=HERE / "results" / name, help="folder of the result")
    made.add_argument(
        "--work", type=Path, default=Path("runs") / "experiments" / name,
        help="folder for finished cells: a killed run goes on there",
    )  # fmt: skip
    made.add_argument("--device", help="cpu or cuda (default: cuda for the presets gpu and paper)")
    made.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="processes to train in")
    made.add_argument("--data", type=Path, help="folder of the data set that the preset paper trains on")
    options = made.parse_args(argv)
    if options.preset == "paper" and options.data is None:
        made.error("the preset paper trains on a data set of yours; give its folder: --data PATH")
    if options.preset != "paper" and options.data is not None:
        fix = "drop it, or give --preset paper" if "paper" in presets else "drop it"
        made.error(f"data={options.data} is not used by the preset {options.preset}, whose data are made here; {fix}")
    if options.cores < 1:
        made.error(f"cores={options.cores} is too small; give at least 1")
    return options


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: ``None``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What ``make`` gave, as JSON in ``path``; made once. For parts that are not runs of an ensemble."""
    if path.exists():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            aside = path.replace(path.with_suffix(".damaged"))
            print(f"{path} is damaged and is kept as {aside.name}; it is made again", file=sys.stderr)
    made = _finite(make())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(made), encoding="utf-8")
    partial.replace(path)
    return json.loads(path.read_text(encoding="utf-8"))
