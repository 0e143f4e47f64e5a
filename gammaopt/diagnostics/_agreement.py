r"""Agreement: do two networks, of two γ or two seeds, compute the same function?

    distance = ‖f_a − f_b‖ / √(‖f_a‖ ‖f_b‖)      cosine = ⟨f_a, f_b⟩ / (‖f_a‖ ‖f_b‖)      labels: share of equal argmax

all over the samples of a stream, in one pass, batch by batch. Rich networks of different seeds agree more than lazy
ones of the same width, whose kernel is random. Sources: Atanasov et al., ICLR 2025 (arXiv 2410.04642), on agreement of
networks across γ; Vyas et al., "Feature-learning networks are consistent across widths", NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gammaopt._errors import UsageError
from gammaopt._probe import Inputs, Output, describe
from gammaopt.diagnostics._function import DOUBLE, Function, same_draws_after, undisturbed

Pairs = Iterable[Any]


@dataclass(frozen=True)
class Agreement:
    """How two functions compare on ``samples`` samples.

    Attributes:
        distance: ‖f_a − f_b‖ relative to the geometric mean of their norms; 0 for equal functions, √2 for orthogonal
            ones of the same size. ``inf`` if only one of them is 0.
        cosine: of the two as vectors over samples and outputs; 0 if one of them is 0.
        labels: share of samples on which the largest output is the same, or for one output its sign. Classes are in
            dimension 1, as for cross-entropy; outputs (n, C, …) have an answer at each place.
    """

    distance: float
    cosine: float
    labels: float
    samples: int


def agreement(
    model_a: nn.Module,
    model_b: nn.Module,
    stream: Inputs | Pairs,
    *,
    output: Output | None = None,
    dtype: torch.dtype = DOUBLE,
) -> Agreement:
    """Compare two models as functions on a stream. Both are left as they were.

    Args:
        model_a, model_b: plain or wrapped; a wrapped one enters as f. Their sizes may differ, their outputs not.
        stream: a tensor or dict of inputs; one (inputs, targets) tuple; or an iterable of batches, (inputs, targets) or
            inputs alone. A tuple of two is one batch with its targets, as for other diagnostics: give two batches as a
            list.
        output: which part of what plain models return is their output; see :func:`gammaopt.wrap`.
        dtype: to compute in.

    Raises:
        UsageError: for a stream without samples, outputs of different shapes, or a model that normalises with the
            statistics of its batch.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 3)
        >>> same = agreement(net, net, torch.eye(2))
        >>> same.distance, round(same.cosine, 12), same.labels, same.samples
        (0.0, 1.0, 1.0, 2)
    """
    (found,) = agreements([model_a, model_b], stream, output=output, dtype=dtype).values()
    return found


def agreements(
    models: Sequence[nn.Module] | Mapping[Any, nn.Module],
    stream: Inputs | Pairs,
    *,
    output: Output | None = None,
    dtype: torch.dtype = DOUBLE,
) -> dict[tuple[Any, Any], Agreement]:
    """:func:`agreement` of every pair of several models, in one pass: (key, key) → agreement, each pair once.

    Args:
        models: a list, whose keys are positions, or a mapping, for example γ → model.
        stream, output, dtype: see :func:`agreement`.

    Example:
        >>> import torch
        >>> nets = {gamma: torch.nn.Linear(2, 3) for gamma in (0.1, 1.0, 10.0)}
        >>> list(agreements(nets, torch.eye(2)))
        [(0.1, 1.0), (0.1, 10.0), (1.0, 10.0)]
    """
    named = dict(models) if isinstance(models, Mapping) else dict(enumerate(models))
    if len(named) < 2:
        raise UsageError(f"{len(named)} models can't agree; give at least two")
    functions = [Function(model, output, dtype) for model in named.values()]
    for function in functions:
        function.refuse_batch_statistics("agreement")
    count = len(functions)
    inner = torch.zeros(count, count, dtype=torch.float64)
    apart = torch.zeros(count, count, dtype=torch.float64)
    same = torch.zeros(count, count, dtype=torch.float64)
    samples = 0
    with same_draws_after(stream):
        for inputs in _inputs(stream):
            values = []
            for function in functions:
                with undisturbed(function.device), torch.no_grad():
                    values.append(function(inputs).cpu())
            shapes = {tuple(value.shape) for value in values}
            if len(shapes) > 1:
                raise UsageError(
                    f"the models' outputs have shapes {' and '.join(map(str, sorted(shapes)))}; give models of one task"
                )
            samples += len(values[0])
            rows = torch.stack(values).flatten(1).double()
            answers = torch.stack([_answers(value) for value in values])
            inner += rows @ rows.T
            for i in range(count):
                apart[i] += (rows - rows[i]).square().sum(1)
                same[i] += (answers == answers[i]).flatten(1).double().mean(1) * len(values[0])
    if not samples:
        raise UsageError("the stream has no batch; give at least one")
    keys, norms = list(named), inner.diagonal().sqrt()
    found = {}
    for i in range(count):
        for j in range(i + 1, count):
            scale = float(norms[i] * norms[j])
            distance = float(apart[i, j]) ** 0.5
            found[keys[i], keys[j]] = Agreement(
                distance=distance / scale**0.5 if scale else (0.0 if distance == 0 else float("inf")),
                cosine=max(-1.0, min(1.0, float(inner[i, j]) / scale)) if scale else 0.0,
                labels=float(same[i, j]) / samples,
                samples=samples,
            )
    return found


def _answers(output: Tensor) -> Tensor:
    """The class of each sample, or its sign, (n, …)."""
    if output.dim() == 1:
        return output > 0
    return (output > 0).squeeze(1) if output.shape[1] == 1 else output.argmax(1)


def _inputs(stream: Any) -> Iterable[Any]:
    """The inputs of each batch."""
    if isinstance(stream, (Tensor, Mapping)):
        return [stream]
    if not isinstance(stream, Iterable):
        raise UsageError(f"the stream is a {describe(stream)}; give inputs, or an iterable of batches")
    if isinstance(stream, tuple) and len(stream) == 2:
        return [stream[0]]
    return (batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch for batch in stream)
