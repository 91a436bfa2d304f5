"""What tensors, buffers and attributes of modules hold, written back only where it changed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from operator import is_
from typing import Any, ClassVar
from weakref import ProxyTypes

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apo.trial.copies import copies_of, write
from apo.trial.plain_objects import attributes_of, is_plain_object, put_attributes_back
from apo.trial.random_state import generator_state, is_generator, restore_generator
from apo.trial.restoring import set_version

__all__ = ["UNCHANGING", "Attributes", "Content", "place", "restored"]


_PLACED = (Tensor, nn.Parameter, nn.Buffer)


class Content:
    """What a tensor holds, and the memory that it holds it in. Written back only where it changed.

    A tensor may be expanded, overlap itself, be read-only, or have been made under inference mode.
    """

    LOOKED_AT: ClassVar = frozenset({"cpu"})
    """Kinds of devices where it is free to look whether a tensor changed: elsewhere it is a synchronisation."""

    def __init__(self, tensor: Tensor, memory: Tensor, content: Tensor) -> None:
        self._held = tensor
        self._inference = tensor.is_inference()
        self._version = None if self._inference else tensor._version
        self._memory, self._content = memory, content

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> list[Content]:
        """What each of these holds."""
        tensors = list(tensors)
        memories = [tensor.detach() for tensor in tensors]
        contents = copies_of([cls._part(memory) for memory in memories])
        return [cls(*each) for each in zip(tensors, memories, contents, strict=True)]

    def restore(self, later: list[Content]) -> None:
        """Put it back, without gradients, or note in ``later`` that its memory is to be written, together with
        others'."""
        memory = self._memory
        with torch.inference_mode() if self._inference else nullcontext():
            if not _in_one_place(self._held, memory):
                self._held.data = memory
            plain = type(memory) is Tensor and memory.layout is torch.strided
            looks = memory.device.type in self.LOOKED_AT
            if plain and not looks and not self._inference:
                later.append(self)
                return
            part = self._part(memory)
            if not (plain and looks and torch.equal(part, self._content)):
                part.copy_(self._content)
        self._settle()

    @classmethod
    def write(cls, later: list[Content]) -> None:
        """Write the memory of those noted."""
        write([x._part(x._memory) for x in later], [x._content for x in later])
        for x in later:
            x._settle()

    def _settle(self) -> None:
        if self._version is not None and self._held._version != self._version:
            set_version(self._held, self._version)

    @staticmethod
    def _part(tensor: Tensor) -> Tensor:
        """Its memory, where several of its elements are one there."""
        if tensor.layout is not torch.strided or tensor.is_contiguous() or not _overlaps(tensor):
            return tensor
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.as_strided((extent,), (1,))


def place(tensor: Tensor) -> Any:
    if tensor.layout != torch.strided or type(tensor) not in _PLACED:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _in_one_place(a: Tensor, b: Tensor) -> bool:
    """Whether :func:`place` says the same of both, in a tenth of its time where it says something."""
    alike = a.layout is b.layout is torch.strided and a.dtype is b.dtype and a.device == b.device
    return a.is_set_to(b) if alike and type(a) in _PLACED else place(a) == place(b)


