"""Roles: what each parameter does in its network, read off the module that owns it.

A role and a fan-in are all that width scaling needs to know. A parameter whose role can't be read off its module is
an error that names it where the width matters (``mean_field``, ``base=``), never a silent factor of 1; ``roles=`` of
:func:`gammaopt.wrap` says it then. A plain ``nn.Parameter`` is read off its name where that tells (bias, gain, scale,
class token, …).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn

from gammaopt._errors import UsageError

Role = Literal["weight", "bias", "norm", "embedding", "scalar", "readout weight", "readout bias", "other"]
STATED = [role for role in get_args(Role) if role != "other"]  # what a user may say: "other" is that nobody knows

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVS, *TRANSPOSED)
NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
# Names that plain parameters have in torch, torchvision, timm and HF: one row per token, added to the stream.
# One factor for each unit, or a single one: norms' gains, timm's and HF's layer scales, ScaleNorm, logit scales.
GAINS = ("scale", "gain", "gamma", "beta", "alpha", "lambda", "temperature", "norm")
TOKENS = ("cls_token", "class_token", "dist_token", "mask_token", "reg_token", "pos_embed", "pos_embedding", "position")
LOW_RANK = ("lora_a", "lora_b")  # PEFT writes them with a capital, torchtune without


@dataclass(frozen=True)
class Rule:
    """One parameter: its name, shape and role, and for a weight its fan-in.

    ``fresh`` marks what ``mean_field`` draws anew: weights, embeddings and biases of known layers; not norms, not
    tokens, not low-rank adapters, whose zero is meant. ``frozen`` is how it was when the network was wrapped.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    fan_in: float | None = None
    fresh: bool = False
    frozen: bool = False

    @property
    def scale(self) -> float | None:
        """Mean-field scale a = std(w) of a weight: fan_in^(-1/2), 1/fan_in for the readout, 1 for an embedding."""
        if self.role == "embedding":
            return 1.0
        if not self.fan_in:  # none, or a layer without inputs
            return None
        return 1.0 / self.fan_in if self.role == "readout weight" else self.fan_in**-0.5


def fan_in(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Inputs summed by one output of a Linear or Conv layer whose weight has ``shape``.

    C_in/groups · kernel area for a convolution. A transposed convolution stores (C_in, C_out/groups, …), and each
    output sees one kernel tap in ``stride`` along each axis.
    """
    if isinstance(layer, TRANSPOSED):
        return shape[0] / layer.groups * max(1.0, math.prod(shape[2:]) / math.prod(layer.stride))
    return float(shape[0] if _input_first(layer) else math.prod(shape[1:]))


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a Linear or Conv layer, the ``Conv1D`` of Hugging Face's GPT-2 included."""
    return isinstance(module, LAYERS) or _input_first(module)


def _input_first(module: nn.Module) -> bool:
    """``transformers.pytorch_utils.Conv1D``: a Linear layer whose weight is (in, out). Known by its looks: it is not
    imported."""
    weight = getattr(module, "weight", None)
    if type(module).__name__ != "Conv1D" or not isinstance(weight, nn.Parameter):
        return False
    return tuple(weight.shape) == (getattr(module, "nx", None), getattr(module, "nf", None))


def layers_in_order(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear and Conv layers by qualified name, in the order of registration."""
    return ((name, module) for name, module in net.named_modules() if is_layer(module))


def rules_for(
    net: nn.Module,
    readout: str | None,
    *,
    overrides: Mapping[str, Role] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Rule, ...]:
    """Give each parameter of ``net`` its role.

    Args:
        net: any module.
        readout: qualified name of the layer whose output is the network's.
        overrides: parameter name → role, where the module does not tell.
        shapes: parameter name → shape to use instead of the parameter's own: the same network at another width.

    Raises:
        UsageError: for an override of an unknown name or role.
    """
    owners = dict(net.named_modules())
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping):
        raise UsageError(f"roles is a {type(overrides).__name__}; give a mapping of parameter names to roles")
    parameters = dict(net.named_parameters())
    for name, role in overrides.items():
        if role not in STATED:
            raise UsageError(f"unknown role {role!r} for parameter {name!r}; choose one of: {', '.join(STATED)}")
        if name not in parameters:
            raise UsageError(f"roles names {name!r}, which is no parameter of {type(net).__name__}; check the spelling")
    rules = []
    for name, parameter in parameters.items():
        prefix, _, leaf = name.rpartition(".")
        shape = shapes[name] if shapes is not None else tuple(parameter.shape)
        if name in overrides:
            rule = _stated(name, shape, overrides[name])
        else:
            rule = _read_off(name, leaf, shape, owners[prefix], is_readout=prefix == readout)
        rules.append(replace(rule, frozen=not parameter.requires_grad))
    return tuple(rules)


def _stated(name: str, shape: tuple[int, ...], role: Role) -> Rule:
    weight = role in ("weight", "readout weight")
    return Rule(name, shape, role, float(math.prod(shape[1:])) if weight else None)


def _read_off(name: str, leaf: str, shape: tuple[int, ...], owner: nn.Module, *, is_readout: bool) -> Rule:
    if is_layer(owner) and leaf == "weight":
        fresh = not _low_rank(name)
        return Rule(name, shape, "readout weight" if is_readout else "weight", fan_in(owner, shape), fresh=fresh)
    if is_layer(owner) and leaf == "bias":
        return Rule(name, shape, "readout bias" if is_readout else "bias", fresh=True)
    if isinstance(owner, LOOKUPS) and leaf == "weight":
        return Rule(name, shape, "embedding", fresh=True)
    if isinstance(owner, nn.MultiheadAttention) and leaf.endswith("proj_weight"):
        return Rule(name, shape, "weight", float(shape[1]), fresh=True)
    if isinstance(owner, RECURRENT) and leaf.startswith("weight"):
        return Rule(name, shape, "weight", float(shape[1]), fresh=True)
    if isinstance(owner, (nn.MultiheadAttention, *RECURRENT)) and leaf.startswith(("bias", "in_proj_bias")):
        return Rule(name, shape, "bias", fresh=not leaf.startswith(("bias_k", "bias_v")))
    if isinstance(owner, NORMS) and leaf in ("weight", "bias"):
        return Rule(name, shape, "norm")
    if isinstance(owner, nn.PReLU):
        return _vector(name, shape, "norm")
    return _read_off_name(name, leaf, shape, type(owner).__name__.lower())


def _read_off_name(name: str, leaf: str, shape: tuple[int, ...], owner: str) -> Rule:
    """A plain ``nn.Parameter`` of a module nobody knows: by the names that are usual, its own or its module's."""
    if any(token in leaf for token in TOKENS):
        return _vector(name, shape, "embedding")
    if len(shape) == 2 and _low_rank(name):
        return Rule(name, shape, "weight", float(shape[1]))
    if len(shape) <= 1 or math.prod(shape) == 1:
        if "bias" in leaf:
            return _vector(name, shape, "bias")
        if any(part in leaf.lower() for part in GAINS) or "norm" in owner or "scale" in owner:
            return _vector(name, shape, "norm")
    return Rule(name, shape, "other")


def _low_rank(name: str) -> bool:
    return any(part in name.lower() for part in LOW_RANK)


def _vector(name: str, shape: tuple[int, ...], role: Role) -> Rule:
    """One number for each unit, unless it is a single one: that has no width."""
    return Rule(name, shape, "scalar" if math.prod(shape) == 1 else role)
