r"""``wrap``: turn a network h into f(x; θ) = [h(x; θ) − h(x; θ₀)]/γ, in place; ``unwrap`` and ``fold`` undo it.

The object stays the same and its class becomes a subclass of the class it had, as ``torch.distributed.fsdp.
fully_shard`` does: ``isinstance`` holds, and parameter names, hooks and submodules are untouched.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import nn

from gammaopt import _distributed, _registry, _residual
from gammaopt._base import BaseShapes, base_of
from gammaopt._depth import effective_depth, hidden_by_zeros
from gammaopt._errors import UsageError, one_of, positive
from gammaopt._knee import knee as measure_knee
from gammaopt._laws import SMALLEST_FLOAT32_GAMMA, Loss
from gammaopt._plan import Base, Parametrization, Plan
from gammaopt._probe import Inputs, Output, probe, probing, trainable
from gammaopt._readout import find_readout, zero_readout
from gammaopt._residual import Residual
from gammaopt._roles import STATED, Role, Rule, rules_for
from gammaopt._wrapped import Wrapped, frozen, wrapped_class

Center = Literal["copy", "zero_readout", "none"]
Net = TypeVar("Net", bound=nn.Module)


def wrap(
    net: Net,
    gamma: float,
    *,
    depth: float | None = None,
    example_inputs: Inputs | None = None,
    parametrization: Parametrization = "as_is",
    center: Center = "copy",
    loss: Loss = "mse",
    knee: float | None = None,
    base: BaseShapes | None = None,
    residual: Residual | None = None,
    roles: Mapping[str, Role] | None = None,
    output: Output | None = None,
) -> Net:
    r"""Make ``net`` compute f(x; θ) = [h(x; θ) − h(x; θ₀)]/γ, in place, and plan its learning rates.

    Returns the same object; its class becomes a subclass of the class it had. θ₀ are the parameters at this call
    (after re-initialisation under ``mean_field``), so f = 0 until the first step: exactly, or to rounding where torch's
    kernel for h differs from that for h₀, as a recurrent layer's may. Follow with
    ``gammaopt.SGD(net.parameters(), lr=…)``, where ``lr`` is the rate tuned at γ = 1; it looks the rates up in the
    wrapped model, which must still be referenced then. A plain ``torch.optim`` optimizer, built before or after, steps
    the same parameters at ``lr`` without γ, and nothing says so: it is also what takes :func:`param_groups`, groups
    baked by hand from ``net.gammaopt.multipliers()``, or one rate that was multiplied by s(γ) already, and from
    outside those look the same.

    Args:
        net: the network h.
        gamma: feature-learning strength γ > 0: small is lazy (kernel-like), large is rich.
        depth: effective depth L; measured from ``example_inputs`` if not given, with biases at 0. Give it where
            trainable weights start at 0, as a low-rank adapter's do: what is measured then is too small, rates above
            the knee are too high, and a warning says so. A checkpoint brings its own in place of a measured one, so
            that a restart trains alike; where both are given and differ it is refused. So with ``knee``.
        example_inputs: one batch (a tensor, a tuple of positional or a dict of keyword arguments). Also tells which
            layer is the readout, the last to run of those that h depends on: without it the readout is the Linear or
            Conv layer registered last.
        parametrization: ``"as_is"`` keeps initialisation and relative rates. ``"mean_field"`` re-initialises weights,
            embeddings and biases (w ~ N(0, a²), biases 0; a = fan_in^(-1/2), readout 1/fan_in) and sets per-layer
            rates, so that one ``lr`` serves every width. Parameters with ``requires_grad=False`` keep their values:
            a frozen backbone is a pretrained one.
        center: ``"copy"`` keeps a frozen copy of the network for h(x; θ₀), which doubles its memory and adds a
            forward pass. ``"zero_readout"`` sets the readout to 0 instead, so that h₀ = 0 costs nothing; it needs
            ``example_inputs``. ``"none"`` drops the term: f = h/γ.
        loss: the loss you will train with, ``"mse"`` or ``"cross_entropy"``: it decides the rates below the knee only.
        knee: γ_c, where the law bends. By default 1 in mean-field form, else measured from ``example_inputs``
            (:func:`gammaopt.knee`); 1 without them.
        base: the network that ``lr`` was tuned on, as a module (the meta device will do), a mapping of parameter
            shapes, or the path of a ``mup`` ``.bsh`` file: rates and the readout's initialisation are then scaled
            from its widths to those of ``net``. Goes with ``"as_is"``.
        residual: the depth rule for a residual network, relative to the number of blocks that ``lr`` was tuned with:
            a :class:`gammaopt.Residual` names the blocks. Their branches are then multiplied by m^(-α) in h. Goes
            with every ``parametrization`` and needs ``example_inputs``.
        roles: parameter name → role, for parameters that the modules don't tell: ``"weight"``, ``"bias"``, ``"norm"``,
            ``"embedding"`` (one row per token), ``"scalar"``.
        output: which part of what ``net`` returns is h, if that is not one tensor: an entry's name or position, where
            f is put in its place; or a function of it, and then the model returns f alone.

    Returns:
        ``net``. ``net.gammaopt`` is its :class:`Plan`: γ, depth and rates; ``print(net.gammaopt)`` shows a table.

    Raises:
        UsageError: a ``ValueError`` with one line that names the value and the fix. ``net`` is then unchanged.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> model = wrap(net, gamma=3.0, example_inputs=torch.randn(2, 4), parametrization="mean_field")
        >>> model is net, model(torch.ones(2, 4)).detach().abs().max().item()
        (True, 0.0)
    """
    gamma = positive("gamma", gamma)
    _check_net(net)
    one_of("parametrization", parametrization, get_args(Parametrization))
    one_of("center", center, get_args(Center))
    one_of("loss", loss, get_args(Loss))
    depth = None if depth is None else positive("depth", depth)
    knee = None if knee is None else positive("knee", knee)
    stated = tuple(name for name, value in (("depth", depth), ("knee", knee)) if value is not None)
    if depth is None and example_inputs is None:
        raise UsageError("depth is not known; give depth=, or example_inputs= to measure it")
    if center == "zero_readout" and example_inputs is None:
        raise UsageError("center='zero_readout' needs example_inputs= to see that the output is 0")
    if base is not None and parametrization != "as_is":
        raise UsageError(f"base= goes with parametrization='as_is', not with {parametrization!r}; drop one of them")
    depth_rule = None if residual is None else _depth_rule(net, residual, example_inputs, output)

    readout = find_readout(net, example_inputs, output)
    rules = rules_for(net, readout, overrides=roles)
    reference_base = None if base is None else base_of(net, base, readout, roles)
    if parametrization == "mean_field" or base is not None:
        _check_rules(net, rules)
    start = copy.deepcopy(net)
    if depth_rule is not None:
        _residual.attach(start, depth_rule)
    if parametrization == "mean_field":
        _initialise(start, rules)
    if reference_base is not None:
        _scale_readout(start, rules, reference_base)
    if depth is None:
        batch = cast("Inputs", example_inputs)
        depth = _rounded(effective_depth(start, batch, output=output))
        hidden = hidden_by_zeros(start, batch, output, depth)
        if not depth > 0:
            raise UsageError(
                f"the measured depth of {type(net).__name__} is {depth:.3g}; {hidden or 'give depth= > 0'}"
            )
        if hidden is not None:
            warnings.warn(
                f"the measured depth of {type(net).__name__} is {depth:.3g} and too small: {hidden}", stacklevel=2
            )
    if knee is None:
        measured = parametrization == "as_is" and example_inputs is not None
        knee = _rounded(measure_knee(start, cast("Inputs", example_inputs), output=output)) if measured else 1.0
    if center == "zero_readout":
        zero_readout(start, readout, cast("Inputs", example_inputs), output)
    width = next((rule.fan_in for rule in rules if rule.role == "readout weight"), None)
    plan = Plan(gamma, depth, loss, knee, parametrization, width, rules, readout, reference_base, depth_rule, stated)
    if center == "copy":
        _warn_if_imprecise(net, gamma)

    # Nothing above touched the net; nothing below can fail.
    with torch.no_grad():
        for target, source in zip(net.parameters(), start.parameters(), strict=True):
            if not target.is_meta:
                target.copy_(source)
    if depth_rule is not None:
        _residual.attach(net, depth_rule)
    net.__class__ = wrapped_class(type(net))  # type: ignore[assignment]
    # Not through nn.Module.__setattr__, which would make the copy a submodule and list its parameters as trainable.
    net.__dict__.update(
        gammaopt=plan, _gammaopt_reference=frozen(start) if center == "copy" else None, _gammaopt_output=output
    )
    _registry.register(net)
    _registry.changed()  # an optimizer that holds these parameters already must see that
    _distributed.watch_ddp()
    return net


def _rounded(measured: float) -> float:
    """Four digits: more than a batch can tell, and the same on every rank and machine."""
    return float(f"{measured:.4g}")


def unwrap(model: Net) -> Net:
    """Give a wrapped model its own class back: the plain network, with the parameters it has now.

    All that :func:`wrap` added is gone, the factor of a ``residual=`` rule on the branches included: a network trained
    at m ≠ 1 computes something else without it. :func:`fold` keeps the function instead.

    An optimizer of gammaopt that was built for the wrapped model refuses to step the plain one, whose rates are others,
    until it is wrapped again: then it follows the new plan. Build one of ``torch.optim`` to train on without γ.

    Raises:
        UsageError: if ``model`` is not wrapped.
    """
    if not isinstance(model, Wrapped):
        parts = [name for name, part in model.named_modules() if isinstance(part, Wrapped)]
        hint = f"its part {parts[0]!r} is: unwrap that" if parts else "nothing to unwrap"
        raise UsageError(f"this {type(model).__name__} is not wrapped; {hint}")
    if not isinstance(vars(type(model)).get("_gammaopt_base"), type):
        raise UsageError(
            f"the class of this {type(model).__name__} was changed after wrapping; "
            "load its full state dict into a fresh model and unwrap that"
        )
    _registry.forget(model)
    base = type(model)._gammaopt_base
    for name in [name for name in vars(model) if name == "gammaopt" or name.startswith("_gammaopt_")]:
        del model.__dict__[name]
    _residual.detach(model)
    model.__class__ = base  # type: ignore[assignment]
    return model


def fold(model: Net, example_inputs: Inputs) -> Net:
    """Unwrap a trained model into a plain network that computes f: 1/γ goes into the readout's weight and bias.

    Exact where f = h/γ, that is without a frozen copy, and where the output is linear in the readout. The factor of a
    ``residual=`` rule goes into the last layer of each branch, where the branch is linear in that.

    Args:
        model: a model wrapped with ``center="zero_readout"`` or ``"none"``.
        example_inputs: one batch, on which the folded network is compared with the wrapped one.

    Returns:
        ``model``, unwrapped.

    Raises:
        UsageError: if ``model`` is not wrapped, has a frozen copy, or its output is not linear in its readout or a
            branch not in its last layer. The model is then unchanged.
    """
    if not isinstance(model, Wrapped):
        raise UsageError(f"this {type(model).__name__} is not wrapped; nothing to fold")
    if model._gammaopt_reference is not None:
        raise UsageError("f has the frozen copy's part − h₀/γ, which no readout holds; wrap with center='zero_readout'")
    plan, output = model.gammaopt, model._gammaopt_output
    if plan.readout is None:
        raise UsageError(f"{type(model).__name__} has no Linear or Conv readout to fold 1/γ into")
    scales = {plan.readout: 1.0 / plan.gamma}
    if plan.residual is not None and plan.residual.branch != 1:
        scales |= _branch_scales(model, plan, example_inputs, scales)
    trial = copy.deepcopy(model)
    with torch.no_grad(), probing(model), probing(trial):
        expected = probe(model, example_inputs, output) / plan.gamma
        _bake(trial, scales)
        folded = probe(trial, example_inputs, output)
    scale = max(float(expected.abs().max()), torch.finfo(expected.dtype).tiny)
    if not float((folded - expected).abs().max()) <= 1e3 * torch.finfo(expected.dtype).eps * scale:
        branches = " and its branches in their last layers" if len(scales) > 1 else ""
        raise UsageError(
            f"the output of {type(model).__name__} is not linear in its readout {plan.readout!r}{branches}; "
            "keep it wrapped"
        )
    _bake(model, scales)
    return unwrap(model)


def _branch_scales(model: nn.Module, plan: Plan, inputs: Inputs, taken: Mapping[str, float]) -> dict[str, float]:
    """Layer → factor m^(−α) to bake into it, one layer for each branch."""
    assert plan.residual is not None
    layers = _residual.last_layers(model, plan.residual, inputs, None)
    for branch in plan.residual.branches:
        if branch not in layers:
            raise UsageError(f"branch {branch!r} has no parameters to take its factor m^(−α); keep the model wrapped")
        if layers[branch] in taken:
            raise UsageError(f"branch {branch!r} ends in the readout {layers[branch]!r}; keep the model wrapped")
    return dict.fromkeys(layers.values(), plan.residual.branch)


@torch.no_grad()
def _bake(model: nn.Module, scales: Mapping[str, float]) -> None:
    """Multiply each layer's own parameters by its factor, and take the factors off the branches."""
    for name, scale in scales.items():
        for parameter in model.get_submodule(name).parameters():
            parameter.mul_(scale)
    _residual.detach(model)


