"""Hugging Face: a :class:`gammaopt.diagnostics.Monitor` as a ``TrainerCallback``.

``Trainer(…, callbacks=[MonitorCallback(({"pixel_values": x}, y), "cross_entropy")])`` measures on rank 0, whatever the
logging is. For TensorBoard give ``tensorboard=`` a folder or writer.

The losses of the run's record are those that the trainer logs: each the mean since the log before, which stands for all
of these steps, rounded to 4 decimals by some versions. ``logging_steps=1`` has the finest curve,
``logging_strategy="no"`` none. A loss that is NaN or infinite the trainer replaces by the mean of others before it logs
(``logging_nan_inf_filter=True``, its default), so that the curve of a run that diverged looks sound; the monitor's own
measurements, and ``final_loss``, do not go through it.

Give the trainer gammaopt's optimizer, by ``optimizers=`` or ``optimizer_cls_and_kwargs=``: the one that it builds
itself is torch's AdamW, which knows nothing of γ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gammaopt._errors import require
from gammaopt.diagnostics import Monitor
from gammaopt.integrations._model import the_model

if TYPE_CHECKING:

    class _Callback:
        """What mypy sees of transformers' class, which may not be installed."""
else:
    _Callback = require("transformers", "frameworks").TrainerCallback


class MonitorCallback(_Callback):
    """Measures along ``Trainer.train``; a run that is resumed goes on counting at its ``global_step``.

    Args:
        data: (inputs, targets), one batch; inputs as a dict of the model's keyword arguments, without labels.
        loss: see :class:`gammaopt.diagnostics.Monitor`.
        settings: others of :class:`gammaopt.diagnostics.Monitor`; ``output="logits"`` for a model that is not wrapped.

    Attributes:
        monitor: once training began; ``None`` before, and on other ranks than 0.
    """

    def __init__(self, data: Any, loss: Any, **settings: Any) -> None:
        self.monitor: Monitor | None = None
        self._data, self._loss, self._settings = data, loss, settings
        self._told = 0  # steps whose losses were logged

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start."""
        if not state.is_world_process_zero:
            return
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        model = getattr(model, "module", model)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's cover
        self._told = state.global_step
        settings = {"start": state.global_step, **self._settings}
        self.monitor = Monitor(the_model(model), optimizer, self._loss, self._data, **settings)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step, and measure if it is time."""
        if self.monitor is not None and state.global_step > self.monitor.step:
            self.monitor.step = state.global_step - 1
            self.monitor()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Note the mean loss since the last log."""
        if self.monitor is not None and logs and "loss" in logs and state.global_step > self._told:
            self.monitor.note(float(logs["loss"]), steps=state.global_step - self._told)
            self._told = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the run's record."""
        if self.monitor is not None:
            self.monitor.finish()
