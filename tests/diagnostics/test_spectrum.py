"""Curvature from products alone, against the dense Hessian in float64; and the model is left as it was."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import gammaopt
from gammaopt import UsageError
from gammaopt.diagnostics import (
    Curvature,
    hessian_eigenvalues,
    hessian_trace,
    sharpness,
    spectral_density,
)
from gammaopt.diagnostics._function import Function
from gammaopt.online import MLP
from gammaopt.online._losses import CRITERIA

Case = tuple[nn.Module, str, tuple[Any, Tensor]]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(gamma: float, outputs: int = 1, *, steps: int = 0, loss: str = "mse") -> Case:
    """A wrapped MLP of 552 or more parameters, 64 samples; after ``steps`` steps."""
    torch.manual_seed(0)
    x = draw(64, 8)
    y = torch.sign(x[:, :1] * x[:, 1:2]) if outputs == 1 else (x[:, :outputs].argmax(1))
    model = gammaopt.wrap(MLP(8, outputs, width=20), gamma, depth=3, parametrization="mean_field")
    optimizer = gammaopt.SGD(model.parameters(), lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        CRITERIA[loss](model(x), y).backward()
        optimizer.step()
    return model, loss, (x, y)


def dense(model: nn.Module, loss: Callable[[Tensor, Any], Tensor], data: tuple[Any, Tensor]) -> Tensor:
    """The Hessian in the trainable parameters by the textbook: second derivatives of the loss, in float64."""
    twin = copy.deepcopy(model).double()
    named = {name: parameter for name, parameter in twin.named_parameters() if parameter.requires_grad}
    names, shapes = list(named), [parameter.shape for parameter in named.values()]
    sizes = [shape.numel() for shape in shapes]
    inputs, targets = data
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    targets = targets.double() if targets.is_floating_point() else targets

    flat = torch.cat([parameter.detach().reshape(-1) for parameter in named.values()]).requires_grad_()
    parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
    value = loss(functional_call(twin, dict(zip(names, parts, strict=True)), (inputs,)), targets)
    (gradient,) = torch.autograd.grad(value, flat, create_graph=True)
    rows = torch.eye(len(flat), dtype=torch.float64).split(128)
    return torch.cat(
        [torch.autograd.grad(gradient, flat, row, retain_graph=True, is_grads_batched=True)[0] for row in rows]
    )


def leading(matrix: Tensor, k: int, which: str) -> NDArray[np.float64]:
    values = np.linalg.eigvalsh(matrix.numpy())
    return values[np.argsort(-values if which == "largest" else -np.abs(values))][:k]


CASES = {
    "lazy start": lambda: mlp(0.1),
    "start": lambda: mlp(1.0, 3),
    "rich start, both signs": lambda: mlp(100.0),
    "classes": lambda: mlp(1.0, 4, loss="cross_entropy"),
    "trained": lambda: mlp(2.0, steps=60),
}


@functools.cache
def dense_of(case: str) -> Tensor:
    """The dense Hessian of a case, made once for all that are compared with it."""
    model, name, data = CASES[case]()
    return dense(model, CRITERIA[name], data)


@pytest.mark.parametrize("which", ["largest", "magnitude"])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
@pytest.mark.parametrize("case", CASES)
def test_eigenvalues_are_those_of_the_dense_hessian_at_any_scale_of_the_loss(
    case: str, scale: float, which: Any
) -> None:
    model, name, data = CASES[case]()
    loss = lambda output, targets: scale * CRITERIA[name](output, targets)
    found = hessian_eigenvalues(model, loss, data, 20, which)
    expected = scale * leading(dense_of(case), 20, which)
    np.testing.assert_allclose(np.abs(found.values), np.abs(expected), rtol=1e-5)
    np.testing.assert_allclose(np.sort(found.values), np.sort(expected), rtol=1e-5)
    assert found.converged
    assert "products, converged" in str(found)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_arpack_finds_the_same(scale: float) -> None:
    model, name, data = mlp(100.0)
    loss = lambda output, targets: scale * CRITERIA[name](output, targets)
    ours = hessian_eigenvalues(model, loss, data, 8)
    theirs = hessian_eigenvalues(model, loss, data, 8, method="eigsh")
    np.testing.assert_allclose(theirs.values, ours.values, rtol=1e-6)
    assert (theirs.residuals <= 1e-4 * np.abs(theirs.values)).all()


def test_arpack_makes_no_more_products_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, data = mlp(1.0, 3)
    needed = hessian_eigenvalues(model, loss, data, 4, method="eigsh").products
    assert hessian_eigenvalues(model, loss, data, 4, method="eigsh", max_products=needed).products == needed
    made: list[int] = []
    multiply = Curvature.__call__
    monkeypatch.setattr(Curvature, "__call__", lambda self, vector: made.append(1) or multiply(self, vector))  # type: ignore[func-returns-value]
    for most in (5, 30, needed - 1):
        made.clear()
        with pytest.raises(UsageError, match=f"ARPACK did not converge within max_products={most}; give more"):
            hessian_eigenvalues(model, loss, data, 4, method="eigsh", max_products=most)
        assert len(made) <= most


def test_gauss_newton_is_the_textbook_product() -> None:
    model, _, (x, y) = mlp(1.0, 3, loss="cross_entropy", steps=20)
    twin = copy.deepcopy(model).double()
    named = dict(twin.named_parameters())
    jacobian = torch.func.jacrev(lambda p: functional_call(twin, p, (x.double(),)))(named)
    rows = torch.cat([part.flatten(2) for part in jacobian.values()], dim=2).detach()
    p = twin(x.double()).softmax(1).detach()
    bend = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nci,ncd,ndj->ij", rows, bend, rows) / len(x)
    found = hessian_eigenvalues(model, "cross_entropy", (x, y), 10, matrix="ggn", vectors=True)
    np.testing.assert_allclose(found.values, leading(expected, 10, "largest"), rtol=1e-6)
    assert found.vectors is not None
    moved = expected @ found.vectors - found.vectors * torch.from_numpy(found.values)
    np.testing.assert_allclose(moved.norm(dim=0).numpy(), found.residuals, atol=1e-8)
    assert np.linalg.norm(moved.numpy(), axis=0).max() < 1e-2


def test_equal_eigenvalues_are_all_found() -> None:
    """A linear network's Hessian is one block for each output: every eigenvalue three times."""
    x, net = draw(40, 6), nn.Linear(6, 3, bias=False)
    found = hessian_eigenvalues(net, "mse", (x, torch.zeros(40, 3)), 9)
    expected = leading(dense(net, CRITERIA["mse"], (x, torch.zeros(40, 3))), 9, "largest")
    np.testing.assert_allclose(found.values, expected, rtol=1e-8)