def _depth_rule(
    net: nn.Module, residual: Residual, inputs: Inputs | None, output: Output | None
) -> _residual.DepthRule:
    if not isinstance(residual, Residual):
        raise UsageError(f"residual is a {type(residual).__name__}; give gammaopt.Residual(blocks=…, base_depth=…)")
    rule = _residual.resolve(net, residual)
    if inputs is None:
        raise UsageError("residual= needs example_inputs= to see that every branch is called")
    _residual.check_branches(net, rule, inputs, output)
    return rule


def _check_net(net: nn.Module) -> None:
    if not isinstance(net, nn.Module):
        raise UsageError(f"net is a {type(net).__name__}; give a torch.nn.Module")
    name = type(net).__name__
    if isinstance(net, torch.jit.ScriptModule):
        raise UsageError(f"{name} is a TorchScript module, whose class can't change; wrap the Python module instead")
    if isinstance(net, Wrapped):
        raise UsageError(f"this {name} is already wrapped with γ = {net.gammaopt.gamma:g}; call gammaopt.unwrap first")
    for part, module in net.named_modules():
        if isinstance(module, Wrapped):
            raise UsageError(
                f"part {part!r} of this {name} is already wrapped with γ = {module.gammaopt.gamma:g}; "
                "call gammaopt.unwrap on it first"
            )
    if not any(parameter.requires_grad for parameter in net.parameters()):
        why = "; call requires_grad_(True) on some" if any(True for _ in net.parameters()) else ""
        raise UsageError(f"{name} has no trainable parameters: there is nothing to train{why}")
    for part, parameter in net.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UsageError(f"parameter {part!r} of this {name} has no shape yet; run one batch before wrapping")
    if isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or name.startswith("FSDP"):
        raise UsageError(f"net is prepared for several processes already; wrap it before it becomes a {name}")
    if name == "OptimizedModule":
        raise UsageError("net is compiled already; wrap it before torch.compile, and compile what wrap returns")
    if "forward" in vars(net):
        raise UsageError(f"forward of this {name} was replaced on the object; wrap the net before that")
    if "gammaopt" in net.__dict__ or "gammaopt" in net._modules:
        raise UsageError(f"{name} has an attribute named 'gammaopt' already; rename it before wrapping")


