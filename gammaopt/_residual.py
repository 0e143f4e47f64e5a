r"""The depth rule: one learning rate for residual networks of every depth.

    h_{l+1} = h_l + m^(−α)·F_l(h_l),    m = blocks/base_depth

The branches F_l are multiplied by m^(−α), and everything inside a block is stepped with another share of ``lr``. A step
η_b on a block changes F_l by a size ∝ η_b whichever m is, and the m blocks' changes add up coherently, so the stream
moves by m·m^(−α)·η_b: η_b must be

    optimizer                       lr           Adam's eps
    Adam, AdamW, Muon               m^(α−1)      m^(−α)
    SGD                             m^(2α−1)

since the gradient of a block is itself ∝ m^(−α): Adam's step does not see that, but its eps does, and SGD's step
carries it once more. α = 1 keeps every block's learning as non-linear as the base's; α = 1/2 keeps the stream's size at
initialisation, but blocks become linear in their own parameters as m grows.

Source: Dey et al., "Don't be lazy: CompleteP enables compute-efficient deep transformers" (arXiv 2505.01618) for Adam;
SGD's exponent follows from the same argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gammaopt._errors import UsageError, at_least, positive
from gammaopt._probe import Inputs, Output, probe, probing


@dataclass(frozen=True)
class Residual:
    """Which modules are the residual blocks of a network, for ``gammaopt.wrap(…, residual=…)``.

    Names are qualified as in ``net.named_modules()``, with ``*``, ``?`` and ``[…]`` inside each part between dots:
    ``"blocks.*"`` is ``blocks.0`` and not ``blocks.0.mlp``.

    Args:
        blocks: name pattern, or several, of the residual blocks. They are counted, and every parameter inside them is
            stepped with the block's share of the rate; what stands on the skip path must be outside.
        base_depth: number of blocks of the network that ``lr`` was tuned on, ≥ 1; m = blocks/base_depth.
        branches: name pattern, or several, inside a block, of the modules whose output is added to the stream:
            ``("attn", "mlp")`` for timm's transformers. By default the block itself, in ``x + block(x)``.
        alpha: α, from 0.5 to 1: the branches are multiplied by m^(−α).

    Raises:
        UsageError: for an ``alpha`` or ``base_depth`` out of range, or patterns that are no strings.

    Example:
        >>> rule = Residual(blocks="blocks.*", branches=("attn", "mlp"), base_depth=2)
        >>> rule.branches, rule.alpha
        (('attn', 'mlp'), 1.0)
    """

    blocks: str | Sequence[str]
    base_depth: int
    branches: str | Sequence[str] = ()
    alpha: float = 1.0

    def __post_init__(self) -> None:
        at_least("base_depth", self.base_depth, 1)
        if not 0.5 <= positive("alpha", self.alpha) <= 1:
            raise UsageError(f"alpha={self.alpha:g} is not allowed; give alpha from 0.5 to 1")
        for name in ("blocks", "branches"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if not self.blocks:
            raise UsageError("blocks=() names no module; give a pattern like 'blocks.*'")


@dataclass(frozen=True)
class DepthRule:
    """A :class:`Residual` applied to one network: what its plan and its optimizers need.

    Attributes:
        blocks: qualified names of the residual blocks.
        branches: qualified names of the modules whose output is multiplied.
        ratio: m = blocks/base_depth.
        alpha: α.
    """

    blocks: tuple[str, ...]
    branches: tuple[str, ...]
    ratio: float
    alpha: float

    @property
    def branch(self) -> float:
        """m^(−α): the factor on a branch's output."""
        return math.pow(self.ratio, -self.alpha)

    def factors(self, name: str, optimizer: str) -> tuple[float, float]:
        """Factors on ``lr`` and ``eps`` of the parameter ``name``: (1, 1) outside the blocks."""
        if not any(name.startswith(f"{block}.") for block in self.blocks):
            return 1.0, 1.0
        exponent = 2 * self.alpha - 1 if optimizer == "sgd" else self.alpha - 1
        return math.pow(self.ratio, exponent), self.branch


