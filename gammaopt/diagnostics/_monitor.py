r"""A monitor for any training loop: sharpness × rate, kernel alignment and loss along a run, in a share of its time.

    monitor = Monitor(model, optimizer, "mse", (x, y), out="runs/mine")
    for …:
        loss = …; loss.backward(); optimizer.step()
        monitor(loss)
    print(monitor.finish())

It measures at log-spaced steps, because what γ changes happens on that scale, and only while what it spent so far and
the next measurement fit in ``share`` of the time since it began: a step that is due waits until they do.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from gammaopt._errors import MissingExtraError, UsageError, at_least, one_of
from gammaopt._files import locked
from gammaopt._laws import EtaLaw
from gammaopt._plan import Plan
from gammaopt._probe import Inputs, Output
from gammaopt.diagnostics._edge import no_edge, rates_of
from gammaopt.diagnostics._function import Batches, Function, LossFunction, loss_function, loss_of, undisturbed
from gammaopt.diagnostics._kernels import centred_kernel_alignment, feature_kernel, kernel_target_alignment, ntk
from gammaopt.diagnostics._operator import Curvature, NotFiniteError
from gammaopt.diagnostics._spectrum import largest_eigenvalue
from gammaopt.diagnostics._told import Told
from gammaopt.online._losses import hits
from gammaopt.online._run_file import RunFile
from gammaopt.online.record import RunRecord
from gammaopt.online.train import Run, summarise
from gammaopt.optim._multipliers import Multipliers

Measure = Literal["sharpness", "ntk", "features"]
LAZY_KEPT = 0.9  # alignment of the kernel with the first one, above which it is called kept
TOL, SEARCH = 1e-2, 200  # of a sharpness: relative error, and products at most
MOVED = 0.1  # of the first loss: a change by less is none
MONITORS = "monitors.lock"  # several runs may share a folder: each waits until another has written its line
EDGE = (1.6, 2.4)  # sharpness × rate that is called the edge of stability


@dataclass(frozen=True)
class Measurement:
    """What a model was at one step. A number that was not asked for, or has no meaning, is ``None``.

    Attributes:
        step: steps taken before.
        seconds: that it took.
        loss, accuracy: on the monitor's data.
        sharpness: λ_max of the Hessian.
        sharpness_lr: sharpness × rate as :func:`gammaopt.diagnostics.sharpness` gives it with the optimizer: 2 at the
            edge of stability, with any momentum. Only for SGD that minimises, with one momentum in all groups.
        alignment: centred alignment of the NTK with the targets, where those are numbers or one class for a sample.
        kernel_kept: centred alignment of the NTK with that of the first measurement: 1 for a lazy run.
        feature_alignment: centred alignment of the last hidden layer's kernel with the targets.
    """

    step: int
    seconds: float
    loss: float
    accuracy: float | None = None
    sharpness: float | None = None
    sharpness_lr: float | None = None
    alignment: float | None = None
    kernel_kept: float | None = None
    feature_alignment: float | None = None

    def numbers(self) -> dict[str, float]:
        """What was measured, by name, without the step."""
        every = dataclasses.asdict(self)
        return {name: value for name, value in every.items() if name != "step" and value is not None}

    def to_json(self) -> str:
        """One line of strict JSON; a number that isn't finite becomes ``null``."""
        every = dataclasses.asdict(self)
        return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in every.items()})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measurement:
        """The measurement that :meth:`to_json` or a monitor wrote; a loss that was ``null`` is no number."""
        own = {field.name: data[field.name] for field in dataclasses.fields(cls) if field.name in data}
        return cls(**{**own, "loss": math.nan if data["loss"] is None else data["loss"]})


