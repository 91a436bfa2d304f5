"""The one place that knows what a trial must not disturb.

A trial writes θ′ into the weights, runs the model forward and backward there, and takes the weights back. Afterwards
everything that isn't the optimizer's is as if no trial had been made: the weights to the bit; ``.grad`` of every
parameter, whoever optimizes it; buffers; train and eval flags; random states; what torch keeps that depends on the
weights (autocast's casts, parametrizations).
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import parametrize

__all__ = [
    "CallersAutocast",
    "Lookahead",
    "Undisturbed",
    "forget_casts",
    "graph_leaves",
    "random_state",
    "restore_random_state",
    "surely",
]


class Lookahead:
    """Holds one copy of the weights, and puts it back when the block is left, whatever the reason.

    Attributes:
        start: the copies, in the order of ``parameters``.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self.start = [p.detach().clone() for p in self._parameters]

    def restore(self) -> None:
        """Write the weights back, to the bit."""
        with torch.no_grad():
            for p, start in zip(self._parameters, self.start, strict=True):
                p.copy_(start)
        forget_casts()

    def __enter__(self) -> Lookahead:
        return self

    def __exit__(self, *_: object) -> None:
        surely(self.restore)


def forget_casts() -> None:
    """Drop what torch holds of the weights' former values. Call it whenever weights were written in place."""
    torch.clear_autocast_cache()
    if parametrize._cache_enabled:  # inside parametrize.cached()
        parametrize._cache.clear()


class CallersAutocast:
    """The autocast that ``step`` was called under: lifted from the optimizer's own arithmetic, not from the model's.

    Args:
        devices: types of the weights' devices.
    """

    def __init__(self, devices: Iterable[str]) -> None:
        self._enabled = [
            (device, torch.get_autocast_dtype(device))
            for device in sorted({"cpu", *devices} - {"meta"})
            if torch.is_autocast_enabled(device)
        ]

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Without autocast and without gradients."""
        with ExitStack() as stack:
            for device, dtype in self._enabled:
                stack.enter_context(torch.autocast(device, dtype, enabled=False))
            stack.enter_context(torch.no_grad())
            yield

    @contextmanager
    def back(self) -> Iterator[None]:
        """Inside :meth:`lifted`: as the caller had it, with gradients."""
        with ExitStack() as stack:
            for device, dtype in self._enabled:
                stack.enter_context(torch.autocast(device, dtype))
            stack.enter_context(torch.enable_grad())
            yield


@dataclass
class _Buffer:
    """A buffer as it was. Written back only if it may have changed."""

    module: nn.Module
    name: str
    held: Tensor
    content: Tensor | None  # None: it can't be written in place
    version: int
    keep_version: AbstractContextManager[None] | None

    @classmethod
    def of(cls, module: nn.Module, name: str, buffer: Tensor) -> _Buffer:
        if buffer.is_inference():
            return cls(module, name, buffer, None, 0, None)
        kept = _unsafe_preserve_version_counter(buffer)
        return cls(module, name, buffer, _written_part(buffer).detach().clone(), buffer._version, kept)

    def restore(self) -> None:
        if self.content is not None:
            _written_part(self.held).copy_(self.content)
            if self.keep_version is not None:
                self.keep_version.__exit__(None, None, None)
        if self.module._buffers.get(self.name) is not self.held:
            self.module._buffers[self.name] = self.held


def _written_part(buffer: Tensor) -> Tensor:
    """Each element once: an expanded tensor can't be written as it is."""
    if buffer.layout != torch.strided or 0 not in buffer.stride():
        return buffer
    return buffer[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in buffer.stride())]


