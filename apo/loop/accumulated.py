"""Whether a closure adds to gradients that were there before it: a trial would then see only its part of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from apo.ranks.sharding import local

__all__ = ["GradientsBefore"]


class GradientsBefore:
    """What a closure finds in ``.grad``. Make it before the closure is run at θ.

    Only the smallest gradient is looked at. No synchronisation where the closure clears as ``zero_grad`` does by
    default.

    Args:
        parameters: the weights.
        any_rank: whether a condition holds on any of the ranks that train the model.
    """

    def __init__(self, parameters: Sequence[Tensor], any_rank: Callable[[bool], bool] = bool) -> None:
        self._any_rank = any_rank
        found = [p for p in parameters if p.grad is not None and p.grad.numel() and p.grad.layout == torch.strided]
        self._parameter = min(found, key=Tensor.numel, default=None)
        if self._parameter is not None:
            self._grad = self._parameter.grad
            self._content = None if self._grad is None else self._grad.detach().clone()

    def guarded(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, to be run at trial weights after it was run at θ.

        It raises ValueError where it adds to the gradients that it finds and found some at θ.
        """
        p, content = self._parameter, None if self._parameter is None else self._content
        if p is None or content is None or p.grad is not self._grad:
            return closure
        if not self._any_rank(bool(local(content).any())):
            return closure

        def at_trial() -> Any:
            probe = p.grad = torch.full_like(content, torch.nan)
            version = local(probe)._version
            loss = closure()
            written = p.grad is probe
            if written and local(probe)._version == version:
                p.grad, written = None, False  # not touched
            if self._any_rank(written and bool(local(probe).isnan().all()) and local(probe).numel() > 0):
                raise ValueError(
                    "closure must clear the gradients that it finds, but added to those that were accumulated before "
                    "it: run again at the trial weights it would give only its own part of the batch. Run all parts "
                    "in the closure, or give the ProximalObjective a loss=, whose trials need no closure"
                )
            return loss

        return at_trial
