"""The losses of tasks, each with its discrepancy, likelihood and metric.

Every loss is summed over outputs and averaged over examples: a negative log-likelihood, whose Fisher matrix is the
Hessian of the discrepancy. That makes λ_FSD and a damping mean the same on every task.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.fisher.damping import wide


@dataclass(frozen=True)
class Loss:
    """Both functions are ``(outputs, targets) -> scalar``, the mean over examples, in at least float32."""

    name: str  # as outputs call it
    function: Callable[[Tensor, Tensor], Tensor]
    discrepancy: str  # of ``apo.ProximalObjective``
    likelihood: str  # of ``benchmarks.paper.baselines.KFAC``
    metric: str  # the name of ``measure``, with its unit
    measure: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool  # of the metric


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(wide(outputs), targets)


def _accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return 100 * (outputs.argmax(-1) == targets).double().mean()


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    y = wide(outputs)
    return (y - targets.to(y.dtype)).square().sum() / len(y)


def _half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return _squared_error(outputs, targets) / 2


def _bernoulli(outputs: Tensor, targets: Tensor) -> Tensor:
    y = wide(outputs)
    return F.binary_cross_entropy_with_logits(y, targets.to(y.dtype), reduction="sum") / len(y)


def _reconstruction(outputs: Tensor, targets: Tensor) -> Tensor:
    return _squared_error(wide(outputs).sigmoid(), targets)


CLASSIFICATION = Loss("cross entropy", _cross_entropy, "kl", "categorical", "accuracy, %", _accuracy, True)
REGRESSION = Loss("½ squared error", _half_squared_error, "mse", "gaussian", "squared error", _squared_error, False)
BERNOULLI = Loss("binary cross entropy", _bernoulli, "bernoulli", "bernoulli", "squared error", _reconstruction, False)
TRANSLATION = replace(CLASSIFICATION, name="cross entropy per token", metric="accuracy of tokens, %")
