r"""The function that diagnostics look at: f(x; θ) in float64 on a private copy, so that the user's model stays as is.

    f(x; θ) = h(x; θ)/γ − h(x; θ₀)/γ        the second part is constant in θ; a plain model has γ = 1 and no second part

Dropout and stochastic depth are off. BatchNorm and InstanceNorm are in the mode that the model gives them: with batch
statistics f of a sample depends on its batch, which a Hessian may and an NTK may not. θ are the parameters that require
a gradient, each once where they are tied; frozen parts belong to f but not to θ.

Forward hooks run on the copy as on the model, because a hook may be part of the function (old-style ``weight_norm``, an
adapter, the factor of a residual branch): one that notes what passes is given the copy's float64 tensors too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gammaopt._errors import UsageError, one_of
from gammaopt._probe import Inputs, Output, call, describe, select, trainable
from gammaopt._wrapped import Wrapped
from gammaopt.online._losses import CRITERIA

Batch = tuple[Inputs, Any]
Data = Batch | Iterable[Batch]
LossFunction = Callable[[Tensor, Any], Tensor]

DOUBLE = torch.float64


class Function:
    """f of a plain or wrapped model, on a copy of it in ``dtype``; of another :class:`Function`, that same copy.

    Attributes:
        module: the copy; for a wrapped model it computes h/γ.
        parameters: name → parameter of the copy that requires a gradient, tied ones once.
        size: number of trainable numbers n.
        device: where they are.
    """

    def __init__(self, model: nn.Module | Function, output: Output | None = None, dtype: torch.dtype = DOUBLE) -> None:
        if isinstance(model, Function):  # several looks at one state of a model share one copy
            self.__dict__.update(model.__dict__)
            return
        model = getattr(model, "_orig_mod", model)  # torch.compile's cover
        if not isinstance(model, nn.Module):
            raise UsageError(f"model is a {type(model).__name__}; give the network, a torch.nn.Module, first")
        _check(model)
        # Lightning's way of not copying a module's trainer and its data with it.
        alone = getattr(model, "_prevent_trainer_and_dataloaders_deepcopy", nullcontext)
        try:
            with alone(), torch.inference_mode(False):
                twin = copy.deepcopy(model)
        except RuntimeError as error:
            raise UsageError(
                f"{type(model).__name__} can't be copied ({str(error).splitlines()[0]}); diagnostics work on a copy, "
                "so that the model stays as it is: detach what it keeps, or use torch.nn.utils.parametrize"
            ) from None
        with torch.inference_mode(False):
            self.module = twin._apply(lambda tensor: _cast(tensor, dtype))
        for module in list(_every_module(self.module)):
            if isinstance(module, Wrapped) and module._gammaopt_reference is not None:
                module._gammaopt_follow(module._gammaopt_reference)  # as a call does, which a look at its parts is not
        self.dtype = dtype
        self._reference: nn.Module | None = None
        self._gamma = 1.0
        self.output = output
        if isinstance(self.module, Wrapped):
            self._gamma = self.module.gammaopt.gamma
            place = self.module._gammaopt_output
            # f stands in the place of h; a function that picked h leaves f alone.
            self.output = place if isinstance(place, (str, int)) else None
            self._reference = self.module._gammaopt_reference
            self.module.__dict__["_gammaopt_reference"] = None
        for module in _every_module(self.module, self._reference):
            if not isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
                module.training = False
        self.parameters = trainable(self.module)
        self.size = sum(parameter.numel() for parameter in self.parameters.values())
        self.device = next(iter(self.parameters.values())).device

    def __call__(self, inputs: Inputs, start: Tensor | None = None) -> Tensor:
        """f on one batch, (batch, …), differentiable in :attr:`parameters`.

        Args:
            inputs: as given to the model; moved to its device and dtype.
            start: :meth:`start` of the same inputs, if it is known already.
        """
        inputs = self.to(inputs)
        value = self.uncentred(inputs)
        start = self.start(inputs) if start is None else start
        return value if start is None else value - start

    def uncentred(self, inputs: Inputs) -> Tensor:
        """h/γ: f without its constant part."""
        try:
            found = select(call(self.module, inputs), self.output, self.module)
        except UsageError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(
                f"inputs of {describe(inputs)} do not fit {type(self.module).__name__}: {reason}; "
                "give them in the shape and dtype that the model takes"
            ) from error
        if found.dim() == 0:
            raise UsageError(
                f"{type(self.module).__name__} returns a scalar, not an output for each sample; give output="
            )
        return found

    @torch.no_grad()
    def start(self, inputs: Inputs) -> Tensor | None:
        """h(x; θ₀)/γ, which is constant in θ; ``None`` without centring."""
        if self._reference is None:
            return None
        place = cast("Wrapped", self.module)._gammaopt_output
        return select(call(self._reference, self.to(inputs)), place, self.module) / self._gamma

    def to(self, value: Any) -> Any:
        """Tensors in ``value`` on the model's device, floating ones in its dtype."""
        if isinstance(value, Tensor):
            value = value.clone() if value.is_inference() else value
            return _cast(value.to(self.device), self.dtype)
        if isinstance(value, Mapping):
            return {key: self.to(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return tuple(self.to(item) for item in value)
        return value

    @property
    def batch_norm(self) -> str | None:
        """The first module that uses the statistics of its batch, which ties samples together."""
        for name, module in self.module.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
                module.training or not module.track_running_stats
            ):
                return name or type(module).__name__
        return None

    def refuse_batch_statistics(
        self, what: str, fix: str = "call model.eval(), with running statistics, before"
    ) -> None:
        """Raise :class:`UsageError` if f of a sample depends on the other samples."""
        if self.batch_norm is not None:
            raise UsageError(
                f"{what} is a function of single samples, and {self.batch_norm!r} normalises with the statistics of "
                f"its batch; {fix}"
            )


def _every_module(*parts: nn.Module | None) -> Iterator[nn.Module]:
    """All modules, those of frozen copies that are no submodules included."""
    for part in parts:
        for module in part.modules() if part is not None else ():
            yield module
            yield from _every_module(getattr(module, "_gammaopt_reference", None))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``, or its complex companion; whole numbers as they are."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _check(model: nn.Module) -> None:
    name = type(model).__name__
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise UsageError(f"this is a {name} around the model; give its .module, the same on every rank")
    for key, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor"):
            raise UsageError(f"parameter {key!r} is sharded; load the full state dict into a model on one device")
        if isinstance(parameter, nn.UninitializedParameter):
            raise UsageError(f"parameter {key!r} has no shape yet; run the model on one batch first")
        if parameter.is_meta:
            raise UsageError(f"parameter {key!r} is on the meta device and has no values; initialise the model first")
        if parameter.is_complex():
            raise UsageError(f"parameter {key!r} is complex; diagnostics are for real parameters")


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Kernels that have a second derivative, gradients on, autocast off; the caller's random state comes back.

    Fused attention and cuDNN's recurrent layers have no double backward; torch's own kernels for them have.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.cudnn.flags(enabled=device.type != "cuda", allow_tf32=False))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def loss_function(loss: str | LossFunction) -> LossFunction:
    """A loss by its name, ``"mse"`` or ``"cross_entropy"`` as in training here, or as it is."""
    if isinstance(loss, type):
        raise UsageError(f"loss is the class {loss.__name__}; give one of it, as {loss.__name__}()")
    return loss if callable(loss) else CRITERIA[one_of("loss", loss, CRITERIA)]


