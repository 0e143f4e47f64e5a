"""The report is one file that needs nothing else: the verdict in words first, then figures, tables, the command."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest

from gammaopt.online.record import Curve, RunRecord
from gammaopt.report import gamma_curve, html_report, loss_curves, plane
from gammaopt.tuning import Arm, Rival, Spent, StudyPlan, TuneResult, paired_t
from gammaopt.tuning._record import Record
from gammaopt.tuning._result import Trial

PLAN = StudyPlan("digits", steps=30, trials=8, seeds=2, confirm_seeds=3, gamma_range=(0.01, 100.0))
STEPS = (1, 3, 10, 30)


def run(gamma: float, lr: float, seed: int, accuracy: float, diverged_at: int | None = None) -> RunRecord:
    steps = tuple(step for step in STEPS if diverged_at is None or step < diverged_at)
    losses = tuple(2.3 - 0.5 * accuracy * i for i in range(len(steps)))
    final: tuple[float, float | None] = (0.0, None) if diverged_at else (accuracy, 1.0)
    mean = 2.0 if steps else None
    return RunRecord(
        gamma, lr, seed, 30, lr * gamma, accuracy, mean, final[0], final[1], diverged_at, Curve(steps, losses, losses)
    )


def result(
    tuned: tuple[float, ...] = (0.62, 0.65, 0.60),
    base: tuple[float, ...] = (0.50, 0.52, 0.49),
    *,
    diverged_at: int | None = None,
    diverged_trials: str = "some",
    notes: tuple[str, ...] = (),
) -> TuneResult:
    """A study's result made up from the scores of its fresh seeds."""
    trials = tuple(
        Trial(arm, gamma, lr, PLAN.law.lr(lr, gamma), 0.3 + 0.05 * i, diverged_trials == "all" or lr > 30)
        for arm, gammas in (("tuned", (0.02, 0.3, 7.0, 80.0)), ("one_equal_budget", (1.0, 1.0, 1.0, 1.0)))
        for i, (gamma, lr) in enumerate(zip(gammas, (0.1, 1.0, 4.0, 50.0), strict=True))
    )
    cells = {"tuned": (0.3, 1.0, tuned), "one_equal_budget": (1.0, 4.0, base), "one": (1.0, 1.0, base)}
    arms = {
        name: Arm(name, 4, 1, g, lr, PLAN.law.lr(lr, g), 0.6, sum(scores) / 3, sum(scores) / 3, scores)
        for name, (g, lr, scores) in cells.items()
    }
    runs: dict[str, tuple[Record, ...]] = {
        name: tuple(run(g, lr, seed, a, diverged_at) for seed, a in zip(PLAN.fresh_seeds, scores, strict=True))
        for name, (g, lr, scores) in cells.items()
    }
    return TuneResult(
        plan=PLAN,
        metric="prequential_accuracy",
        arms=arms,
        confirm=paired_t("prequential_accuracy", PLAN.fresh_seeds, tuned, base),
        confirm_final=paired_t("final_accuracy", PLAN.fresh_seeds, tuned, base),
        rivals=(Rival(2.0, paired_t("prequential_accuracy", PLAN.fresh_seeds, tuned, base)),),
        spent={name: Spent(16, 15360, 2.5e9, 0.75) for name in arms},
        notes=notes,
        versions={"gammaopt": "9.8.7", "torch": "6.5.4", "machine": "abacus"},
        command=PLAN.command(),
        trials=trials,
        runs=runs,
    )