@pytest.mark.parametrize(("inputs", "k"), [(7, 15), (9, 20), (5, 7)])
def test_ten_copies_of_each_eigenvalue_are_all_found_from_any_start(inputs: int, k: int) -> None:
    torch.manual_seed(1)
    x, net, y = draw(40, inputs), nn.Linear(inputs, 10), torch.zeros(40, 10)
    expected = leading(dense(net, CRITERIA["mse"], (x, y)), k, "largest")
    for seed in range(8):
        np.testing.assert_allclose(hessian_eigenvalues(net, "mse", (x, y), k, seed=seed).values, expected, rtol=1e-5)


def test_a_small_basis_restarts_and_finds_the_same() -> None:
    model, loss, data = mlp(1.0, 3)
    found = hessian_eigenvalues(model, loss, data, 6, basis=20, max_products=500)
    np.testing.assert_allclose(found.values, hessian_eigenvalues(model, loss, data, 6).values, rtol=1e-6)


def test_data_may_stream_in_batches_of_any_sizes() -> None:
    model, loss, (x, y) = mlp(1.0, 3, loss="cross_entropy")
    whole = hessian_eigenvalues(model, loss, (x, y), 4).values
    loader = DataLoader(TensorDataset(x, y), batch_size=24)
    for data in (loader, list(loader)):
        np.testing.assert_allclose(hessian_eigenvalues(model, loss, data, 4).values, whole, rtol=1e-5)
    total = lambda output, targets: nn.functional.cross_entropy(output, targets, reduction="sum") / len(x)
    summed = hessian_eigenvalues(model, total, list(loader), 4, reduction="sum").values
    np.testing.assert_allclose(summed, whole, rtol=1e-5)


