"""θ₀ and the plan in several processes: they must be what θ is, shared or sharded, on every rank.

Two things would part silently. θ₀: DistributedDataParallel gives every rank the first rank's θ, but not its frozen
copy, which is no parameter. The plan: depth and knee are measured on a batch, and ranks may measure different ones;
then they step by different rates and drift apart. So

- constructing ``DistributedDataParallel``, where torch itself synchronises all ranks, also gives every rank the first
  one's θ₀ and plan. It is seen by torch's hook on the registration of a submodule, which :func:`watch_ddp` sets once.
- DistributedDataParallel gives every rank the first one's running statistics before each forward; a hook on it does
  the same with θ₀'s, else f in evaluation would be another function on every rank. ``convert_sync_batchnorm`` after
  wrapping reaches no frozen copy; its layers are converted too, when DDP is constructed or at the next forward.
- ``fully_shard`` keeps on each rank a slice of what that rank holds; the frozen copy is sliced in the same way, on its
  first use after that, which takes no communication. The plans are compared at the first forward, which is collective.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from gammaopt._errors import UsageError
from gammaopt._plan import Plan

_watching = False
# In a wrapped model's __dict__: a SyncBatchNorm was put somewhere since θ₀'s layers were last compared with its own.
_SYNCHRONISED = "_gammaopt_synchronised"


def watch_ddp() -> None:
    """From now on, have DistributedDataParallel share θ₀ and the plan when it is constructed."""
    global _watching
    if not _watching and dist.is_available():
        register_module_module_registration_hook(_registered)
        _watching = True


def active() -> bool:
    """Whether this process is one of several that work together."""
    return dist.is_available() and dist.is_initialized()


def _registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if child is None:
        return
    if any(isinstance(part, nn.SyncBatchNorm) for part in child.modules()):
        from gammaopt import _registry  # which imports this file

        for model in _registry.live():
            vars(model)[_SYNCHRONISED] = True
    if name == "module" and isinstance(parent, nn.parallel.DistributedDataParallel):
        models = [model for model in child.modules() if "gammaopt" in vars(model)]
        for model in models:
            follow_synchronised_norms(model, model._gammaopt_reference)  # type: ignore[arg-type]
            _share(model, parent.process_group)
        if models:
            parent.register_forward_pre_hook(_share_statistics)


@torch.no_grad()
def _share(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Give every rank of ``group`` the plan and θ₀ of its first."""
    plans = _gathered((model.gammaopt, "_gammaopt_planned" in vars(model)), group)
    first = plans[0][0]
    others = [plan for plan, _ in plans if plan != first]
    if others:
        if any(plan.gamma != first.gamma for plan in others) or any(planned for _, planned in plans):
            fix = "build the optimizer after DistributedDataParallel, or give depth= and knee= to wrap"
            raise _disagreement(model, first, others[0], fix)
        vars(model)["gammaopt"] = first
    vars(model)["_gammaopt_agreed"] = True
    reference: nn.Module | None = model._gammaopt_reference  # type: ignore[assignment]
    if reference is not None:
        source = dist.get_global_rank(group, 0)
        for tensor in _tensors(reference):
            dist.broadcast(tensor, source, group=group)


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def _share_statistics(parallel: nn.Module, args: object) -> None:
    """Give every rank the first one's buffers of θ₀, when and as DistributedDataParallel does with the model's own.

    Not inside ``ddp.join()``: ranks that have run out of batches mirror what torch itself sends there, not this. θ₀'s
    statistics are then each rank's own; torch leaves the mark of that context on the module, so share them again by a
    forward inside ``with ddp.join(enable=False)``, as for an evaluation on every rank.
    """
    if parallel._join_config.enable or not parallel.will_sync_module_buffers():  # type: ignore[operator, union-attr]
        return
    references = [vars(model).get("_gammaopt_reference") for model in parallel.modules()]
    buffers = [buffer for reference in references if reference is not None for buffer in reference.buffers()]
    group = parallel.process_group
    source = dist.get_global_rank(group, 0)  # type: ignore[arg-type]
    for alike in _alike(buffers):  # one message for each kind, not for each buffer
        flat = torch.cat([buffer.flatten() for buffer in alike])
        dist.broadcast(flat, source, group=group)  # type: ignore[arg-type]
        for buffer, value in zip(alike, flat.split([buffer.numel() for buffer in alike]), strict=True):
            buffer.copy_(value.view_as(buffer))


