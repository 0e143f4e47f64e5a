r"""The spectrum of a loss's curvature: leading eigenvalues, sharpness, trace and density, from products alone.

    eigenvalues   Lanczos with full reorthogonalisation (:mod:`gammaopt.diagnostics._lanczos`), or ARPACK
    sharpness     λ_max; of √R H √R with the rates R of an optimizer, so that gradient descent turns unstable at 2
    trace         Hutch++: tr(Qᵀ H Q) exactly on a sketched range Q, and Hutchinson's estimate on the rest
    density       stochastic Lanczos quadrature: n⁻¹ Σ_i δ(λ − λ_i) ≈ mean over probes of Σ_j τ_j² δ(λ − θ_j)

Sources: Cohen et al., "Gradient descent on neural networks typically occurs at the edge of stability", ICLR 2021;
Meyer, Musco, Musco and Woodruff, "Hutch++", SOSA 2021; Ghorbani, Krishnan and Xiao, ICML 2019 (density).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from gammaopt._errors import UsageError, at_least, one_of, positive, require
from gammaopt._probe import Output
from gammaopt.diagnostics._edge import rates_of
from gammaopt.diagnostics._function import DOUBLE, Data, LossFunction
from gammaopt.diagnostics._lanczos import Array, Krylov, Which, lanczos
from gammaopt.diagnostics._operator import Curvature, Matrix, Reduction

Method = Literal["lanczos", "eigsh"]
BASIS_BYTES = 2**30  # for the vectors of a Lanczos basis
SHARPNESS_TOL = 1e-3


@dataclass(frozen=True)
class Eigenvalues:
    """Leading eigenvalues of a Hessian or Gauss–Newton matrix, the most wanted first.

    Attributes:
        values: (k,) eigenvalues λ.
        residuals: (k,) Ritz residual norms ‖H v − λ v‖: an eigenvalue lies within that of λ.
        errors: (k,) estimated errors of λ, min(r, r²/gap); no bound, because the gap is that of the Ritz values.
        products: products with the matrix that were made, each a pass over the data.
        tol: asked for, relative to each \\|λ\\|.
        vectors: (n, k) eigenvectors in the order of ``model.parameters()`` that train, if asked for.
        looked: whether a look for further copies of an eigenvalue came to its end; ``None`` for ARPACK, which has none.
        floor: what rounding leaves of an error at least; it counts as converged.
    """

    values: Array
    residuals: Array
    errors: Array
    products: int
    tol: float
    vectors: Tensor | None = None
    looked: bool | None = None
    floor: float = 0.0

    @property
    def converged(self) -> bool:
        """Whether the estimated error of every eigenvalue is within ``tol``, and no look for others was cut short."""
        return self._within and self.looked is not False

    @property
    def _within(self) -> bool:
        least = max(self.floor, 1e-13 * np.abs(self.values).max(initial=0.0))
        return bool(np.all(self.errors <= self.tol * np.abs(self.values) + least))

    def __str__(self) -> str:
        rows = [f"{v:12.5g}  residual {r:.1e}" for v, r in zip(self.values, self.residuals, strict=True)]
        end = "converged"
        if not self.converged:
            what = "copies of them not looked for to the end" if self._within else f"not all within tol={self.tol:g}"
            end = f"{what}: give more max_products"
        return "\n".join([*rows, f"{self.products} products, {end}"])


def hessian_eigenvalues(
    model: nn.Module,
    loss: str | LossFunction,
    data: Data,
    k: int = 20,
    which: Which = "largest",
    *,
    matrix: Matrix = "hessian",
    method: Method = "lanczos",
    tol: float = 1e-5,
    max_products: int | None = None,
    basis: int | None = None,
    vectors: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    reduction: Reduction = "mean",
    output: Output | None = None,
    dtype: torch.dtype = DOUBLE,
    seed: int = 0,
) -> Eigenvalues:
    r"""The ``k`` leading eigenvalues of the Hessian of a loss in the trainable parameters.

    The model is looked at through a float64 copy and left as it was. Dropout is off, BatchNorm as ``model.training``
    says. Vectors stay on the model's device; each product is one pass over the data. When the pairs look converged, a
    random vector looks for further copies of an eigenvalue, which one start can't see; it misses one in a hundred.

    Args:
        model: plain or wrapped; a wrapped one enters as f = (h − h₀)/γ, with θ₀ constant.
        loss: ``"mse"``, ``"cross_entropy"``, or (output, targets) → scalar.
        data: (inputs, targets), or an iterable of such that can be passed over again, as a ``DataLoader`` is.
        k: how many eigenvalues, ≥ 1.
        which: ``"largest"`` from the top down, or ``"magnitude"`` by \|λ\|.
        matrix: ``"hessian"``, or ``"ggn"`` for the generalised Gauss–Newton matrix.
        method: ``"lanczos"``, or ``"eigsh"`` for ARPACK through SciPy, whose vectors live on the host; it makes k more
            products to tell the residuals.
        tol: estimated error of each eigenvalue to stop at, relative to it.
        max_products: to make at most; max(200, 10 k) by default. Lanczos then returns what it has, with ``converged``
            false, also where only the look for copies was cut short; ARPACK gives nothing before it has converged, and
            that is an error.
        basis: vectors that the Lanczos basis may hold before it is restarted, 8 n bytes each in float64. By default as
            many as there are products, within 1 GiB, but 2 k + 20 at least: 4.5 GiB for k = 20 and 10⁷ parameters.
        vectors: return eigenvectors too.
        optimizer: if given, the matrix is √R H √R with R its rates: eigenvalues η·λ, the edge of stability at 2.
        reduction: whether ``loss`` is the mean or the sum over the samples of its batch.
        output: which part of what a plain model returns is its output; see :func:`gammaopt.wrap`.
        dtype: to compute products in.
        seed: of the starting vector; torch's global generators are not touched.

    Returns:
        Eigenvalues with residuals and the number of products. ``print`` shows them.

    Raises:
        UsageError: for a ``k`` above the number of parameters, data that differs between passes, a model without
            second derivatives, or ARPACK that has not converged within ``max_products``.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(3, 1, bias=False)
        >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
        >>> found = hessian_eigenvalues(net, "mse", (x, torch.zeros(3, 1)), k=2)  # H = 2 xᵀx/3
        >>> found.values.round(6).tolist(), found.converged
        ([6.0, 2.666667], True)
    """
    at_least("k", k, 1), one_of("which", which, get_args(Which)), one_of("method", method, get_args(Method))
    positive("tol", tol)
    most = max(200, 10 * k) if max_products is None else at_least("max_products", max_products, k + 1)
    operator = _operator(model, loss, data, optimizer, matrix=matrix, reduction=reduction, output=output, dtype=dtype)
    n = operator.size
    if k > n:
        raise UsageError(f"k={k} is more than the {n} trainable parameters; give at most {n}")
    capacity = _affordable(n, k, most) if basis is None else min(n, at_least("basis", basis, k + 5))
    start, draw = _start(operator, seed)
    if method == "eigsh":
        return _eigsh(operator, start, k, which, tol, most, min(n, capacity, max(2 * k + 20, 60)), vectors)
    found = lanczos(
        operator, start, k, which,
        tol=tol, max_products=most, capacity=capacity, generator=draw, vectors=vectors,
    )  # fmt: skip
    ritz = found.ritz
    return Eigenvalues(
        ritz.values, ritz.residuals, ritz.errors, found.products, tol, ritz.vectors, found.looked, found.floor
    )


def largest_eigenvalue(multiply: Callable[[Tensor], Tensor], like: Curvature, tol: float, max_products: int) -> float:
    """λ_max of a symmetric matrix on the space of ``like``, of which only products are known."""
    start, draw = _start(like, 0)
    capacity = _affordable(like.size, 1, max_products)
    found = lanczos(
        multiply, start, 1, "largest",
        tol=tol, max_products=max_products, capacity=capacity, generator=draw, vectors=False,
    )  # fmt: skip
    return float(found.ritz.values[0])


def _start(operator: Curvature, seed: int) -> tuple[Tensor, torch.Generator]:
    """A random first vector, and the generator for those that join later."""
    draw = torch.Generator().manual_seed(seed)
    return _on_device(torch.randn(operator.size, generator=draw, dtype=torch.float64), operator), draw


def _affordable(n: int, k: int, products: int) -> int:
    """Vectors for a basis: as many as there are products, within the memory for them."""
    return min(n, products + 2, max(2 * k + 20, BASIS_BYTES // (8 * n)))


class _SpentError(Exception):
    """No product is left: the way out of ARPACK's loop."""


