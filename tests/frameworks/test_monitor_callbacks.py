"""A monitor as a callback measures what it measures in a plain loop, and the framework's training is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gammaopt
from gammaopt import wrap
from gammaopt.diagnostics import Measurement, Monitor
from gammaopt.online import MLP, RunRecord

pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' advice, which is not about us

GENERATOR = torch.Generator().manual_seed(7)
X = torch.sign(torch.randn(8, 6, generator=GENERATOR))
Y = X[:, :1] * X[:, 1:2]
STEPS = 6


def prepared() -> nn.Module:
    torch.manual_seed(0)
    return wrap(MLP(6, 1, width=8, depth=3), 3.0, depth=3, parametrization="mean_field")


def plain_loop() -> tuple[nn.Module, Monitor]:
    model = prepared()
    optimizer = gammaopt.SGD(model.parameters(), lr=0.3)
    monitor = Monitor(model, optimizer, "mse", (X, Y), share=None)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(X) - Y).square().mean()
        loss.backward()
        optimizer.step()
        monitor(loss)
    return model, monitor


def same(found: Monitor, expected: Monitor, out: Path) -> None:
    """Equal measurements but for the seconds, and the same record, written."""
    assert [m.step for m in found.measurements] == [m.step for m in expected.measurements] == [0, 1, 2, 3, 5]
    for ours, theirs in zip(found.measurements, expected.measurements, strict=True):
        mine, other = ours.numbers(), theirs.numbers()
        assert mine.pop("seconds") >= 0
        other.pop("seconds")
        assert mine == pytest.approx(other, rel=1e-5)
    lines = (out / "measurements.jsonl").read_text().splitlines()
    assert [Measurement.from_dict(json.loads(line)) for line in lines] == found.measurements
    record, wanted = found.finish(), expected.finish()
    (line,) = (out / "runs.jsonl").read_text().splitlines()
    assert RunRecord.from_dict(json.loads(line)) == record
    assert record.curve.loss == pytest.approx(wanted.curve.loss, rel=1e-4)
    assert (record.gamma, record.lr) == (3.0, 0.3)
    assert record.effective_lr == pytest.approx(wanted.effective_lr)


def lightning_task(pl: Any) -> Any:
    """What the plain loop trains, as a Lightning module."""

    class Task(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = prepared()

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            loss: Tensor = (self.model(x) - y).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return gammaopt.SGD(self.parameters(), lr=0.3)

    return Task()


def test_lightning_measures_as_the_plain_loop_and_logs_it(tmp_path: Path) -> None:
    pl: Any = pytest.importorskip("lightning.pytorch", reason="needs the extra 'frameworks'")
    from gammaopt.integrations.lightning import MonitorCallback

    class Logger(pl.loggers.logger.Logger):  # type: ignore[misc]
        name, version = "test", 0
        told: list[tuple[int | None, dict[str, float]]] = []  # noqa: RUF012

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.told.append((step, metrics))

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            """Nothing to tell."""

    task, logger = lightning_task(pl), Logger()
    callback = MonitorCallback((X, Y), "mse", share=None, out=tmp_path)
    pl.Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, logger=logger, callbacks=[callback], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(task, DataLoader(TensorDataset(X, Y), batch_size=8))  # fmt: skip
    model, monitor = plain_loop()
    assert callback.monitor is not None
    assert callback.monitor.model is task.model
    same(callback.monitor, monitor, tmp_path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(task.model.state_dict()[name], value)
    told = [(step, found["gammaopt/sharpness_lr"]) for step, found in logger.told if "gammaopt/sharpness_lr" in found]
    assert told == [(m.step, m.sharpness_lr) for m in callback.monitor.measurements]


def lightning(folder: Path, callback: Any, steps: int, size: int, **settings: Any) -> Path:
    pl: Any = pytest.importorskip("lightning.pytorch", reason="needs the extra 'frameworks'")

    checkpoint = settings.pop("ckpt_path", None)
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, callbacks=[callback], default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.fit(lightning_task(pl), DataLoader(TensorDataset(X, Y), batch_size=size), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "saved.ckpt")
    return folder / "saved.ckpt"


def test_the_loss_of_accumulated_batches_is_that_of_the_step_in_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch", reason="needs the extra 'frameworks'")
    from gammaopt.integrations.lightning import MonitorCallback

    callback = MonitorCallback((X, Y), "mse", share=None, out=tmp_path)
    lightning(tmp_path, callback, STEPS, size=2, accumulate_grad_batches=4)
    assert callback.monitor is not None
    same(callback.monitor, plain_loop()[1], tmp_path)


def test_a_resumed_run_counts_on_in_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch", reason="needs the extra 'frameworks'")
    from gammaopt.integrations.lightning import MonitorCallback

    saved = lightning(tmp_path, MonitorCallback((X, Y), "mse", measures=()), 4, size=8)
    callback = MonitorCallback((X, Y), "mse", measures=(), share=None)
    lightning(tmp_path, callback, STEPS, size=8, ckpt_path=saved)
    assert callback.monitor is not None
    assert [m.step for m in callback.monitor.measurements] == [4, 6]
    record, whole = callback.monitor.finish(), plain_loop()[1].finish()
    assert (record.steps, record.curve.steps) == (STEPS, (5, 6))
    assert record.curve.loss == pytest.approx(whole.curve.loss[4:], rel=1e-4)


def test_accumulated_gradients_are_one_step_in_lightning() -> None:
    pytest.importorskip("lightning.pytorch", reason="needs the extra 'frameworks'")
    from gammaopt.integrations.lightning import MonitorCallback

    model = prepared()

    class Trainer:
        is_global_zero, global_step, loggers = True, 0, ()
        accumulate_grad_batches = 2
        optimizers = (gammaopt.SGD(model.parameters(), lr=0.3),)

    trainer, callback = Trainer(), MonitorCallback((X, Y), "mse", share=None, measures=())
    callback.on_train_start(trainer, model)
    assert callback.monitor is not None
    for batch in range(4):
        trainer.global_step = (batch + 1) // 2
        callback.on_train_batch_end(trainer, model, {"loss": torch.tensor(1.0)}, None, batch)
    # An epoch that ends in the midst of a step: one batch of two, its loss divided by two all the same.
    trainer.global_step = 3
    callback.on_train_batch_end(trainer, model, {"loss": torch.tensor(1.0)}, None, 4)
    assert callback.monitor.finish().curve.loss == (2.0, 2.0, 2.0)
    other = MonitorCallback((X, Y), "mse")
    trainer.is_global_zero = False
    other.on_train_start(trainer, model)
    other.on_train_batch_end(trainer, model, {}, None, 0)
    other.on_train_end(trainer, model)
    assert other.monitor is None


class Regression(nn.Module):
    """The MLP as Hugging Face's trainer calls a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = prepared()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        output = self.net(x)
        return {"logits": output} if labels is None else {"loss": (output - labels).square().mean(), "logits": output}


