"""Kernels against ``vmap(jacrev)`` in float64, whatever the layers; alignment against its formula."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import gammaopt
from gammaopt import UsageError
from gammaopt.diagnostics import _kernels as module
from gammaopt.diagnostics import (
    _layers,
    centred_kernel_alignment,
    feature_kernel,
    kernel_target_alignment,
    ntk,
    ntk_eigenvalues,
)
from gammaopt.online import CNN, MLP


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def reference(net: nn.Module, x: Tensor) -> Tensor:
    """The full kernel from the whole Jacobian of each sample, (n, n, C, C), in float64."""
    twin = copy.deepcopy(net).double().eval()
    named = {name: parameter.detach() for name, parameter in twin.named_parameters() if parameter.requires_grad}
    x = x.double() if x.is_floating_point() else x
    one = lambda p, sample: functional_call(twin, p, (sample[None],))[0].flatten()
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", "There is a performance drop")
        jacobian = vmap(jacrev(one), (None, 0))(named, x)
    rows = torch.cat([part.flatten(2) for part in jacobian.values()], dim=2)
    return torch.einsum("icp,jdp->ijcd", rows, rows)


class Tokens(nn.Module):
    """A layer on (batch, time, ·), with as many positions as samples; in place; norms; plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(draw(6))
        self.inner, self.norm, self.readout = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.readout(self.norm(self.act(self.inner(x))) * self.scale).mean(1)
        return out


class TimeFirst(Tokens):
    """The samples stand in the second dimension: the first one has the same size but is time."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.readout(self.act(self.inner(x.transpose(0, 1)))).mean(0)
        return out


class Tied(nn.Module):
    """One layer that runs twice, and one whose weight is used beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.beside, self.once = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x).tanh()).tanh()
        h = self.beside(x) + x @ self.beside.weight.T.square()
        out: Tensor = self.once(h)
        return out


class Odd(nn.Module):
    """Groups, dilation, stride, circular padding; then 1-d and 3-d convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="circular")
        self.same = nn.Conv2d(6, 4, (3, 1), padding="same", bias=False)
        self.one, self.three = nn.Conv1d(4, 3, 2), nn.Conv3d(1, 2, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.two(x).tanh()).tanh()
        x = self.one(x.flatten(2))
        out: Tensor = self.three(x[:, None, :, :, None].expand(-1, -1, -1, -1, 2)).flatten(1)[:, :3]
        return out


class PlainAttention(nn.Module):
    """Softmax of q·k by hand: what k's bias does to it is nothing, and its gradient nothing but rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.readout = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        out: Tensor = self.readout(weights @ self.v(x)).mean(1)
        return out


def frozen() -> nn.Module:
    net = MLP(5, 2, width=6, bias=True)
    named = dict(net.named_parameters())
    for name in ("1.weight", "3.bias"):
        named[name].requires_grad_(False)
    return net


def wrapped() -> nn.Module:
    net = gammaopt.wrap(MLP(5, 3, width=8, bias=True), 4.0, depth=3, parametrization="mean_field")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * draw(*parameter.shape))
    return net


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    # net, inputs, share of the parameters that the layers account for
    "MLP": (lambda: MLP(5, 3, width=8, bias=True), (6, 5), 1.0),
    "one output": (lambda: MLP(5, 1, width=8), (6, 5), 1.0),
    "wrapped": (wrapped, (6, 5), 1.0),
    "CNN": (lambda: CNN((2, 8, 8), 3, width=4, depth=3, bias=True), (5, 2, 8, 8), 1.0),
    "wide CNN of few pixels": (lambda: CNN((8, 4, 4), 3, width=32, depth=3), (3, 8, 4, 4), 1.0),
    "odd convolutions": (Odd, (4, 4, 8, 8), 1.0),
    "tokens": (Tokens, (5, 5, 4), 44 / 62),
    "time first": (TimeFirst, (5, 5, 4), 0.0),
    "tied": (Tied, (6, 4), 8 / 43),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).eval(), (6, 4), 37 / 47),
    "frozen": (frozen, (6, 5), 1.0),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (6, 4), 3 / 18),
    "plain attention": (PlainAttention, (6, 5, 4), 1.0),
    "plain output": (lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), (6, 4), 1.0),
}


