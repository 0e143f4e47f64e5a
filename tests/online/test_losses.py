"""Losses and hits of one run and of a stack are one computation, and torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gammaopt._errors import UsageError
from gammaopt.online._losses import CRITERIA, check_output, hits, mean_loss

STACKED = torch.randn(3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CLASSES = torch.randint(5, (3, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("shared", [True, False])
def test_each_run_of_a_stack_has_torchs_loss_of_its_own_batch(loss: str, shared: bool) -> None:
    targets = CLASSES[0] if shared else CLASSES
    stacked, right = mean_loss(loss, STACKED, targets), hits(STACKED, targets)
    for k, output in enumerate(STACKED):
        own = targets if shared else targets[k]
        torchs = (
            F.cross_entropy(output, own) if loss == "cross_entropy" else F.mse_loss(output, F.one_hot(own, 5) * 1.0)
        )
        for found in (stacked[k], mean_loss(loss, output, own), CRITERIA[loss](output, own)):
            torch.testing.assert_close(found, torchs, rtol=1e-14, atol=0)
        assert torch.equal(right[k], hits(output, own))
        assert right[k].tolist() == [int(row.argmax()) == int(target) for row, target in zip(output, own, strict=True)]


@pytest.mark.parametrize("shared", [True, False])
def test_one_number_for_each_sample(shared: bool) -> None:
    output = STACKED[..., :1]
    values = STACKED[0, :, 1] if shared else STACKED[..., 1]
    stacked = mean_loss("mse", output, values)
    for k in range(3):
        own = values if shared else values[k]
        torch.testing.assert_close(stacked[k], F.mse_loss(output[k, :, 0], own), rtol=1e-14, atol=0)
        torch.testing.assert_close(stacked[k], mean_loss("mse", output[k], own), rtol=0, atol=0)
    assert not hits(output, values).any()


def test_a_criterion_is_the_mean_over_outputs_of_any_shape() -> None:
    output, wanted = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(CRITERIA["mse"](output, wanted), (output - wanted).square().mean())
    assert CRITERIA["cross_entropy"](output, torch.ones(2, 4, 4, dtype=torch.long)).shape == ()


@pytest.mark.parametrize(
    ("loss", "classes", "shape", "message"),
    [
        ("cross_entropy", 10, (8, 9), r"shape \(8, 9\), and the stream's targets are 10 classes; .* with 10 outputs$"),
        ("mse", 10, (8,), r"shape \(8,\), and .* with 10 outputs$"),
        ("mse", 0, (8, 3), r"shape \(8, 3\), and the stream's targets are one number .* with 1 output$"),
        ("cross_entropy", 0, (8, 1), "needs classes, and the stream's targets are numbers; give loss='mse'"),
    ],
)
def test_outputs_that_do_not_fit(loss: str, classes: int, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_output(loss, classes, torch.zeros(shape))
