"""Per-parameter multipliers beside a torch optimizer's groups, without touching the groups.

``param_groups`` and ``state_dict()`` stay exactly torch's (same groups, order and keys), so torch checkpoints load
both ways and schedulers that write absolute rates stay right. The multipliers stand in a list parallel to each
group's ``params``: by position, because deepcopy, pickling and sharding replace the tensors but keep their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from gammaopt import _registry
from gammaopt._errors import UsageError
from gammaopt._laws import EtaLaw, Loss, OptimizerFamily


class Multipliers(Optimizer):
    """Mixin for a torch optimizer: finds each parameter's multiplier when a group is added, and keeps it.

    A subclass sets ``_law`` (or ``None``) before ``super().__init__``.
    """

    _family: ClassVar[OptimizerFamily]
    _law: tuple[EtaLaw, float] | None
    _multipliers: list[list[float]]
    _names: list[list[str]]

    def _set_law(self, gamma: float | None, depth: float | None, loss: Loss, knee: float) -> None:
        """Keep the law for parameters of no wrapped model, from the optimizer's own ``gamma=`` and ``depth=``."""
        self._multipliers, self._names = [], []
        self._law = None
        if gamma is None and depth is None:
            return
        if gamma is None or depth is None:
            given, missing = ("gamma", "depth") if depth is None else ("depth", "gamma")
            raise UsageError(f"{given}= was given without {missing}=; give both, or neither after gammaopt.wrap")
        law = EtaLaw(depth, self._family, loss, knee)
        law.factor(gamma)  # a bad gamma is reported here, before torch sees the parameters
        self._law = law, gamma

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            multipliers, names = self._resolve(self.param_groups[-1]["params"])
        except BaseException:
            self.param_groups.pop()
            raise
        self._multipliers.append(multipliers)
        self._names.append(names)

    def _resolve(self, parameters: list[Tensor]) -> tuple[list[float], list[str]]:
        owners = _registry.owners(parameters)
        start = sum(map(len, self._multipliers))
        if self._law is not None:
            for owner in owners:
                if owner is not None:
                    raise UsageError(
                        f"parameter {owner.name!r} belongs to a model wrapped with γ = {owner.plan.gamma:g}, "
                        f"but gamma={self._law[1]:g} was given too; drop gamma= and depth= here"
                    )
            law, gamma = self._law
            names = [f"parameter {start + index}" for index in range(len(parameters))]
            return [law.factor(gamma)] * len(parameters), names
        cache: dict[int, dict[str, float]] = {}
        multipliers, names = [], []
        for index, (parameter, owner) in enumerate(zip(parameters, owners, strict=True)):
            if owner is None:
                raise UsageError(
                    f"parameter {start + index} {tuple(parameter.shape)} belongs to no wrapped model; "
                    "call gammaopt.wrap(net, gamma=…) first, or give gamma= and depth= to the optimizer"
                )
            table = cache.setdefault(id(owner.plan), {}) or owner.plan.multipliers(self._family)
            cache[id(owner.plan)] = table
            multipliers.append(table[owner.name])
            names.append(owner.name)
        return multipliers, names

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_multipliers": self._multipliers, "_names": self._names, "_law": self._law}
        return {**super().__getstate__(), **kept}

    def effective_lrs(self) -> dict[str, float]:
        """Parameter name → the rate it is stepped with now: the group's ``lr`` times its multiplier."""
        groups = zip(self.param_groups, self._names, self._multipliers, strict=True)
        return {
            name: float(group["lr"]) * multiplier
            for group, names, multipliers in groups
            for name, multiplier in zip(names, multipliers, strict=True)
        }

    def _with_gradients(self, group_index: int) -> Iterator[tuple[int, float]]:
        """(position among the group's parameters that have a gradient, multiplier), in the group's order."""
        pairs = zip(self.param_groups[group_index]["params"], self._multipliers[group_index], strict=True)
        return enumerate(multiplier for parameter, multiplier in pairs if parameter.grad is not None)

    def _buckets(self, group_index: int) -> dict[float, list[int]]:
        """Multiplier → positions of the parameters that share it: one call of torch's kernel for each."""
        buckets: dict[float, list[int]] = {}
        for position, multiplier in self._with_gradients(group_index):
            buckets.setdefault(multiplier, []).append(position)
        return buckets
