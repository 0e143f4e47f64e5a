"""Live wrapped models, so that an optimizer given bare parameters finds the plan they belong to.

Nothing is written on a parameter: tags there are lost by deepcopy, ``load_state_dict(assign=True)``, ``to_empty``
and sharding. Models are held weakly and asked for their *current* parameters whenever an optimizer is built.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from gammaopt import _distributed
from gammaopt._errors import UsageError

if TYPE_CHECKING:
    from gammaopt._plan import Plan

# Keyed by id, not by the module: a module may define __eq__ and so be unhashable.
_version = 0
_live: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
# Parameters whose model was unwrapped and not wrapped since, by id too: tensors compare by element.
_unwrapped: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Owner:
    """Where a parameter lives: its wrapped model's plan and its name there."""

    plan: Plan
    name: str


def register(model: nn.Module) -> None:
    """Remember a wrapped model for as long as it lives."""
    _live[id(model)] = model
    for parameter in model.parameters():
        _unwrapped.pop(id(parameter), None)


def live() -> list[nn.Module]:
    """The wrapped models that are alive."""
    return list(_live.values())


def version() -> int:
    """A number that grows when a model gets a plan or another one: optimizers then look their rates up again."""
    return _version


def changed() -> None:
    """Note that a model got a plan, or another one."""
    global _version
    _version += 1


def forget(model: nn.Module) -> None:
    """Drop a model that is no longer wrapped; an optimizer that still steps it is told."""
    _live.pop(id(model), None)
    _unwrapped.update((id(parameter), parameter) for parameter in model.parameters())
    changed()


def was_unwrapped(parameter: Tensor) -> bool:
    """Whether the model that holds this parameter was unwrapped, and not wrapped again since."""
    return _unwrapped.get(id(parameter)) is parameter


def owners(parameters: Sequence[Tensor]) -> list[Owner | None]:
    """For each parameter the wrapped model that holds it, or ``None``.

    Raises:
        UsageError: if two wrapped models share one of the parameters, so that its rate would be ambiguous, or if it
            was not in the model, or had another shape, when that was wrapped.
    """
    wanted = {id(parameter) for parameter in parameters}
    found: dict[int, Owner] = {}
    for model in live():
        plan: Plan = model.gammaopt  # type: ignore[assignment]
        shapes = {rule.name: rule.shape for rule in plan.rules}
        for name, parameter in model.named_parameters():
            if id(parameter) not in wanted:
                continue
            if found.get(id(parameter)) == Owner(plan, name):  # a shallow copy of the same model
                continue
            if id(parameter) in found:
                raise UsageError(
                    f"parameter {name!r} {tuple(parameter.shape)} belongs to two wrapped models; unwrap one of them"
                )
            if shapes.get(name) != tuple(parameter.shape):
                was = f"had shape {shapes[name]}" if name in shapes else "was not there"
                raise UsageError(
                    f"parameter {name!r} {tuple(parameter.shape)} {was} when {type(model).__name__} was wrapped; "
                    "call gammaopt.unwrap on the model and wrap it again"
                )
            found[id(parameter)] = Owner(plan, name)
            if "_gammaopt_planned" not in vars(model):
                _distributed.follow_sharding(model, model._gammaopt_reference)  # type: ignore[arg-type]
            vars(model)["_gammaopt_planned"] = True  # from here on it can't be given another process's plan
    return [found.get(id(parameter)) for parameter in parameters]