class Undisturbed:
    """A context in which models run forward and backward without leaving a trace.

    Inside, every known ``.grad`` is None, and modules are in eval mode, or as they were if ``train``; a closure that
    calls ``model.train()`` doesn't change that. A module that wasn't known is taken in when it is first called.

    Args:
        models: modules whose submodules, parameters and buffers are known from the start.
        tensors: further tensors whose ``.grad`` has to survive.
        train: leave train and eval flags as they are.

    In eval mode a recurrent network keeps its flag and loses its dropout instead: cuDNN has no backward in eval mode.
    """

    def __init__(self, models: Iterable[nn.Module], tensors: Iterable[Tensor], *, train: bool = False) -> None:
        self._train = train
        self._models = list(models)
        self._tensors = list(tensors)
        self._modules: dict[int, nn.Module] = {}
        self._flags: list[tuple[nn.Module, bool]] = []
        self._dropouts: list[tuple[nn.RNNBase, float]] = []
        self._own_train: list[tuple[nn.Module, Any]] = []
        self._buffers: list[_Buffer] = []
        self._grads: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}
        self._rng: dict[str, Any] = {}
        self._exit = ExitStack()

    def __enter__(self) -> Undisturbed:
        self._rng = random_state(self._tensors)
        try:
            for model in self._models:
                self._meet(model)
            for tensor in self._tensors:
                self._meet_tensor(tensor)
            self._exit.enter_context(_without_hook_warning(self._modules.values()))
            handle = register_module_forward_pre_hook(self._on_call)
            self._exit.callback(handle.remove)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()
        surely(self._restore)

    def set_flags(self) -> None:
        """Give modules the flags that they have in here once more, for a closure may have written them."""
        for module, flag in self._flags:
            wanted = flag if self._train or isinstance(module, nn.RNNBase) else False
            if module.training != wanted:
                module.training = wanted

    def _on_call(self, module: nn.Module, _: Any) -> None:
        if not torch.compiler.is_compiling() and id(module) not in self._modules:
            self._meet(module)

    def _meet(self, root: nn.Module) -> None:
        for module in root.modules():
            if id(module) in self._modules:
                continue
            self._modules[id(module)] = module
            self._flags.append((module, module.training))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    with torch.no_grad():
                        self._buffers.append(_Buffer.of(module, name, buffer))
            for p in module._parameters.values():
                if p is not None:
                    self._meet_tensor(p)
            if not self._train:
                self._to_eval(module)

    def _to_eval(self, module: nn.Module) -> None:
        if isinstance(module, nn.RNNBase):
            self._dropouts.append((module, module.dropout))
            module.dropout = 0.0
        elif module.training:
            module.training = False
        # `model.train()` in a closure would switch dropout on between the anchor and the trial
        self._own_train.append((module, module.__dict__.get("train")))
        module.__dict__["train"] = lambda mode=True, module=module: module

    def _meet_tensor(self, tensor: Tensor) -> None:
        if id(tensor) in self._grads:
            return
        grad = tensor.grad
        # Where memory is shared with something else (DDP's buckets), the trial's backward may write to it.
        shared = grad is not None and grad.layout == torch.strided and _is_part(grad)
        content = grad.detach().clone() if grad is not None and shared else None
        self._grads[id(tensor)] = tensor, grad, content
        if grad is not None:
            tensor.grad = None

    def _restore(self) -> None:
        for module, own in self._own_train:
            if own is None:
                module.__dict__.pop("train", None)
            else:
                module.__dict__["train"] = own
        for rnn, dropout in self._dropouts:
            rnn.dropout = dropout
        for module, flag in self._flags:
            if module.training != flag:
                module.training = flag
        with torch.no_grad():
            for tensor, grad, content in self._grads.values():
                if tensor.grad is not grad:
                    tensor.grad = grad
                if grad is not None and content is not None:
                    grad.copy_(content)
            for buffer in self._buffers:
                buffer.restore()
        restore_random_state(self._rng)


def _is_part(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory that holds more than it."""
    return tensor._is_view() or tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


@contextmanager
def _without_hook_warning(modules: Iterable[nn.Module]) -> Iterator[None]:
    """torch warns that a hook on all modules also fires for the one that ``torch.compile`` makes; ours may."""
    if not any(hasattr(module, "_orig_mod") for module in modules):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
        yield


def graph_leaves(loss: Any) -> list[Tensor]:
    """The leaves that a loss was computed from, if it still has its graph: their ``.grad`` is what a closure writes."""
    start = getattr(loss, "grad_fn", None)
    seen, queue, leaves = {start}, [start], []
    while queue:
        node = queue.pop()
        if node is None:
            continue
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves.append(variable)
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return leaves


def random_state(parameters: Iterable[Tensor]) -> dict[str, Any]:
    """The states of the generators that a model may draw from: torch's on the CPU and on the parameters' devices,
    Python's and NumPy's."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    state |= {"numpy": np.random.get_state()}  # noqa: NPY002
    for device in {p.device for p in parameters if p.device.type not in ("cpu", "meta")}:
        state[str(device)] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    for name, content in state.items():
        if name == "cpu":
            torch.set_rng_state(content)
        elif name == "python":
            random.setstate(content)
        elif name == "numpy":
            np.random.set_state(content)  # noqa: NPY002
        else:
            torch.get_device_module(torch.device(name)).set_rng_state(content, torch.device(name))


def surely(restore: Callable[[], None]) -> None:
    """Run it to its end although Ctrl-C is pressed meanwhile. It must be safe to run twice."""
    try:
        restore()
    except BaseException:
        restore()
        raise