class Monitor:
    """Measures a model along its training; call it once after each step.

    The model is looked at through copies and left as it was; so are torch's generators, so that a run with a monitor is
    the run without.

    Args:
        model: what is trained, plain or wrapped.
        optimizer: what trains it; gives the rates for ``sharpness_lr``.
        loss: ``"mse"``, ``"cross_entropy"``, or (output, targets) → scalar.
        data: (inputs, targets), one batch, not trained on by preference; the kernels take its first samples: of each
            tensor in a tuple, list or mapping of inputs.
        share: of the time since the start, at most, for measurements; ``None`` for no limit. The first measurement, at
            the start, is always made, and counts.
        measures: any of ``"sharpness"``, ``"ntk"``, ``"features"``. All by default, but no kernels while a BatchNorm
            normalises with the statistics of its batch, as it does in training: f of a sample is then no function of
            that sample. Its running statistics are no way out: they start at (0, 1), and the kernel with them moves
            without a step.
        per_decade: steps to measure at in each factor of 10.
        kernel_samples: samples for the kernels.
        out: folder; a line for each measurement goes to ``measurements.jsonl``, the run's record to ``runs.jsonl``.
            Lines are added to files that are there. Those of one monitor have one number, ``run``, counted from 1, and
            its γ, rate and seed.
        tensorboard: a ``SummaryWriter``, or a folder to make one in.
        seed: of the run, for its record.
        start: steps taken before, by a run that goes on. Measurements and the record's curve count on from there; what
            the record adds up is of the steps since.
        output: which part of what a plain model returns is its output; see :func:`gammaopt.wrap`.

    Attributes:
        measurements: so far.
        spent: seconds of them, and of the score in :meth:`finish`.

    Raises:
        UsageError: for a ``share`` outside of 0 to 1, an unknown measure, or a model that has no such measure.

    Example:
        >>> import torch
        >>> net, (x, y) = torch.nn.Linear(2, 1), (torch.randn(8, 2), torch.randn(8, 1))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> monitor = Monitor(net, optimizer, "mse", (x, y), share=None)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss = (net(x) - y).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     measurement = monitor(loss)
        >>> [m.step for m in monitor.measurements], round(monitor.finish().effective_lr, 6)
        ([0, 1, 2, 3], 0.1)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: str | LossFunction,
        data: tuple[Inputs, Any],
        *,
        share: float | None = 0.05,
        measures: Sequence[Measure] | None = None,
        per_decade: int = 6,
        kernel_samples: int = 64,
        out: str | Path | None = None,
        tensorboard: Any = None,
        seed: int = 0,
        start: int = 0,
        output: Output | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if share is not None and not 0 < share <= 1:
            raise UsageError(f"share={share:g} is no share of time; give 0 < share <= 1, or None for no limit")
        if isinstance(measures, str):
            raise UsageError(f"measures={measures!r} is one word; give a tuple: ({measures!r},)")
        for measure in measures or ():
            one_of("measure", measure, get_args(Measure))
        at_least("per_decade", per_decade, 1), at_least("kernel_samples", kernel_samples, 2)
        self._start = at_least("start", start, 0)
        self.model, self.optimizer = getattr(model, "_orig_mod", model), optimizer
        self._loss, self._criterion = loss, loss_function(loss)
        (self._data,) = _one(data)
        self._few = _few(self._data[0], kernel_samples), _of_samples(self._data[1], kernel_samples)
        self._asked = measures is not None
        self._measures = get_args(Measure) if measures is None else tuple(measures)
        self._share, self._factor = share, 10.0 ** (1 / per_decade)
        self._seed, self._output, self._clock = seed, output, clock
        self._out = None if out is None else Path(out)
        for file, what in (("study.json", "a study"), ("portrait.json", "a portrait")):
            if self._out is not None and (self._out / file).exists():
                raise UsageError(f"out={self._out} is the folder of {what}; give a folder for monitored runs")
        self._number: int | None = None  # of this run in its folder
        self._writer = _writer(tensorboard)
        self.measurements: list[Measurement] = []
        self.spent, self.step = 0.0, start
        self._due, self._cost = 0, 0.0
        self._losses, self._shares = Told(), Told()
        self._told_at: list[int] = []  # the steps of these, from 1
        self._first_kernel: Tensor | None = None
        group = optimizer.param_groups[0]
        # Of a schedule the base rate: its own may be 0 at the start of a warm-up.
        self._run = Run(self._gamma, float(group.get("initial_lr", group["lr"])), seed)
        self._law = self._own_law()
        self._finished: RunRecord | None = None
        self._began = clock()
        self.measure()

    @property
    def _gamma(self) -> float:
        plan = getattr(self.model, "gammaopt", None)
        return plan.gamma if isinstance(plan, Plan) else 1.0

    def _own_law(self) -> EtaLaw | None:
        """The law that the optimizer steps by; ``None`` for one that knows nothing of γ."""
        plan = getattr(self.model, "gammaopt", None)
        if isinstance(plan, Plan) and isinstance(self.optimizer, Multipliers):
            return plan.law(self.optimizer._family)
        return None

    def __call__(
        self, loss: Tensor | float | None = None, accuracy: Tensor | float | None = None
    ) -> Measurement | None:
        """Note a step's loss, and measure if it is time.

        Args:
            loss: of this step's batch, before the step; without it the run's record has no curve.
            accuracy: share of that batch that was answered right.

        Returns:
            The measurement, if one was made.
        """
        self.step += 1
        if loss is not None:
            self._keep(loss, accuracy, self.step - self._start)
        if self.step < self._due:
            return None
        if self._share is not None:
            elapsed = self._clock() - self._began
            if self.spent + self._cost > self._share * elapsed:
                return None
        return self.measure()

    def note(self, loss: Tensor | float, accuracy: Tensor | float | None = None, *, steps: int = 1) -> None:
        """Note a loss for the record's curve without counting a step, where it is known only later.

        Args:
            loss, accuracy: as in a call; means where they stand for several steps.
            steps: how many they stand for, those after the last that was noted.
        """
        for _ in range(steps):
            self._keep(loss, accuracy)

    def _keep(self, loss: Tensor | float, accuracy: Tensor | float | None, step: int = 1) -> None:
        """Keep what was told of a step, from 1: of that one, or of the next after the last that was told, if later."""
        self._losses.add(loss)
        self._shares.add(0.0 if accuracy is None else accuracy)
        self._told_at.append(max(step, self._told_at[-1] + 1 if self._told_at else 1))

    def measure(self) -> Measurement:
        """Measure now, due or not."""
        start = self._now()
        made = self._measured()
        self._cost = self._now() - start
        self.spent += self._cost
        made = dataclasses.replace(made, seconds=self._cost)
        self.measurements.append(made)
        self._due = max(self.step + 1, math.ceil(self.step * self._factor))
        if self._out is not None:
            self._write(made, self._out / "measurements.jsonl")
        if self._writer is not None:
            for name, value in made.numbers().items():
                self._writer.add_scalar(f"gammaopt/{name}", value, self.step)
        return made

    def _now(self) -> float:
        """The time at which the device has done what it was told: steps in its queue are none of a measurement's."""
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self._clock()

    def _write(self, made: Measurement, path: Path) -> None:
        with locked(path.parent, MONITORS, wait=True):
            if self._number is None:
                self._number = 1 + _last_number(path)
            whose = {"run": self._number, **self._run._asdict()}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({**whose, **json.loads(made.to_json())}) + "\n")

    def _measured(self) -> Measurement:
        function = Function(self.model, self._output)
        loss, accuracy = self._score(function)
        if not math.isfinite(loss):
            return Measurement(self.step, 0.0, loss, accuracy)
        found: dict[str, float | None] = {}
        if "sharpness" in self._measures:
            found["sharpness"], found["sharpness_lr"] = self._sharpness(function)
        x, y = self._few
        measures, shared = self._with_meaning(function), cast("nn.Module", function)
        if "ntk" in measures:
            kernel = ntk(shared, x).cpu()
            self._first_kernel = kernel if self._first_kernel is None else self._first_kernel
            found["alignment"] = None if y is None else _aligned(kernel_target_alignment, kernel, y)
            found["kernel_kept"] = _aligned(centred_kernel_alignment, kernel, self._first_kernel)
        if "features" in measures:
            features = feature_kernel(shared, x).cpu()
            found["feature_alignment"] = None if y is None else _aligned(kernel_target_alignment, features, y)
        return Measurement(self.step, 0.0, loss, accuracy, **found)

    def _sharpness(self, function: Function) -> tuple[float | None, float | None]:
        """λ_max, and that of √R H √R for SGD: one search where all rates are equal, and else two over one graph.

        ``None`` where a second derivative is not finite, which a run that trains well may come by.
        """
        hessian = Curvature(cast("nn.Module", function), self._loss, self._data)
        plain = _finite(partial(largest_eigenvalue, hessian, hessian, TOL, SEARCH))
        if (
            plain is None
            or not isinstance(self.optimizer, torch.optim.SGD)
            or no_edge(self.optimizer, self.model) is not None
        ):
            return plain, None
        rates = rates_of(self.optimizer, self.model)
        if len(set(rates.values())) == 1:
            return plain, plain * next(iter(rates.values()))
        root = torch.cat(
            [
                p.new_full((p.numel(),), rates[name] ** 0.5, requires_grad=False)
                for name, p in function.parameters.items()
            ]
        )
        return plain, _finite(partial(largest_eigenvalue, lambda v: root * hessian(root * v), hessian, TOL, SEARCH))

    def _with_meaning(self, function: Function) -> tuple[str, ...]:
        """What to measure of the model as it is now."""
        if function.batch_norm is None:
            return self._measures
        if self._asked:
            fix = "give measures=('sharpness',), which it has in training too"
            for measure, what in (("ntk", "the NTK"), ("features", "a feature kernel")):
                if measure in self._measures:
                    function.refuse_batch_statistics(what, fix)
        return tuple(measure for measure in self._measures if measure == "sharpness")

    def _score(self, function: Function) -> tuple[float, float | None]:
        """Loss on the data, and accuracy for classes."""
        inputs, targets = self._data
        targets = function.to(targets)
        with undisturbed(function.device), torch.no_grad():
            output = function(inputs)
            loss = float(loss_of(self._criterion, output, targets))
        classes = isinstance(targets, Tensor) and not targets.is_floating_point() and output.dim() == 2
        return loss, float(hits(output, targets).double().mean()) if classes else None

    def finish(self) -> RunRecord:
        """The record of the run so far, as :func:`gammaopt.online.train` makes one, written to ``out`` once.

        ``final_loss`` and ``final_accuracy`` are on the monitor's data; prequential ones need the steps' losses and
        accuracies.
        """
        if self._finished is not None:
            return self._finished
        start = self._now()
        loss, accuracy = self._score(Function(self.model, self._output))
        self.spent += self._now() - start
        losses, shares = self._losses.all(), self._shares.all()
        record = (
            summarise(self._run, max(1, len(losses)), self._law or EtaLaw(1.0), losses, shares, (accuracy or 0.0, loss))
            if len(losses)
            else _without_losses(self._run, self.step, loss, accuracy or 0.0)
        )
        record = self._counted(record, bool(len(losses)))
        if self._law is None:
            record = dataclasses.replace(record, effective_lr=self._run.lr)
        elif not len(losses):
            record = dataclasses.replace(record, effective_lr=self._run.lr * self._law.factor(self._run.gamma))
        if self._out is not None:
            with locked(self._out, MONITORS, wait=True):
                file = RunFile(self._out / "runs.jsonl", RunRecord.from_dict)
                file.add(record)
                file.close()
        if self._writer is not None:
            self._writer.flush()
        self._finished = record
        return record

    def _counted(self, record: RunRecord, told: bool) -> RunRecord:
        """The record with its steps counted as the monitor counts: that of the n-th loss told is no n-th step."""
        at, curve = record.diverged_at, record.curve
        if told:
            last = self._told_at[-1] + 1  # a divergence that only the end has shown
            steps = [step + self._start for step in (*self._told_at, last)]
            curve = dataclasses.replace(curve, steps=tuple(steps[n - 1] for n in curve.steps))
            at = None if at is None else steps[at - 1]
        return dataclasses.replace(record, steps=max(1, self.step), diverged_at=at, curve=curve)

    def verdict(self) -> str:
        """In words, which regime the last measurement shows, and of which step it is."""
        first, last = self.measurements[0], self.measurements[-1]
        said = [f"step {last.step}" + (f" of {self.step} so far" if self.step > last.step else "")]
        if len(self.measurements) == 1 and self.step > last.step and self._share is not None:
            return (
                f"{said[0]}: nothing was measured since, for share={self._share:g} of these steps' time is less than "
                f"the {self._cost:.2g} s that a measurement takes; give a larger share, or None"
            )
        if not math.isfinite(last.loss):
            return f"{said[0]}: diverged"
        moved = first.loss - last.loss > MOVED * abs(first.loss)
        if last.kernel_kept is not None and moved:  # before, a run of any γ has the kernel that it began with
            said.append(f"{'lazy' if last.kernel_kept > LAZY_KEPT else 'rich'} (kernel kept: {last.kernel_kept:.2f})")
        if not (first.loss > 0 and math.isfinite(first.loss)):
            said.append(f"the loss is {last.loss:.3g}, from {first.loss:.3g}")
        elif moved:
            said.append(f"the loss fell to {last.loss / first.loss:.2g} of its start")
        elif last.loss > (1 + MOVED) * first.loss:
            said.append(
                f"the loss rose to {last.loss / first.loss:.2g} of its start: a catapult if it comes back, "
                "or this rate is too large"
            )
        else:
            grown = (last.alignment or 0.0) - (first.alignment or 0.0)
            if last.alignment is not None and grown > 0.05:
                said.append(f"on a plateau and aligning ({grown:+.2f}): wait")
            else:
                said.append("the loss has not moved: at the start of a plateau, or stuck at this rate")
        if last.sharpness_lr is not None:
            low, high = EDGE
            where = "below" if last.sharpness_lr < low else "at" if last.sharpness_lr <= high else "past"
            said.append(f"{where} the edge of stability (sharpness × rate: {last.sharpness_lr:.2f} of 2)")
        return "; ".join(said)