def _alike(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Tensors of one dtype on one device: those that can be sent as one."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return kinds.values()


def follow_synchronised_norms(model: nn.Module, reference: nn.Module | None) -> None:
    """Convert θ₀'s batch normalisations where ``convert_sync_batchnorm`` converted the model's since.

    h and h₀ must be normalised alike: one over all ranks' batches, the other over this rank's would leave f ≠ 0 at the
    start, by their difference over γ.

    Raises:
        UsageError: for a ``SyncBatchNorm`` where the wrapped net had no batch normalisation.
    """
    if reference is None or _SYNCHRONISED not in vars(model):
        return
    twins = dict(reference.named_modules())
    for name, module in model.named_modules():
        if not isinstance(module, nn.SyncBatchNorm) or isinstance(twins.get(name), nn.SyncBatchNorm):
            continue
        twin = twins.get(name)
        if not isinstance(twin, nn.modules.batchnorm._BatchNorm):
            was = "was not there" if twin is None else f"was a {type(twin).__name__}"
            raise UsageError(
                f"part {name!r} of {type(model).__name__}, a SyncBatchNorm, {was} when it was wrapped; "
                "call gammaopt.unwrap on the model and wrap it again"
            )
        owner, _, leaf = name.rpartition(".")
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(twin, module.process_group)
        reference.get_submodule(owner).add_module(leaf, converted)
    del vars(model)[_SYNCHRONISED]


def _disagreement(model: nn.Module, first: Plan, other: Plan, fix: str) -> UsageError:
    for name in ("gamma", "depth", "knee"):
        a, b = getattr(first, name), getattr(other, name)
        if a != b:
            fix = "give every rank the same gamma" if name == "gamma" else fix
            return UsageError(f"the ranks wrapped {type(model).__name__} with {name} = {a:.6g} and {b:.6g}; {fix}")
    return UsageError(f"the ranks wrapped {type(model).__name__} with different plans; wrap the same net on every rank")


def _gathered(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from (parameter.detach() for parameter in module.parameters())
    yield from module.buffers()


def follow_sharding(model: nn.Module, reference: nn.Module | None) -> None:
    """Shard θ₀ as ``fully_shard`` sharded the model since: same groups, meshes, placements and precision.

    No communication: each rank slices what it holds. A part that was sharded before is left alone.

    Raises:
        UsageError: if the model is sharded only as a part of a larger one, whose settings can't be seen from here.
    """
    if reference is None or not active():
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    # Innermost first, as fully_shard itself has to be called: an outer group takes what no inner one has.
    sharded = [module for module in reversed(list(model.modules())) if isinstance(module, FSDPModule)]
    if not sharded and getattr(model, "_is_fsdp_managed_module", False):
        raise UsageError(
            f"{type(model).__name__} was sharded as a part of a larger model, and its θ₀ can't follow; "
            "call fully_shard on the wrapped model itself first, then on the larger one"
        )
    twins = dict(zip(model.modules(), reference.modules(), strict=True)) if sharded else {}
    for module in sharded:
        if isinstance(twins[module], FSDPModule):
            continue
        state = fully_shard.state(module)  # type: ignore[attr-defined]
        placements, policies, mesh = {}, {}, None
        for group in state._fsdp_param_groups:
            mesh, policies = group.mesh_info.mesh, {"offload_policy": group.offload_policy}
            for item in group.fsdp_params:
                twin = getattr(twins[item._module_info.module], item._module_info.param_name)
                placements[twin] = item.fsdp_placement
        if mesh is None:  # all parameters are in inner groups
            mesh = _mesh(model)
        fully_shard(
            [twins[each] for each in state._modules] if len(state._modules) > 1 else twins[module],
            mesh=mesh,
            mp_policy=state._mp_policy,
            # Kept as slices between steps: no backward follows that would give the memory back.
            reshard_after_forward=True,
            shard_placement_fn=placements.get,
            ignored_params={parameter for parameter in twins[module].parameters() if parameter not in placements},
            **policies,
        )


def _mesh(model: nn.Module) -> Any:
    """The mesh of a model's first sharded group."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in fully_shard.state(module)._fsdp_param_groups:  # type: ignore[attr-defined]
                return group.mesh_info.mesh
    return None


def check_plans(model: nn.Module) -> None:
    """At the first forward of a model sharded by ``fully_shard``: all ranks hold the same plan.

    Raises:
        UsageError: on every rank, if they don't.
    """
    if "_gammaopt_agreed" in vars(model) or not active():
        return
    mesh = _mesh(model)
    if mesh is None:
        return
    for dimension in range(mesh.ndim):
        plans: list[Plan] = _gathered(model.gammaopt, mesh.get_group(dimension))
        others = [plan for plan in plans if plan != plans[0]]
        if others:
            fix = "give depth= and knee= to wrap, or the same net and example_inputs on every rank"
            raise _disagreement(model, plans[0], others[0], fix)
    vars(model)["_gammaopt_agreed"] = True
