"""Errors, breakdowns and losses of range of one method on one problem in one dtype.

Three errors, relative and in the Frobenius norm, show where accuracy is lost. With ``x`` the method's
operands, ``x̂`` the same in the storage dtype, and ``f`` the method::

    error           f(x̂) in the dtype     against the float64 result of unrounded factors and gradient
    arithmetic      f(x̂) in the dtype     against f(x̂) in float64
    representation  f(x̂) in float64       against the float64 result of unrounded factors and gradient

The **limit** is the exact operator on the rounded gradient, its result rounded once. No method that takes and
returns matrices of this dtype can be expected to do better.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.dtypes import SHORT_NAMES
from benchmarks.kernels.stability.methods import Breakdown, InverseMethod, StoredOperands, Trace
from benchmarks.kernels.stability.problem import Damped

DTYPES = tuple(SHORT_NAMES)
LIMIT = "limit"


Counts = Counter[str]
"""Entries that float64 holds and the dtype doesn't: ``overflow`` (infinite or NaN), ``zero`` or ``subnormal``."""


@dataclass(frozen=True)
class Measured:
    """One measurement. An error is None where there is nothing finite to compare."""

    case: str
    source: str
    condition: float
    damping: float
    method: str
    dtype: str
    error: float | None
    arithmetic: float | None
    representation: float | None
    breakdown: str | None  # why the result can't be used
    entries: int
    result: Counts
    intermediates: dict[str, Counts]

    @property
    def pair(self) -> tuple[str, float]:
        """The problem, whatever the method and dtype."""
        return self.case, self.damping


def measure(problem: Damped, method: InverseMethod, dtype: torch.dtype) -> Measured:
    """``method`` on ``problem`` with operands stored in ``dtype``."""
    operands = method.prepare(problem)
    stored = operands.to(dtype)
    trace, failure = _attempt(method, stored)
    wide, _ = _attempt(method, stored.to(torch.float64))
    exact, _ = _attempt(method, operands)
    intermediates = {
        name: count_range(values, exact.intermediates[name] if exact else None)
        for name, values in (trace.intermediates if trace else {}).items()
    }
    results = trace.result if trace else None, wide.result if wide else None
    return _row(problem, method.key, stored.G, *results, failure, intermediates)


def limit(problem: Damped, dtype: torch.dtype) -> Measured:
    """The exact operator on the rounded gradient, rounded to ``dtype``: see the module's docstring."""
    G = problem.case.G.to(dtype)
    wide = problem.exact(G.double())
    return _row(problem, LIMIT, G, wide.to(dtype), wide, None, {})


def _row(
    problem: Damped,
    method: str,
    G: Tensor,
    result: Tensor | None,
    wide: Tensor | None,
    failure: str | None,
    intermediates: dict[str, Counts],
) -> Measured:
    """``G`` is the rounded gradient, ``wide`` the result in float64 of the same operands."""
    error = relative_error(result, problem.result)
    return Measured(
        case=problem.case.name,
        source=problem.case.source,
        condition=problem.case.condition,
        damping=problem.damping,
        method=method,
        dtype=SHORT_NAMES[G.dtype],
        error=error,
        arithmetic=relative_error(result, wide),
        representation=relative_error(wide, problem.result),
        breakdown=failure or _breakdown(G, result, error),
        entries=G.numel(),
        result=count_range(result, problem.result) if result is not None else Counts(),
        intermediates=intermediates,
    )


def relative_error(result: Tensor | None, reference: Tensor | None) -> float | None:
    """``‖result − reference‖ / ‖reference‖`` in float64; None where either is missing or not finite."""
    if result is None or reference is None:
        return None
    norm = reference.double().norm()
    error = ((result.double() - reference.double()).norm() / norm).item()
    return error if error < float("inf") else None


def count_range(values: Tensor, exact: Tensor | None) -> Counts:
    """Overflows and underflows in ``values``, beside what float64 has in their place (None: nothing).

    Entries of ``exact`` that are mere rounding noise of float64 may be lost without being counted.
    """
    if exact is None:
        return Counts(overflow=int((~values.isfinite()).sum()))
    magnitude = exact.abs().where(exact.isfinite(), 0)
    noise = torch.finfo(exact.dtype).eps * max(exact.shape) * magnitude.max()
    held = magnitude > max(noise.item(), torch.finfo(exact.dtype).tiny)
    small = held & values.isfinite() & (values.abs() < torch.finfo(values.dtype).tiny)
    overflow, zero = exact.isfinite() & ~values.isfinite(), small & (values == 0)
    return Counts(overflow=int(overflow.sum()), zero=int(zero.sum()), subnormal=int(small.sum() - zero.sum()))


def _attempt(method: InverseMethod, operands: StoredOperands) -> tuple[Trace | None, str | None]:
    try:
        return method.apply(operands), None
    except Breakdown as failure:
        return None, str(failure)


def _breakdown(G: Tensor, result: Tensor | None, error: float | None) -> str | None:
    """Why a result is of no use, the worst reason first; None if it can be used."""
    if result is None or not result.isfinite().all():
        return "not finite"
    if (G.double() * result.double()).sum() <= 0:
        return "indefinite"  # gᵀPg <= 0: not a direction of descent
    if error is None or error > 1:
        return "error above 1"  # further off than a step of zero
    return None
