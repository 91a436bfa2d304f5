"""One copy of the weights, put back whatever happens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apo.trial.autocast import forget_casts
from apo.trial.restoring import set_version, surely

__all__ = ["Lookahead"]


class Lookahead:
    """Holds one copy of the weights, and puts it back when the block is left, whatever the reason.

    Attributes:
        start: the copies, in the order of ``parameters``.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._versions = [p._version for p in self._parameters]
        self.start = [torch.empty_like(p) for p in self._parameters]
        if self.start:
            torch._foreach_copy_(self.start, [p.detach() for p in self._parameters])

    def restore(self) -> None:
        """Write the weights back, to the bit: a graph that was made before is as good as it was."""
        with torch.no_grad():
            if self._parameters:
                torch._foreach_copy_(self._parameters, self.start)
        for p, version in zip(self._parameters, self._versions, strict=True):
            set_version(p, version)
        forget_casts()

    def __enter__(self) -> Lookahead:
        return self

    def __exit__(self, *_: object) -> None:
        surely(self.restore)
