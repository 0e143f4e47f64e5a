"""The report: one HTML file with everything in it. Verdict in words first, then the evidence, then how to repeat it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING

from gammaopt.report._figures import gamma_curve, loss_curves, plane
from gammaopt.tuning._confirm import Confirmation
from gammaopt.tuning._result import TuneResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2429; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .3rem; }
h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.verdict { border-left: .4rem solid $colour; background: #f4f6f7; padding: .8rem 1rem; font-size: 1.1rem; }
.note { color: #8a4b00; }
svg { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #dde3e6; }
th:first-child, td:first-child { text-align: left; }
pre { background: #f4f6f7; padding: .7rem 1rem; white-space: pre-wrap; font-size: .85rem; }
p.caption { color: #55626a; font-size: .9rem; margin-top: .2rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="verdict"><strong>$verdict</strong></p>
$notes
<p>$budget</p>
<p>$others</p>
$final
<h2>$metric against γ</h2>
$gamma_curve
<p class="caption">Small dots: trials of the search, each the mean over $seeds tuning seeds. Grey lines: fresh seeds,
each joining its run at γ&nbsp;=&nbsp;1 and its run at the tuned γ. Diamonds: their means.</p>
<h2>Trials in the (γ, η) plane</h2>
$plane
<p class="caption">The line is the law through the best rate found at γ&nbsp;=&nbsp;1. Nothing on it was fitted for
γ&nbsp;≠&nbsp;1.</p>
<h2>Runs in time</h2>
$loss_curves
<p class="caption">Mean and standard deviation over the fresh seeds.</p>
<h2>Arms</h2>
<div class="wide">$arms</div>
<p class="caption">Each arm chose the best of its trials on the tuning seeds. Equal budget means equal trials, samples
and FLOPs: every run takes $steps steps. “Tuning score” was the best of many and so is optimistic; the verdict uses
fresh seeds only.</p>
<h2>γ&nbsp;=&nbsp;1 at the rates beside</h2>
<div class="wide">$rivals</div>
<p class="caption">A search misses the best rate by a little. “Confirmed” asks that tuned γ beats γ&nbsp;=&nbsp;1 at the
rate it chose and at each of these.</p>
<h2>Fresh seeds</h2>
<div class="wide">$table</div>
<h2>Made by</h2>
<pre>$command</pre>
<p class="caption">$versions</p>
</body>
</html>
""")

COLOURS = {"confirmed": "#2e7d4f", "not confirmed": "#8a8f93", "worse": "#b5433a", "range too small": "#8a4b00"}
ARM_TITLES = {
    "tuned": "tuned γ",
    "one_equal_budget": "γ = 1, equal budget",
    "one": "γ = 1, a few rates",
}


def html_report(result: TuneResult) -> str:
    """The report of a study as one self-contained HTML page: no scripts, no outside files."""
    return PAGE.substitute(
        title=escape(f"γ study: {result.plan.title}"),
        metric=escape(result.metric.replace("_", " ").capitalize()),
        budget=escape(result.budget_in_words()),
        others=escape(_others_words(result)),
        rivals=_rivals_table(result),
        colour=COLOURS[result.verdict],
        verdict=escape(result.in_words()),
        notes="".join(f'<p class="note">Note: {escape(note)}.</p>' for note in result.notes),
        final=f"<p>{escape(_final_words(result.confirm_final))}</p>" if result.confirm_final else "",
        gamma_curve=_svg(gamma_curve(result), f"{result.metric.replace('_', ' ')} against γ".capitalize()),
        plane=_svg(plane(result), "Trials in the (γ, η) plane with the law's line"),
        loss_curves=_svg(loss_curves(result), result.plan.curve.partition(" (")[0].capitalize() + " in time"),
        seeds=result.plan.seeds,
        steps=result.plan.steps,
        arms=_arms_table(result),
        table=_seeds_table(result),
        command=escape(result.command),
        versions=escape(_made_of(result)),
    )


def _made_of(result: TuneResult) -> str:
    versions = [f"{name} {version}" for name, version in result.versions.items()]
    return ", ".join(versions + ([f"commit {result.git_commit}"] if result.git_commit else []))


def _others_words(result: TuneResult) -> str:
    confirm = result.confirm
    return (
        f"Beside the paired t test (p = {confirm.p_value:.2g}): Wilcoxon's signed ranks p = {confirm.wilcoxon_p:.2g}, "
        f"permutation of signs p = {confirm.permutation_p:.2g}."
    )


def _final_words(final: Confirmation) -> str:
    low, high = (100 * end for end in final.ci95)
    return (
        f"Held-out accuracy at the end, for comparison: {100 * final.mean_difference:+.2f} points "
        f"(95 % interval {low:+.2f} to {high:+.2f})."
    )


def _rivals_table(result: TuneResult) -> str:
    shown = result.plan.shown_difference
    rows = (
        (
            f"{rival.lr:.3g}",
            shown(rival.confirm.mean_difference),
            " to ".join(map(shown, rival.confirm.ci95)),
            f"{rival.confirm.p_value:.2g}",
        )
        for rival in result.rivals
    )
    return _table(("lr of γ = 1", _difference(result, "tuned γ", "γ = 1"), "95 % interval", "p"), rows)


def _difference(result: TuneResult, tuned: str, other: str) -> str:
    """What a positive difference is: the improvement, also of a score that is minimised."""
    return f"{tuned} − {other}" if result.plan.direction == "maximize" else f"{other} − {tuned}"


def _arms_table(result: TuneResult) -> str:
    head = (
        "arm",
        "trials",
        "diverged",
        "γ",
        "lr (as given)",
        "η = lr·s(γ)",
        "tuning score",
        "fresh seeds",
        *(["held-out at the end"] if result.confirm_final else []),
    )
    rows = (
        (
            ARM_TITLES[name],
            str(arm.trials),
            str(arm.diverged),
            f"{arm.gamma:.3g}",
            f"{arm.lr:.3g}",
            f"{arm.effective_lr:.3g}",
            result.shown(arm.score),
            result.shown(arm.confirmed_score),
            *([result.shown(arm.confirmed_final)] if result.confirm_final else []),
        )
        for name, arm in sorted(result.arms.items(), key=lambda item: list(ARM_TITLES).index(item[0]))
    )
    return _table(head, rows)


def _seeds_table(result: TuneResult) -> str:
    scores = [result.arms[name].scores for name in ARM_TITLES]
    head = ("seed", *ARM_TITLES.values(), _difference(result, "tuned", "equal budget"))
    rows = (
        (str(seed), *(result.shown(score) for score in row), result.plan.shown_difference(difference))
        for seed, *row, difference in zip(result.confirm.seeds, *scores, result.confirm.differences, strict=True)
    )
    return _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _svg(figure: Figure, label: str) -> str:
    """The figure as an inline SVG element, with ids that don't clash with those of the page's other figures."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    prefix = re.sub(r"\W+", "-", label.lower(), flags=re.ASCII)  # some renderers look no other ids up
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