def _overlaps(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return False
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


_OF_EVERY_MODULE = set(nn.Module().__dict__) - {"_non_persistent_buffers_set"}
_CONTAINERS = (list, dict, set, deque)
_PLAIN = (Tensor, int, float, complex, str, bytes, type(None), tuple, np.ndarray, np.generic, bytearray, *_CONTAINERS)
_LEADING_FAR = (nn.Module, Optimizer)
"""Attributes of what leads to the whole program, as a trainer does."""

UNCHANGING = frozenset((int, float, complex, bool, str, bytes, type(None), *ProxyTypes))
"""Types of what holds nothing that could change."""


class Attributes:
    """What a module keeps in ordinary attributes: hidden states, caches, counts, losses on the side, generators.

    Containers are restored to what they held, and so are the attributes of plain objects, such as running means in a
    dataclass: of those that modules hold, not of those that these hold in turn. Other objects, iterators among them,
    and tensors with a graph are left as they are.

    Args:
        seen: plain objects that were met before, as a configuration that all modules hold; added to.
    """

    def __init__(self, module: nn.Module, seen: dict[int, Any]) -> None:
        self._module = module
        self._seen = seen
        own = module.__dict__
        self._all = list(own.values())
        self._values = {k: v for k, v in own.items() if k not in _OF_EVERY_MODULE}
        self._buffers = dict(module._buffers) if isinstance(module._buffers, dict) else None
        self._contents: dict[int, tuple[Any, Any]] = {}
        for value in self._values.values():
            self._save(value)

    def _save(self, value: Any, *, inside_object: bool = False) -> None:
        if type(value) in UNCHANGING or id(value) in self._contents:
            return
        if isinstance(value, Tensor):
            if not value.requires_grad and not value.is_meta and not isinstance(value, nn.Parameter):
                self._contents[id(value)] = value, Content.of([value])[0]
        elif isinstance(value, np.ndarray):
            self._contents[id(value)] = value, value.copy()
        elif is_generator(value):
            self._contents[id(value)] = value, generator_state(value)
        elif isinstance(value, _CONTAINERS):
            self._contents[id(value)] = value, dict(value) if isinstance(value, dict) else list(value)
            for item in value.values() if isinstance(value, dict) else value:
                self._save(item, inside_object=inside_object)
        elif isinstance(value, bytearray):
            self._contents[id(value)] = value, bytes(value)
        elif isinstance(value, tuple):
            for item in value:
                self._save(item, inside_object=inside_object)
        elif not inside_object and id(value) not in self._seen and is_plain_object(value):
            self._seen[id(value)] = value
            own = attributes_of(value)
            if not any(issubclass(type(x), _LEADING_FAR) for x in own.values()):
                self._contents[id(value)] = value, own
                for item in own.values():
                    self._save(item, inside_object=True)

    def restore(self, later: list[Content]) -> None:
        own = self._module.__dict__
        if len(own) != len(self._all) or not all(map(is_, own.values(), self._all)):
            self._put_back(own)
        buffers = self._module._buffers
        if self._buffers is not None and (buffers or self._buffers) and not _same_items(buffers, self._buffers):
            buffers.clear()
            buffers.update(self._buffers)
        for value, content in self._contents.values():
            _restore_content(value, content, later)

    def _put_back(self, own: dict[str, Any]) -> None:
        for name, value in self._values.items():
            now = own.get(name)
            if now is not value and _is_kept(value) and _is_kept(now):
                own[name] = value
        for name in [k for k in own if k not in self._values and k not in _OF_EVERY_MODULE]:
            if _is_kept(own[name]):
                del own[name]


def _is_kept(value: Any) -> bool:
    return issubclass(type(value), _PLAIN) or is_plain_object(value)


def restored(contents: Iterable[Content | Attributes]) -> None:
    """Put all of it back."""
    later: list[Content] = []
    with torch.no_grad():
        for each in contents:
            each.restore(later)
        Content.write(later)


def _restore_content(value: Any, content: Any, later: list[Content]) -> None:
    if isinstance(content, Content):
        content.restore(later)
    elif isinstance(value, bytearray):
        value[:] = content
    elif isinstance(value, np.ndarray):
        if not np.array_equal(value, content):
            value[...] = content
    elif isinstance(value, dict):
        if not _same_items(value, content):
            value.clear()
            value.update(content)
    elif isinstance(value, list):
        if len(value) != len(content) or any(a is not b for a, b in zip(value, content, strict=True)):
            value[:] = content
    elif isinstance(value, (set, deque)):
        if list(value) != content if isinstance(value, set) else [*map(id, value)] != [*map(id, content)]:
            value.clear()
            for item in content:
                value.add(item) if isinstance(value, set) else value.append(item)
    elif is_generator(value):
        restore_generator(value, content)
    elif not _same_items(attributes_of(value), content):
        put_attributes_back(value, content)


def _same_items(a: Any, b: dict[Any, Any]) -> bool:
    return len(a) == len(b) and all(k == j and v is w for (k, v), (j, w) in zip(a.items(), b.items(), strict=True))
