"""Function-space discrepancies ``D_F = E ρ(f(x̃, θ′), f(x̃, θ))`` (the second term of Eq. 8).

Each is a callable ``rho(new, old) -> scalar``: the mean over a batch of the divergence between the outputs at the
lookahead and those at the weights, which are detached. At ``new = old`` it is zero, and so is its gradient. Its Hessian
there is the Gauss–Newton matrix of the outputs, the ``G`` of Eq. 4 and of Theorem 1. Where ρ is a KL divergence, that
is the Fisher matrix.

A discrepancy has to match the loss in scale. The defaults here fit a loss that is summed over outputs and averaged over
examples, as ``F.cross_entropy`` is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apo import checks

__all__ = ["KL", "BernoulliKL", "Discrepancy", "FisherSample", "GaussianKL", "SquaredError", "discrepancy_named"]

Discrepancy = Callable[[Any, Any], Tensor]
"""``rho(new, old) -> scalar``. Both are what the model returned, or what ``outputs=`` took from it."""


FisherSample = Callable[[Any, torch.Generator], list[Tensor]]
"""A discrepancy's ``fisher_sample(outputs, generator)``: one cotangent per tensor of the outputs, drawn such that their
covariance is the discrepancy's Hessian at ``new = old``. Sent back through the model they are a gradient ``w`` with
``E wwᵀ`` the Fisher matrix. A discrepancy without it gets no start by :mod:`apo.fisher.start`."""


class KL:
    """``KL(softmax(old) ‖ softmax(new))`` of logits, averaged over all dimensions except that of the classes.

    Args:
        dim: the dimension of the classes: -1, the last, for ``(N, C)`` and for language models' ``(N, T, C)``;
            1 for segmentation's ``(N, C, H, W)``.

    Raises:
        ValueError: at a trial: there is only one class, whose softmax is constant, or no dimension but the classes'.
    """

    def __init__(self, dim: int = -1) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim must be an integer, but got {dim!r} ({type(dim).__name__})")
        self.dim = dim

    def __call__(self, new: Tensor, old: Tensor) -> Tensor:
        new, old = self._logits(new, old)
        log_p = F.log_softmax(old, self.dim)
        log_q = F.log_softmax(new, self.dim)
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / (new.numel() // new.shape[self.dim])

    def fisher_sample(self, outputs: Tensor, generator: torch.Generator) -> list[Tensor]:
        """``(softmax − onehot(y)) / √n`` with ``y`` sampled from the outputs: see :data:`FisherSample`."""
        logits, _ = self._logits(outputs, outputs)
        p = F.softmax(logits.detach().movedim(self.dim, -1), -1)
        drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])
        found = p - F.one_hot(drawn, p.shape[-1])
        return [found.movedim(-1, self.dim) / math.sqrt(drawn.numel())]

    def _logits(self, new: object, old: object) -> tuple[Tensor, Tensor]:
        new, old = _logits("KL", new, old, self.dim)
        if new.ndim < 2:
            raise ValueError(
                f"discrepancy 'kl' needs outputs of examples by classes, but got shape {tuple(new.shape)}: where that "
                "is one number for each example, take 'bernoulli' for logits, 'mse' for values; where it is one "
                "example's classes, outputs=lambda returned: returned[None]"
            )
        if new.shape[self.dim] == 1:
            raise ValueError(
                f"discrepancy 'kl' needs outputs with two classes or more, but got shape {tuple(new.shape)}: the "
                "softmax of one number is 1 whatever it is. Take 'bernoulli' for one logit, 'mse' for one value"
            )
        return new, old


class SquaredError:
    """``½ ‖new − old‖²``, summed over outputs and averaged over examples (dimension 0).

    Args:
        mean: average over the outputs too, as ``F.mse_loss`` does.
    """

    def __init__(self, *, mean: bool = False) -> None:
        self.mean = checks.boolean("mean", mean)

    def __call__(self, new: Tensor, old: Tensor) -> Tensor:
        new, old = _logits("SquaredError", new, old)
        return (new - old).square().sum() / (2 * _count(new, mean=self.mean))

    def fisher_sample(self, outputs: Tensor, generator: torch.Generator) -> list[Tensor]:
        """``N(0, 1) / √n``: see :data:`FisherSample`."""
        outputs, _ = _logits("SquaredError", outputs, outputs)
        return [_normal(outputs, generator) / math.sqrt(_count(outputs, mean=self.mean))]


class BernoulliKL:
    """``KL(σ(old) ‖ σ(new))`` of logits, summed over outputs and averaged over examples (dimension 0).

    For losses like ``F.binary_cross_entropy_with_logits(..., reduction="sum") / len(x)``.

    Args:
        mean: average over the outputs too.
    """

    def __init__(self, *, mean: bool = False) -> None:
        self.mean = checks.boolean("mean", mean)

    def __call__(self, new: Tensor, old: Tensor) -> Tensor:
        new, old = _logits("BernoulliKL", new, old)
        p = torch.sigmoid(old)
        # log σ of both signs: exact where 1 − σ would round to nothing
        positive = F.logsigmoid(old) - F.logsigmoid(new)
        negative = F.logsigmoid(-old) - F.logsigmoid(-new)
        total = (p * positive + torch.sigmoid(-old) * negative).sum()
        return total / _count(new, mean=self.mean)

    def fisher_sample(self, outputs: Tensor, generator: torch.Generator) -> list[Tensor]:
        """``(σ − y) / √n`` with ``y`` sampled from the outputs: see :data:`FisherSample`."""
        outputs, _ = _logits("BernoulliKL", outputs, outputs)
        p = torch.sigmoid(outputs.detach())
        drawn = torch.bernoulli(p, generator=generator)
        return [(p - drawn) / math.sqrt(_count(p, mean=self.mean))]


class GaussianKL:
    """``KL(N(old) ‖ N(new))``, summed over outputs and averaged over examples (dimension 0).

    Args:
        variance: of outputs that are means, ``½ ‖new − old‖² / variance``; None for outputs that are a pair
            ``(mean, log_variance)`` of equal shapes.
    """

    def __init__(self, variance: float | None = None) -> None:
        self.variance = None if variance is None else checks.number("variance", variance, above=True)

    def __call__(self, new: Any, old: Any) -> Tensor:
        if self.variance is not None:
            return SquaredError()(new, old) / self.variance
        each = zip(self._pair(new), old, strict=True)
        (mean, old_mean), (log_var, old_log_var) = (_logits("GaussianKL", *both) for both in each)
        change = log_var - old_log_var
        ratio = ((old_mean - mean).square() + old_log_var.exp()) * torch.exp(-log_var)
        return (change + ratio - 1).sum() / (2 * _count(mean))

    def fisher_sample(self, outputs: Any, generator: torch.Generator) -> list[Tensor]:
        """``N(0, 1/variance) / √n`` of means, ``N(0, ½) / √n`` of log-variances: see :data:`FisherSample`."""
        if self.variance is not None:
            return [x / math.sqrt(self.variance) for x in SquaredError().fisher_sample(outputs, generator)]
        mean, log_var = (_logits("GaussianKL", x, x)[0].detach() for x in self._pair(outputs))
        of_mean = _normal(mean, generator) * torch.exp(-log_var / 2)
        return [of_mean / math.sqrt(_count(mean)), _normal(log_var, generator) / math.sqrt(2 * _count(mean))]

    @staticmethod
    def _pair(outputs: Any) -> Any:
        if not (isinstance(outputs, (tuple, list)) and len(outputs) == 2):
            raise TypeError(
                "GaussianKL without a variance needs outputs that are a pair (mean, log_variance), "
                f"but got {type(outputs).__name__}"
            )
        return outputs


_NAMED: dict[str, Callable[[], Discrepancy]] = {
    "kl": KL,
    "mse": SquaredError,
    "bernoulli": BernoulliKL,
    "gaussian": GaussianKL,
}


def discrepancy_named(discrepancy: str | Discrepancy) -> Discrepancy:
    """``"kl"``, ``"mse"``, ``"bernoulli"`` or ``"gaussian"`` as a callable; a callable as it is."""
    if isinstance(discrepancy, str):
        checks.one_of("discrepancy", discrepancy, _NAMED)
        return _NAMED[discrepancy]()
    if isinstance(discrepancy, type):
        name = discrepancy.__name__
        raise TypeError(
            f"discrepancy must be a name or a callable rho(new, old), but got the class {name}: make one, {name}()"
        )
    if not callable(discrepancy):
        raise TypeError(
            f"discrepancy must be one of {', '.join(map(repr, _NAMED))} or a callable rho(new, old) -> scalar, "
            f"but got {discrepancy!r} ({type(discrepancy).__name__})"
        )
    return discrepancy


def takes_pairs(discrepancy: Discrepancy) -> bool:
    """Whether the discrepancy is of the whole tuple that the model returns."""
    return isinstance(discrepancy, GaussianKL) and discrepancy.variance is None


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(like.shape, generator=generator, dtype=dtype, device=like.device)


def _count(outputs: Tensor, *, mean: bool = False) -> int:
    """What sums are divided by: examples, along dimension 0, or numbers. One number alone is an example."""
    return outputs.numel() if mean or outputs.ndim == 0 else len(outputs)


def _logits(name: str, new: object, old: object, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Both as tensors wide enough to sum in."""
    if not isinstance(new, Tensor) or not isinstance(old, Tensor):
        raise TypeError(
            f"{name} needs outputs that are tensors, but got {type(new).__name__}: say which with "
            "ProximalObjective(outputs=lambda returned: ...)"
        )
    if new.shape != old.shape:
        raise ValueError(f"{name} needs outputs of one shape, but got {tuple(new.shape)} and {tuple(old.shape)}")
    if new.ndim and not -new.ndim <= dim < new.ndim:
        raise ValueError(f"{name} needs outputs that have a dimension {dim}, but got shape {tuple(new.shape)}")
    wide = torch.promote_types(new.dtype, torch.float32)
    return new.to(wide), old.to(wide)