class Page(HTMLParser):
    """Tags with their attributes, visible text, and whether every element was closed in order."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def html() -> str:
    return html_report(result(notes=("range too small: γ < 1 & more",)))


def test_the_page_needs_no_other_file_and_runs_no_script(html: str) -> None:
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "img", "image", "base"} - {"image"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert str(value).startswith(("#", "data:")), f"<{tag} {name}={value}>"
    assert not re.search(r"@import|url\((?!#)", html)


def test_every_id_is_unique_and_every_reference_finds_its_own_figures_id(html: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    references = re.findall(r'href="#([^"]+)"', html) + re.findall(r"url\(#([^)]+)\)", html)
    assert references
    assert set(references) <= set(ids)
    # Each figure refers to itself only.
    for figure in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        mine = set(re.findall(r'\bid="([^"]+)"', figure))
        used = set(re.findall(r'href="#([^"]+)"', figure) + re.findall(r"url\(#([^)]+)\)", figure))
        assert used <= mine


def test_the_verdict_comes_in_words_before_any_figure_or_table(html: str) -> None:
    words = unescape(html)
    verdict = words.index("Confirmed: γ = 0.3 beats γ = 1")
    assert verdict < words.index("<svg")
    assert verdict < words.index("<table")
    assert verdict < words.index("range too small: γ < 1 & more")


def test_the_page_has_three_named_figures_and_three_tables_in_order(html: str) -> None:
    page = Page(html)
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert labels == [
        "Prequential accuracy against γ",
        "Trials in the (γ, η) plane with the law's line",
        "Online loss in time",
    ]
    kinds = [tag for tag, _ in page.tags if tag in ("svg", "table")]
    assert kinds == ["svg", "svg", "svg", "table", "table", "table"]


def test_the_page_names_the_command_and_every_version(html: str) -> None:
    text = Page(html).text
    assert PLAN.command() in text
    assert "gammaopt 9.8.7, torch 6.5.4, machine abacus" in text


def test_the_tables_show_the_arms_and_the_differences_seed_by_seed(html: str) -> None:
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    by_first = {row[0]: row for row in rows}
    assert by_first["tuned γ"][1:6] == ["4", "1", "0.3", "1", "0.3"]
    assert by_first["γ = 1, equal budget"][3:6] == ["1", "4", "4"]
    assert by_first["500001"] == ["500001", "65.00 %", "52.00 %", "52.00 %", "+13.00"]
    assert [row[0] for row in rows[-3:]] == ["500000", "500001", "500002"]


def test_notes_are_escaped_and_shown_and_without_notes_there_is_none(html: str) -> None:
    assert "Note: range too small: γ &lt; 1 &amp; more." in html
    assert "Note:" not in html_report(result())


@pytest.mark.parametrize(
    ("tuned", "verdict", "words"),
    [
        ((0.62, 0.65, 0.60), "confirmed", "Confirmed: γ = 0.3 beats γ = 1 by +12.00 points of prequential accuracy"),
        ((0.62, 0.45, 0.49), "not confirmed", "Not confirmed: γ = 0.3 can't be told from γ = 1: +1.67 points"),
        ((0.40, 0.41, 0.39), "worse", "Worse: γ = 0.3 is below γ = 1 by 10.33 points"),
    ],
)
def test_each_verdict_has_its_sentence_with_the_interval_and_the_seeds(
    tuned: tuple[float, ...], verdict: str, words: str
) -> None:
    study = result(tuned)
    assert study.verdict == verdict
    assert study.in_words().startswith(words)
    low, high = study.confirm.ci95
    assert f"95 % interval {100 * low:+.2f} to {100 * high:+.2f}" in study.in_words()
    assert "3 fresh paired seeds" in study.in_words()


def test_the_p_of_a_verdict_is_the_largest_and_the_least_difference_is_told() -> None:
    study = result()
    near, far = ((0.50, 0.52, 0.49), (0.55, 0.57, 0.58))
    rivals = tuple(
        Rival(lr, paired_t("prequential_accuracy", PLAN.fresh_seeds, (0.62, 0.65, 0.60), base))
        for lr, base in ((2.0, near), (8.0, far))
    )
    study = replace(study, rivals=rivals)
    assert study.p_value == max(rival.confirm.p_value for rival in rivals) > study.confirm.p_value
    assert study.smallest_difference == pytest.approx(0.17 / 3)
    confirmed = replace(study, rivals=rivals[:1])
    assert "at a rate beside it" not in confirmed.in_words()  # as far as at the rate it chose
    far_ahead = replace(
        study, rivals=(Rival(2.0, paired_t("a", PLAN.fresh_seeds, (0.62, 0.65, 0.60), (0.52, 0.54, 0.51))),)
    )
    assert far_ahead.verdict == "confirmed"
    assert "against γ = 1 at a rate beside it +10.00 at least" in far_ahead.in_words()
    other_sign = Rival(4.0, paired_t("prequential_accuracy", PLAN.fresh_seeds, near, (0.62, 0.65, 0.60)))
    both_signs = replace(study, rivals=(*rivals, other_sign))
    assert (both_signs.p_value, both_signs.smallest_difference) == (1.0, 0.0)


def test_fewer_than_ten_seeds_show_nothing_whatever_the_verdict() -> None:
    assert result().verdict == "confirmed"
    assert result().in_words().endswith("). 3 seeds are too few to show it: give 10 or more.")


def test_the_report_of_a_result_is_always_the_same_text(html: str) -> None:
    assert html_report(result(notes=("range too small: γ < 1 & more",))) == html


@pytest.mark.parametrize("diverged_at", [1, 2, 11])
@pytest.mark.parametrize("diverged_trials", ["some", "all"])
def test_diverged_runs_and_trials_are_drawn_without_a_warning(diverged_at: int, diverged_trials: str) -> None:
    study = result((0.0, 0.02, 0.01), (0.0, 0.0, 0.0), diverged_at=diverged_at, diverged_trials=diverged_trials)
    assert html_report(study).count("<svg") == 3


def test_one_diverged_run_among_good_ones_shortens_the_mean_curve_to_what_all_reached() -> None:
    study = result()
    good = study.runs["tuned"]
    assert isinstance(good[0], RunRecord)
    cut = (replace(good[0], curve=Curve((1, 3), (2.3, 2.0), (0.1, 0.2)), diverged_at=9), *good[1:])
    figure = loss_curves(replace(study, runs={**study.runs, "tuned": cut}))
    base, tuned = figure.axes[0].lines
    assert list(base.get_xdata()) == [1, 3, 10, 30]  # type: ignore[arg-type]
    assert list(tuned.get_xdata()) == [1, 3]  # type: ignore[arg-type]
    expected = (2.0 + good[1].curve.loss[1] + good[2].curve.loss[1]) / 3
    assert tuned.get_ydata()[1] == pytest.approx(expected)  # type: ignore[index]


def test_the_plane_draws_the_law_through_the_best_rate_at_gamma_one() -> None:
    study = result()
    axes = plane(study).axes[0]
    line = next(line for line in axes.lines if str(line.get_label()).startswith("law: η ∝ γ^1 below 1, γ^0.667 above"))
    points = dict(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))  # type: ignore[arg-type]
    for gamma, rate in points.items():
        assert rate == pytest.approx(4.0 * (gamma if gamma <= 1 else gamma ** (2 / 3)))
    assert (min(points), max(points)) == pytest.approx((0.01, 100.0))
    crosses = next(line for line in axes.lines if line.get_label() == "diverged")
    assert len(crosses.get_xdata()) == 2  # type: ignore[arg-type]


def test_the_gamma_curve_joins_the_two_scores_of_every_fresh_seed() -> None:
    study = result()
    joined = [line for line in gamma_curve(study).axes[0].lines if len(line.get_xdata()) == 2]  # type: ignore[arg-type]
    ends = sorted((list(line.get_xdata()), list(line.get_ydata())) for line in joined)  # type: ignore[arg-type]
    pairs = [(0.49, 0.60), (0.50, 0.62), (0.52, 0.65)]
    for (gammas, scores), (b, t) in zip(ends, pairs, strict=True):
        assert gammas == [1.0, 0.3]
        assert scores == pytest.approx([100 * b, 100 * t])


def test_the_tests_beside_the_paired_one_and_the_rivals_are_on_the_page(html: str) -> None:
    text, confirm = Page(html).text, result().confirm
    assert f"(p = {confirm.p_value:.2g}): Wilcoxon's signed ranks p = {confirm.wilcoxon_p:.2g}" in text
    assert f"permutation of signs p = {confirm.permutation_p:.2g}." in text
    assert len({f"{p:.2g}" for p in (confirm.p_value, confirm.wilcoxon_p)}) == 2
    (rival,) = result().rivals
    words = " ".join(text.partition("lr of γ = 1")[2].split())
    low, high = (PLAN.shown_difference(end) for end in rival.confirm.ci95)
    row = f"2 {PLAN.shown_difference(rival.confirm.mean_difference)} {low} to {high} {rival.confirm.p_value:.2g}"
    assert row.replace(" ", "") in words.replace(" ", "")
