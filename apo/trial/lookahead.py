"""One copy of the weights, put back whatever happens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from apo.ranks.sharding import local
from apo.trial.autocast import forget_casts
from apo.trial.copies import copies_of, write
from apo.trial.restoring import set_version, surely

__all__ = ["Lookahead"]


class Lookahead:
    """Holds one copy of the weights, and puts it back when the block is left, whatever the reason.

    Args:
        parameters: the weights; of a DTensor, this rank's part.
        models: what may hold gathered or cast copies of them.

    Attributes:
        start: the copies, in the order of ``parameters``.
    """

    def __init__(self, parameters: Sequence[Tensor], models: Iterable[nn.Module] = ()) -> None:
        self._models = list(models)
        self._placed = [(p, p._version) for p in parameters if local(p) is not p]
        self._parameters = [local(p) for p in parameters]
        self._versions = [p._version for p in self._parameters]
        self.start = copies_of(self._parameters)

    def restore(self) -> None:
        """Write the weights back, to the bit: a graph that was made before is as good as it was."""
        write(self._parameters, self.start)
        for p, version in zip(self._parameters, self._versions, strict=True):
            set_version(p, version)
        for p, version in self._placed:
            set_version(p, version)
        forget_casts(self._models)

    def __enter__(self) -> Lookahead:
        return self

    def __exit__(self, *_: object) -> None:
        surely(self.restore)
