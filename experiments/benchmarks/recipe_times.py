"""What each recipe reaches in its smoke preset, as a user runs it, and how long it takes; bar: 90 s on two cores.

    python experiments/benchmarks/recipe_times.py --check --json experiments/results/recipes/cpu.json

Each is a process of its own in an empty folder: ``python recipes/NAME.py``. Seconds are those of the clock, imports
included. Accuracy is what its last line says. With ``--json`` the table in recipes/README.md is written from it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _paired import argument_parser, machine_and_date, write_json

ROOT = Path(__file__).parents[2]
INDEX = ROOT / "recipes" / "README.md"
BAR = 90.0  # seconds
LAST = re.compile(r"accuracy (?P<accuracy>\d+\.\d) %.*\(chance (?P<chance>\d+\.\d) %")
BEGIN, END = "<!-- measured: experiments/benchmarks/recipe_times.py -->\n", "<!-- end of measured -->\n"


def measure(script: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Run one recipe and read its last line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(script), *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - began
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    found = LAST.search(last)
    if done.returncode or found is None:
        raise SystemExit(f"{script.name} ended with code {done.returncode}: {last or done.stderr[-500:]}")
    return {
        "name": script.stem,
        "accuracy": float(found["accuracy"]),
        "chance": float(found["chance"]),
        "seconds": round(seconds, 1),
        "bar": BAR,
    }


def table(content: dict[str, Any]) -> str:
    """Markdown between the marks of the index."""
    rows = [
        f"| [`{row['name']}.py`]({row['name']}.py) | {row['accuracy']:.1f} % | {row['chance']:.1f} % "
        f"| {row['seconds']:.0f} s |"
        for row in content["rows"]
    ]
    told = f"Measured with their smoke presets on {content['machine']}, {content['date']}:"
    return "\n".join([told, "", "| recipe | accuracy | chance | time |", "|---|---|---|---|", *rows]) + "\n"


def write_table(text: str, content: dict[str, Any]) -> str:
    """The index with a new table in the place of the old one."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{INDEX} has lost the marks around its table: {BEGIN.strip()} … {END.strip()}")
    return before + BEGIN + table(content) + END + after


def main(argv: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--only", default="", help="recipes with this word in their names")
    options = parser.parse_args(argv)
    rows = []
    for script in sorted(path for path in (ROOT / "recipes").glob("*.py") if options.only in path.stem):
        rows.append(measure(script))
        print("{name:24} {accuracy:5.1f} %  (chance {chance:4.1f} %)  {seconds:5.1f} s".format(**rows[-1]), flush=True)
    if options.json and not options.only:
        INDEX.write_text(
            write_table(INDEX.read_text(encoding="utf-8"), {**machine_and_date(), "rows": rows}), encoding="utf-8"
        )
    missed = [
        f"{row['name']}: {row['seconds']:.0f} s, at most {BAR:.0f} wanted" for row in rows if row["seconds"] > BAR
    ]
    write_json(options, {"rows": rows}, missed)


if __name__ == "__main__":
    main()
