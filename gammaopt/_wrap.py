r"""``wrap``: turn a network h into f(x; θ) = [h(x; θ) − h(x; θ₀)] / γ without changing what it looks like.

The object stays the same and its class becomes a subclass of the class it had, as ``torch.distributed.fsdp.
fully_shard`` does: ``isinstance`` holds, and parameter names, hooks and submodules are untouched. θ₀ is a frozen copy
that is no submodule, so it is in neither ``parameters()`` nor ``modules()``; but it is part of the function, so it is
moved, cast, copied, pickled, saved and loaded with the model (as ``gammaopt_theta0.*`` in ``state_dict()``).
"""

from __future__ import annotations

import copy
import functools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from gammaopt import _registry
from gammaopt._depth import Inputs, effective_depth, probe, probing, tensor_output
from gammaopt._errors import UsageError, one_of, positive
from gammaopt._laws import Loss
from gammaopt._plan import LAYERS, Parametrization, Plan, fan_in, layers_in_order, rules_for

Center = Literal["copy", "none"]
Net = TypeVar("Net", bound=nn.Module)

THETA0 = "gammaopt_theta0."
# float32 centring loses about 2.4e-7/γ of the output: a quarter of a per mille here.
SMALLEST_FLOAT32_GAMMA = 1e-3


