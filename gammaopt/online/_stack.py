"""K runs in training as one batched network: their parameters (K, …), one step for all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gammaopt._errors import UsageError
from gammaopt._plan import Plan, Scale
from gammaopt._wrap import unwrap
from gammaopt.online._device import seeded
from gammaopt.online._losses import check_output, hits, mean_loss
from gammaopt.online._obstacles import obstacle
from gammaopt.online.streams import Batches
from gammaopt.online.train import (
    FAMILIES,
    HELD_OUT_SLICE,
    Recipe,
    Run,
    fresh_model,
    held_out_samples,
    mixes_samples,
)

ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
ADAMW_DECAY = 1e-2


class CannotStackError(UsageError):
    """The network can't be run for several runs at once; one at a time it can."""


@dataclass
class Seed:
    """What runs of a seed share: the network at initialisation, its plan, the batches, and h₀ on them."""

    recipe: Recipe
    net: nn.Module
    plan: Plan
    batches: Batches
    initial: dict[str, Tensor]
    _frozen: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    _held_out: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def frozen_output(self, step: int) -> Tensor:
        """h(x; θ₀) on the batch of ``step``, (size, outputs); computed for a chunk of steps at a time."""
        chunk, offset = divmod(step, Batches.CHUNK)
        if chunk not in self._frozen:
            if not self.batches.keeps_all:
                self._frozen.clear()
            steps = range(chunk * Batches.CHUNK, min((chunk + 1) * Batches.CHUNK, self.batches.steps))
            inputs = torch.stack([self.batches[i][0] for i in steps]).to(self.recipe.dtype)
            if mixes_samples(self.net):  # h₀ of a batch is that of no other batch beside it
                self._frozen[chunk] = torch.stack([self._h0(batch) for batch in inputs])
            else:
                output = self._h0(inputs.flatten(0, 1))
                self._frozen[chunk] = output.view(*inputs.shape[:2], *output.shape[1:])
        return self._frozen[chunk][offset]

    @torch.no_grad()
    def held_out(self) -> tuple[Tensor, Tensor, Tensor]:
        """Held-out inputs, targets and h₀ in evaluation mode."""
        if self._held_out is None:
            inputs, targets = held_out_samples(self.recipe, self.batches.seed)
            with evaluating(self.net):
                self._held_out = inputs, targets, torch.cat([self._h0(part) for part in inputs.split(HELD_OUT_SLICE)])
        return self._held_out

    def _h0(self, inputs: Tensor) -> Tensor:
        return cast("Tensor", functional_call(self.net, self.initial, (inputs,)))


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """The network in evaluation mode; each of its modules is given back in the mode it was in."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Seeds:
    """Seed → what its runs share, made when first asked for."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._made: dict[int, Seed] = {}
        self._batches: dict[int, Batches] = {}

    def batches(self, seed: int) -> Batches:
        """The training batches of a seed; no more is made for them."""
        if seed not in self._batches:
            recipe = self.recipe
            self._batches[seed] = Batches(recipe.stream, seed, recipe.steps, recipe.batch_size, recipe.device)
        return self._batches[seed]

    def __getitem__(self, seed: int) -> Seed:
        if seed not in self._made:
            recipe, batches = self.recipe, self.batches(seed)
            with seeded(recipe.device, seed):
                model = fresh_model(recipe, 1.0, batches[0][0], center="none")
            plan = cast("Plan", model.gammaopt)
            net = unwrap(model)
            _check_module(net)
            initial = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
            self._made[seed] = Seed(recipe, net, plan, batches, initial)
        return self._made[seed]

    def forget(self, *, but: int) -> None:
        """Drop what was made, but for the last ``but`` seeds: each may hold its whole pass."""
        for made in (self._made, self._batches):
            for seed in list(made)[: max(0, len(made) - but)]:
                del made[seed]

    def scales(self, run: Run) -> Mapping[str, Scale]:
        plan = dataclasses.replace(self[run.seed].plan, gamma=run.gamma)
        return plan.scales(FAMILIES[self.recipe.optimizer])


