r"""What a checkpoint says of its plan, and in which words one that does not fit is refused.

The plan is saved as numbers, because a checkpoint is loaded with ``weights_only``, averaged and cast like the tensors
beside it:

    γ, depth, knee, the depth rule's m and α, the form of the rates, a fingerprint of their width factors, the loss

The form is the position in :data:`FORMS`. The fingerprint (:attr:`Plan.fingerprint`) tells another base network or
other ``roles=``. Depth and knee are adopted where they were measured: measured anew on another draw they would give
other rates. In the rest, and in a depth or knee that the user gave, a checkpoint must agree: γ, m and α are part of the
function, and under other width factors the same ``lr`` means other rates. Only the loss is the user's to change, with a
warning.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gammaopt import _distributed
from gammaopt._laws import Loss
from gammaopt._plan import Plan

THETA0 = "gammaopt_theta0."
PLAN = "gammaopt_plan"
FORMS = ("parametrization='as_is'", "parametrization='mean_field'", "base=")
LOSSES: tuple[Loss, ...] = ("mse", "cross_entropy")


def numbers(plan: Plan) -> tuple[float, ...]:
    """The plan as it stands in a checkpoint, in the order above."""
    form = 2 if plan.base is not None else FORMS.index(f"parametrization={plan.parametrization!r}")
    return plan.gamma, plan.depth, plan.knee, *_depth_rule(plan), form, plan.fingerprint, LOSSES.index(plan.loss)


def same(saved: float, ours: float, dtype: torch.dtype) -> bool:
    """Equal up to rounding: a checkpoint may be an average of others, or cast to half precision."""
    return math.isclose(saved, ours, rel_tol=max(1e-12, torch.finfo(dtype).eps))


def adopted(saved: Tensor, plan: Plan) -> Plan:
    """``plan`` with the depth and knee of a checkpoint that :func:`disagreements` has nothing against.

    Warns where the checkpoint was trained for another loss, and that gives other rates.
    """
    theirs, ours = _compared(saved, plan)
    result = dataclasses.replace(plan, depth=theirs[1], knee=theirs[2])
    if theirs[-1] != ours[-1]:
        trained = dataclasses.replace(result, loss=LOSSES[round(theirs[-1])])
        then, now = (each.law("sgd").factor(plan.gamma) for each in (trained, result))
        if not math.isclose(then, now):
            warnings.warn(
                f"the checkpoint was trained for loss={trained.loss!r} and this model is wrapped for "
                f"loss={plan.loss!r}: SGD's rates are {now / then:.3g} × the checkpoint's; "
                f"to go on at its rates wrap the net with loss={trained.loss!r}",
                stacklevel=2,
            )
    return result


def disagreements(saved: Tensor, plan: Plan, *, same_shapes: bool = True) -> list[str]:
    """One line for each part of the plan in which a checkpoint is of another function or other rates; γ first.

    Args:
        saved: the numbers in the checkpoint.
        plan: of the model that is to load it.
        same_shapes: whether the networks have the same widths; otherwise their width factors differ anyway.
    """
    unreadable = _unreadable(saved)
    if unreadable:
        return [unreadable]
    theirs, ours = _compared(saved, plan)
    lines = []
    if theirs[0] != ours[0] and saved.dtype != torch.float64 and theirs[0] == float(torch.tensor(ours[0]).to(saved)):
        dtype = str(saved.dtype).removeprefix("torch.")
        lines.append(
            f"the checkpoint was cast to {dtype}, which can't hold the γ = {ours[0]:g} of this model; "
            f"leave {PLAN!r} in float64 when you cast one"
        )
    elif theirs[0] != ours[0]:
        lines.append(
            f"the checkpoint was saved at γ = {theirs[0]:g} and this model is wrapped with γ = {ours[0]:g}; "
            "wrap the net with the checkpoint's γ"
        )
    if saved.numel() != len(ours):
        lines.append(
            f"the checkpoint's {PLAN!r} has {saved.numel()} numbers and {len(ours)} are known here; "
            "load it with the version of gammaopt that saved it"
        )
        return lines
    for name, saved_at, given in (("depth", theirs[1], ours[1]), ("knee", theirs[2], ours[2])):
        if name in plan.stated and saved_at != given:
            lines.append(
                f"the checkpoint was saved at {name} = {saved_at:g} and this model is wrapped with "
                f"{name}={given:g}, where one lr means other rates; "
                f"wrap the net with {name}={saved_at:g}, or without {name}= to take the checkpoint's"
            )
    if theirs[3:5] != ours[3:5]:
        (m, alpha), here = theirs[3:5], ours[3:5]
        lines.append(
            f"the checkpoint was saved under a depth rule with m = {m:g}, α = {alpha:g} and this model has "
            f"m = {here[0]:g}, α = {here[1]:g}; wrap the net with the checkpoint's residual="
        )
    if theirs[6] == ours[6] == 0:  # no width factor on either side: a base of the net's own width is like none
        return lines
    if theirs[5] != ours[5]:
        there, here_form = FORMS[round(theirs[5])], FORMS[round(ours[5])]
        lines.append(
            f"the checkpoint was saved under {there} and this model is wrapped with {here_form}, where one lr means "
            f"other rates; wrap the net with the checkpoint's {there}"
        )
    elif theirs[6] != ours[6] and same_shapes:
        what = "base= or roles=" if plan.base is not None else "roles="
        lines.append(
            f"the checkpoint was saved with another {what}, where one lr means other rates; "
            "wrap the net with the checkpoint's"
        )
    return lines


def misfit(model: nn.Module, saved: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Why a checkpoint does not fit ``model``, one line each: of its plan, and of its network and its θ₀."""
    plan: Plan = model.gammaopt  # type: ignore[assignment]
    here = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    there = {name: tuple(tensor.shape) for name, tensor in saved.items() if isinstance(tensor, Tensor)}
    # If all names differ, by a prefix or because it is another network, torch's words are the clearer ones.
    others = _network(model, here, there) + _centring(model, saved) if here.keys() & there.keys() else []
    if PLAN not in there:
        return [], others
    return disagreements(
        saved[PLAN], plan, same_shapes=all(there.get(name, here[name]) == here[name] for name in here)
    ), others