def test_too_few_products_are_told() -> None:
    model, loss, data = mlp(1.0, 3)
    found = hessian_eigenvalues(model, loss, data, 20, max_products=25)
    assert found.products == 25
    assert not found.converged
    assert "give more max_products" in str(found)


def test_values_that_no_look_for_copies_has_confirmed_are_not_called_converged() -> None:
    net, data = nn.Linear(6, 3, bias=False), (draw(40, 6), draw(40, 3))  # each eigenvalue three times
    short = hessian_eigenvalues(net, "mse", data, k=4, max_products=6)
    assert len(set(short.values.round(6))) == 4  # the copies were not seen
    assert short.looked is False
    assert not short.converged
    assert str(short).endswith("6 products, copies of them not looked for to the end: give more max_products")
    whole = hessian_eigenvalues(net, "mse", data, k=4)
    assert whole.looked
    assert whole.converged
    assert whole.values[:3] == pytest.approx([short.values[0]] * 3)


def test_a_pair_that_a_look_unsettles_converges_with_the_rest() -> None:
    """A look shows how small the gap beside a pair is, and so its error may be above the tolerance again."""
    torch.manual_seed(0)
    x = torch.randn(32, 20)
    model = gammaopt.wrap(nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 1)), 3.0, example_inputs=x)
    values = leading(dense(model, CRITERIA["mse"], (x, x[:, :1])), 2, "largest")
    for seed in range(40):
        found = hessian_eigenvalues(model, "mse", (x, x[:, :1]), k=2, seed=seed)
        assert found.converged, seed
        assert found.products < 80, seed
        np.testing.assert_allclose(found.values, values, rtol=3e-5)  # tol is of an estimate


def test_float32_products_converge_as_far_as_their_rounding_allows() -> None:
    model, loss, data = mlp(1.0, 3)
    found = hessian_eigenvalues(model, loss, data, k=6, tol=1e-9, dtype=torch.float32)
    assert found.products < 200
    assert found.converged
    assert found.floor > 1e-6 * abs(found.values[0])


@pytest.mark.parametrize(("k", "basis"), [(8, 13), (12, 17), (8, 16)])
def test_a_basis_that_copies_fill_loses_no_wanted_pair_and_stays_orthogonal(k: int, basis: int) -> None:
    net, data = nn.Linear(4, 12, bias=False), (draw(30, 4), draw(30, 12))  # each eigenvalue twelve times
    values = leading(dense(net, CRITERIA["mse"], data), 12, "largest")
    found = hessian_eigenvalues(net, "mse", data, k=k, basis=basis, max_products=600, vectors=True)
    np.testing.assert_allclose(found.values, values[:k], rtol=1e-5)
    assert found.converged == (basis == 16)  # five vectors more than pairs leave a look little room
    assert found.vectors is not None
    pairs = found.vectors.numpy()
    np.testing.assert_allclose(pairs.T @ pairs, np.eye(k), atol=1e-9)
    lost = np.linalg.norm(dense(net, CRITERIA["mse"], data).numpy() @ pairs - pairs * found.values, axis=0)
    assert np.all(lost <= 1.01 * found.residuals + 1e-12)