def hugging_face(folder: Path, callback: Any, *, resume: bool = False, **settings: Any) -> Regression:
    transformers: Any = pytest.importorskip("transformers", reason="needs the extra 'frameworks'")
    pytest.importorskip("accelerate", reason="needs the extra 'frameworks'")
    model = Regression()
    every: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "no", **settings}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "hf"), per_device_train_batch_size=8, report_to=[], use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True, dataloader_pin_memory=False, max_grad_norm=0.0,
        lr_scheduler_type="constant", **every,
    )  # fmt: skip
    optimizer = gammaopt.SGD(model.parameters(), lr=0.3)
    samples = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    transformers.Trainer(
        model, arguments, train_dataset=samples, optimizers=(optimizer, None), callbacks=[callback]
    ).train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize(
    ("logging", "told"),
    [
        ({"logging_steps": 1}, 6),
        ({"logging_steps": 100}, 0),  # the trainer tells no losses in between
        ({"logging_steps": 2}, 6),
        ({"logging_steps": 4}, 4),
        ({"logging_strategy": "epoch", "logging_steps": 1}, 6),
        ({"logging_strategy": "no", "logging_steps": 1}, 0),
    ],
)
def test_hugging_faces_trainer_measures_as_the_plain_loop(tmp_path: Path, logging: dict[str, Any], told: int) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'frameworks'")
    from gammaopt.integrations.transformers import MonitorCallback

    callback = MonitorCallback((X, Y), "mse", share=None, out=tmp_path)
    model = hugging_face(tmp_path, callback, **logging)
    _, monitor = plain_loop()
    assert callback.monitor is not None
    assert callback.monitor.model is model.net
    if logging == {"logging_steps": 1}:
        same(callback.monitor, monitor, tmp_path)
    assert [m.step for m in callback.monitor.measurements] == [0, 1, 2, 3, 5]
    steps = [m.sharpness_lr for m in callback.monitor.measurements]
    assert steps == pytest.approx([m.sharpness_lr for m in monitor.measurements], rel=1e-5)
    found, wanted = callback.monitor.finish(), monitor.finish()
    assert found.steps == STEPS
    assert len(found.curve.loss) == told
    # A log's mean stands for each of its steps, so that means over them are those of the plain loop.
    assert sum(found.curve.loss) == pytest.approx(sum(wanted.curve.loss[:told]), rel=1e-4)


def test_a_resumed_run_counts_on_in_hugging_faces_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'frameworks'")
    from gammaopt.integrations.transformers import MonitorCallback

    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
    hugging_face(tmp_path, MonitorCallback((X, Y), "mse", measures=()), max_steps=4, **saving)
    callback = MonitorCallback((X, Y), "mse", measures=(), share=None)
    hugging_face(tmp_path, callback, resume=True, **saving)
    assert callback.monitor is not None
    assert [m.step for m in callback.monitor.measurements] == [4, 6]
    record, whole = callback.monitor.finish(), plain_loop()[1].finish()
    assert (record.steps, record.curve.steps) == (STEPS, (5, 6))
    assert record.curve.loss == pytest.approx(whole.curve.loss[4:], rel=1e-4)