def _unreadable(saved: Any) -> str:
    """What is wrong with an entry that holds no numbers of a plan; empty if nothing is."""
    if not isinstance(saved, Tensor):
        what = f"a {type(saved).__name__}"
    elif saved.dim() != 1 or not saved.numel() or not saved.is_floating_point():
        what = f"of shape {tuple(saved.shape)} and {str(saved.dtype).removeprefix('torch.')}"
    elif saved.is_meta:
        what = "on the meta device"
    elif not _in_range(saved.tolist()):
        what = str(saved.tolist())
    else:
        return ""
    return (
        f"the checkpoint's {PLAN!r} is {what}, not the numbers of a plan; take it from a wrapped model's state_dict()"
    )


def _in_range(values: list[float]) -> bool:
    """Whether they may be a plan's: γ may be infinite, after a cast."""
    if math.isnan(values[0]) or not all(map(math.isfinite, values[1:])):
        return False
    return len(values) < 8 or (0 <= round(values[5]) < len(FORMS) and 0 <= round(values[7]) < len(LOSSES))


def uncentred(model: nn.Module, saved: Mapping[str, Any]) -> list[str]:
    """What to warn of where a checkpoint is loaded with ``strict=False`` that has no γ, or no θ₀ to centre on.

    The latter where the model stands at its start: one that has moved, and is given other parameters, keeps its θ₀.
    """
    reference: nn.Module | None = model._gammaopt_reference  # type: ignore[assignment]
    if reference is None or not any(name in saved for name, _ in model.named_parameters()):
        return []
    if any(name.startswith(THETA0) for name in saved):
        return [] if PLAN in saved else _centring(model, saved)
    if any(not parameter.requires_grad and name not in saved for name, parameter in model.named_parameters()):
        return []  # of an adapter alone: what it is added to is frozen, here as where it was saved
    _distributed.follow_sharding(model, reference)
    if not all(_at_start(*pair) for pair in zip(model.parameters(), reference.parameters(), strict=False)):
        return []
    return [
        "the checkpoint has no θ₀, so f stays centred on this model's own start and is not 0 at what was loaded; "
        "to start from the checkpoint load it into the net before gammaopt.wrap"
    ]


