r"""What a wrapped model is: its own class, plus f = (h − h₀)/γ and θ₀'s company.

θ₀ is a frozen copy that is no submodule, so it is in neither ``parameters()`` nor ``modules()``; but it is part of the
function, so it is moved, cast, copied, pickled, saved and loaded with the model (``gammaopt_theta0.*`` in
``state_dict()``), shared between processes and sharded with it (:mod:`gammaopt._distributed`).
"""

from __future__ import annotations

import copy
import functools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gammaopt import _distributed, _registry, _saved
from gammaopt._errors import CheckpointError, UsageError
from gammaopt._plan import Plan
from gammaopt._probe import Output, replaced, select
from gammaopt._saved import PLAN, THETA0


class Wrapped(nn.Module):
    """What every wrapped model is besides its own class: 1/γ, the centring, and θ₀'s company."""

    gammaopt: Plan
    _gammaopt_base: type[nn.Module]
    _gammaopt_reference: nn.Module | None
    _gammaopt_output: Output | None

    def _gammaopt_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the class that was wrapped returns: h(x; θ), or something that contains it."""
        return super().forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """f(x; θ) = (h(x; θ) − h(x; θ₀))/γ, or h(x; θ)/γ without centring, in the place where h was."""
        if not torch.compiler.is_compiling() and _distributed.active():
            _distributed.follow_sharding(self, self._gammaopt_reference)
            _distributed.follow_synchronised_norms(self, self._gammaopt_reference)
            _distributed.check_plans(self)
        reference, output, gamma = self._gammaopt_reference, self._gammaopt_output, self.gammaopt.gamma
        if reference is None:
            returned = self._gammaopt_forward(*args, **kwargs)
            h = select(returned, output, self)
            self._gammaopt_check_units(h)
            return replaced(returned, output, h / gamma)
        self._gammaopt_follow(reference)
        with _same_draws_and_kernels(reference) as rewind:
            with torch.no_grad():
                start = select(reference(*args, **kwargs), output, self)
            rewind()
            returned = self._gammaopt_forward(*args, **kwargs)
        h = select(returned, output, self)
        self._gammaopt_check_units(h)
        if h.shape != start.shape:  # they might broadcast
            raise UsageError(
                f"the output of {type(self).__name__} has shape {tuple(h.shape)} and had {tuple(start.shape)} when it "
                "was wrapped; call gammaopt.unwrap on the model and wrap it again"
            )
        return replaced(returned, output, (h - start) / gamma)

    def _gammaopt_check_units(self, h: Tensor) -> None:
        """Warn, once, of a scalar: for a net that returns its loss, f would be (loss − loss₀)/γ.

        Not an error, and not inside ``vmap``: there it is the output for one sample.
        """
        if h.dim() or torch.compiler.is_compiling() or "_gammaopt_scalar" in vars(self):
            return
        if torch._C._functorch.maybe_current_level() is not None:
            return
        vars(self)["_gammaopt_scalar"] = True
        warnings.warn(
            f"{type(self).__name__} returns a scalar, not an output for each sample, and 1/γ was applied to that; if "
            "it is a loss, compute it from the model's output instead, or give output= to gammaopt.wrap",
            stacklevel=4,
        )

    def _gammaopt_follow(self, reference: nn.Module) -> None:
        """Put the frozen copy's parts in the modes of the model's: a part may be in ``eval()`` by itself.

        Raises:
            UsageError: if the copy has no values.
        """
        if "_gammaopt_empty" in self.__dict__:
            raise UsageError(
                f"θ₀ of {type(self).__name__} was on the meta device and to_empty() made its memory without values; "
                "load a checkpoint of the wrapped model, or wrap the net after it was initialised"
            )
        fill = self.__dict__.pop("_gammaopt_unsaved", False)
        for module, twin in zip(self.modules(), reference.modules(), strict=False):
            if twin.training != module.training:
                twin.training = module.training
            if fill:
                for name in twin._non_persistent_buffers_set:
                    kept = module._buffers[name]
                    twin._buffers[name] = None if kept is None else kept.detach().clone()

    def train(self, mode: bool = True) -> Any:
        if self._gammaopt_reference is not None:
            self._gammaopt_reference.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        reference = self._gammaopt_reference
        if reference is not None:
            _distributed.follow_sharding(self, reference)
            was_meta = _on_meta(reference)
            reference._apply(fn, recurse)
            if was_meta and not _on_meta(reference):
                self.__dict__["_gammaopt_empty"] = True
        return super()._apply(fn, recurse)

    @property
    def gammaopt_theta0(self) -> nn.Module | None:
        """The frozen network that computes h(x; θ₀), under the name that its tensors have in ``state_dict()``."""
        return self._gammaopt_reference

    @property
    def gammaopt_plan(self) -> Tensor:
        """γ, depth, knee and what else of the plan is in ``state_dict()``, see :mod:`gammaopt._saved`.

        May be set, as ``functional_call`` does, at the same γ.
        """
        numbers = _saved.numbers(self.gammaopt)
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")  # whatever the default device is

    @gammaopt_plan.setter
    def gammaopt_plan(self, value: Tensor) -> None:
        if not _saved.same(float(value[0]), self.gammaopt.gamma, value.dtype):
            raise UsageError(
                f"γ = {float(value[0]):g} is not the γ = {self.gammaopt.gamma:g} of this model; wrap it again"
            )

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Buffers as ever; asked for this module's own only, also what it adds to ``state_dict()``.

        ``torch.distributed.checkpoint`` walks a model in that way to learn its keys.
        """
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse:
            start = prefix + "." if prefix else ""
            # Where the parameters are: set_model_state_dict wants one device for all. MPS has no float64.
            device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
            yield start + PLAN, self.gammaopt_plan.to("cpu" if device.type == "mps" else device)
            if self._gammaopt_reference is not None:
                _distributed.follow_sharding(self, self._gammaopt_reference)
                for name, tensor in self._gammaopt_reference.state_dict().items():
                    yield f"{start}{THETA0}{name}", tensor

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + PLAN] = self.gammaopt_plan
        if self._gammaopt_reference is not None:
            _distributed.follow_sharding(self, self._gammaopt_reference)
            for name, tensor in self._gammaopt_reference.state_dict(keep_vars=keep_vars).items():
                destination[f"{prefix}{THETA0}{name}"] = tensor

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As torch's; what does not fit is first said in one line.

        A plain network knows no θ₀ and no plan, so it refuses the checkpoint of a wrapped one in torch's words: load
        that into a wrapped model and :func:`gammaopt.unwrap` or :func:`gammaopt.fold` it.

        Raises:
            CheckpointError: a ``RuntimeError`` as torch's own, for a checkpoint of a plain network, or of one at
                another γ, parametrization, base, depth, width or centring. Where γ or the rates differ, the model is
                left as it was; as a part of a larger one, or inside DistributedDataParallel, its weights are copied
                before that is seen.
        """
        of_plan, others = _saved.misfit(self, state_dict) if isinstance(state_dict, Mapping) else ([], [])
        if of_plan:  # before anything is copied into the model
            raise CheckpointError("\n".join([*of_plan, *others]))
        left_behind = _saved.uncentred(self, state_dict) if isinstance(state_dict, Mapping) else []
        try:
            keys = super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            words = _saved.shortened(str(error)) if others else str(error)
            raise CheckpointError("\n".join([*others, words])) from None
        for line in left_behind:  # with strict=False: else it was refused above
            warnings.warn(line, stacklevel=2)
        return keys

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
        saved = state_dict.pop(prefix + PLAN, None)  # a plain network's checkpoint has none
        theta0 = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(start)}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        state_dict.update(theta0)
        if saved is not None:
            state_dict[prefix + PLAN] = saved
            sizes = ((state_dict.get(prefix + name), mine.shape) for name, mine in self.named_parameters())
            self._adopt(saved, error_msgs, all(theirs is None or theirs.shape == mine for theirs, mine in sizes))
        ours = {name.removeprefix(start): tensor for name, tensor in theta0.items()}
        if self._gammaopt_reference is None:
            unexpected_keys.extend(start + name for name in ours)
            return
        if ours and saved is None:  # θ₀ of a γ that nobody knows
            missing_keys.append(prefix + PLAN)
        _distributed.follow_sharding(self, self._gammaopt_reference)
        try:
            assign = bool(local_metadata.get("assign_to_params_buffers", False))
            keys = self._gammaopt_reference.load_state_dict(ours, strict=False, assign=assign)
            self._gammaopt_reference.requires_grad_(False)
        except RuntimeError as error:
            error_msgs.extend(f"θ₀: {line.strip()}" for line in str(error).splitlines()[1:])
            return
        if not keys.missing_keys:
            # Buffers that no checkpoint has are filled again in the model, and at its next call here from those.
            was_empty = self.__dict__.pop("_gammaopt_empty", False)
            if was_empty or _on_meta(self._gammaopt_reference):
                self.__dict__["_gammaopt_unsaved"] = True
        missing_keys.extend(start + name for name in keys.missing_keys)
        unexpected_keys.extend(start + name for name in keys.unexpected_keys)

    def _adopt(self, saved: Tensor, error_msgs: list[str], same_shapes: bool) -> None:
        """Take depth and knee from a checkpoint: measured anew on another draw they would give other rates."""
        lines = _saved.disagreements(saved, self.gammaopt, same_shapes=same_shapes)
        if lines:
            error_msgs.extend(lines)
            return
        self.__dict__["gammaopt"] = _saved.adopted(saved, self.gammaopt)
        _registry.changed()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _distributed.watch_ddp()
        _registry.register(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The wrapped class is made at run time and can't be found by name: rebuild it from the class it wraps.
        base = type(self)._gammaopt_base
        if base.__reduce_ex__ is object.__reduce_ex__ and base.__reduce__ is object.__reduce__:
            return _blank, (base,), *super().__reduce_ex__(protocol)[2:]
        return _rewrapped, self._gammaopt_parts()

    def _gammaopt_parts(self) -> tuple[nn.Module, dict[str, Any]]:
        """The plain module, holding the very same things, for a class that copies in its own way; and what is ours."""
        plain = object.__new__(type(self)._gammaopt_base)
        plain.__dict__.update(self.__dict__)
        ours = [name for name in self.__dict__ if name == "gammaopt" or name.startswith("_gammaopt_")]
        return plain, {name: plain.__dict__.pop(name) for name in ours}


def frozen(start: nn.Module) -> nn.Module:
    """θ₀'s copy: no gradients.

    Its normalisation layers keep running statistics of their own, those of h₀, over the batches that the model's own
    layers see: in evaluation h and h₀ are then normalised alike, and f stays 0 as long as θ = θ₀. With statistics kept
    from the start, (0, 1), f in evaluation would be off by what those do to h₀, over γ.
    """
    start.requires_grad_(False)
    # Hooks on the whole run once, around f: what they make of the inputs is what the copy is given.
    start._forward_pre_hooks.clear()
    start._forward_hooks.clear()
    return start


def _on_meta(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def _rewrapped(plain: nn.Module, ours: dict[str, Any]) -> nn.Module:
    plain.__class__ = wrapped_class(type(plain))
    plain.__dict__.update(ours)
    _distributed.watch_ddp()
    _registry.register(plain)
    return plain


def _copied(model: Wrapped, memo: dict[int, Any]) -> nn.Module:
    """``__deepcopy__`` where the class that was wrapped has one, as ``torch.fx.GraphModule`` does."""
    plain, ours = model._gammaopt_parts()
    memo[id(model)] = twin = copy.deepcopy(plain, memo)
    return _rewrapped(twin, copy.deepcopy(ours, memo))


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = wrapped_class(base)
    return cls.__new__(cls)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def wrapped_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` that computes f: one for each base; it keeps the signature of forward."""
    if base not in _classes:
        _classes[base] = _make_class(base)
    return _classes[base]