def test_a_second_derivative_that_is_not_finite_is_named() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            output = self.layer(x)
            # At 0: a slope of 0, and no second derivative.
            kink: Tensor = (output - output.detach()).norm(dim=1, keepdim=True)
            return kink

    x = draw(8, 3)
    with pytest.raises(UsageError, match="a second derivative of Norm is not finite, as that of a root or"):
        hessian_eigenvalues(Norm(), "mse", (x, draw(8, 1)), k=1)


def test_a_loaders_own_draws_are_given_back() -> None:
    model, loss, (x, y) = mlp(1.0, 3)
    own, dataset = torch.Generator().manual_seed(3), TensorDataset(x, y)
    sampler = RandomSampler(dataset, generator=own)
    for loader in (
        DataLoader(dataset, 16, shuffle=True, generator=own),
        DataLoader(dataset, 16, sampler=sampler),
        DataLoader(dataset, batch_sampler=BatchSampler(sampler, 16, drop_last=False)),
    ):
        before, everybodys = own.get_state(), torch.get_rng_state()
        hessian_eigenvalues(model, loss, loader, k=1)
        assert torch.equal(own.get_state(), before)
        assert torch.equal(torch.get_rng_state(), everybodys)


def test_an_instance_norm_is_in_the_mode_of_the_model() -> None:
    norm = nn.InstanceNorm1d(3, track_running_stats=True)
    net = nn.Sequential(nn.Conv1d(2, 3, 1), norm, nn.Flatten(), nn.Linear(15, 1))
    x = draw(8, 2, 5)
    for training in (True, False):
        net.train(training)
        kept = copy.deepcopy(net).double()
        assert torch.allclose(Function(net)(x), kept(x.double()))


def test_sharpness_with_an_optimizer_is_at_two_where_its_steps_turn_unstable() -> None:
    """Full-batch steps on a quadratic: below 2 they shrink, above they grow, with rates that differ by layer."""
    x, y = draw(40, 6), torch.zeros(40, 1)
    for factor, grows in ((0.98, False), (1.02, True)):
        model = gammaopt.wrap(nn.Sequential(nn.Linear(6, 1)), 1.0, depth=1, knee=1.0, center="none")
        optimizer = torch.optim.SGD([{"params": [model[0].weight], "lr": 0.3}, {"params": [model[0].bias], "lr": 1.0}])
        at = sharpness(model, "mse", (x, y), optimizer=optimizer)
        for group in optimizer.param_groups:
            group["lr"] *= factor * 2 / at
        assert sharpness(model, "mse", (x, y), optimizer=optimizer) == pytest.approx(2 * factor, rel=1e-3)
        losses = []
        for _ in range(400):
            optimizer.zero_grad()
            loss = CRITERIA["mse"](model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert (losses[-1] > losses[300]) == grows


@pytest.mark.parametrize("kind", [torch.optim.SGD, gammaopt.SGD])
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.3},
        {"momentum": 0.9},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.6},
        {"dampening": 0.6},  # which torch leaves alone without momentum
    ],
)
def test_the_edge_is_at_two_with_any_momentum(kind: Any, settings: dict[str, Any]) -> None:
    """Full-batch steps on a quadratic, with two rates: just below 2 they shrink, just above they grow."""
    x, y = draw(40, 6), torch.zeros(40, 1)
    for factor, grows in ((0.98, False), (1.02, True)):
        torch.manual_seed(0)
        model = gammaopt.wrap(nn.Sequential(nn.Linear(6, 1)), 2.0, depth=1, knee=1.0, center="none").double()
        groups = [{"params": [model[0].weight], "lr": 0.3}, {"params": [model[0].bias], "lr": 1.0}]
        optimizer = kind(groups, **settings)
        at = sharpness(model, "mse", (x, y), optimizer=optimizer)
        for group in optimizer.param_groups:
            group["lr"] *= factor * 2 / at
        losses = []
        for _ in range(600):
            optimizer.zero_grad()
            loss = CRITERIA["mse"](model(x.double()), y.double())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert (losses[-1] > 2 * losses[300]) == grows
        assert (losses[-1] < 0.5 * losses[300]) != grows