def _at_start(parameter: Tensor, start: Tensor) -> bool:
    """Whether a parameter stands at its start, and can be compared with it at all."""
    if parameter.is_meta or start.is_meta:
        return False
    kinds = ((t.shape, t.dtype, t.device) for t in (parameter, start))
    return len(set(kinds)) == 1 and torch.equal(parameter, start)


def shortened(error: str) -> str:
    """Torch's list of what does not fit, cut behind its first entry: ours has said what it means."""
    head, *entries = error.splitlines()
    entries.sort(key=lambda entry: entry.strip().startswith("θ₀"))
    return "\n".join([head, entries[0], f"\t… and {len(entries) - 1} more"] if len(entries) > 2 else [head, *entries])


def _compared(saved: Tensor, plan: Plan) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The numbers of a checkpoint, each as ours where it equals ours up to rounding, and ours."""
    ours = numbers(plan)
    pairs = zip(saved.tolist(), ours, strict=False)
    return tuple(mine if same(value, mine, saved.dtype) else value for value, mine in pairs), ours


def _depth_rule(plan: Plan) -> tuple[float, float]:
    """m and α; (1, 1) where no rule changes anything."""
    if plan.residual is None or plan.residual.ratio == 1:
        return 1.0, 1.0
    return plan.residual.ratio, plan.residual.alpha


Shapes = dict[str, tuple[int, ...]]


def _network(model: nn.Module, here: Shapes, there: Shapes) -> list[str]:
    """Another depth or width, if that is plain to see: shapes by name in the model and in the checkpoint."""
    modules = {name for name, _ in model.named_modules()}
    for name in [*here, *(name for name in there if not name.startswith((PLAN, THETA0)))]:
        if name not in there or (name not in here and name.rpartition(".")[0] not in modules):
            has, lacks = ("model", "checkpoint") if name in here else ("checkpoint", "model")
            return [
                f"the checkpoint was saved at another depth: {name!r} of the {has} is not in the {lacks}; "
                "build the net with the checkpoint's layers"
            ]
    for name in here:
        if here[name] != there[name]:
            return [
                f"the checkpoint was saved at another width: {name!r} is {there[name]} there and {here[name]} "
                "here; build the net at the checkpoint's width"
            ]
    return []


def _centring(model: nn.Module, saved: Mapping[str, Any]) -> list[str]:
    """A frozen copy on one side only."""
    here, there = model._gammaopt_reference is not None, any(name.startswith(THETA0) for name in saved)
    if here == there:
        if here and PLAN not in saved:
            return [
                f"the checkpoint has θ₀ and no {PLAN!r}, so nothing tells at which γ it was saved; save the model's "
                "whole state_dict()"
            ]
        return []
    if there:
        return [
            "the checkpoint has θ₀, so its model was wrapped with center='copy', and this one with another center=; "
            "wrap the net with center='copy'"
        ]
    if PLAN not in saved:
        return [
            f"the checkpoint is of a plain network, without {PLAN!r} and θ₀; load it into the net before gammaopt.wrap"
        ]
    return [
        "the checkpoint has no θ₀, so its model was wrapped with center='zero_readout' or 'none', and this one with "
        "center='copy'; wrap the net with the checkpoint's center="
    ]