def _finite(search: Callable[[], float]) -> float | None:
    """``None`` where a second derivative is not finite."""
    try:
        return search()
    except NotFiniteError:
        return None


def _without_losses(run: Run, steps: int, loss: float, accuracy: float) -> RunRecord:
    """A record of a run whose steps' losses nobody told."""
    one = torch.tensor([loss], dtype=torch.float64)
    record = summarise(run, 1, EtaLaw(1.0), one, torch.tensor([accuracy]), (accuracy, loss))
    empty = dataclasses.replace(record.curve, steps=(), loss=(), accuracy=())
    return dataclasses.replace(record, steps=steps, prequential_loss=None, prequential_accuracy=0.0, curve=empty)


def _aligned(align: Callable[[Tensor, Tensor], float], kernel: Tensor, other: Tensor) -> float | None:
    """``None`` for a kernel that is constant over the samples, which a run may well come to: it has no direction."""
    try:
        return align(kernel, other)
    except UsageError as error:
        if "constant over the samples" not in str(error):
            raise
        return None


def _last_number(path: Path) -> int:
    """The largest run of the whole lines that have one; 0 for a new file, and for lines of a version without any."""
    if not path.exists():
        return 0
    number = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            number = max(number, int(json.loads(line)["run"]))
        except (ValueError, KeyError, TypeError):
            continue
    return number