def _check_module(net: nn.Module) -> None:
    """Modules whose behaviour in a stack would differ from their own."""
    for name, module in net.named_modules():
        where = f"{name or 'the network'} ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise CannotStackError(
                f"{where} accumulates running statistics, which a stack of runs can't; "
                "set track_running_stats=False, use GroupNorm or LayerNorm, or give one_at_a_time=True"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise CannotStackError(
                f"{where} draws at random, so a run would depend on its neighbours; set p=0, or give one_at_a_time=True"
            )


class Stack:
    """K runs in training: their parameters and optimizer states, (K, …) each, and their rates.

    ``alone`` passes a stack's only run through the network itself, for networks that are no faster in stacks. Without
    it a run has the same numbers to the last bit in a stack of any size, of one too: the batched kernels sum in
    another order than the plain ones on some processors, and a run may lose its neighbours half-way.
    """

    def __init__(self, seeds: Seeds, runs: list[Run], *, alone: bool = False) -> None:
        self.seeds, self.runs, self.recipe, self._alone = seeds, runs, seeds.recipe, alone
        first = seeds[runs[0].seed]
        trainable = [name for name, parameter in first.net.named_parameters() if parameter.requires_grad]
        self.parameters = {name: torch.stack([seeds[run.seed].initial[name] for run in runs]) for name in trainable}
        fixed = {name: t for name, t in first.initial.items() if name not in self.parameters}
        _check_fixed(seeds, runs, fixed)
        self._fixed = {**fixed, **dict(first.net.named_buffers())}
        momentum, adam = bool(self.recipe.momentum), self.recipe.optimizer != "sgd"
        self.states = [
            {name: torch.zeros_like(stacked) for name, stacked in self.parameters.items()}
            for _ in range(2 if adam else int(momentum))
        ]
        self.step = 0
        self._prepare()

    def _prepare(self) -> None:
        """What follows from the runs that are in the stack now."""
        recipe, runs = self.recipe, self.runs
        self.net = self.seeds[runs[0].seed].net
        self._gammas = self._column([run.gamma for run in runs])
        self._lrs = self._column([run.lr for run in runs])
        scales = [self.seeds.scales(run) for run in runs]
        self._rates = {
            name: self._column([run.lr * scale[name].lr for run, scale in zip(runs, scales, strict=True)])
            for name in self.parameters
        }
        self._eps = {name: self._column([ADAM_EPS * scale[name].eps for scale in scales]) for name in self.parameters}
        self._distinct = sorted({run.seed for run in runs})
        index = [self._distinct.index(run.seed) for run in runs]
        self._index = torch.tensor(index, device=recipe.device)
        self._leaves: list[Tensor]
        if self._alone:  # on the same memory
            own = dict(self.net.named_parameters())
            for name, stacked in self.parameters.items():
                own[name].data = stacked[0]
            self._leaves = [own[name] for name in self.parameters]
        else:
            self._leaves = [stacked.requires_grad_() for stacked in self.parameters.values()]

    def _column(self, numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=self.recipe.dtype, device=self.recipe.device)

    @torch.no_grad()
    def keep(self, positions: list[int]) -> None:
        """Drop all runs but these."""
        chosen = torch.tensor(positions, dtype=torch.long, device=self.recipe.device)
        self.runs = [self.runs[i] for i in positions]
        self.parameters = {name: stacked[chosen] for name, stacked in self.parameters.items()}
        self.states = [{name: stacked[chosen] for name, stacked in state.items()} for state in self.states]
        if self.runs:
            self._prepare()

    def load(self, step: int, parameters: dict[str, Tensor], states: list[dict[str, Tensor]]) -> None:
        """Take the state of the same runs after ``step`` steps."""
        self.step, self.parameters, self.states = step, parameters, states
        if self.runs:
            self._prepare()

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and h₀ of this step: (size, …) if all runs share a seed, else (K, size, …)."""
        seeds, step, dtype = (self.seeds[seed] for seed in self._distinct), self.step, self.recipe.dtype
        inputs, targets, frozen = self._gather([(*seed.batches[step], seed.frozen_output(step)) for seed in seeds])
        return inputs.to(dtype), targets, frozen

    def _gather(self, parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """The distinct seeds' tensors as the runs see them."""
        if len(parts) == 1:
            inputs, targets, frozen = parts[0]
        else:
            inputs, targets, frozen = (torch.stack(part)[self._index] for part in zip(*parts, strict=True))
        return inputs, targets, frozen

    def outputs(self, inputs: Tensor) -> Tensor:
        """h of each run, (K, size, outputs), from inputs (size, …) shared by all, or (K, size, …)."""
        if self._alone:
            output: Tensor = self.net(inputs)
            return output[None]
        return self._batched(self.parameters, inputs, shared=self.shared)

    def _batched(self, parameters: dict[str, Tensor], inputs: Tensor, *, shared: bool) -> Tensor:
        def forward(own: dict[str, Tensor], x: Tensor) -> Tensor:
            return cast("Tensor", functional_call(self.net, {**self._fixed, **own}, (x,)))

        return vmap(forward, in_dims=(0, None if shared else 0))(parameters, inputs)

    @torch.no_grad()
    def try_forward(self) -> bool:
        """Pass a batch as a stack does, of one run too; returns whether its samples leave each other alone.

        h₀ of many batches is computed at once, so it must not depend on what else is passed.
        """
        seed = self.seeds[self.runs[0].seed]
        inputs = self.batch()[0]
        inputs = inputs.expand(len(self.runs), *inputs.shape) if self.shared else inputs
        outputs = self._batched(self.parameters, inputs, shared=False)[:1]
        check_output(self.recipe.loss, self.recipe.stream.classes, outputs[0])
        if mixes_samples(self.net):  # known to, and h₀ is that of each batch by itself
            return True
        other = seed.batches[1][0] if seed.batches.steps > 1 else seed.batches[0][0][:1]
        among = torch.cat([inputs[0], other.to(inputs.dtype)])[None]
        again = self._batched({name: t[:1] for name, t in self.parameters.items()}, among, shared=False)
        difference = (again[:, : outputs.shape[1]] - outputs).abs().max()
        # Far above what a sum in another order makes, far below what a mean over other samples does.
        return not bool(difference > torch.finfo(outputs.dtype).eps ** (1 / 3) * outputs.abs().max())

    @property
    def shared(self) -> bool:
        """Whether all runs see the same batch."""
        return len(self._distinct) == 1

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One step of all runs; their losses and shares of right answers before it, (K,)."""
        inputs, targets, frozen = self.batch()
        self.step += 1
        return self.advance(inputs, targets, None if self.step == 1 else frozen, self.corrections())

    def corrections(self) -> tuple[float, float]:
        """What Adam's two averages are divided by at this step: 1 − β₁^t, and √(1 − β₂^t) for the root."""
        beta1, beta2 = ADAM_BETAS
        return 1 - beta1**self.step, math.sqrt(1 - beta2**self.step)

    def advance(
        self, inputs: Tensor, targets: Tensor, frozen: Tensor | None, corrections: Sequence[float] | Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The step itself, all on the device: ``frozen`` is h₀, ``None`` at θ₀."""
        with torch.enable_grad():
            output = self.outputs(inputs)
            # At θ₀ the difference is 0 to the last bit, which a sum in another order need not be.
            output = (output - (output.detach() if frozen is None else frozen)) / self._gammas.view(-1, 1, 1)
            losses = mean_loss(self.recipe.loss, output, targets)
            gradients = torch.autograd.grad(losses.sum(), self._leaves)
        with torch.no_grad():
            shares = hits(output, targets).to(losses.dtype).mean(-1)
            for (name, stacked), gradient in zip(self.parameters.items(), gradients, strict=True):
                self._update(name, stacked, gradient.view_as(stacked), corrections)
        return losses.detach(), shares

    def _update(
        self, name: str, stacked: Tensor, gradient: Tensor, corrections: Sequence[float] | Sequence[Tensor]
    ) -> None:
        shape = (-1, *[1] * (stacked.dim() - 1))
        rate = self._rates[name].view(shape)
        if self.recipe.optimizer == "sgd":
            if self.recipe.momentum:
                gradient = self.states[0][name].mul_(self.recipe.momentum).add_(gradient)
            stacked.addcmul_(gradient, rate, value=-1)
            return
        beta1, beta2 = ADAM_BETAS
        if self.recipe.optimizer == "adamw":
            stacked.mul_(1 - self._lrs.view(shape) * ADAMW_DECAY)
        first = self.states[0][name].lerp_(gradient, 1 - beta1)
        second = self.states[1][name].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (second.sqrt() / corrections[1]).add_(self._eps[name].view(shape))
        stacked.sub_((first * (rate / corrections[0])).div_(root))

    @torch.no_grad()
    def scores(self) -> list[tuple[float, float]]:
        """Held-out accuracy and loss of each run; the network is put in evaluation mode for it."""
        samples = [self.seeds[seed].held_out() for seed in self._distinct]
        accuracy, loss = torch.zeros_like(self._gammas), torch.zeros_like(self._gammas)
        count = len(samples[0][1])
        with evaluating(self.net):
            for start in range(0, count, HELD_OUT_SLICE):
                parts = [[tensor[start : start + HELD_OUT_SLICE] for tensor in sample] for sample in samples]
                inputs, targets, frozen = self._gather(parts)
                output = (self.outputs(inputs) - frozen) / self._gammas.view(-1, 1, 1)
                share = targets.shape[-1] / count
                accuracy += share * hits(output, targets).to(accuracy.dtype).mean(-1)
                loss += share * mean_loss(self.recipe.loss, output, targets)
        return list(zip(accuracy.tolist(), loss.tolist(), strict=True))


def _check_fixed(seeds: Seeds, runs: list[Run], fixed: dict[str, Tensor]) -> None:
    """A stack has one copy of what isn't trained, so all its seeds must agree on it."""
    buffers = dict(seeds[runs[0].seed].net.named_buffers())
    for seed in {run.seed for run in runs[1:]}:
        made = seeds[seed]
        theirs = dict(made.net.named_buffers())
        for name, tensor in {**fixed, **buffers}.items():
            if not torch.equal(theirs[name] if name in buffers else made.initial[name], tensor):
                what = f"buffer {name!r} is" if name in buffers else f"parameter {name!r} is frozen but"
                raise CannotStackError(
                    f"{what} drawn anew for each seed, which a stack of several seeds can't hold; "
                    "make it the same for all seeds, or give one_at_a_time=True"
                )


def check_forward(stack: Stack) -> None:
    """Before the first step: name the module that a stack can't run, instead of a message from deep inside."""
    inside: list[tuple[str, nn.Module]] = []
    handles = []
    for name, module in stack.net.named_modules():
        where = f"{name or 'the network'} ({type(module).__name__})"
        handles.append(module.register_forward_pre_hook(lambda owner, _, where=where: inside.append((where, owner))))
        handles.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    stack.batch()
    try:
        apart = stack.try_forward()
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, (torch.OutOfMemoryError, UsageError)):
            raise
        where, owner = inside[-1] if inside else ("the network", stack.net)
        raise CannotStackError(f"{where} {obstacle(error, owner)}, or give one_at_a_time=True") from error
    finally:
        for handle in handles:
            handle.remove()
    if not apart:
        raise CannotStackError(
            "the network's output for a sample depends on the other samples passed with it, so h₀ can't be computed "
            "for many batches at once; give one_at_a_time=True"
        )
