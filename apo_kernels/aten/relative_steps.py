"""Relative steps on torch's own operations: see :mod:`apo_kernels.relative_steps`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apo_kernels.aten.operators import aligned_product

__all__ = ["EPS", "relative_step_scalings_", "relative_step_squares_"]

Numbers = float | Tensor

EPS = {torch.float32: 1e-18, torch.float64: 1e-150}
"""Slopes have no scale of their own: this only keeps sizes that underflow from being divided by."""

SQUARES_AT_A_TIME = 64
SCALINGS_AT_A_TIME = 2**16
"""On a CPU: as many as stay in its cache."""


def relative_step_squares_(
    X: Tensor,
    slope: Tensor,
    size: Tensor,
    new_slope: Tensor,
    new_size: Tensor,
    rate: Numbers,
    betas: tuple[float, float],
    correction: Numbers,
    floor: float,
    longest: float,
    active: Tensor | None,
) -> None:
    count = len(X)
    step = SQUARES_AT_A_TIME if X.device.type == "cpu" else count
    rate, correction = (x[:, None, None] if isinstance(x, Tensor) else x for x in (rate, correction))
    if active is not None:  # a rate of 0 leaves a square as it is
        rate = active[:, None, None].to(X.dtype) * rate
    for part in (slice(first, first + step) for first in range(0, count, step)):
        takes_part = None if active is None else active[part]
        _average_(slope[part], new_slope[part], betas[0], takes_part)
        _average_(size[part], new_size[part], betas[1], takes_part)
        own, average, mean = X[part], slope[part], size[part]
        least = floor * mean.mean(-1, keepdim=True) + EPS[X.dtype]
        scale = (mean + least).rsqrt_()
        change = torch.add(average, average.mT).mul_(scale.unsqueeze(-1)).mul_(scale.unsqueeze(-2))
        change.mul_(_part(correction, part) / 2)
        length = torch.linalg.vector_norm(change, dim=(-2, -1), keepdim=True)
        change.mul_(length.clamp_min_(longest).reciprocal_().mul_(_part(rate, part) * longest))
        own.sub_(torch.bmm(own, change) if len(own) > 1 else aligned_product(own, change))


def relative_step_scalings_(
    S: Tensor,
    slope: Tensor,
    size: Tensor,
    new_slope: Tensor,
    new_size: Tensor,
    lengths: Sequence[int],
    entries: Sequence[int],
    rate: Numbers,
    betas: tuple[float, float],
    correction: Numbers,
    floor: float,
    active: Tensor | None,
    total: Callable[[Tensor], None] | None,
) -> None:
    if active is not None:
        rate = active.to(S.dtype) * rate
    floors = None
    for floored in (False, True):  # all sizes are averaged before the first floor is taken
        if floored:
            floors = _floors(size, lengths, entries, floor, total)
        for part, tensors in _parts(lengths, S.device.type == "cpu"):
            counts = torch.tensor(lengths[tensors], device=S.device)

            def each(x: Tensor, tensors: slice = tensors, counts: Tensor = counts) -> Tensor:
                """A number of each tensor's, for each entry of the part, or, of one tensor alone, one for all."""
                own = x[tensors]
                return own if len(own) == 1 else own.repeat_interleave(counts)

            if floors is None:
                takes_part = None if active is None else each(active)
                _average_(slope[part], new_slope[part], betas[0], takes_part)
                _average_(size[part], new_size[part], betas[1], takes_part)
            else:
                numbers = (each(x) if isinstance(x, Tensor) else x for x in (rate, correction))
                _step_scalings(S[part], slope[part], size[part], each(floors), *numbers)


def _parts(lengths: Sequence[int], cached: bool) -> list[tuple[slice, slice]]:
    """Slices of the entries, and which tensors they are of: of one large one, or of several small ones."""
    most = SCALINGS_AT_A_TIME if cached else sum(lengths)
    parts: list[tuple[slice, slice]] = []
    first = at = 0
    while at < len(lengths):
        if lengths[at] > most:
            end = first + lengths[at]
            parts += [(slice(x, min(x + most, end)), slice(at, at + 1)) for x in range(first, end, most)]
            first, at = end, at + 1
            continue
        begin, tensor = first, at
        while at < len(lengths) and first + lengths[at] - begin <= most:
            first, at = first + lengths[at], at + 1
        parts.append((slice(begin, first), slice(tensor, at)))
    return parts


def _floors(
    size: Tensor,
    lengths: Sequence[int],
    entries: Sequence[int],
    floor: float,
    total: Callable[[Tensor], None] | None,
) -> Tensor:
    """The least size of each tensor."""
    sums = torch.stack(torch._foreach_norm(list(torch.split(size, list(lengths))), ord=1))
    if total is not None:
        total(sums)
    means = sums / torch.tensor([max(each, 1) for each in entries], dtype=size.dtype, device=size.device)
    return means.mul_(floor).add_(EPS[size.dtype])


def _step_scalings(S: Tensor, slope: Tensor, size: Tensor, floor: Tensor, rate: Numbers, correction: Numbers) -> None:
    ratio = slope / (size + floor)
    ratio.mul_(correction).clamp_(-1, 1)
    S.mul_(ratio.mul_(-rate).exp_())


def _average_(mean: Tensor, new: Tensor, beta: float, active: Tensor | None) -> None:
    if active is None:
        mean.lerp_(new, 1 - beta)
    else:
        own = active.view(-1, *[1] * (mean.ndim - 1))
        mean.copy_(torch.where(own, torch.lerp(mean, new, 1 - beta), mean))


def _part(number: Numbers, part: slice) -> Numbers:
    return number[part] if isinstance(number, Tensor) else number