@pytest.mark.parametrize("name", NETS)
def test_layerwise_and_chunked_are_the_kernel_of_the_jacobians(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make, shape, share = NETS[name]
    net, x = make(), draw(*shape)
    expected = reference(net, x) if name != "plain output" else reference(net.get_submodule("0"), x)
    counted: list[set[str]] = []
    real = _layers.trusted

    def spy(*args: Any) -> Any:
        found = real(*args)
        counted.append(found[1])
        return found

    monkeypatch.setattr(module, "trusted", spy)
    kernel = ntk(net, x)
    sizes = {key: parameter.numel() for key, parameter in net.named_parameters() if parameter.requires_grad}
    assert sum(sizes[key] for key in counted[0]) / sum(sizes.values()) == pytest.approx(share)
    trace = expected.diagonal(dim1=2, dim2=3).sum(-1)
    scale = float(trace.abs().max())
    torch.testing.assert_close(kernel, trace, rtol=1e-9, atol=1e-10 * scale)
    torch.testing.assert_close(ntk(net, x, full=True), expected, rtol=1e-9, atol=1e-10 * scale)
    for full in (False, True):
        plain = ntk(net, x, full=full, layerwise=False, chunk=2)
        torch.testing.assert_close(plain, expected if full else trace, rtol=1e-9, atol=1e-10 * scale)
    monkeypatch.setattr(_layers, "GRAM_BYTES", 1)
    monkeypatch.setattr(module, "DELTA_BYTES", 1)
    torch.testing.assert_close(ntk(net, x), trace, rtol=1e-9, atol=1e-10 * scale)
    torch.testing.assert_close(ntk(net, x, full=True), expected, rtol=1e-9, atol=1e-10 * scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gradient_that_is_zero_in_theory_is_no_reason_to_go_sample_by_sample(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    expected = ntk(net := PlainAttention(), x := draw(16, 20, 4))
    monkeypatch.setattr(module, "_sample_by_sample", lambda *_: pytest.fail("went sample by sample"))
    torch.testing.assert_close(ntk(net, x, dtype=dtype).double(), expected, rtol=1e-3, atol=1e-4)


def test_a_sample_with_all_units_dead_is_no_reason_to_go_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inner, x = nn.Linear(4, 5), draw(6, 4)
    net = nn.Sequential(inner, nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        inner.weight.abs_()
    x[:3] = -10 * x[:3].abs()
    with torch.no_grad():
        assert (net[:2](x[:3]) == 0).all()
    expected = reference(net, x).diagonal(dim1=2, dim2=3).sum(-1)
    monkeypatch.setattr(module, "_sample_by_sample", lambda *_: pytest.fail("went sample by sample"))
    torch.testing.assert_close(ntk(net, x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("make", [lambda: MLP(5, 7, width=8, bias=True), lambda: CNN((2, 8, 8), 7, width=4, depth=3)])
def test_what_is_backpropagated_is_held_within_its_memory(
    make: Callable[[], nn.Module], full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = make()
    x = draw(5, 5) if isinstance(net, MLP) else draw(5, 2, 8, 8)
    expected, whole, pulled = ntk(net, x, full=full), [], module._pulled

    def watched(*args: Any) -> list[Tensor]:
        deltas = pulled(*args)
        whole.append(sum(delta.numel() * delta.element_size() for delta in deltas))
        return deltas

    monkeypatch.setattr(module, "_pulled", watched)
    ntk(net, x, full=full)
    assert len(whole) == 1
    one = whole[0] // 7
    for allowed in (1, 2, 3, 5):  # outputs
        limit = allowed * one * (2 if full else 1)
        monkeypatch.setattr(module, "DELTA_BYTES", limit)
        whole.clear()
        torch.testing.assert_close(ntk(net, x, full=full), expected, rtol=1e-10, atol=1e-12)
        assert max(whole) == allowed * one
        blocks = -(-7 // allowed)
        assert len(whole) == (blocks * (blocks + 1) // 2 if full else blocks)


def test_attention_has_the_kernel_of_its_jacobians() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True), nn.Flatten(), nn.Linear(12, 2)
    )
    x = draw(4, 3, 4)
    net.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = reference(net, x).diagonal(dim1=2, dim2=3).sum(-1)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    net.train()
    state, modes = torch.get_rng_state(), [part.training for part in net.modules()]
    torch.testing.assert_close(ntk(net, x), expected, rtol=1e-9, atol=1e-10)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in net.modules()] == modes
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(part._forward_hooks for part in net.modules())


def test_a_sparse_embedding_has_the_kernel_of_a_dense_one() -> None:
    tokens = torch.randint(5, (6, 2), generator=torch.Generator().manual_seed(0))
    kernels = []
    for sparse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 2))
        kernels.append(ntk(net, tokens))
    assert torch.equal(*kernels)


def test_eigenvalues_and_gamma() -> None:
    net, x = wrapped(), draw(6, 5)
    expected = torch.linalg.eigvalsh(reference(net, x).diagonal(dim1=2, dim2=3).sum(-1)).flip(0)
    torch.testing.assert_close(ntk_eigenvalues(net, x), expected)
    whole = ntk_eigenvalues(net, x, full=True)
    assert whole.shape == (18,)
    assert float(whole.sum()) == pytest.approx(float(expected.sum()))
    plain = gammaopt.unwrap(net)
    torch.testing.assert_close(ntk_eigenvalues(plain, x), 16 * expected)


def test_feature_kernel_is_that_of_what_enters_the_readout() -> None:
    net, x = wrapped(), draw(6, 5)
    features = nn.Sequential(*copy.deepcopy(net).double().children())[:-1](x.double())
    torch.testing.assert_close(feature_kernel(net, x), (features @ features.T / 8).detach())
    inputs = x.double()
    torch.testing.assert_close(feature_kernel(net, x, layer="1"), inputs @ inputs.T / 5)
    with pytest.raises(UsageError, match="'9' is no Linear or Conv layer of GammaMLP; choose one of: 1, 3, 5"):
        feature_kernel(net, x, layer="9")
    with pytest.raises(UsageError, match=r"ReLU has no trainable parameters"):
        feature_kernel(nn.ReLU(), x)


def test_alignments_are_their_formulas() -> None:
    y, x = draw(7), draw(7, 3).double()
    kernel = x @ x.T
    h = torch.eye(7).double() - 1 / 7
    target = torch.outer(y, y).double()
    value = (h @ kernel @ h * target).sum() / ((h @ kernel @ h).norm() * (h @ target @ h).norm())
    assert kernel_target_alignment(kernel, y) == pytest.approx(float(value))
    plain = (kernel * target).sum() / (kernel.norm() * target.norm())
    assert kernel_target_alignment(kernel, y[:, None], centred=False) == pytest.approx(float(plain))
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    onehot = nn.functional.one_hot(classes).double()
    assert kernel_target_alignment(onehot @ onehot.T, classes) == pytest.approx(1)
    rotation = torch.linalg.qr(draw(3, 3).double())[0]
    moved = (2 * x + 1) @ rotation
    assert centred_kernel_alignment(kernel, moved @ moved.T) == pytest.approx(1)
    assert centred_kernel_alignment(kernel, draw(7, 7).double()) < 0.9


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: ntk(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), draw(4, 3)),
            r"the NTK is a function of single samples, and '1' normalises.*model\.eval\(\)",
        ),
        (lambda: ntk(nn.Linear(3, 2).requires_grad_(False), draw(4, 3)), "no trainable parameters"),
        (
            lambda: ntk(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), [(draw(4, 3), draw(4, 2))]),  # type: ignore[arg-type]
            r"inputs of .*\(4, 3\).* do not fit Sequential: 'tuple' object has no attribute 'flatten'",
        ),
        (lambda: ntk(nn.Linear(3, 2), draw(4, 3), chunk=0), "chunk=0 is too small"),
        (
            lambda: centred_kernel_alignment(draw(3, 3), draw(4, 4)),
            r"kernels of shapes \(3, 3\) and \(4, 4\) can't be aligned",
        ),
        (
            lambda: centred_kernel_alignment(torch.ones(3, 3), draw(3, 3)),
            "one of the kernels is constant over the samples",
        ),
        *(
            (lambda at=at: centred_kernel_alignment(*at), "one of the kernels is constant over the samples")
            for at in (
                (torch.full((7, 7), 0.1), draw(7, 7)),
                (draw(7, 7).double(), torch.full((7, 7), 0.1).double()),
                (torch.zeros(3, 3), draw(3, 3)),
            )
        ),
        (
            lambda: kernel_target_alignment(draw(3, 3), torch.tensor([1, -1, 1])),
            r"targets are whole numbers down to -1, and classes count from 0; give targets\.float\(\)",
        ),
    ],
)
def test_mistakes_are_named(ask: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ask()


def test_a_rich_start_aligns_and_a_lazy_one_does_not() -> None:
    x = torch.sign(draw(64, 6))
    y = x[:, :1] * x[:, 1:2]
    gained = {}
    for gamma, lr in ((0.05, 0.05), (20.0, 1.0)):
        torch.manual_seed(0)
        net = gammaopt.wrap(MLP(6, 1, width=64), gamma, depth=3, parametrization="mean_field")
        optimizer = gammaopt.SGD(net.parameters(), lr=lr)
        before = kernel_target_alignment(ntk(net, x), y)
        for _ in range(150):
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
        gained[gamma] = kernel_target_alignment(ntk(net, x), y) - before
    assert np.abs(gained[0.05]) < 0.02
    assert gained[20.0] > 0.2
