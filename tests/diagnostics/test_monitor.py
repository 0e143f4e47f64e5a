"""A monitor measures at log-spaced steps within its share of time, changes nothing, and writes the same records."""

from __future__ import annotations

import copy
import json
import math
import sys
import threading
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gammaopt
from gammaopt import UsageError
from gammaopt._files import locked
from gammaopt.diagnostics import Measurement, Monitor, kernel_target_alignment, ntk, sharpness
from gammaopt.diagnostics._lanczos import lanczos
from gammaopt.diagnostics._monitor import MONITORS
from gammaopt.diagnostics._operator import NotFiniteError
from gammaopt.online import MLP, RunRecord

X = torch.sign(torch.randn(32, 6, generator=torch.Generator().manual_seed(0)))
Y = X[:, :1] * X[:, 1:2]


def fresh(gamma: float = 2.0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = gammaopt.wrap(
        nn.Sequential(MLP(6, 16, width=8), nn.Dropout(0.2), nn.Linear(16, 1)),
        gamma,
        depth=3,
        parametrization="mean_field",
    )
    return model, gammaopt.SGD(model.parameters(), lr=0.2, momentum=0.5)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, monitor: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(X) - Y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if monitor is not None:
            monitor(loss)
    return losses


class Norm(nn.Module):
    """At 0, where it is, it has a slope of 0 and no second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        kink: Tensor = (x - x.detach()).norm(dim=1, keepdim=True)
        return kink


class Clock:
    """Time that passes by one second whenever somebody looks, or as told."""

    def __init__(self, look: float) -> None:
        self.now, self.look = 0.0, look

    def __call__(self) -> float:
        self.now += self.look
        return self.now


def test_training_is_the_same_with_a_monitor_to_the_last_bit() -> None:
    model, optimizer = fresh()
    alone = fit(model, optimizer, None, 12)
    model, optimizer = fresh()
    monitor = Monitor(model, optimizer, "mse", (X, Y), share=None)
    assert fit(model, optimizer, monitor, 12) == alone
    assert len(monitor.measurements) > 5
    assert model.training


def test_it_measures_at_log_spaced_steps_what_the_functions_measure(tmp_path: Path) -> None:
    model, optimizer = fresh()
    monitor = Monitor(model, optimizer, "mse", (X, Y), share=None, per_decade=4, kernel_samples=16, out=tmp_path)
    fit(model, optimizer, monitor, 60)
    steps = [m.step for m in monitor.measurements]
    assert steps == [0, 1, 2, 4, 8, 15, 27, 49]
    last = monitor.measure()
    assert last.sharpness == pytest.approx(sharpness(model, "mse", (X, Y)), rel=2e-2)
    scaled = sharpness(model, "mse", (X, Y), optimizer=optimizer)
    assert last.sharpness_lr == pytest.approx(scaled, rel=2e-2)
    assert last.alignment == pytest.approx(kernel_target_alignment(ntk(model, X[:16]), Y[:16]))
    assert monitor.measurements[0].kernel_kept == pytest.approx(1.0)
    record = monitor.finish()
    assert monitor.finish() is record
    lines = (tmp_path / "measurements.jsonl").read_text().splitlines()
    assert [Measurement.from_dict(json.loads(line)) for line in lines] == monitor.measurements
    assert [m.step for m in monitor.measurements] == [*steps, 60]
    (written,) = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert RunRecord.from_dict(json.loads(written)) == record
    assert (record.gamma, record.lr, record.steps) == (2.0, 0.2, 60)
    assert record.effective_lr == pytest.approx(0.2 * 2 ** (2 / 3))
    assert record.final_loss == pytest.approx(last.loss)
    assert len(record.curve.steps) <= 40
    assert f"sharpness × rate: {last.sharpness_lr:.2f} of 2" in monitor.verdict()


@pytest.mark.parametrize(
    ("settings", "edge"),
    [({"momentum": 0.9}, 3.8), ({"momentum": 0.9, "nesterov": True}, 3.8 / 2.8), ({"maximize": True}, None)],
)
def test_sharpness_times_rate_is_in_units_of_the_edge(settings: dict[str, Any], edge: float | None) -> None:
    net = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, **settings)
    monitor = Monitor(net, optimizer, "mse", (X, Y), measures=("sharpness",))
    (measured,) = monitor.measurements
    assert measured.sharpness is not None
    expected = None if edge is None else pytest.approx(0.1 * measured.sharpness * 2 / edge, rel=2e-2)
    assert measured.sharpness_lr == expected


def said(*measured: Measurement) -> str:
    monitor = object.__new__(Monitor)
    monitor.measurements, monitor.step, monitor._share = list(measured), measured[-1].step, None
    return monitor.verdict()


def test_a_verdict_says_nothing_of_the_kernel_before_the_loss_moved() -> None:
    torch.manual_seed(0)
    model = gammaopt.wrap(MLP(6, 1, width=32), 100.0, depth=3, parametrization="mean_field")
    optimizer = gammaopt.SGD(model.parameters(), lr=0.2)
    monitor = Monitor(model, optimizer, "mse", (X, Y), share=None)
    fit(model, optimizer, monitor, 5)
    assert monitor.measure().kernel_kept == pytest.approx(1, abs=0.02)
    assert "lazy" not in monitor.verdict()
    assert "the loss has not moved" in monitor.verdict()


def test_a_verdict_has_words_for_any_loss() -> None:
    start = Measurement(0, 0.0, 1.0, kernel_kept=1.0)
    assert said(start, Measurement(9, 0.0, 3.8, kernel_kept=0.5)) == (
        "step 9; the loss rose to 3.8 of its start: a catapult if it comes back, or this rate is too large"
    )
    assert said(start, Measurement(9, 0.0, 0.5, kernel_kept=0.5)).startswith("step 9; rich (kernel kept: 0.50); ")
    assert said(Measurement(0, 0.0, 0.0), Measurement(9, 0.0, 0.0)) == "step 9; the loss is 0, from 0"
    assert said(Measurement(0, 0.0, -1.0), Measurement(9, 0.0, -2.0)) == "step 9; the loss is -2, from -1"


def test_a_batch_norm_in_training_has_no_kernels_by_default() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = Monitor(net, optimizer, "mse", (X, Y), share=None)
    fit(net, optimizer, monitor, 2)
    for one in monitor.measurements:
        assert set(one.numbers()) == {"seconds", "loss", "sharpness", "sharpness_lr"}
    with pytest.raises(UsageError, match=r"'1' normalises .* its batch; give measures=\('sharpness',\)"):
        Monitor(net, optimizer, "mse", (X, Y), measures=("sharpness", "features"))
    net.eval()
    assert monitor.measure().kernel_kept == pytest.approx(1)


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = MLP(6, 3, width=8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = self.net(x) * scale
        return out


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_any_mapping_of_inputs_is_cut_to_its_first_samples(kind: Any) -> None:
    torch.manual_seed(0)
    net, y = Keyed(), torch.arange(32) % 3
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    inputs = kind({"x": X, "scale": torch.tensor(2.0)})
    (one,) = Monitor(net, optimizer, "cross_entropy", (inputs, y), kernel_samples=8).measurements
    few = {"x": X[:8], "scale": torch.tensor(2.0)}
    assert one.alignment == pytest.approx(kernel_target_alignment(ntk(net, few), y[:8]))
    assert one.feature_alignment is not None


def test_targets_that_no_kernel_aligns_with_leave_that_out_and_other_mistakes_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = MLP(6, 3, width=8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def loss(output: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(output, targets["y"])

    y = torch.arange(32) % 3
    (one,) = Monitor(net, optimizer, loss, (X, {"y": y})).measurements
    assert (one.alignment, one.feature_alignment) == (None, None)
    assert one.kernel_kept == pytest.approx(1)
    (one,) = Monitor(net, optimizer, "cross_entropy", (X, 0 * y)).measurements
    assert one.alignment is None  # one class: constant over the samples
    wrong = lambda *args, **settings: torch.eye(3, dtype=torch.float64)
    monkeypatch.setattr("gammaopt.diagnostics._monitor.feature_kernel", wrong)
    with pytest.raises(UsageError, match=r"kernels of shapes \(3, 3\) and \(32, 32\)"):
        Monitor(net, optimizer, "cross_entropy", (X, y))


def test_runs_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    net = MLP(6, 1, width=8)
    (tmp_path / "measurements.jsonl").write_text(Measurement(0, 0.0, 1.0).to_json() + "\n")  # of an older version
    for seed in (3, 3):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        monitor = Monitor(net, optimizer, "mse", (X, Y), share=None, measures=(), out=tmp_path, seed=seed)
        fit(net, optimizer, monitor, 1)
    lines = [json.loads(line) for line in (tmp_path / "measurements.jsonl").read_text().splitlines()]
    assert [(line.get("run"), line.get("seed"), line["step"]) for line in lines] == [
        (None, None, 0), (1, 3, 0), (1, 3, 1), (2, 3, 0), (2, 3, 1),
    ]  # fmt: skip
    assert [Measurement.from_dict(line) for line in lines[3:]] == monitor.measurements


@pytest.mark.parametrize(("groups", "searches"), [(1, 1), (2, 2)])
def test_a_measurement_copies_the_model_once(monkeypatch: pytest.MonkeyPatch, groups: int, searches: int) -> None:
    copies, ran = [], []
    own, search = copy.deepcopy, lanczos

    def counting(value: Any, *rest: Any) -> Any:
        copies.extend([value] if isinstance(value, nn.Module) and not rest else [])
        return own(value, *rest)

    def counted(*args: Any, **settings: Any) -> Any:
        ran.append(args)
        return search(*args, **settings)

    monkeypatch.setattr(copy, "deepcopy", counting)
    monkeypatch.setattr("gammaopt.diagnostics._spectrum.lanczos", counted)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    rates = [0.3, 0.1][:groups]
    parts = [{"params": part.parameters(), "lr": rates[i % groups]} for i, part in enumerate((net[0], net[2]))]
    optimizer = torch.optim.SGD(parts, momentum=0.5)
    (one,) = Monitor(net, optimizer, "mse", (X, Y)).measurements
    assert (len(copies), len(ran)) == (1, searches)
    monkeypatch.undo()
    assert one.sharpness == pytest.approx(sharpness(net, "mse", (X, Y)), rel=1e-2)
    assert one.sharpness_lr == pytest.approx(sharpness(net, "mse", (X, Y), optimizer=optimizer), rel=1e-2)


def test_losses_are_kept_in_blocks_and_moved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gammaopt.diagnostics._told.BLOCK", 4)
    net = MLP(6, 1, width=8)
    monitor = Monitor(net, torch.optim.SGD(net.parameters(), lr=0.1), "mse", (X, Y), measures=())
    with torch.inference_mode():
        for step in range(1, 6):
            monitor(torch.tensor([float(step)]) if step % 2 else float(step), torch.tensor(0.5))
    for step in range(6, 11):
        monitor(torch.tensor(float(step), requires_grad=True))
    record = monitor.finish()
    assert record.curve.loss == tuple(map(float, range(1, 11)))
    assert record.curve.accuracy == (0.5,) * 5 + (0.0,) * 5
    assert len(monitor._losses._full) == 3


def test_losses_that_are_told_at_some_steps_only_stand_at_those() -> None:
    net = MLP(6, 1, width=8)
    monitor = Monitor(net, torch.optim.SGD(net.parameters(), lr=0.1), "mse", (X, Y), measures=(), start=10)
    for loss in (None, 2.0, None, 4.0, None, 6.0):
        monitor(loss)
    curve = monitor.finish().curve
    assert (curve.steps, curve.loss) == ((12, 14, 16), (2.0, 4.0, 6.0))


def test_a_run_that_its_last_step_ended_diverged_after_it() -> None:
    net = MLP(6, 1, width=8)
    monitor = Monitor(net, torch.optim.SGD(net.parameters(), lr=0.1), "mse", (X, Y), measures=())
    for loss in (1.0, 0.9, 0.8):
        monitor(loss)
    with torch.no_grad():
        next(net.parameters()).fill_(math.nan)
    record = monitor.finish()
    assert (record.diverged_at, record.curve.steps) == (4, (1, 2, 3))


def test_a_share_that_allows_one_measurement_gives_no_verdict_on_the_run() -> None:
    model, optimizer = fresh()
    monitor = Monitor(model, optimizer, "mse", (X, Y), share=1e-6, clock=Clock(1.0))
    fit(model, optimizer, monitor, 5)
    assert len(monitor.measurements) == 1
    assert monitor.verdict() == (
        "step 0 of 5 so far: nothing was measured since, for share=1e-06 of these steps' time is less than the "
        "1 s that a measurement takes; give a larger share, or None"
    )


def test_steps_ascend_where_losses_are_told_in_both_ways() -> None:
    net = MLP(6, 1, width=8)
    monitor = Monitor(net, torch.optim.SGD(net.parameters(), lr=0.1), "mse", (X, Y), measures=())
    monitor.note(1.0, steps=3)
    monitor(0.5)
    assert monitor.finish().curve.steps == (1, 2, 3, 4)


def test_a_warm_ups_base_rate_is_that_of_the_record() -> None:
    model, optimizer = fresh()
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
    assert optimizer.param_groups[0]["lr"] == 0.0
    record = Monitor(model, optimizer, "mse", (X, Y), measures=()).finish()
    assert record.lr == 0.2
    assert record.effective_lr == pytest.approx(0.2 * gammaopt.EtaLaw(3).factor(2.0))


def test_a_run_waits_for_another_that_writes_and_a_study_is_not_written_into(tmp_path: Path) -> None:
    model, optimizer = fresh()
    made: list[Monitor] = []
    with locked(tmp_path, MONITORS):
        waiting = threading.Thread(
            target=lambda: made.append(Monitor(model, optimizer, "mse", (X, Y), measures=(), out=tmp_path))
        )
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert not made
    waiting.join(30)
    assert len((tmp_path / "measurements.jsonl").read_text().splitlines()) == 1
    for file, what in (("portrait.json", "a portrait"), ("study.json", "a study")):
        (tmp_path / file).write_text("{}")
        with pytest.raises(UsageError, match=f"is the folder of {what}; give a folder for monitored runs"):
            Monitor(model, optimizer, "mse", (X, Y), measures=(), out=tmp_path)


def test_a_curvature_that_is_not_finite_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(6, 1), Norm())
    (one,) = Monitor(
        net, torch.optim.SGD(net.parameters(), lr=0.1), "mse", (X, Y), measures=("sharpness",)
    ).measurements
    assert math.isfinite(one.loss)
    assert (one.sharpness, one.sharpness_lr) == (None, None)
    calls: list[Any] = []

    def second_fails(*args: Any) -> float:
        calls.append(args)
        if len(calls) == 2:
            raise NotFiniteError("it is not finite")
        return 1.0

    monkeypatch.setattr("gammaopt.diagnostics._monitor.largest_eigenvalue", second_fails)
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1))
    rates = [{"params": part.parameters(), "lr": lr} for part, lr in zip(net, (0.1, 0.2), strict=True)]
    (one,) = Monitor(net, torch.optim.SGD(rates), "mse", (X, Y), measures=("sharpness",)).measurements
    assert (one.sharpness, one.sharpness_lr) == (1.0, None)


def test_the_score_at_the_end_counts_as_spent() -> None:
    model, optimizer = fresh()
    monitor = Monitor(model, optimizer, "mse", (X, Y), measures=(), clock=Clock(1.0))
    spent = monitor.spent
    monitor.finish()
    assert monitor.spent == spent + 1


def test_the_clock_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Device:
        type = "cuda"

    class Parameter:
        device = Device()

    monitor = object.__new__(Monitor)
    monitor.model = type("Net", (), {"parameters": lambda self: iter([Parameter()])})()
    monitor._clock = lambda: order.append("clock") or 1.0  # type: ignore[func-returns-value]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    assert monitor._now() == 1.0
    assert order == ["wait", "clock"]


def test_the_share_of_time_is_kept_and_a_due_step_waits() -> None:
    """Each look at the clock is a second: a measurement takes one, a step one (it asks whether there is time)."""
    model, optimizer = fresh()
    monitor = Monitor(model, optimizer, "mse", (X, Y), share=0.05, measures=("ntk",), clock=Clock(1.0))
    fit(model, optimizer, monitor, 300)
    steps = [m.step for m in monitor.measurements]
    assert steps[0] == 0
    assert 4 <= len(steps) <= 300 * 0.05 + 2
    clock = 0
    for spent, step in enumerate(steps[1:], start=1):
        clock = step
        assert spent + 1 <= 0.05 * (clock + 2 * spent + 2) + 1  # what was spent, and this one, of what had passed
    assert monitor.spent <= 0.05 * 330


def test_a_diverged_run_and_a_plain_model_and_adam_have_records_too() -> None:
    net = MLP(6, 1, width=8)
    adam = torch.optim.Adam(net.parameters(), lr=1e-2)
    monitor = Monitor(net, adam, "mse", (X, Y), share=None)
    fit(net, adam, monitor, 5)
    assert monitor.measurements[-1].sharpness_lr is None
    assert "edge" not in monitor.verdict()
    assert monitor.finish().effective_lr == pytest.approx(1e-2)
    with torch.no_grad():
        net.get_parameter("1.weight").fill_(float("nan"))
    assert not torch.isfinite(torch.tensor(monitor.measure().loss))
    written = json.loads(monitor.measurements[-1].to_json())
    assert written["loss"] is None
    assert math.isnan(Measurement.from_dict(written).loss)
    assert monitor.verdict() == "step 5: diverged"
    silent = Monitor(net, adam, "mse", (X, Y), share=None)
    silent()
    assert silent.finish().final_loss is None


def test_classes_have_an_accuracy_and_a_writer_gets_the_numbers() -> None:
    class Writer:
        told: list[tuple[str, int]] = []  # noqa: RUF012

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert isinstance(value, float)
            self.told.append((name, step))

        def flush(self) -> None:
            self.told.append(("flush", -1))

    net = MLP(6, 3, width=8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    labels = torch.arange(32) % 3
    monitor = Monitor(net, optimizer, "cross_entropy", (X, labels), measures=("features",), tensorboard=Writer())
    expected = float((net(X).argmax(1) == labels).double().mean())
    assert monitor.measurements[0].accuracy == pytest.approx(expected)
    monitor.finish()
    names = {name for name, _ in Writer.told}
    assert {"gammaopt/loss", "gammaopt/accuracy", "gammaopt/feature_alignment", "flush"} <= names


def test_verdicts_tell_lazy_from_rich() -> None:
    told = {}
    for gamma, lr in ((0.05, 2.0), (30.0, 0.2)):
        torch.manual_seed(0)
        model = gammaopt.wrap(MLP(6, 1, width=32), gamma, depth=3, parametrization="mean_field")
        optimizer = gammaopt.SGD(model.parameters(), lr=lr)
        monitor = Monitor(model, optimizer, "mse", (X, Y), share=None)
        told[gamma] = ""
        for _ in range(150):
            fit(model, optimizer, monitor, 1)
            if monitor.measurements[-1].step == monitor.step and "aligning" in monitor.verdict():
                told[gamma] += "aligning "
        monitor.measure()
        told[gamma] += monitor.verdict()
    assert "lazy (kernel kept" in told[0.05]
    assert "aligning" not in told[0.05]
    assert told[30.0].startswith("aligning")
    assert "rich (kernel kept" in told[30.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, "share=0 is no share of time; give 0 < share <= 1"),
        ({"measures": "sharpness"}, r"measures='sharpness' is one word; give a tuple: \('sharpness',\)"),
        ({"measures": ("ntks",)}, "unknown measure 'ntks'; choose one of: sharpness, ntk, features"),
        ({"per_decade": 0}, "per_decade=0 is too small"),
        ({"kernel_samples": 1}, "kernel_samples=1 is too small"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    model, optimizer = fresh()
    with pytest.raises(UsageError, match=message):
        Monitor(model, optimizer, "mse", (X, Y), **settings)


def test_a_list_of_batches_is_refused() -> None:
    model, optimizer = fresh()
    with pytest.raises(UsageError, match="a monitor takes one batch, and data has 2"):
        Monitor(model, optimizer, "mse", [(X, Y), (X, Y)])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"does not take outputs of shape \(32, 1\) float64 with targets of shape"):
        Monitor(model, optimizer, "mse", (X, Y[:5]), measures=())


def test_without_tensorboard_a_folder_for_it_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    model, optimizer = fresh()
    with pytest.raises(ImportError, match="'tensorboard', which is not installed; run: pip install tensorboard"):
        Monitor(model, optimizer, "mse", (X, Y), tensorboard=tmp_path)


def test_the_model_of_a_monitor_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
    net[3].eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    (net(X) - Y).square().mean().backward()
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    modes, state = [part.training for part in net.modules()], torch.get_rng_state()
    monitor = Monitor(net, optimizer, "mse", (X, Y), share=None, measures=("sharpness",))
    monitor.measure()
    monitor.finish()
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    assert all(p.grad is not None and torch.equal(p.grad, grads[name]) for name, p in net.named_parameters())
    assert [part.training for part in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UsageError, match=r"the NTK is a function of single samples, and '1' normalises"):
        Monitor(net, optimizer, "mse", (X, Y), measures=("ntk",))