def _make_class(base: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: Wrapped, *args: Any, **kwargs: Any) -> Any:
        return Wrapped.forward(self, *args, **kwargs)

    namespace = {"forward": forward, "_gammaopt_base": base, "__module__": base.__module__, "__doc__": base.__doc__}
    if hasattr(base, "__deepcopy__"):
        namespace["__deepcopy__"] = _copied
    return types.new_class(f"Gamma{base.__name__}", (Wrapped, base), exec_body=lambda body: body.update(namespace))


@contextmanager
def _same_draws_and_kernels(reference: nn.Module) -> Iterator[Callable[[], None]]:
    """h₀ and h see the same dropout masks and take the same kernels; yields what to call between the two.

    Masks: h₀ runs first, then the random state is handed back for h. Kernels: torch's attention layers have an
    inference kernel that only h₀, computed without gradients, would take; it rounds differently, and h − h₀ divided by
    a small γ shows that. While compiling, a kernel is chosen once for both, and the state is handled only if needed.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and not _draws(reference):
        yield lambda: None
        return
    states = _random_states(reference)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield lambda: _rewind(states)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _draws(model: nn.Module) -> bool:
    """Whether a module of ``model`` says that it drops something: a positive attribute with "drop" in its name."""
    return any(
        isinstance(value, float) and value > 0 and ("drop" in name or isinstance(module, nn.modules.dropout._DropoutNd))
        for module in model.modules()
        for name, value in vars(module).items()
    )


def _random_states(model: nn.Module) -> list[tuple[torch.device, Tensor]]:
    """The generators that a forward of ``model`` may draw from, and where they stand."""
    states = [(torch.device("cpu"), torch.get_rng_state())]
    if torch.cuda.is_initialized():
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        states += [(device, torch.cuda.get_rng_state(device)) for device in devices]
    return states


def _rewind(states: list[tuple[torch.device, Tensor]]) -> None:
    for device, state in states:
        torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state, device)
