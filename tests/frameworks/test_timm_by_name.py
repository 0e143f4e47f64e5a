"""timm: optimizers by name, its groups with ``lr_scale``, its schedulers that write rates, its EMA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gammaopt
from gammaopt import wrap

WHY = "needs the extra 'vision'"
optim: Any = pytest.importorskip("timm.optim", reason=WHY)
scheduling: Any = pytest.importorskip("timm.scheduler", reason=WHY)
utils: Any = pytest.importorskip("timm.utils", reason=WHY)

import gammaopt.integrations.timm  # noqa: E402

CLASSES: dict[str, Any] = {"gammasgd": gammaopt.SGD, "gammaadam": gammaopt.Adam, "gammaadamw": gammaopt.AdamW}
ORIGINALS = {"gammasgd": "sgd", "gammaadam": "adam", "gammaadamw": "adamw"}


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.randint(5, (4,), generator=generator)


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "vit":
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(img_size=32, patch_size=8, num_classes=5, embed_dim=16, depth=2, num_heads=2)
    from timm.models.resnet import BasicBlock, ResNet

    block: Any = BasicBlock
    return ResNet(block, (1, 1, 1, 1), num_classes=5, channels=(4, 8, 8, 8))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    x, y = images()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("opt", CLASSES)
def test_optimizer_by_name_trains_from_zero_output(name: str, opt: str) -> None:
    x, _ = images()
    model = wrap(net(name), 2.0, example_inputs=x, loss="cross_entropy")
    assert not model(x).any()
    optimizer: Any = optim.create_optimizer_v2(model, opt=opt, lr=0.01, weight_decay=0.05)
    assert type(optimizer) is CLASSES[opt]
    names = {parameter: name for name, parameter in model.named_parameters()}
    plan: Any = model.gammaopt
    multipliers = plan.multipliers("sgd" if opt == "gammasgd" else "adam")
    expected = {names[p]: g["lr"] * multipliers[names[p]] for g in optimizer.param_groups for p in g["params"]}
    assert optimizer.effective_lrs() == pytest.approx(expected)
    losses = train(model, optimizer)
    assert losses[0] == pytest.approx(torch.tensor(5.0).log().item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("opt", CLASSES)
def test_at_gamma_one_it_is_timms_own_optimizer(opt: str) -> None:
    ends = []
    for choice in (opt, ORIGINALS[opt]):
        model = wrap(net("vit"), 1.0, depth=3)
        train(model, optim.create_optimizer_v2(model, opt=choice, lr=0.01, weight_decay=0.05))
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


WARMUP: dict[str, Any] = {"warmup_t": 2, "warmup_lr_init": 1e-5}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "CosineLRScheduler": {"t_initial": 10, "lr_min": 1e-4},
    "StepLRScheduler": {"decay_t": 2, "decay_rate": 0.5},
    "MultiStepLRScheduler": {"decay_t": [3, 4], "decay_rate": 0.5},
    "PolyLRScheduler": {"t_initial": 10, "power": 1.5, "lr_min": 1e-4},
    "TanhLRScheduler": {"t_initial": 10, "lr_min": 1e-4},
    "WSDLRScheduler": {"t_initial": 5, "decay_t": 2},  # absent from older timms
    "PlateauLRScheduler": {"decay_rate": 0.5, "patience_t": 0, "lr_min": 1e-4},
}


def test_the_table_has_every_scheduler_of_timm() -> None:
    classes = {name for name in vars(scheduling) if name.endswith("LRScheduler")}
    assert classes | {"WSDLRScheduler"} == set(SCHEDULERS)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
@pytest.mark.parametrize("which", [name for name in SCHEDULERS if hasattr(scheduling, name)])
def test_layer_decay_groups_keep_their_scale_under_a_scheduler(which: str) -> None:
    model = wrap(net("vit"), 5.0, depth=3)
    optimizer: Any = optim.create_optimizer_v2(model, opt="gammaadamw", lr=0.01, layer_decay=0.5)
    plan: Any = model.gammaopt
    multipliers = plan.multipliers("adam")
    names = {parameter: name for name, parameter in model.named_parameters()}
    scheduler = getattr(scheduling, which)(optimizer, **SCHEDULERS[which], **WARMUP)
    seen = set()
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 2
    for step in range(5):
        train(model, optimizer, steps=1)
        scheduler.step(step, metric=1.0)  # which never gets better
        rate = max(group["lr"] for group in optimizer.param_groups)
        expected = {
            names[p]: rate * group["lr_scale"] * multipliers[names[p]]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert optimizer.effective_lrs() == pytest.approx(expected)
        seen.add(rate)
    assert len(seen) > 2  # warmed up, and then let down


def test_moving_average_computes_the_function_of_the_averaged_parameters() -> None:
    x, _ = images()
    model = wrap(net("resnet"), 2.0, depth=3)
    average = utils.ModelEmaV3(model, decay=0.5)
    optimizer = optim.create_optimizer_v2(model, opt="gammasgd", lr=0.01)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, optimizer, steps=1)
    average.update(model)
    for mean, first, now in zip(average.module.parameters(), start, model.parameters(), strict=True):
        torch.testing.assert_close(mean, (first + now) / 2)
    references: list[Any] = [average.module.gammaopt_theta0, model.gammaopt_theta0]
    for mean, frozen in zip(*(reference.parameters() for reference in references), strict=True):
        assert torch.equal(mean, frozen)
    assert average(x).abs().max() > 0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
def test_muon_by_name_is_for_matrices() -> None:
    model = wrap(net("vit"), 5.0, depth=3)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    optimizer: Any = optim.create_optimizer_v2(matrices, opt="gammamuon", lr=0.01)
    assert type(optimizer) is gammaopt.Muon
    plan: Any = model.gammaopt
    multipliers = plan.multipliers("muon")
    assert optimizer.effective_lrs() == {
        name: pytest.approx(0.01 * multipliers[name]) for name, p in model.named_parameters() if p.dim() == 2
    }
    with pytest.raises(ValueError, match="2D parameters"):
        optim.create_optimizer_v2(model, opt="gammamuon", lr=0.01)
