r"""The laws of the best learning rate across the feature-learning strength γ. Pure numbers, no torch.

For f = (h − h₀)/γ the best rate follows η*(γ) = η*(1)·s(γ), a power below the knee γ_c and another above it:

    s(γ) = ψ(γ/γ_c) / ψ(1/γ_c),    ψ(x) = x^lazy for x ≤ 1,   x^rich for x ≥ 1

    optimizer             loss            lazy    rich
    SGD (any momentum)    MSE             2       2/L
    SGD (any momentum)    cross-entropy   1       2/L
    Adam, AdamW, Muon     any             1       1/L

Source: Atanasov, Meterez, Simon, Pehlevan, "The Optimization Landscape of SGD Across the Feature Learning
Strength", ICLR 2025 (arXiv 2410.04642) for SGD. The exponents for Adam and Muon, the cross-entropy exponent and the
knee are this project's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from gammaopt._errors import UsageError, one_of, positive

if TYPE_CHECKING:
    from gammaopt._fit import Of, Record, Slopes

OptimizerFamily = Literal["sgd", "adam", "muon"]
Loss = Literal["mse", "cross_entropy"]

# Below it float64 is advised: h − h₀ in float32 loses about 2.4e-7/γ of the output, here 2.4e-4.
SMALLEST_FLOAT32_GAMMA = 1e-3
# Below it our own runs are trained in float64 whatever was asked: a run near its stable edge makes that loss larger at
# every step, and under cross-entropy two orders of summation are apart by 9 % of the loss after 100 steps at γ = 0.003.
FLOAT64_BELOW_GAMMA = 1e-2


@dataclass(frozen=True)
class LawFit:
    """A law calibrated on runs: ``fit.law.lr(fit.base_lr, gamma)`` is the rate it predicts.

    Attributes:
        law: with the fitted exponents and bend, and the predicted ones where the runs could not tell.
        base_lr: c, the fitted rate at γ = 1.
        slopes: what was fitted, with 95 % intervals and the points.
    """

    law: EtaLaw
    base_lr: float
    slopes: Slopes = field(repr=False)

    def __str__(self) -> str:
        """A table: each number with its 95 % interval, and what the law takes where the runs could not tell."""
        slopes = self.slopes
        rows = (
            ("rate at γ = 1", self.base_lr, slopes.lr_interval),
            ("lazy exponent", self.law.lazy, slopes.lazy_interval),
            ("rich exponent", self.law.rich, slopes.rich_interval),
            ("bend γ_c     ", self.law.knee, slopes.bend_interval),
        )
        lines = [f"law of {len(slopes.points)} points at {len({p.gamma for p in slopes.points})} γ, 95 % intervals"]
        for name, value, interval in rows:
            told = f"{interval[0]:.3g} … {interval[1]:.3g}" if interval else "not fitted"
            lines.append(f"  {name}  {value:<7.3g}  {told}")
        return "\n".join(lines)


@dataclass(frozen=True)
class EtaLaw:
    r"""How the best learning rate and the time to learn change with γ.

    Under cross-entropy and SGD the lazy exponent is 1, not 2. Training stays kernel-like up to rates ∝ γ², but the
    largest stable rate, and the best one at a finite budget, is ∝ γ: the residual p − y is bounded by 1, so one step
    moves a weight by at most about η/γ and the weights stay put as long as η ≲ γ, and a softmax that overshoots
    recovers. ``lazy_exponent=2`` selects the kernel-regime law.

    Args:
        depth: L, the degree of homogeneity of the network's output in its parameters; :func:`effective_depth`
            measures it. A plain ReLU network with L weight layers has depth L.
        optimizer: family of the update: ``"sgd"``, ``"adam"`` or ``"muon"``.
        loss: ``"mse"`` or ``"cross_entropy"``.
        knee: γ_c, where lazy turns rich. 1 for a network in mean-field form.
        lazy_exponent: exponent for γ < γ_c; ``None`` takes the table above.

    Raises:
        UsageError: for a depth, knee or exponent that is not finite and positive, or an unknown name.

    Example:
        >>> law = EtaLaw(depth=3)
        >>> round(law.factor(1000.0), 6), round(law.factor(0.1), 6)
        (100.0, 0.01)
        >>> round(law.lr(0.5, 8.0), 6)
        2.0
        >>> round(law.gamma_max(steps=1000, at_one=100), 6)
        1000.0
    """

    depth: float
    optimizer: OptimizerFamily = "sgd"
    loss: Loss = "mse"
    knee: float = 1.0
    _: KW_ONLY
    lazy_exponent: float | None = None

    def __post_init__(self) -> None:
        positive("depth", self.depth)
        positive("knee", self.knee)
        one_of("optimizer", self.optimizer, get_args(OptimizerFamily))
        one_of("loss", self.loss, get_args(Loss))
        if self.lazy_exponent is not None:
            positive("lazy_exponent", self.lazy_exponent)

    @property
    def lazy(self) -> float:
        """The exponent of η* in γ below the knee."""
        if self.lazy_exponent is not None:
            return self.lazy_exponent
        return 2.0 if (self.optimizer, self.loss) == ("sgd", "mse") else 1.0

    @property
    def rich(self) -> float:
        """The exponent of η* in γ above the knee: 2/L for SGD, 1/L for Adam."""
        return (2.0 if self.optimizer == "sgd" else 1.0) / self.depth

    def _psi(self, x: float) -> float:
        return math.pow(x, self.lazy if x <= 1 else self.rich)

    def factor(self, gamma: float) -> float:
        """s(γ) = η*(γ)/η*(1), so ``factor(1) == 1``. ``gamma`` > 0; no unit."""
        return self._psi(positive("gamma", gamma) / self.knee) / self._psi(1.0 / self.knee)

    def lr(self, base_lr: float, gamma: float) -> float:
        """The rate to use at ``gamma`` when ``base_lr`` is the rate tuned at γ = 1."""
        return positive("base_lr", base_lr) * self.factor(gamma)

    @classmethod
    def fit(
        cls,
        records: Iterable[Record],
        *,
        optimizer: OptimizerFamily = "sgd",
        loss: Loss = "mse",
        of: Of = "best",
        knee: float | None = None,
    ) -> LawFit:
        """Calibrate the law on runs: exponents, bend and rate at γ = 1, with 95 % intervals.

        The fitted law predicts like any other; its ``depth`` is the one that gives the fitted rich exponent.
        A rate is known to half of the distance between those tried, so the intervals hold that too.

        Args:
            records: runs over several γ and, for each γ, several rates; several seeds narrow the intervals.
            optimizer, loss: what the runs were trained with.
            of: fit the ``"best"`` rate at each γ, or the stable ``"edge"``.
            knee: γ_c if it is known. Fitted if there are at least six γ, three on each side, and the slopes below and
                above it differ by more than their interval; else 1.

        Raises:
            UsageError: for what are no records; if fewer than three γ have their best rate, or edge, inside the rates
                tried; or if they don't reach into the rich regime, or the fitted exponents are not positive.
        """
        from gammaopt._fit import critical_rates, fit_slopes

        slopes = fit_slopes(critical_rates(records, of), bend=None if knee is None else positive("knee", knee))
        if slopes.rich is None:
            raise UsageError("fewer than three γ lie above the bend, so its exponent is not known; give larger γ")
        for name, exponent in {"rich": slopes.rich, "lazy": slopes.lazy}.items():
            if exponent is not None and exponent <= 0:
                raise UsageError(
                    f"the fitted {name} exponent is {exponent:.3g}, no law; give more seeds or longer runs"
                )
        depth = (2.0 if optimizer == "sgd" else 1.0) / slopes.rich
        law = cls(depth, optimizer, loss, slopes.bend or 1.0, lazy_exponent=slopes.lazy)
        return LawFit(law, slopes.lr_at_one, slopes)

    def _plateau_growth(self, x: float) -> float:
        """The plateau at γ = x·γ_c over the one at the knee."""
        if x <= 1 or self.optimizer != "sgd" or self.depth < 2:
            return 1.0
        return 1.0 + math.log(x) if self.depth == 2 else math.pow(x, 1.0 - 2.0 / self.depth)

    def plateau_steps(self, gamma: float, at_one: float) -> float:
        """Steps of the plateau before the loss falls, at the law's own rate.

        SGD: ∝ γ^(1−2/L) above the knee for L > 2, 1 + log γ at L = 2, constant for L < 2 and below the knee. These
        are the leading orders in γ: just above L = 2 the power is too slow to show what the logarithm does. Adam and
        Muon: does not grow with γ.

        Args:
            gamma: feature-learning strength, > 0.
            at_one: the plateau's length at γ = 1, in steps, > 0.
        """
        growth = self._plateau_growth(positive("gamma", gamma) / self.knee)
        return positive("at_one", at_one) * growth / self._plateau_growth(1.0 / self.knee)

    def gamma_max(self, steps: float, at_one: float) -> float:
        """The largest γ that a budget of ``steps`` can train: where :meth:`plateau_steps` reaches ``steps``.

        ``inf`` where the plateau is bounded (Adam, Muon, L < 2).

        Raises:
            UsageError: if ``steps`` < ``at_one``: then not even γ = 1 leaves its plateau.
        """
        steps, at_one = positive("steps", steps), positive("at_one", at_one)
        if steps < at_one:
            raise UsageError(
                f"steps={steps:g} is less than at_one={at_one:g}: γ = 1 itself is not trained; give steps >= {at_one:g}"
            )
        growth = steps / at_one * self._plateau_growth(1.0 / self.knee)
        if self.optimizer != "sgd" or self.depth < 2:
            return math.inf
        log_x = growth - 1.0 if self.depth == 2 else math.log(growth) * self.depth / (self.depth - 2.0)
        # A plateau as long as the one at γ = 1 is shared by every γ below the knee: γ = 1 is always trainable.
        return max(1.0, self.knee * math.exp(log_x)) if log_x < 700 else math.inf
