"""The gallery: experiments/README.md, made from the result files alone.

    python experiments/gallery.py

Each result that has claims is one section: its picture, one sentence of what it means, the table of predictions beside
measurements, and the command, device, date and versions that made it. Presets that have not been run stand as "not
measured", with their command. Nothing in the page is typed by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _experiment import HEAD, Claim

from gammaopt._errors import UsageError

HERE = Path(__file__).parent
ORDER = (  # as the argument goes: the law, time, accuracy, mechanisms, the verdict; others follow by name
    "phase_portrait", "loss_curves", "accuracy_vs_gamma", "hessian_spectrum", "catapult_silent_alignment", "agreement",
    "linear_toy", "width_transfer", "depth", "architectures", "knee", "residual", "tuned_vs_one",
)  # fmt: skip
SHOWN = ("cpu", "gpu")
Result = dict[str, Any]


def read(results: Path) -> dict[str, dict[str, Result]]:
    """Name → preset → result, of those with claims.

    Raises:
        UsageError: for a result that can't be read, or has no picture.
    """
    found: dict[str, dict[str, Result]] = {}
    for path in sorted(results.glob("*/*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(
                f"{path} is damaged ({error}); restore it, or run experiments/{path.parent.name}.py"
            ) from None
        if isinstance(content, dict) and "claims" in content and path.stem != "smoke":
            if not (picture := path.with_suffix(".png")).exists():
                raise UsageError(f"{picture} is missing; restore it, or run experiments/{path.parent.name}.py")
            found.setdefault(path.parent.name, {})[path.stem] = content
    places = {name: place for place, name in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: (places.get(item[0], len(ORDER)), item[0])))


def page(found: Mapping[str, Mapping[str, Result]]) -> str:
    """The whole page, as Markdown."""
    every = [result for presets in found.values() for result in presets.values()]
    held, total = counts(every)
    off = [one.off for result in every for one in map(Claim.from_dict, result["claims"]) if one.holds]
    beyond = sum(one is not None for one in off)
    lines = [
        "# The paper, measured again",
        "",
        "Predictions of Atanasov et al., ICLR 2025 ([arXiv 2410.04642](https://arxiv.org/abs/2410.04642)), and of the "
        "laws here, beside what was measured. `make experiments PRESET=cpu` runs everything again and rebuilds this "
        "page, which is made from the files in `results/` by `python experiments/gallery.py`.",
        "",
        f"{held} of {total} predictions hold within their stated tolerance.",
        "",
        f"{rule(beyond)} A bound holds only if the number and its whole interval, where it has one, are on its side.",
        "",
        "| experiment | holds | device | time |",
        "|---|---|---|---|",
        *(overview(name, presets) for name, presets in found.items()),
        *(together(preset, found) for preset in SHOWN if any(preset in presets for presets in found.values())),
    ]
    for name, presets in found.items():
        lines += ["", *section(name, presets)]
    return "\n".join(lines) + "\n"


def rule(beyond: int) -> str:
    """When a number holds, and how many of those that hold have a prediction outside of their interval."""
    told = "A number holds if it lies within the tolerance of what was predicted, which is written as ± or as a range"
    if not beyond:
        return f"{told}."
    return f"{told}; for {beyond} of those the 95 % interval excludes the prediction, and the row says by how much."


def counts(results: Sequence[Result]) -> tuple[int, int]:
    """Claims that hold, and all."""
    claims = [claim for result in results for claim in result["claims"]]
    return sum(claim["holds"] for claim in claims), len(claims)


def overview(name: str, presets: Mapping[str, Result]) -> str:
    """One line of the table of contents."""
    result = presets.get("gpu") or next(iter(presets.values()))
    held, total = counts([result])
    return f"| [{name}](#{name}) | {held} of {total} | {result['machine']} | {duration(result['seconds'])} |"


def together(preset: str, found: Mapping[str, Mapping[str, Result]]) -> str:
    """The last lines of the table of contents: a preset of all experiments."""
    results = [presets[preset] for presets in found.values() if preset in presets]
    held, total = counts(results)
    return f"| all, {preset} | {held} of {total} | | {duration(sum(result['seconds'] for result in results))} |"


def duration(seconds: float) -> str:
    """In words."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def section(name: str, presets: Mapping[str, Result]) -> list[str]:
    """One experiment."""
    first = next(iter(presets.values()))
    lines = [f"## {name}", "", first["title"] + "."]
    for preset in (*SHOWN, *(other for other in presets if other not in SHOWN)):
        result = presets.get(preset)
        if result is None:
            lines += ["", f"**{preset}**: not measured; `python experiments/{name}.py --preset {preset}`"]
            continue
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        picture, data_set = f"results/{name}/{preset}.png", result.get("data_set", "")
        lines += [
            "", f"![{result['meaning']}]({picture})", "", result["meaning"], "",
            HEAD, *(Claim.from_dict(claim).row for claim in result["claims"]),
        ]  # fmt: skip
        lines += ["", result["table"]] if result["table"] else []
        lines += [
            "",
            f"**{preset}**: `{result['command']}`; {result['machine']}, {result['device']}; "
            f"{data_set + '; ' if data_set else ''}{result['date']}, {duration(result['seconds'])}; {versions}.",
        ]
    return lines


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--out", type=Path, default=HERE / "README.md", help="page to write")
    options = parser.parse_args(argv)
    try:
        found = read(options.results)
    except UsageError as error:
        parser.error(str(error))
    if not found:
        parser.error(f"{options.results} holds no result of an experiment; run one, e.g. python experiments/depth.py")
    try:
        options.out.write_text(page(found), encoding="utf-8")
    except OSError as error:
        parser.error(f"{options.out} can't be written: {error.strerror}; give another --out")
    print(options.out)
    return Path(options.out)


if __name__ == "__main__":
    main()