def _eigsh(
    operator: Curvature, start: Tensor, k: int, which: Which, tol: float, most: int, basis: int, vectors: bool
) -> Eigenvalues:
    """ARPACK on a float64 operator of about unit size: its convergence test has an absolute floor."""
    linalg: Any = require("scipy.sparse.linalg", "tune")
    n = operator.size
    if k >= n:
        raise UsageError(f"k={k}: ARPACK finds fewer than all {n} eigenvalues; use method='lanczos'")
    scale = float(operator(start).norm() / start.norm())
    if scale == 0.0:
        return Eigenvalues(np.zeros(k), np.zeros(k), np.zeros(k), operator.products, tol)

    limit = most - k  # what the residuals take

    def product(vector: Array) -> Array:
        if operator.products >= limit:
            raise _SpentError
        made: Array = operator(torch.from_numpy(vector.reshape(-1).copy())).numpy()
        return made / scale

    wanted = "LA" if which == "largest" else "LM"
    # ARPACK tests residuals r, and the error of an eigenvalue is r²/gap: √tol would do were every gap about λ.
    settings = {"k": k, "which": wanted, "ncv": basis, "tol": tol, "maxiter": max(1, most // max(1, basis - k))}
    try:
        values, found = linalg.eigsh(
            linalg.LinearOperator((n, n), product, dtype=np.float64), v0=start.double().cpu().numpy(), **settings
        )
    except (_SpentError, linalg.ArpackNoConvergence):
        raise UsageError(
            f"ARPACK did not converge within max_products={most}; give more, or method='lanczos', which returns what "
            "it has"
        ) from None
    limit = most
    down = np.argsort(-values if which == "largest" else -np.abs(values))
    values, found = values[down], found[:, down]
    moved = np.stack([product(vector) for vector in found.T], axis=1)
    residuals = np.linalg.norm(moved - found * values, axis=0)
    kept = torch.from_numpy(found).to(operator.device) if vectors else None
    values, residuals = values * scale, residuals * scale
    return Eigenvalues(values, residuals, residuals, operator.products, tol, kept)


def sharpness(
    model: nn.Module,
    loss: str | LossFunction,
    data: Data,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    tol: float = SHARPNESS_TOL,
    **settings: Any,
) -> float:
    """λ_max of the Hessian, or η·λ_max with an optimizer: SGD is at the edge of stability when that is 2.

    The rates of γ and of a parametrization differ from layer to layer, and so what meets the edge is not λ_max times
    one rate: with ``optimizer`` it is the largest eigenvalue of √R H √R, R being the optimizer's rates, which is the
    sharpness in the coordinates in which all rates are equal.

    Momentum moves the edge, and the rates are in units of it, so that it is at 2 with any: η·λ is over 1 + β for
    momentum β, times 1 − τ for dampening τ, and over (1 + β)/(1 + 2β) for Nesterov's (see :func:`rates_of`). Weight
    decay ω is no part of the loss here: it adds ω to each λ, so that the edge comes η·ω before 2 (where all rates are
    equal, without momentum).

    Args:
        model, loss, data: see :func:`hessian_eigenvalues`.
        optimizer: SGD on ``model.parameters()``, torch's or gammaopt's, that minimises with one momentum in all groups.
        tol: relative error to stop at.
        settings: others of :func:`hessian_eigenvalues`.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> data = torch.ones(1, 1), torch.zeros(1, 1)
        >>> round(sharpness(net, "mse", data, optimizer=torch.optim.SGD(net.parameters(), lr=0.5)), 6)  # λ = 2
        1.0
    """
    found = hessian_eigenvalues(model, loss, data, 1, tol=tol, optimizer=optimizer, **settings)
    return float(found.values[0])


@dataclass(frozen=True)
class Trace:
    """An estimate of tr H, its standard error (0 where it is exact), and the products made."""

    value: float
    error: float
    products: int


def hessian_trace(
    model: nn.Module,
    loss: str | LossFunction,
    data: Data,
    *,
    products: int = 60,
    matrix: Matrix = "hessian",
    reduction: Reduction = "mean",
    output: Output | None = None,
    dtype: torch.dtype = DOUBLE,
    seed: int = 0,
) -> Trace:
    """tr H by Hutch++: a third of the products sketch the range of H, a third trace it there, a third the rest.

    Exact, with n products, where there are as many as there are parameters.

    Args:
        model, loss, data, matrix, reduction, output, dtype, seed: see :func:`hessian_eigenvalues`.
        products: to make at most, at least 6; the error is about 1/products of the nuclear norm Σ \\|λ\\|, which for an
            indefinite H may be many times its trace.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(3, 1, bias=False)
        >>> trace = hessian_trace(net, "mse", (torch.eye(3), torch.zeros(3, 1)))  # H = 2/3 of the identity
        >>> round(trace.value, 6), trace.error
        (2.0, 0.0)
    """
    at_least("products", products, 6)
    operator = _operator(model, loss, data, None, matrix=matrix, reduction=reduction, output=output, dtype=dtype)
    n, columns = operator.size, products // 3
    draw = torch.Generator().manual_seed(seed)
    if n <= products:
        # A random reflection of the unit vectors: a frame of which no vector sees one parameter alone.
        mirror = _on_device(torch.randn(n, generator=draw, dtype=torch.float64), operator)
        mirror /= mirror.norm()
        total = 0.0
        for i in range(n):
            vector = -2 * mirror[i] * mirror
            vector[i] += 1
            total += float(vector @ operator(vector))
        return Trace(total, 0.0, operator.products)
    sketch = torch.stack([operator(_signs(n, draw, operator)) for _ in range(columns)], dim=1)
    frame, _ = torch.linalg.qr(sketch)
    on_range = sum(float(column @ operator(column.contiguous())) for column in frame.T)
    rest = []
    for _ in range(products - 2 * columns):
        vector = _signs(n, draw, operator)
        vector = vector - frame @ (frame.T @ vector)
        rest.append(float(vector @ operator(vector)))
    error = float(np.std(rest, ddof=1)) / len(rest) ** 0.5
    return Trace(on_range + float(np.mean(rest)), error, operator.products)


@dataclass(frozen=True)
class SpectralDensity:
    """The density of eigenvalues as weighted nodes: ``weights`` (summing to 1) of mass at ``nodes``, ascending."""

    nodes: Array
    weights: Array
    products: int

    def smoothed(self, grid: Array, width: float) -> Array:
        """The density on a grid of λ, each node a Gaussian of standard deviation ``width``."""
        positive("width", width)
        distance = (np.asarray(grid)[:, None] - self.nodes) / width
        made: Array = np.exp(-0.5 * distance**2) @ self.weights / (width * (2 * np.pi) ** 0.5)
        return made


def spectral_density(
    model: nn.Module,
    loss: str | LossFunction,
    data: Data,
    *,
    probes: int = 4,
    steps: int = 40,
    matrix: Matrix = "hessian",
    reduction: Reduction = "mean",
    output: Output | None = None,
    dtype: torch.dtype = DOUBLE,
    seed: int = 0,
) -> SpectralDensity:
    """The density of all n eigenvalues by stochastic Lanczos quadrature.

    Moments up to degree 2·``steps`` − 1 of each probe's measure are exact; averaging over probes costs an error of
    about 1/√(n·``probes``).

    Args:
        model, loss, data, matrix, reduction, output, dtype, seed: see :func:`hessian_eigenvalues`.
        probes: random vectors, ≥ 1.
        steps: Lanczos steps from each, ≥ 2: probes × steps products at most.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(3, 1, bias=False)
        >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
        >>> density = spectral_density(net, "mse", (x, torch.zeros(3, 1)), probes=1)  # H = 2 xᵀx/3
        >>> density.nodes.round(4).tolist(), round(float(density.weights.sum()), 6)
        ([0.6667, 2.6667, 6.0], 1.0)
    """
    at_least("probes", probes, 1), at_least("steps", steps, 2)
    operator = _operator(model, loss, data, None, matrix=matrix, reduction=reduction, output=output, dtype=dtype)
    draw = torch.Generator().manual_seed(seed)
    nodes, weights = [], []
    for _ in range(probes):
        start = _on_device(torch.randn(operator.size, generator=draw, dtype=torch.float64), operator)
        space = Krylov(operator, start, min(steps + 1, operator.size), draw)
        while space.done < steps and not space.exhausted:
            space.advance()
        at, mass = space.quadrature()
        nodes.append(at)
        weights.append(mass / probes)
    every = np.concatenate(nodes)
    ascending = np.argsort(every)
    return SpectralDensity(every[ascending], np.concatenate(weights)[ascending], operator.products)


def _operator(
    model: nn.Module, loss: str | LossFunction, data: Data, optimizer: torch.optim.Optimizer | None, **settings: Any
) -> Curvature:
    if optimizer is not None and not isinstance(optimizer, torch.optim.SGD):
        raise UsageError(
            f"{type(optimizer).__name__} does not step by rate × gradient, so its rates say nothing of its edge of "
            "stability; leave optimizer= out, or give the SGD that trains the model"
        )
    rates = None if optimizer is None else rates_of(optimizer, model)
    return Curvature(model, loss, data, rates=rates, **settings)


def _on_device(vectors: Tensor, operator: Curvature) -> Tensor:
    return vectors.to(operator.device, operator.dtype)


def _signs(n: int, draw: torch.Generator, operator: Curvature) -> Tensor:
    return _on_device(2.0 * torch.randint(2, (n,), generator=draw).double() - 1.0, operator)