def _check_rules(net: nn.Module, rules: tuple[Rule, ...]) -> None:
    """Width scaling needs every role, and each weight in one place."""
    unknown = [rule for rule in rules if rule.role == "other"]
    if unknown:
        owners = [type(net.get_submodule(rule.name.rpartition(".")[0])).__name__ for rule in unknown]
        listed = ", ".join(
            f"{rule.name!r} {rule.shape} of {owner}" for rule, owner in zip(unknown, owners, strict=True)
        )
        stated = ", ".join(f"{rule.name!r}: …" for rule in unknown)
        many = len(unknown) > 1
        raise UsageError(
            f"parameter{'s' if many else ''} {listed} {'have' if many else 'has'} no known scaling with width; "
            f"say {'their roles' if many else 'its role'} with roles={{{stated}}} (one of: {', '.join(STATED)}), "
            "or wrap with parametrization='as_is'"
        )
    if not any(rule.role == "readout weight" for rule in rules):
        names = {name for name, _ in net.named_parameters()}
        tied = [name for name, _ in net.named_parameters(remove_duplicate=False) if name not in names]
        why = f"its weight {tied[0]!r} is tied to another layer's" if tied else "it has no Linear or Conv layer"
        raise UsageError(
            f"{type(net).__name__} has no readout of its own to scale with width: {why}; "
            "wrap with parametrization='as_is' and without base="
        )


