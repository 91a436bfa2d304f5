"""The tensors of a call on a whole model: what must be looked at in every call to know them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor

from apo_kernels.memory import addresses
from apo_kernels.slopes import Parts

__all__ = ["Given"]

_DTYPE, _DEVICE = attrgetter("dtype"), attrgetter("device")


class Given(NamedTuple):
    """The gradients, the weights if any and the momentum buffers if any, without the layers that are None.

    A tensor keeps neither its form where its memory stays, nor its memory where it stays the same object: ``t_()``,
    ``resize_``, ``set_`` and ``.data =`` change it in place. So all of it is compared.

    Attributes:
        layers: those that take part.
        counts: how many entries the lists have, and how many parts each layer.
        reads: how many of ``tensors`` are gradients.
        weights: how many are weights: none, or as many. They are None where the gradient is.
        tensors: by layer and part the gradients, then the weights, then by layer the momentum buffers.
        places: where they lie; 0 for None.
        forms: of those that aren't None sizes, strides, dtypes and whether any is lazily negated. Strides are None
            where all are contiguous: then the sizes tell.
        held: the weights and buffers, weakly, to know them again: an object doesn't become lazily negated.
    """

    layers: list[int]
    counts: list[int]
    reads: int
    weights: int
    tensors: list[Tensor | None]
    places: list[int]
    forms: tuple[Any, ...]
    held: list[Callable[[], Tensor | None]]

    @classmethod
    def of(
        cls, written: Parts, read: Parts, buffers: Sequence[Tensor | None] | None, known: Given | None = None
    ) -> Given:
        """``written is read`` where nothing is written. ``known``: of a former call.

        Raises:
            AttributeError, LookupError, RuntimeError, TypeError: these are no parts, or no tensors that lie in memory.
        """
        lists: list[Sequence[Any]] = [read]
        layers, parts = [*range(len(read))], [*read]
        if None in parts:
            layers = [i for i in layers if read[i] is not None]
            parts = [read[i] for i in layers]
        tensors = [x for own in parts for x in own]  # type: ignore[union-attr]
        reads = len(tensors)
        weights = 0
        if written is not read:
            lists.append(written)
            parts += written if len(layers) == len(written) else [written[i] for i in layers]
            tensors += [x for own in parts[len(layers) :] for x in own]  # type: ignore[union-attr]
            weights = len(tensors) - reads
            if weights != reads:
                raise TypeError(f"there are {reads} parts of gradients, but {weights} of weights")
        if buffers is not None:
            lists.append(buffers)
            tensors += buffers if len(layers) == len(buffers) else [buffers[i] for i in layers]
        there: list[Tensor] = tensors  # type: ignore[assignment]
        try:
            places = [*map(Tensor.data_ptr, there)]
        except TypeError:  # some are None
            tensors[reads : reads + weights] = [
                None if G is None else x for G, x in zip(tensors, tensors[reads : reads + weights], strict=False)
            ]
            there = [x for x in tensors if x is not None]
            places = addresses(tensors)
        own = tensors[reads:]
        held = known is not None and len(own) == len(known.held) and all(map(is_, own, [x() for x in known.held]))
        plain = all(map(Tensor.is_contiguous, there))
        forms = (
            [*map(Tensor.size, there)],
            None if plain else [*map(Tensor.stride, there)],
            [*map(_DTYPE, there)],
            any(map(Tensor.is_neg, tensors[:reads] if held and there is tensors else there)),
        )
        counts = [*map(len, lists), *map(len, parts)]  # type: ignore[arg-type]
        return cls(layers, counts, reads, weights, tensors, places, forms, known.held if known and held else [])

    @property
    def gradients(self) -> list[Tensor]:
        return self._there(0, self.reads)

    @property
    def stepped(self) -> list[Tensor]:
        """The weights that are written: those with a gradient."""
        return self._there(self.reads, self.reads + self.weights)

    @property
    def buffers(self) -> list[Tensor]:
        return self._there(self.reads + self.weights, len(self.tensors))

    def _there(self, first: int, end: int) -> list[Tensor]:
        return [x for x in self.tensors[first:end] if x is not None]

    def same(self, other: Given) -> bool:
        """Whether the other's are of these forms, at these places."""
        return self.places is other.places or (self.places == other.places and self.alike(other))

    def alike(self, other: Given) -> bool:
        """Whether the other's are of these forms, wherever they lie."""
        return self.layers == other.layers and self.counts == other.counts and self.forms == other.forms

    def kinds(self) -> object:
        """All else that there is to check of tensors of known forms: it doesn't depend on where they lie."""
        there = [x for x in self.tensors if x is not None]
        return [*map(type, self.tensors)], [*map(_DEVICE, there)], [*map(Tensor.is_inference, there)]

    def written_places(self) -> list[int]:
        """Where weights and momentum buffers lie."""
        return self.places[self.reads :]

    def forget(self) -> Given:
        """Without the tensors: these may go."""
        held = self.held or [_nothing if x is None else ref(x) for x in self.tensors[self.reads :]]
        return self._replace(tensors=[], held=held)


def _nothing() -> None:
    return None