def test_dampening_may_differ_by_group_and_what_has_no_one_edge_is_refused() -> None:
    net = nn.Linear(2, 1, bias=True)
    data = torch.eye(2), torch.zeros(2, 1)

    def of(bias: dict[str, Any], **settings: Any) -> float:
        groups: list[dict[str, Any]] = [{"params": [net.weight]}, {"params": [net.bias], **bias}]
        return sharpness(net, "mse", data, optimizer=torch.optim.SGD(groups, lr=0.5, momentum=0.5, **settings))

    parts: list[dict[str, Any]] = [{"params": [net.weight]}, {"params": [net.bias], "lr": 0.1}]
    damped = torch.optim.SGD(parts, lr=0.5)
    expected = sharpness(net, "mse", data, optimizer=damped) / 1.5
    assert of({"dampening": 0.8}) == pytest.approx(expected)
    assert of({"lr": -1e-12}) == pytest.approx(0.5 / 1.5)  # where a schedule ends
    with pytest.raises(UsageError, match=r"momenta 0\.5 and 0\.9, and no one edge .*; give all groups one momentum"):
        of({"momentum": 0.9})
    with pytest.raises(UsageError, match=r"momenta 0\.5 and 0\.5 \(Nesterov\)"):
        of({"nesterov": True})
    with pytest.raises(UsageError, match="this SGD maximises, and the edge of stability is that of descent"):
        of({}, maximize=True)


def test_sharpness_takes_the_rates_of_gammaopts_optimizers() -> None:
    model, loss, data = mlp(3.0, 3)
    optimizer = gammaopt.SGD(model.parameters(), lr=0.7)
    rates = optimizer.effective_lrs()
    roots = torch.cat([p.new_full((p.numel(),), rates[name]) for name, p in model.named_parameters()]).double().sqrt()
    expected = leading(roots[:, None] * dense(model, CRITERIA[loss], data) * roots, 1, "largest")[0]
    assert sharpness(model, loss, data, optimizer=optimizer) == pytest.approx(expected, rel=1e-3)
    with pytest.raises(UsageError, match="this SGD holds no parameter of GammaMLP"):
        sharpness(model, loss, data, optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0))


def test_trace_is_within_its_error_and_exact_with_enough_products() -> None:
    model, loss, data = mlp(1.0, 3)
    expected = float(dense(model, CRITERIA[loss], data).trace())
    errors = []
    for seed in range(8):
        found = hessian_trace(model, loss, data, seed=seed)
        assert found.products <= 60
        errors.append((found.value - expected) / found.error)
    assert 0.4 < np.sqrt(np.mean(np.square(errors))) < 2  # of eight that are about normal
    assert abs(hessian_trace(model, loss, data, products=300).value / expected - 1) < 0.01


@pytest.mark.parametrize("products", [18, 30, 60])
def test_the_trace_is_exact_with_a_product_for_each_parameter(products: int) -> None:
    net, data = frozen(), (X, draw(8, 2))  # 18 parameters
    found = hessian_trace(net, "mse", data, products=products)
    assert found.products == 18
    assert found.error == 0
    assert found.value == pytest.approx(float(dense(net, CRITERIA["mse"], data).trace()), rel=1e-12)


def test_density_has_the_moments_and_the_counts_of_the_dense_spectrum() -> None:
    model, loss, data = mlp(1.0, 3)
    values = np.linalg.eigvalsh(dense(model, CRITERIA[loss], data).numpy())
    found = spectral_density(model, loss, data, probes=8)
    assert found.weights.sum() == pytest.approx(1)
    assert found.products <= 8 * 40
    # A mean of a function over λ, as eight Gaussian probes see it, is off by about this much.
    spread = lambda at: np.sqrt(2 * np.mean((at - at.mean()) ** 2) / (8 * len(values)))
    for power in (1, 2):
        assert abs(found.nodes**power @ found.weights - np.mean(values**power)) < 4 * spread(values**power)
    for above in (0.1, 0.3):
        for sign in (1, -1):
            counted = (sign * values > above).astype(float)
            share = found.weights[sign * found.nodes > above].sum()
            assert 4 * spread(counted) < counted.mean()  # none at all would not do
            assert abs(share - counted.mean()) < 4 * spread(counted)
    grid = np.linspace(values.min() - 1, values.max() + 1, 4000)
    assert np.trapezoid(found.smoothed(grid, 0.05), grid) == pytest.approx(1, abs=1e-3)