class Wrapped(nn.Module):
    """What every wrapped model is besides its own class: 1/γ, the centring, and θ₀'s company."""

    gammaopt: Plan
    _gammaopt_base: type[nn.Module]
    _gammaopt_reference: nn.Module | None

    def _gammaopt_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """h(x; θ): the forward of the class that was wrapped."""
        return tensor_output(super().forward(*args, **kwargs), self)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """f(x; θ) = (h(x; θ) − h(x; θ₀))/γ, or h(x; θ)/γ without centring."""
        reference = self._gammaopt_reference
        if reference is None:
            return self._gammaopt_forward(*args, **kwargs) / self.gammaopt.gamma
        with _one_attention_kernel():
            # Dropout must draw the same masks in both: run h₀ first, then hand the random state back for h.
            state = _random_state(reference)
            with torch.no_grad():
                start = reference(*args, **kwargs)
            _rewind(state)
            h = self._gammaopt_forward(*args, **kwargs)
        return (h - cast("Tensor", start)) / self.gammaopt.gamma

    def train(self, mode: bool = True) -> Any:
        if self._gammaopt_reference is not None:
            self._gammaopt_reference.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self._gammaopt_reference is not None:
            self._gammaopt_reference._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._gammaopt_reference is not None:
            for name, tensor in self._gammaopt_reference.state_dict(keep_vars=keep_vars).items():
                destination[f"{prefix}{THETA0}{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        start = prefix + THETA0
        # Taken out and put back, not filtered into a copy: the net's own load hooks may rename keys in place.
        theta0 = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(start)}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        state_dict.update(theta0)
        ours = {name.removeprefix(start): tensor for name, tensor in theta0.items()}
        if self._gammaopt_reference is None:
            unexpected_keys.extend(start + name for name in ours)
            return
        try:
            assign = bool(local_metadata.get("assign_to_params_buffers", False))
            keys = self._gammaopt_reference.load_state_dict(ours, strict=False, assign=assign)
            self._gammaopt_reference.requires_grad_(False)
        except RuntimeError as error:
            error_msgs.append(str(error))
            return
        missing_keys.extend(start + name for name in keys.missing_keys)
        unexpected_keys.extend(start + name for name in keys.unexpected_keys)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _registry.register(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The wrapped class is made at run time and can't be found by name: rebuild it from the class it wraps.
        return _blank, (_base_class(self),), *super().__reduce_ex__(protocol)[2:]


def _base_class(model: nn.Module) -> type[nn.Module]:
    return cast("type[Wrapped]", type(model))._gammaopt_base


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = _wrapped_class(base)
    return cls.__new__(cls)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _wrapped_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` that computes f: one for each base; it keeps the signature of forward."""
    if base not in _classes:
        _classes[base] = _make_class(base)
    return _classes[base]


def _make_class(base: type[nn.Module]) -> type[nn.Module]:

    @functools.wraps(base.forward)
    def forward(self: Wrapped, *args: Any, **kwargs: Any) -> Tensor:
        return Wrapped.forward(self, *args, **kwargs)

    namespace = {"forward": forward, "_gammaopt_base": base, "__module__": base.__module__, "__doc__": base.__doc__}
    return types.new_class(f"Gamma{base.__name__}", (Wrapped, base), exec_body=lambda body: body.update(namespace))


@contextmanager
def _one_attention_kernel() -> Iterator[None]:
    """Keep torch's attention layers off the inference kernel that only h₀, computed without gradients, would take.

    It rounds differently, and h − h₀ divided by a small γ shows that.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _random_state(model: nn.Module) -> list[tuple[torch.device, Tensor]]:
    """The generators that a forward of ``model`` may draw from, and where they stand."""
    states = [(torch.device("cpu"), torch.get_rng_state())]
    if torch.cuda.is_initialized():
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        states += [(device, torch.cuda.get_rng_state(device)) for device in devices]
    return states


def _rewind(states: list[tuple[torch.device, Tensor]]) -> None:
    for device, state in states:
        torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state, device)


def wrap(
    net: Net,
    gamma: float,
    *,
    depth: float | None = None,
    example_inputs: Inputs | None = None,
    parametrization: Parametrization = "as_is",
    center: Center = "copy",
    loss: Loss = "mse",
    knee: float = 1.0,
) -> Net:
    r"""Make ``net`` compute f(x; θ) = [h(x; θ) − h(x; θ₀)]/γ, in place, and plan its learning rates.

    Returns the same object; its class becomes a subclass of the class it had. θ₀ are the parameters at this call
    (after re-initialisation under ``mean_field``), so f = 0 exactly until the first step. Follow with
    ``gammaopt.SGD(net.parameters(), lr=…)``, where ``lr`` is the rate tuned at γ = 1.

    Args:
        net: the network h. Its forward must return one floating-point tensor.
        gamma: feature-learning strength γ > 0: small is lazy (kernel-like), large is rich.
        depth: effective depth L; measured from ``example_inputs`` if not given.
        example_inputs: one batch (a tensor, a tuple of positional or a dict of keyword arguments). Also tells which
            layer runs last: without it the readout is the Linear or Conv layer registered last.
        parametrization: ``"as_is"`` keeps initialisation and relative rates. ``"mean_field"`` re-initialises Linear
            and Conv layers (w ~ N(0, a²), biases 0; a = fan_in^(-1/2), readout 1/fan_in) and sets per-layer SGD
            rates, so that one ``lr`` serves every width.
        center: ``"copy"`` keeps a frozen copy of the network for h(x; θ₀), which doubles its memory and adds a
            forward pass; ``"none"`` drops the term: f = h/γ.
        loss: the loss you will train with, ``"mse"`` or ``"cross_entropy"``: it decides the rates for γ < 1 only.
        knee: γ_c, where the law bends; 1 for mean-field form, about √width for torch's own initialisation.

    Returns:
        ``net``. ``net.gammaopt`` is its :class:`Plan`: γ, depth and rates; ``print(net.gammaopt)`` shows a table.

    Raises:
        UsageError: a ``ValueError`` with one line that names the value and the fix. ``net`` is then unchanged.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> model = wrap(net, gamma=3.0, example_inputs=torch.randn(2, 4), parametrization="mean_field")
        >>> model is net, float(model(torch.ones(2, 4)).abs().max())
        (True, 0.0)
    """
    gamma, knee = positive("gamma", gamma), positive("knee", knee)
    _check_net(net)
    one_of("parametrization", parametrization, get_args(Parametrization))
    one_of("center", center, get_args(Center))
    one_of("loss", loss, get_args(Loss))
    if depth is not None:
        depth = positive("depth", depth)
    elif example_inputs is None:
        raise UsageError("depth is not known; give depth=, or example_inputs= to measure it")

    readout = _readout(net, example_inputs)
    rules = rules_for(net, parametrization, readout)
    start = copy.deepcopy(net)
    if parametrization == "mean_field":
        _initialise(start, readout)
    if depth is None:
        depth = effective_depth(start, cast("Inputs", example_inputs))
        if not depth > 0:
            raise UsageError(f"the measured depth of {type(net).__name__} is {depth:.3g}; give depth= > 0")
    width = fan_in(net.get_submodule(readout)) if readout is not None else None
    plan = Plan(gamma, depth, loss, knee, parametrization, width, rules)

    if center == "copy":
        _warn_if_imprecise(net, gamma)

    # Nothing above touched the net; nothing below can fail.
    if parametrization == "mean_field":
        with torch.no_grad():
            for target, source in zip(net.parameters(), start.parameters(), strict=True):
                target.copy_(source)
    net.__class__ = _wrapped_class(type(net))  # type: ignore[assignment]
    net.gammaopt = plan  # type: ignore[assignment]
    reference = _freeze(start) if center == "copy" else None
    # Not through nn.Module.__setattr__, which would make it a submodule and list its parameters as trainable.
    net.__dict__["_gammaopt_reference"] = reference
    _registry.register(net)
    return net


def unwrap(model: Net) -> Net:
    """Give a wrapped model its own class back: the plain h(x; θ), with the parameters it has now.

    Raises:
        UsageError: if ``model`` is not wrapped.
    """
    if not isinstance(model, Wrapped):
        raise UsageError(f"this {type(model).__name__} is not wrapped; nothing to unwrap")
    _registry.forget(model)
    base = _base_class(model)
    del model.__dict__["gammaopt"], model.__dict__["_gammaopt_reference"]
    model.__class__ = base  # type: ignore[assignment]
    return model


def _check_net(net: nn.Module) -> None:
    if not isinstance(net, nn.Module):
        raise UsageError(f"net is a {type(net).__name__}; give a torch.nn.Module")
    name = type(net).__name__
    if isinstance(net, torch.jit.ScriptModule):
        raise UsageError(f"{name} is a TorchScript module, whose class can't change; wrap the Python module instead")
    if isinstance(net, Wrapped):
        raise UsageError(f"this {name} is already wrapped with γ = {net.gammaopt.gamma:g}; call gammaopt.unwrap first")
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise UsageError(f"{name} has no trainable parameters; there is nothing to train")
    if "forward" in vars(net):
        raise UsageError(f"forward of this {name} was replaced on the object; wrap the net before that")
    if "gammaopt" in net.__dict__ or "gammaopt" in net._modules:
        raise UsageError(f"{name} has an attribute named 'gammaopt' already; rename it before wrapping")


def _readout(net: nn.Module, inputs: Inputs | None) -> str | None:
    """Qualified name of the layer that runs last on ``inputs``, or that is registered last without inputs."""
    order = [name for name, _ in layers_in_order(net)]
    if inputs is not None:
        ran: list[str] = []

        def note(name: str) -> Callable[..., None]:
            return lambda *_: ran.append(name)

        handles = [module.register_forward_hook(note(name)) for name, module in layers_in_order(net)]
        devices = sorted({p.device.index or 0 for p in net.parameters() if p.device.type == "cuda"})
        try:
            with torch.no_grad(), probing(net), torch.random.fork_rng(devices):
                probe(net, inputs)
        finally:
            for handle in handles:
                handle.remove()
        order = ran or order
    return order[-1] if order else None


def _initialise(net: nn.Module, readout: str | None) -> None:
    """Draw mean-field weights w ~ N(0, a²) and set biases to 0, from torch's global random state."""
    with torch.no_grad():
        for name, layer in net.named_modules():
            if not isinstance(layer, LAYERS):
                continue
            inputs = fan_in(layer)
            layer.weight.normal_(0.0, 1.0 / inputs if name == readout else inputs**-0.5)
            if layer.bias is not None:
                layer.bias.zero_()


def _freeze(start: nn.Module) -> nn.Module:
    """θ₀'s copy: no gradients, and batch statistics that are used but never accumulated."""
    start.requires_grad_(False)
    for module in start.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    return start


def _warn_if_imprecise(net: nn.Module, gamma: float) -> None:
    coarse = any(p.requires_grad and torch.finfo(p.dtype).eps > 1e-10 for p in net.parameters())
    if coarse and gamma < SMALLEST_FLOAT32_GAMMA:
        warnings.warn(
            f"gamma={gamma:g} in float32: centring loses about {2.4e-7 / gamma:.1e} of the output; "
            "call net.double() before wrapping",
            stacklevel=3,
        )