def loss_of(criterion: LossFunction, output: Tensor, targets: Any) -> Tensor:
    """The scalar loss of one batch.

    Raises:
        UsageError: if the loss does not take these outputs and targets, says nothing of them, or gives no scalar.
    """
    if criterion is CRITERIA["cross_entropy"] and output.dim() > 1 and output.shape[1] == 1:
        raise UsageError(
            "cross-entropy over one class is 0 at any weights; give the network an output for each class, or loss='mse'"
        )
    try:
        value = criterion(output, targets)
    except UsageError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"the loss does not take outputs of {describe(output)} with targets of {describe(targets)}: {reason}"
        ) from error
    if not (isinstance(value, Tensor) and value.dim() == 0):
        raise UsageError(f"the loss gives {describe(value)}; it must give one scalar, a mean or a sum")
    return value


@contextmanager
def same_draws_after(data: Any) -> Iterator[None]:
    """A loader draws when it is read, an order and a seed: its generators and torch's get their state back."""
    sampler = getattr(data, "batch_sampler", None)
    owners = (data, getattr(data, "sampler", None), sampler, getattr(sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    own = list({id(made): made for made in found if isinstance(made, torch.Generator)}.values())
    states = [generator.get_state() for generator in own]
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)


class Batches:
    """Data as (inputs, targets) batches that can be passed over again and again.

    Args:
        data: one (inputs, targets) tuple; or a list, a ``DataLoader`` or any iterable of such pairs.

    Attributes:
        data: what is passed over.
        kept: whether the batches are the same, in the same order, each time.
    """

    def __init__(self, data: Data) -> None:
        self.kept = isinstance(data, (tuple, list))  # the same batches in the same order each time
        self.data: Iterable[Batch] = [cast("Batch", data)] if isinstance(data, tuple) else data
        if not isinstance(self.data, Iterable):
            raise UsageError(f"data is a {type(data).__name__}; give (inputs, targets), or a list or loader of such")
        if isinstance(self.data, Iterator):
            raise UsageError("data can be read only once, and each product passes over it again; give list(data)")
        if isinstance(self.data, Sequence) and not self.data:
            raise UsageError("data has no batch; give at least one (inputs, targets)")

    @property
    def single(self) -> bool:
        """Whether there is one batch, always the same."""
        return self.kept and isinstance(self.data, list) and len(self.data) == 1

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.data:
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                raise UsageError(f"a batch is {describe(batch)}; give pairs (inputs, targets)")
            yield batch[0], batch[1]
