"""The readout: the last layer to run of those that h depends on.

Another output of the same network may have a layer of its own that runs later, so it is autograd that tells: while the
network runs, each layer's output has a zero added to it, and the readout is the last layer whose zero stands in the
graph of h. A frozen layer is found like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gammaopt._errors import UsageError
from gammaopt._probe import Inputs, Output, measurable, probe, probing
from gammaopt._roles import layers_in_order


def find_readout(net: nn.Module, inputs: Inputs | None, output: Output | None) -> str | None:
    """Qualified name of the readout, or without inputs of the layer that is registered last; ``None`` without layers.

    Where h has no graph (it was computed without gradients), the layer that ran last.
    """
    layers = dict(layers_in_order(net))
    registered = list(layers)
    if inputs is None:
        return registered[-1] if registered else None
    for name, module in net.named_modules():
        if isinstance(module, nn.MultiheadAttention):  # it applies its out_proj without calling it
            layers[f"{name}.out_proj".lstrip(".")] = module
    ran: list[str] = []
    zeros: dict[int, tuple[int, Tensor]] = {}  # by id: where its layer stands in the order, and the zero itself

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: object, returned: Any) -> Any:
            ran.append(name)
            h, *rest = returned if isinstance(returned, tuple) else (returned,)
            if not isinstance(h, Tensor) or h.is_nested or not torch.is_grad_enabled():
                return None
            zero = torch.zeros((), dtype=h.dtype, device=h.device, requires_grad=True)
            zeros[id(zero)] = len(ran) - 1, zero
            return (h + zero, *rest) if isinstance(returned, tuple) else h + zero

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    try:
        with torch.enable_grad(), probing(net):
            h = probe(net, inputs, output)
    finally:
        for handle in handles:
            handle.remove()
    inside = [zeros[leaf][0] for leaf in _leaves(h) if leaf in zeros]
    if inside:
        return ran[max(inside)]
    return ran[-1] if ran else registered[-1] if registered else None


def _leaves(h: Tensor) -> list[int]:
    """The leaves of the graph of ``h``, by id. The graph is walked, not run: checkpointed parts are not run again."""
    seen, waiting, found = set(), [h.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.append(id(leaf))
        waiting += [parent for parent, _ in node.next_functions]
    return found


def zero_readout(net: nn.Module, readout: str | None, inputs: Inputs, output: Output | None) -> None:
    """Set the readout of ``net`` to 0, so that h₀ = 0.

    Raises:
        UsageError: if h is not 0 with it, or the readout could not be trained away from 0 alone.
    """
    if readout is None:
        raise UsageError(f"{type(net).__name__} has no Linear or Conv readout to set to 0; use center='copy'")
    layer = net.get_submodule(readout)
    if not any(parameter.requires_grad for parameter in layer.parameters()):
        raise UsageError(f"readout {readout!r} is frozen and would stay at 0; use center='copy'")
    own = list(layer.parameters())
    for part, module in net.named_modules():
        if any(module is each for each in layer.modules()):
            continue
        if any(parameter is each for parameter in module.parameters(recurse=False) for each in own):
            raise UsageError(f"readout {readout!r} is tied to {part!r}, which would be 0 with it; use center='copy'")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        with probing(net):
            largest = float(measurable(net, probe(net, inputs, output)).abs().max())
    if not largest == 0:  # a weight-normalised readout divides 0 by 0
        raise UsageError(
            f"with its readout {readout!r} at 0 the output of {type(net).__name__} is still {largest:.3g}; "
            "use center='copy'"
        )