def test_one_probes_measure_has_its_moments_exactly_and_with_enough_steps_is_its_measure() -> None:
    model, loss, data = mlp(1.0, 3)
    values, vectors = np.linalg.eigh(dense(model, CRITERIA[loss], data).numpy())
    probe = torch.randn(len(values), generator=torch.Generator().manual_seed(5), dtype=torch.float64).numpy()
    masses = (vectors.T @ (probe / np.linalg.norm(probe))) ** 2
    found = spectral_density(model, loss, data, probes=1, steps=8, seed=5)
    size = np.abs(values).max()
    for power in range(16):
        exact = (values / size) ** power @ masses
        assert (found.nodes / size) ** power @ found.weights == pytest.approx(exact, rel=1e-9)
    assert (found.nodes / size) ** 16 @ found.weights != pytest.approx((values / size) ** 16 @ masses, rel=1e-9)
    net, small = frozen(), (X, draw(8, 2))
    values, vectors = np.linalg.eigh(dense(net, CRITERIA["mse"], small).numpy())
    probe = torch.randn(18, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    masses = (vectors.T @ (probe / np.linalg.norm(probe))) ** 2
    found = spectral_density(net, "mse", small, probes=1, steps=30)
    for above in np.quantile(values, [0.3, 0.5, 0.7, 0.9]) + 1e-6:
        assert found.weights[found.nodes > above].sum() == pytest.approx(masses[values > above].sum(), abs=1e-6)


class Attention(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.readout = nn.Linear(8, 7, bias=False)
        if tied:
            self.readout.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.readout(self.block(self.embed(tokens))).mean(1)
        return out


class SDPA(nn.Module):
    """Fused attention as most transformers call it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.readout = nn.Linear(4, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        heads = [part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v)]
        mixed = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        out: Tensor = self.readout(mixed).mean(1)
        return out


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    net[0].requires_grad_(False)
    return net


def data_for(net: nn.Module) -> tuple[Tensor, Tensor]:
    if isinstance(net, Attention):
        tokens = torch.randint(7, (12, 5), generator=torch.Generator().manual_seed(1))
        return tokens, tokens[:, 0]
    return (draw(12, 5, 4) if isinstance(net, SDPA) else draw(12, 6)), torch.arange(12) % 2


NETS: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "fused attention": SDPA,
    "tied weights": lambda: Attention(tied=True),
    "batch norm, eval": lambda: batch_norm().eval(),
    "batch norm, train": batch_norm,
    "frozen": frozen,
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_special_parts_have_the_dense_hessian_too_and_the_model_is_left_as_it_was(name: str, wrapped: bool) -> None:
    torch.manual_seed(0)
    net = NETS[name]()
    data = data_for(net)
    if wrapped:
        gammaopt.wrap(net, 2.0, depth=2, knee=1.0)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    before = snapshot(net)
    found = hessian_eigenvalues(net, "cross_entropy", data, 5)
    hessian_trace(net, "cross_entropy", data, products=6)
    spectral_density(net, "cross_entropy", data, probes=1, steps=3)
    after = snapshot(net)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key], key

    twin = copy.deepcopy(net)
    reference = getattr(twin, "_gammaopt_reference", nn.Module())
    for module in [*twin.modules(), *reference.modules()]:
        module.training = module.training and isinstance(module, nn.BatchNorm1d)
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 0.0
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = leading(dense(twin, nn.functional.cross_entropy, data), 5, "largest")
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    np.testing.assert_allclose(found.values, expected, rtol=1e-5)


def snapshot(net: nn.Module) -> dict[str, Any]:
    """Everything of a model, and of torch, that a diagnostic could disturb."""
    kept: dict[str, Any] = {f"state {key}": value.clone() for key, value in net.state_dict().items()}
    kept |= {
        f"grad {key}": None if parameter.grad is None else parameter.grad.clone()
        for key, parameter in net.named_parameters()
    }
    kept |= {f"asks {key}": parameter.requires_grad for key, parameter in net.named_parameters()}
    kept |= {f"id {key}": id(parameter) for key, parameter in net.named_parameters()}
    kept |= {f"mode {key}": module.training for key, module in net.named_modules()}
    kept["random"] = torch.get_rng_state()
    kept["numpy"] = str(np.random.get_state()[1][:5])  # type: ignore[index]
    kept["fast path"] = torch.backends.mha.get_fastpath_enabled()
    kept["grad mode"] = torch.is_grad_enabled()
    return kept


def test_float32_models_and_no_grad_and_autocast_change_nothing() -> None:
    model, loss, data = mlp(1.0, 3)
    expected = hessian_eigenvalues(model, loss, data, 3).values
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(hessian_eigenvalues(model, loss, data, 3).values, expected)
    with torch.inference_mode():
        np.testing.assert_array_equal(hessian_eigenvalues(model, loss, data, 3).values, expected)
    np.testing.assert_allclose(
        hessian_eigenvalues(model, loss, data, 3, tol=1e-4, dtype=torch.float32).values, expected, rtol=1e-3
    )


X, Y = draw(8, 6), torch.arange(8) % 2


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: hessian_eigenvalues(frozen(), "mse", (X, Y), 0), "k=0 is too small"),
        (lambda: hessian_eigenvalues(frozen(), "mse", (X, Y), 99), "k=99 is more than the 18 trainable parameters"),
        (lambda: hessian_eigenvalues(frozen(), "mse", (X, Y), 1, "smallest"), "unknown which 'smallest'"),  # type: ignore[arg-type]
        (lambda: hessian_eigenvalues(frozen(), "l1", (X, Y)), "unknown loss 'l1'; choose one of: mse, cross_entropy"),
        (
            lambda: hessian_eigenvalues(frozen(), "mse", (draw(8, 5), Y), 1),
            r"inputs of shape \(8, 5\) float64 do not fit",
        ),
        (lambda: hessian_eigenvalues(frozen(), "mse", [], 1), "data has no batch"),
        (
            lambda: hessian_eigenvalues(frozen(), "mse", iter([(X, Y)]), 1),
            r"data can be read only once.*give list\(data\)",
        ),
        (
            lambda: hessian_eigenvalues(frozen(), "mse", cast("Any", [X]), 1),
            r"a batch is shape \(8, 6\) float32; give pairs",
        ),
        (
            lambda: hessian_eigenvalues(frozen(), lambda f, y: f, (X, Y), 1),
            r"the loss gives shape \(8, 2\).*one scalar",
        ),
        (
            lambda: hessian_eigenvalues(frozen(), lambda f, y: f.sum() / 0, (X, Y), 1),
            "the loss on the data is (nan|inf|-inf)",
        ),
        (lambda: hessian_eigenvalues(frozen().requires_grad_(False), "mse", (X, Y), 1), "no trainable parameters"),
        (
            lambda: hessian_eigenvalues(cast("Any", "mse"), cast("Any", frozen()), (X, Y), 1),
            "model is a str; give the network",
        ),
        (
            lambda: hessian_eigenvalues(frozen(), cast("Any", nn.MSELoss), (X, Y), 1),
            r"loss is the class MSELoss; give one of it, as MSELoss\(\)",
        ),
        (
            lambda: hessian_eigenvalues(nn.Linear(6, 1), "cross_entropy", (X, X[:, :1]), 1),
            "cross-entropy over one class is 0 at any weights",
        ),
        (
            lambda: hessian_eigenvalues(frozen(), "cross_entropy", (X, torch.full((8,), 9)), 1),
            r"outputs of shape \(8, 2\) float64 with targets of shape \(8,\) int64: Target 9 is out of bounds",
        ),
        (
            lambda: sharpness((net := frozen()), "mse", (X, Y), optimizer=torch.optim.Adam(net.parameters())),
            "Adam does not step by rate × gradient",
        ),
        (lambda: hessian_trace(frozen(), "mse", (X, Y), products=5), "products=5 is too small; give at least 6"),
        (lambda: spectral_density(frozen(), "mse", (X, Y), steps=1), "steps=1 is too small"),
        (
            lambda: Curvature(frozen(), "mse", (X, Y), rates={"2.weight": 1.0}),
            "rates has no '2.bias'; give one for each trainable parameter",
        ),
        (
            lambda: Curvature(frozen(), "mse", (X, Y), rates={"2.weight": 1.0, "2.bias": -0.5}),
            r"rates\['2.bias'\]=-0.5 is not allowed; give a finite rates\['2.bias'\] >= 0",
        ),
        (lambda: Curvature(frozen(), "mse", (X, Y))(torch.zeros(3)), r"shape \(3,\) does not fit 18 trainable"),
    ],
)
def test_mistakes_are_named(ask: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ask()


def test_data_that_changes_between_passes_is_refused() -> None:
    class Augmented:
        draws = torch.Generator().manual_seed(0)

        def __iter__(self) -> Any:
            yield torch.randn(8, 6, generator=self.draws), Y

    with pytest.raises(UsageError, match=r"at one pass over the data .* without augmentation"):
        hessian_eigenvalues(frozen(), "mse", Augmented(), 2)


def test_recurrent_layers_work_and_a_model_that_keeps_a_graph_is_refused_in_words() -> None:
    net = nn.GRU(3, 4, batch_first=True)
    found = hessian_eigenvalues(
        net, lambda out, y: (out - y).square().mean(), (draw(5, 6, 3), torch.zeros(5, 6, 4)), 2, output=0
    )
    assert found.converged
    kept = frozen()
    kept.kept = kept(X)
    with pytest.raises(UsageError, match=r"Sequential can't be copied .* detach what it keeps"):
        hessian_eigenvalues(kept, "mse", (X, Y), 1)


class OnlyOnce(torch.autograd.Function):
    """tanh, whose backward autograd takes for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        onwards: Tensor = gradient * (1 - x.tanh() ** 2)
        return onwards


class Once(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.readout = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.readout(OnlyOnce.apply(self.inner(x)))
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_an_operation_that_can_be_differentiated_once_only_is_refused(matrix: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, data = Once(), (X, draw(8, 2, seed=1))
    for ask in (
        lambda: hessian_eigenvalues(net, "mse", data, 1, matrix=matrix, dtype=dtype),
        lambda: hessian_trace(net, "mse", data, products=6, matrix=matrix, dtype=dtype),
        lambda: hessian_trace(net, "mse", data, products=100, matrix=matrix, dtype=dtype),
        lambda: spectral_density(net, "mse", data, probes=1, steps=2, matrix=matrix, dtype=dtype),
    ):
        with pytest.raises(UsageError, match=r"curvature of Once is not symmetric .*use its plain form"):
            ask()


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_a_sparse_embedding_has_the_curvature_of_a_dense_one(matrix: Any) -> None:
    tokens = torch.randint(5, (9, 2), generator=torch.Generator().manual_seed(0))
    found = {}
    for sparse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 2))
        found[sparse] = hessian_eigenvalues(net, "mse", (tokens, draw(9, 2)), 3, matrix=matrix).values
        assert net[0].sparse == sparse
    np.testing.assert_array_equal(found[True], found[False])