@dataclass(frozen=True)
class BranchFactor:
    """Forward hook that multiplies a branch's output.

    A hook, not another class for the branch: its type is what roles are read off. An instance of a class of this
    module, not a closure: deepcopy and pickle take it along. It adds nothing to ``state_dict()``.
    """

    factor: float
    branch: str

    def __call__(self, module: nn.Module, args: object, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise UsageError(
                f"branch {self.branch!r} ({type(module).__name__}) returns a {type(output).__name__}, not a tensor; "
                "name in branches= the module inside it whose output is added to the stream"
            )
        return output * self.factor


def resolve(net: nn.Module, residual: Residual) -> DepthRule:
    """The blocks and branches that ``residual`` names in ``net``.

    Raises:
        UsageError: if a pattern matches nothing, a block has no branch, or one branch is inside another.
    """
    modules = {name: module for name, module in net.named_modules() if name}
    blocks: list[str] = []
    for pattern in residual.blocks:
        found = [name for name in modules if _matches(name, pattern)]
        if not found:
            raise UsageError(
                f"blocks={pattern!r} matches no module of {type(net).__name__}; "
                f"{_examples(modules)}: give the residual blocks' names, * for a part between dots"
            )
        blocks += [name for name in found if name not in blocks]
    branches: list[str] = []
    unused = set(residual.branches)
    for block in blocks:
        inner = [name.removeprefix(f"{block}.") for name in modules if name.startswith(f"{block}.")]
        matched = {pattern: [name for name in inner if _matches(name, pattern)] for pattern in residual.branches}
        unused -= {pattern for pattern, names in matched.items() if names}
        of_block = [f"{block}.{name}" for names in matched.values() for name in names] if matched else [block]
        if not of_block:
            raise UsageError(
                f"branches={list(residual.branches)} match no module of block {block!r}; {_examples(inner)}: "
                "give the names, inside a block, of what is added to the stream"
            )
        branches += [name for name in of_block if name not in branches]
    if unused:
        raise UsageError(
            f"branches={min(unused)!r} matches no module of the blocks of {type(net).__name__}; drop or mend it"
        )
    for outer in branches:
        for name in branches:
            if name.startswith(f"{outer}."):
                raise UsageError(f"branch {name!r} is inside branch {outer!r}: it would be multiplied twice; name one")
    return DepthRule(tuple(blocks), tuple(branches), len(blocks) / residual.base_depth, float(residual.alpha))


def attach(net: nn.Module, rule: DepthRule) -> None:
    """Multiply the branches of ``net``; at m = 1 nothing is done."""
    if rule.branch != 1:
        for name in rule.branches:
            net.get_submodule(name).register_forward_hook(BranchFactor(rule.branch, name))


def detach(net: nn.Module) -> None:
    """Undo :func:`attach`."""
    for module in net.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, BranchFactor)]:
            del module._forward_hooks[key]


def check_branches(net: nn.Module, rule: DepthRule, inputs: Inputs, output: Output | None) -> None:
    """Every branch runs on ``inputs`` and returns a tensor.

    Raises:
        UsageError: naming the branch that doesn't.
    """
    ran: set[str] = set()

    def watch(name: str) -> Any:
        check = BranchFactor(1.0, name)

        def hook(module: nn.Module, args: object, returned: Any) -> None:
            check(module, args, returned)
            ran.add(name)

        return hook

    handles = [net.get_submodule(name).register_forward_hook(watch(name)) for name in rule.branches]
    try:
        with torch.no_grad(), probing(net):
            probe(net, inputs, output)
    finally:
        for handle in handles:
            handle.remove()
    for name in rule.branches:
        if name not in ran:
            raise UsageError(
                f"branch {name!r} ({type(net.get_submodule(name)).__name__}) is not called on the example inputs, so "
                "its output can't be multiplied; name in branches= a module that is called"
            )


def last_layers(net: nn.Module, rule: DepthRule, inputs: Inputs, output: Output | None) -> dict[str, str]:
    """Branch → the module inside it with parameters of its own that ran last: where its factor may be baked in."""
    owners = [
        (branch, name, module)
        for branch in rule.branches
        for name, module in net.named_modules()
        if (name == branch or name.startswith(f"{branch}.")) and any(True for _ in module.parameters(recurse=False))
    ]
    found: dict[str, str] = {}

    def note(branch: str, name: str) -> Any:
        return lambda *_: found.__setitem__(branch, name)

    handles = [module.register_forward_hook(note(branch, name)) for branch, name, module in owners]
    try:
        with torch.no_grad(), probing(net):
            probe(net, inputs, output)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(item, str) for item in patterns):
        raise UsageError(f"{name}={value!r} is no module name; give a string like 'blocks.*', or several")
    return tuple(patterns)


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _examples(names: Any) -> str:
    listed = list(names)
    shown = ", ".join(map(repr, listed[:4]))
    return f"it has {shown}{', …' if len(listed) > 4 else ''}" if listed else "it has no modules inside"