def _initialise(net: nn.Module, rules: tuple[Rule, ...]) -> None:
    """Draw mean-field weights w ~ N(0, a²) and set biases to 0, from torch's global random state."""
    parameters = trainable(net)
    with torch.no_grad():
        for rule in rules:
            if not rule.fresh or rule.name not in parameters:
                continue
            if rule.scale is None:
                parameters[rule.name].zero_()
                continue
            parameters[rule.name].normal_(0.0, rule.scale)
            padding = getattr(net.get_submodule(rule.name.rpartition(".")[0]), "padding_idx", None)
            if rule.role == "embedding" and padding is not None:  # that row has no gradient: it would stay as drawn
                parameters[rule.name][padding].zero_()


def _scale_readout(net: nn.Module, rules: tuple[Rule, ...], base: Base) -> None:
    """std of the readout ∝ 1/fan_in from the base on: torch's own initialisation makes it fan_in^(-1/2)."""
    parameters = trainable(net)
    with torch.no_grad():
        for rule in rules:
            if rule.role == "readout weight" and rule.fan_in and rule.name in parameters:
                parameters[rule.name].mul_((base.width / rule.fan_in) ** 0.5)


def _warn_if_imprecise(net: nn.Module, gamma: float) -> None:
    """h − h₀ loses about 2·eps/γ of the output to rounding."""
    dtypes = {p.dtype for p in net.parameters() if p.requires_grad and p.is_floating_point()}
    if not dtypes:
        return
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    loss = 2 * torch.finfo(coarsest).eps / gamma
    if loss > 2 * torch.finfo(torch.float32).eps / SMALLEST_FLOAT32_GAMMA:
        dtype = str(coarsest).removeprefix("torch.")
        warnings.warn(
            f"gamma={gamma:g} in {dtype}: centring loses about {loss:.1e} of the output; "
            "call net.double() before wrapping",
            stacklevel=3,
        )
