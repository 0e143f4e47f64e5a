"""Lightning: a :class:`gammaopt.diagnostics.Monitor` as a callback.

``Trainer(callbacks=[MonitorCallback((x, y), "mse")])`` measures the wrapped model in the LightningModule, on rank 0,
and logs what it measured to the trainer's loggers, TensorBoard among them, as ``gammaopt/…``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from gammaopt._errors import require
from gammaopt.diagnostics import Monitor
from gammaopt.integrations._model import the_model

if TYPE_CHECKING:

    class _Callback:
        """What mypy sees of Lightning's class, which may not be installed."""
else:
    _Callback = require("lightning.pytorch", "frameworks").Callback


class MonitorCallback(_Callback):
    """Measures along ``Trainer.fit``.

    A step is one of the optimizer: of accumulated batches the losses are added up, each of which Lightning has divided
    by their number. A run that is resumed goes on counting at its ``global_step``; its record is of the steps since.

    Args:
        data: (inputs, targets), one batch.
        loss: see :class:`gammaopt.diagnostics.Monitor`.
        model: the LightningModule → what to measure; its wrapped submodule by default, else the module itself.
        settings: others of :class:`gammaopt.diagnostics.Monitor`.

    Attributes:
        monitor: once training began; ``None`` before, and on other ranks than 0.
    """

    def __init__(self, data: Any, loss: Any, *, model: Any = None, **settings: Any) -> None:
        self.monitor: Monitor | None = None
        self._data, self._loss, self._model, self._settings = data, loss, model, settings
        self._seen = 0
        self._sum: Any = None  # of the losses since the optimizer's last step
        self._count = 0  # how many these are

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Measure the start."""
        if not trainer.is_global_zero:
            return
        model = the_model(pl_module) if self._model is None else self._model(pl_module)
        self._seen, self._sum, self._count = trainer.global_step, None, 0
        settings = {"start": trainer.global_step, **self._settings}
        self.monitor = Monitor(model, trainer.optimizers[0], self._loss, self._data, **settings)
        self._log(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a step, if the optimizer made one, and measure if it is time."""
        if self.monitor is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            self._sum = loss if self._sum is None else self._sum + loss
            self._count += 1
        if trainer.global_step == self._seen:  # gradients are accumulated still
            return
        self._seen = trainer.global_step
        if self._sum is not None:  # of losses over the batches of a whole step, and an epoch's last may have fewer
            self._sum = self._sum * (trainer.accumulate_grad_batches / self._count)
        loss, self._sum, self._count = self._sum, None, 0
        if self.monitor(loss) is not None:
            self._log(trainer)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Write the run's record."""
        if self.monitor is not None:
            self.monitor.finish()

    def _log(self, trainer: Any) -> None:
        assert self.monitor is not None
        last = self.monitor.measurements[-1]
        for logger in trainer.loggers:
            logger.log_metrics({f"gammaopt/{name}": value for name, value in last.numbers().items()}, step=last.step)
