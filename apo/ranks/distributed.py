"""Ranks that must take the same meta-steps: replicas of one model, on one process group."""

from __future__ import annotations

import gc
import hashlib
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Ranks", "distributed_data_parallel"]

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


_PATIENCE = timedelta(seconds=30)
"""How long a rank waits for the others to come to the same optimizer's first meta-step. Replicas come at once, for
their gradients have just been averaged."""

_asked: Counter[str] = Counter()


def distributed_data_parallel(model: nn.Module, parameters: Sequence[Tensor]) -> DistributedDataParallel | None:
    """The DDP module that a model is or holds, or that holds one of its parameters."""
    own = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
    if own is not None or torch.distributed.get_world_size() == 1:
        return own
    wanted = {id(p) for p in parameters}
    for held in gc.get_objects():
        if issubclass(type(held), DistributedDataParallel) and any(id(p) in wanted for p in held.parameters()):
            return held  # type: ignore[no-any-return]
    return None


class Ranks:
    """Over which ranks V, the terms of Q and the verdict are averaged.

    Args:
        process_group: the ranks of one model; None to find out: DDP's own, else the default group if weights,
            gradients and settings are equal to the bit on all of its ranks at the first meta-step. Models that
            differ, as those of an ensemble or a sweep, stay independent, and so does a model that other ranks don't
            train.
    """

    def __init__(self, process_group: Any = None) -> None:
        if process_group is not None and not _is_group(process_group):
            got = type(process_group).__name__
            raise TypeError(f"process_group must be a torch.distributed.ProcessGroup or None, but got {got}")
        self._given = process_group
        self._group: Any = None
        self._settled = False

    @property
    def together(self) -> bool:
        """Whether there are other ranks to agree with. Known after :meth:`settle`."""
        return self._group is not None

    @property
    def count(self) -> int:
        """How many ranks there are, this one counted."""
        return torch.distributed.get_world_size(self._group) if self.together else 1

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return torch.distributed.get_rank(self._group) if self.together else 0

    def settle(self, model: nn.Module, parameters: Sequence[Tensor], settings: str, *, placed: bool = False) -> None:
        """Find the group, once; where ranks have to be compared, by the process group's store.

        Of DTensors (``placed``) the mesh says it, and no other group is looked for.

        Raises:
            ValueError: some ranks of the default group hold one model and others another.
        """
        if self._settled:
            return
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        group = self._given
        if group is None and not placed:
            ddp = distributed_data_parallel(model, parameters)
            if ddp is not None:
                group = ddp.process_group
            elif torch.distributed.get_world_size() > 1:
                group = _group_of_replicas(parameters, settings)
        self._settled = True
        self._group = group if group is not None and torch.distributed.get_world_size(group) > 1 else None

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each by its mean over the ranks; the same bits on all of them."""
        if not self.together:
            return
        dense = [t.contiguous() for t in tensors]
        pending = [torch.distributed.all_reduce(t, group=self._group, async_op=True) for t in dense]
        for work in pending:
            work.wait()
        torch._foreach_div_(dense, self.count)
        for t, averaged in zip(tensors, dense, strict=True):
            if averaged is not t:
                t.copy_(averaged)

    def __getstate__(self) -> dict[str, Any]:
        # A process group belongs to the process: a copy finds its own.
        return {"_given": None, "_group": None, "_settled": False}


def _is_group(value: object) -> bool:
    return torch.distributed.is_available() and isinstance(value, torch.distributed.ProcessGroup)


def _group_of_replicas(parameters: Sequence[Tensor], settings: str) -> Any:
    """The default group if all of its ranks hold the same; None if all differ, or if not all ranks ask."""
    digests = _gathered(_digest(parameters, settings), _shape_text(parameters, settings))
    if digests is None or len(set(digests)) == len(digests):
        return None
    if len(set(digests)) == 1:
        return torch.distributed.group.WORLD
    raise ValueError(
        "process_group must be given: some ranks of the default group hold the same model and others another one. "
        "Pass the group of those that train one model, or give the objective the DistributedDataParallel module."
    )


def _gathered(own: int, question: str) -> list[int] | None:
    """Each rank's number, or None on all of them where one doesn't ask this in time. No collective, which would hang
    where a model is trained on some ranks only."""
    store = torch.distributed.distributed_c10d._get_default_store()
    while True:
        _asked[question] += 1
        name = f"apo/{hashlib.sha256(question.encode()).hexdigest()[:16]}/{_asked[question]}"
        keys = [f"{name}/{rank}" for rank in range(torch.distributed.get_world_size())]
        late = store.check([f"{name}/verdict"])
        store.set(keys[torch.distributed.get_rank()], str(own))
        try:
            store.wait(keys, timedelta(milliseconds=1) if late else _PATIENCE)
            verdict = "all"
        except RuntimeError:  # timed out
            verdict = "some"
        # the first verdict counts: a rank may come just when another has given up
        if store.compare_set(f"{name}/verdict", "", verdict) == b"all":
            return [int(store.get(key)) for key in keys]
        if not late:
            return None
        others = {
            int(store.get(key)) for key in keys if store.check([key]) and key != keys[torch.distributed.get_rank()]
        }
        if own in others:
            raise ValueError(
                "process_group must be given: this rank came so late to its first meta-step that another with the "
                "same model has gone on alone"
            )
        # it was another model's question, which not all ranks train: this model's is the next


def _shape_text(parameters: Sequence[Tensor], settings: str) -> str:
    """What replicas have in common whatever they hold."""
    return f"{settings.split('(')[0]} {[(tuple(p.shape), str(p.dtype)) for p in parameters]}"


def _digest(parameters: Sequence[Tensor], settings: str) -> int:
    """63 bits of the weights', the gradients' and the settings' content."""
    content = [settings]
    for p in parameters:
        for t in (p.detach(), p.grad):
            if t is None:
                content.append("none")
                continue
            words = t.detach().to_dense().contiguous().view(-1).view(_WORDS[t.element_size()])
            sums = [int(words[::stride].sum(dtype=torch.int64)) for stride in (1, 2, 3)]
            content.append(f"{tuple(t.shape)} {sums}")
    return int.from_bytes(hashlib.sha256("|".join(content).encode()).digest()[:8], "big") >> 1
