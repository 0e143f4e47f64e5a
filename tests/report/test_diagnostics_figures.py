"""Each diagnostic has a picture, and what stands in it is what was measured."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from gammaopt import UsageError, report
from gammaopt.diagnostics import (
    Agreement,
    Collapse,
    Eigenvalues,
    Measurement,
    Monitor,
    SpectralDensity,
    dynamics,
    ntk_eigenvalues,
)
from gammaopt.online import MLP
from gammaopt.online.record import Curve

STEPS = (0, 1, 3, 10, 30, 100)
RUN = [
    Measurement(
        step, 0.1, loss=2.0 * (1 - 0.9 * i / 5), accuracy=0.5 + 0.1 * i, sharpness=3.0, sharpness_lr=0.4 * i,
        alignment=0.1 + 0.15 * i, kernel_kept=1 - 0.15 * i, feature_alignment=0.2,
    )
    for i, step in enumerate(STEPS)
]  # fmt: skip
T = np.geomspace(1, 1e4, 60)
AGREED = {
    (0.1, 1.0): Agreement(0.8, 0.7, 0.6, 5),
    (0.1, 30.0): Agreement(1.5, -0.2, 0.3, 5),
    (1.0, 30.0): Agreement(0.4, 0.9, 0.8, 5),
}


def stairs(t: Any) -> Any:
    return 1 - 0.4 / (1 + (30 / t) ** 6) - 0.5 / (1 + (1000 / t) ** 6)


def drawn(figure: Figure) -> Figure:
    """The figure after it was rendered, which must not warn."""
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    return figure


def data(line: Any) -> tuple[list[float], list[float]]:
    return [float(v) for v in line.get_xdata()], [float(v) for v in line.get_ydata()]


def line(figure: Figure, label: str, panel: int = 0) -> Any:
    (found,) = (one for one in figure.axes[panel].lines if str(one.get_label()).startswith(label))
    return data(found)


def test_a_spectrum_has_its_negative_eigenvalues_as_open_marks_at_their_size() -> None:
    values = np.array([5.0, -3.0, 1.0, -0.5])
    found = Eigenvalues(values, np.array([0.1, 0.2, 0.0, 0.9]), np.zeros(4), 20, 1e-6)
    figure = drawn(report.draw_spectrum(found))
    marks = {one.get_markerfacecolor(): data(one) for one in figure.axes[0].lines if one.get_linestyle() == "None"}
    assert marks[report._figures.ONE] == ([1, 3], [5, 1])
    opened = [data(one) for one in figure.axes[0].lines if one.get_markerfacecolor() == "white"]
    assert [points for points in opened if points[0]] == [([2, 4], [3, 0.5])]
    ends = figure.axes[0].collections[0].get_segments()  # type: ignore[attr-defined]
    assert ends[0][:, 1].tolist() == pytest.approx([4.9, 5.1])
    assert ends[3][:, 1].tolist() == pytest.approx([0.05, 1.4])  # a residual beyond the value stays on a log axis
    both = drawn(report.draw_spectrum({"start": found, "end": found}))
    assert {t.get_text() for t in both.axes[0].get_legend().get_texts()} == {"start", "end", "λ < 0"}  # type: ignore[union-attr]


def test_a_density_is_the_smoothed_one_and_reaches_seven_decades_down() -> None:
    found = SpectralDensity(np.array([-1.0, 0.0, 9.0]), np.array([0.1, 0.8999, 1e-4]), 12)
    axes = drawn(report.draw_density(found, width=0.2)).axes[0]
    x, y = data(axes.lines[0])
    expected = found.smoothed(np.array(x), 0.2)
    bottom = expected.max() / 1e7
    np.testing.assert_allclose(y, np.maximum(expected, bottom))
    assert axes.get_ylim()[0] == pytest.approx(bottom)
    assert x[0] < -1.5 < 9.5 < x[-1]
    one = SpectralDensity(np.array([2.0]), np.array([1.0]), 1)
    drawn(report.draw_density(one))  # all eigenvalues equal


def test_ntk_eigenvalues_that_are_zero_up_to_rounding_are_left_out() -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    values = ntk_eigenvalues(torch.nn.Linear(3, 1, bias=False), x)  # of rank 3
    figure = drawn(report.draw_ntk({"γ = 1": values}))
    rank, shown = line(figure, "γ = 1")
    assert rank == [1, 2, 3]
    assert shown == pytest.approx(values[:3].tolist())


def test_alignment_stands_beside_the_relative_loss_in_time() -> None:
    figure = drawn(report.draw_alignment(RUN))
    assert line(figure, "NTK with the targets") == (list(STEPS), pytest.approx([m.alignment for m in RUN]))
    assert line(figure, "features") == (list(STEPS), pytest.approx([0.2] * 6))
    assert line(figure, "loss over its start")[1] == pytest.approx([m.loss / 2 for m in RUN])
    assert figure.axes[0].get_xlim()[0] < 0  # step 0 is inside
    bare = [Measurement(0, 0.1, 1.0), Measurement(1, 0.1, 0.5)]
    with pytest.raises(UsageError, match="no kernel was measured; give the monitor measures="):
        report.draw_alignment(bare)


def test_sharpness_times_rate_stands_against_two_and_what_is_no_number_is_left_out() -> None:
    diverged = [*RUN, Measurement(200, 0.1, float("nan"), sharpness_lr=float("nan"))]
    figure = drawn(report.draw_edge({"γ = 3": RUN, "γ = 9": diverged}))
    assert line(figure, "γ = 3") == line(figure, "γ = 9") == (list(STEPS), pytest.approx([0.4 * i for i in range(6)]))
    assert set(line(figure, "edge of stability")[1]) == {2.0}
    with pytest.raises(UsageError, match="sharpness × rate was not measured; it takes SGD"):
        report.draw_edge([Measurement(0, 0.1, 1.0)])


@pytest.mark.parametrize("of", ["cosine", "labels", "distance"])
def test_agreement_is_a_symmetric_matrix_with_its_numbers(of: Any) -> None:
    axes = drawn(report.draw_agreement(AGREED, of=of)).axes[0]
    shown = np.array([float(text.get_text()) for text in axes.texts]).reshape(3, 3)
    expected = np.eye(3) if of != "distance" else np.zeros((3, 3))
    for (i, j), pair in zip(((0, 1), (0, 2), (1, 2)), AGREED, strict=True):
        expected[i, j] = expected[j, i] = getattr(AGREED[pair], of)
    np.testing.assert_allclose(shown, expected)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.1", "1", "30"]


def test_dynamics_are_marked_where_they_were_found() -> None:
    found = dynamics((T, stairs(T)))
    axes = drawn(report.draw_dynamics((T, stairs(T)))).axes[0]
    np.testing.assert_allclose(data(axes.lines[0])[1], stairs(T) / stairs(T)[0])
    assert [text.get_text() for text in axes.texts] == [f"{drop.size:.0%}" for drop in found.drops]
    assert [one.get_segments()[0][0, 0] for one in axes.collections] == [drop.step for drop in found.drops]  # type: ignore[attr-defined]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels == [f"plateau, {found.plateau:.3g} steps", "drops, in shares of the start"]
    bump = 4 * np.exp(-((np.log(T) - np.log(20)) ** 2) * 4)
    thrown = (T, 1 + bump - 0.95 / (1 + (200 / T) ** 4))
    figure = drawn(report.draw_dynamics(thrown))
    peak = dynamics(thrown).catapult
    assert peak is not None
    assert line(figure, "catapult to 4.99 × the start") == ([peak.step], [peak.height])
    gone = drawn(report.draw_dynamics(([1, 2, 3, 4], [1.0, 1.2, 5e3, np.nan])))
    assert line(gone, "diverged at step 3")[0] == [3, 3]
    at_once = drawn(report.draw_dynamics(([1, 2], [np.inf, np.inf])))
    assert line(at_once, "diverged at step 1")[0] == [1, 1]
    record: Any = type("Record", (), {"curve": Curve((), (), ()), "diverged_at": 1})()
    assert line(drawn(report.draw_dynamics(record)), "diverged at step 1")[0] == [1, 1]
    waiting = drawn(report.draw_dynamics((T, 0 * T + 1)))  # never left its plateau
    assert [text.get_text() for text in waiting.axes[0].get_legend().get_texts()] == ["plateau, 1e+04 steps"]  # type: ignore[union-attr]


def test_a_collapse_tells_its_spread_and_every_curve_has_its_label() -> None:
    found = Collapse(0.03, 0.71, T, np.stack([stairs(T), stairs(2 * T)]))
    figure = drawn(report.draw_collapse(found, ["a", "b"]))
    np.testing.assert_allclose(line(figure, "b")[1], found.curves[1])
    assert figure.axes[0].get_title() == "spread 0.03, in steps 0.71"
    with pytest.raises(UsageError, match="1 labels for 2 curves; give one for each"):
        report.draw_collapse(found, ["a"])


def test_a_monitored_run_has_a_panel_for_each_thing_that_was_measured() -> None:
    figure = drawn(report.draw_monitor(RUN))
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["loss", "sharpness × learning rate", "centred alignment", "accuracy in %"]
    assert data(figure.axes[0].lines[0])[1] == [m.loss for m in RUN]
    assert data(figure.axes[3].lines[0])[1] == pytest.approx([100 * (m.accuracy or 0) for m in RUN])
    assert len(drawn(report.draw_monitor([Measurement(0, 0.1, 1.0), Measurement(5, 0.1, 0.5)])).axes) == 1
    net, x = MLP(4, 1, width=4), torch.randn(6, 4)
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    monitor = Monitor(net, adam, "mse", (x, x[:, :1]), measures=("ntk",))
    page = drawn(report.draw_monitor(monitor))
    assert [axes.get_ylabel() for axes in page.axes] == ["loss", "centred alignment"]
    assert page.get_suptitle().replace("\n", "; ") == monitor.verdict()


def test_pictures_go_on_given_axes() -> None:
    figure = Figure()
    axes = figure.subplots(2)
    assert report.draw_edge(RUN, axes[1]) is figure
    assert not axes[0].lines
    assert axes[1].lines


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: report.draw_alignment([]), "there is no measurement to draw; give at least one"),
        (lambda: report.draw_spectrum({}), "there is nothing to draw; give at least one"),
        (lambda: report.draw_agreement(AGREED, of="cos"), "unknown of 'cos'; choose one of: cosine, labels"),  # type: ignore[arg-type]
        (lambda: report.draw_density(SpectralDensity(T, T, 1), width=0.0), "width=0 is not allowed"),
    ],
)
def test_mistakes_are_named(draw: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw()