def _one(data: Any) -> list[tuple[Inputs, Any]]:
    batches = list(Batches(data))
    if len(batches) != 1:
        raise UsageError(f"a monitor takes one batch, and data has {len(batches)}; give (inputs, targets)")
    return batches


def _few(inputs: Any, count: int) -> Any:
    """The first samples of the tensors in ``inputs``."""
    if isinstance(inputs, Tensor):
        return inputs[:count] if inputs.dim() else inputs
    if isinstance(inputs, Mapping):
        return {key: _few(value, count) for key, value in inputs.items()}
    return tuple(_few(value, count) for value in inputs) if isinstance(inputs, (tuple, list)) else inputs


def _of_samples(targets: Any, count: int) -> Tensor | None:
    """The first targets, where each sample has numbers or one class; else no kernel aligns with them."""
    if not isinstance(targets, Tensor) or not targets.dim():
        return None
    if not targets.is_floating_point() and targets.numel() != len(targets):
        return None
    return targets[:count].cpu()


def _writer(tensorboard: Any) -> Any:
    if tensorboard is None or hasattr(tensorboard, "add_scalar"):
        return tensorboard
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError(
            "this needs the package 'tensorboard', which is not installed; run: pip install tensorboard"
        ) from None
    return SummaryWriter(str(tensorboard))
