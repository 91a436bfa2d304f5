"""The one place that knows what a trial must not disturb.

A trial writes θ′ into the weights, runs the model forward and backward there, and takes the weights back. Afterwards
everything that isn't the optimizer's is as if no trial had been made: the weights to the bit; ``.grad`` of every
parameter, whoever optimizes it; buffers; train and eval flags; what modules keep in attributes; random states; what
torch keeps that depends on the weights (autocast's casts, parametrizations).
"""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

__all__ = [
    "CallersAutocast",
    "Lookahead",
    "Undisturbed",
    "changed_by",
    "forget_casts",
    "generator_state",
    "is_generator",
    "leaves_of_backwards",
    "random_state",
    "restore_generator",
    "restore_random_state",
    "surely",
    "without_autocast",
]


class Lookahead:
    """Holds one copy of the weights, and puts it back when the block is left, whatever the reason.

    Attributes:
        start: the copies, in the order of ``parameters``.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._versions = [p._version for p in self._parameters]
        self.start = [p.detach().clone() for p in self._parameters]

    def restore(self) -> None:
        """Write the weights back, to the bit: a graph that was made before is as good as it was."""
        with torch.no_grad():
            if self._parameters:
                torch._foreach_copy_(self._parameters, self.start)
        for p, version in zip(self._parameters, self._versions, strict=True):
            _set_version(p, version)
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


@contextmanager
def without_autocast(outputs: Any) -> Iterator[None]:
    """No operation on such outputs is cast in here."""
    devices = {x.device.type for x in tree_leaves(outputs) if isinstance(x, Tensor)} - {"meta"}
    with ExitStack() as stack:
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


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


class _Content:
    """What a tensor holds, and the memory that it holds it in. Written back only where it changed.

    A tensor may be expanded, overlap itself, be read-only, or have been made under inference mode.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._held = tensor
        self._inference = tensor.is_inference()
        self._version = None if self._inference else tensor._version
        self._memory = tensor.detach()
        self._content = self._part(self._memory).clone()

    def restore(self) -> None:
        held, memory = self._held, self._memory
        with torch.inference_mode() if self._inference else torch.no_grad():
            if _place(held) != _place(memory):
                held.data = memory
            part = self._part(memory)
            if self._changed(part):
                part.copy_(self._content)
        if self._version is not None and held._version != self._version:
            _set_version(held, self._version)

    def _changed(self, part: Tensor) -> bool:
        # to look is free on the CPU, and a synchronisation elsewhere
        compared = part.device.type == "cpu" and part.layout == torch.strided and type(part) is Tensor
        return not (compared and torch.equal(part, self._content))

    @staticmethod
    def _part(tensor: Tensor) -> Tensor:
        """Its memory, where several of its elements are one there."""
        if tensor.layout != torch.strided or not _overlaps(tensor):
            return tensor
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.as_strided((extent,), (1,))


def _place(tensor: Tensor) -> Any:
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


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


def _set_version(tensor: Tensor, version: int) -> None:
    if not tensor.is_inference():
        torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


_OF_EVERY_MODULE = set(nn.Module().__dict__) - {"_non_persistent_buffers_set"}
_CONTAINERS = (list, dict, set, deque)
_PLAIN = (Tensor, int, float, complex, str, bytes, type(None), tuple, np.ndarray, np.generic, *_CONTAINERS)


class _Attributes:
    """What a module keeps in ordinary attributes: hidden states, caches, counts, losses on the side, generators.

    Containers are restored to what they held. Other objects, and tensors with a graph, are left as they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        own = module.__dict__
        self._values = {k: v for k, v in own.items() if k not in _OF_EVERY_MODULE}
        self._buffers = dict(module._buffers) if isinstance(module._buffers, dict) else None
        self._contents: dict[int, tuple[Any, Any]] = {}
        for value in self._values.values():
            self._save(value)

    def _save(self, value: Any) -> None:
        if id(value) in self._contents:
            return
        if isinstance(value, Tensor):
            if not value.requires_grad and not value.is_meta and not isinstance(value, nn.Parameter):
                self._contents[id(value)] = value, _Content(value)
        elif isinstance(value, np.ndarray):
            self._contents[id(value)] = value, value.copy()
        elif is_generator(value):
            self._contents[id(value)] = value, generator_state(value)
        elif isinstance(value, _CONTAINERS):
            self._contents[id(value)] = value, dict(value) if isinstance(value, dict) else list(value)
            for item in value.values() if isinstance(value, dict) else value:
                self._save(item)
        elif isinstance(value, tuple):
            for item in value:
                self._save(item)

    def restore(self) -> None:
        own = self._module.__dict__
        for name, value in self._values.items():
            now = own.get(name)
            if now is not value and isinstance(value, _PLAIN) and isinstance(now, _PLAIN):
                own[name] = value
        for name in [k for k in own if k not in self._values and k not in _OF_EVERY_MODULE]:
            if isinstance(own[name], _PLAIN):
                del own[name]
        if self._buffers is not None and not _same_items(self._module._buffers, self._buffers):
            self._module._buffers.clear()
            self._module._buffers.update(self._buffers)
        for value, content in self._contents.values():
            _restore_content(value, content)


def _restore_content(value: Any, content: Any) -> None:
    if isinstance(content, _Content):
        content.restore()
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
    else:
        restore_generator(value, content)


def _same_items(a: Any, b: dict[Any, Any]) -> bool:
    return len(a) == len(b) and all(k == j and v is w for (k, v), (j, w) in zip(a.items(), b.items(), strict=True))


class Undisturbed:
    """A context in which models run forward and backward without leaving a trace.

    Inside, every known ``.grad`` is None, and modules are in eval mode, or as they were if ``train``; a closure that
    calls ``model.train()`` doesn't change that. A module that wasn't known is taken in when it is first called.

    Args:
        models: modules whose submodules, parameters and buffers are known from the start.
        tensors: further tensors whose ``.grad`` has to survive.
        train: leave train and eval flags as they are.
        own: tensors whose hooks after the backward run in here too. Those of others may step them.
        written: parameters of others whose content has to survive too, for the closure writes it.

    In eval mode a recurrent network keeps its flag and loses its dropout instead: cuDNN has no backward in eval mode.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        tensors: Iterable[Tensor],
        *,
        train: bool = False,
        own: Iterable[Tensor] = (),
        written: Iterable[Tensor] = (),
    ) -> None:
        self._own = {id(tensor) for tensor in own}
        self._hooks: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._train = train
        self._written = list(written)
        self._models = list(models)
        self._tensors = list(tensors)
        self._modules: dict[int, nn.Module] = {}
        self._flags: list[tuple[nn.Module, bool]] = []
        self._dropouts: list[tuple[nn.RNNBase, float]] = []
        self._own_train: dict[type, Any] = {}
        self._contents: list[_Content | _Attributes] = []
        self._buffers: set[int] = set()
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
            self._contents += [_Content(tensor) for tensor in self._written]
            # a trial that leaps is refused, and isn't the anomaly that someone looks for
            self._exit.enter_context(torch.autograd.set_detect_anomaly(False))
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

    def start_over(self) -> None:
        """Put back flags as they are in here, buffers and attributes: what is run next starts as what was run first.

        Gradients stay.
        """
        for content in self._contents:
            content.restore()
        for module, flag in self._flags:
            wanted = flag if self._train or isinstance(module, nn.RNNBase) else False
            if module.training != wanted:
                module.training = wanted

    def _on_call(self, module: nn.Module, _: Any) -> None:
        if not torch.compiler.is_compiling() and id(module) not in self._modules:
            self._meet(module)

    def _meet(self, root: nn.Module) -> None:
        fresh = [module for module in root.modules() if id(module) not in self._modules]
        self._modules.update((id(module), module) for module in fresh)
        self._flags += [(module, module.training) for module in fresh]  # all first: some forward theirs to others
        for module in fresh:
            for buffer in module._buffers.values():
                if buffer is not None and not buffer.is_meta and id(buffer) not in self._buffers:
                    self._buffers.add(id(buffer))
                    self._contents.append(_Content(buffer))
            for p in module._parameters.values():
                if p is not None:
                    self._meet_tensor(p)
            if not self._train:
                self._to_eval(module)
            self._contents.append(_Attributes(module))

    def _to_eval(self, module: nn.Module) -> None:
        self._keep_flags(type(module))
        if isinstance(module, nn.RNNBase):
            self._dropouts.append((module, module.dropout))
            module.dropout = 0.0
        elif module.training:
            module.training = False

    def _keep_flags(self, kind: type) -> None:
        """``model.train()`` in a closure would switch dropout on between the anchor and the trial. Copies that a
        closure makes of a module aren't concerned."""
        for owner in kind.__mro__:
            if "train" in vars(owner) and owner not in self._own_train:
                true = self._own_train[owner] = vars(owner)["train"]
                owner.train = _train_but(self._modules, true)  # type: ignore[attr-defined]

    def _meet_tensor(self, tensor: Tensor) -> None:
        if id(tensor) in self._grads:
            return
        hooks = tensor._post_accumulate_grad_hooks
        if hooks and id(tensor) not in self._own:
            self._hooks.append((hooks, dict(hooks)))
            hooks.clear()
        grad = tensor.grad
        # Where memory is shared with something else (DDP's buckets), the trial's backward may write to it.
        shared = grad is not None and grad.layout == torch.strided and _is_part(grad)
        content = grad.detach().clone() if grad is not None and shared else None
        self._grads[id(tensor)] = tensor, grad, content
        if grad is not None:
            tensor.grad = None

    def _restore(self) -> None:
        for held in self._contents:
            held.restore()
        for owner, train in self._own_train.items():
            owner.train = train  # type: ignore[attr-defined]
        for hooks, former in self._hooks:
            hooks.update(former)
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
        restore_random_state(self._rng)


def _train_but(known: dict[int, nn.Module], true: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(true)
    def train(self: nn.Module, mode: bool = True) -> Any:
        return self if id(self) in known else true(self, mode)

    return train


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


@contextmanager
def leaves_of_backwards() -> Iterator[list[Tensor]]:
    """The leaves of all graphs that are gone through backward in here: what closures write ``.grad`` of."""
    found: dict[int, Tensor] = {}
    true = torch.autograd.backward

    @wraps(true)
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        found.update((id(leaf), leaf) for leaf in _graph_leaves(roots))
        leaves[:] = found.values()
        return true(roots if not isinstance(tensors, Tensor) else tensors, *args, **kwargs)

    leaves: list[Tensor] = []
    torch.autograd.backward = backward
    try:
        yield leaves
    finally:
        torch.autograd.backward = true


def _graph_leaves(roots: Iterable[Tensor]) -> list[Tensor]:
    queue = [root.grad_fn for root in roots if isinstance(root, Tensor)]
    seen, leaves = set(queue), []
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


@contextmanager
def changed_by(models: Iterable[nn.Module], own: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Other parameters of the models than ``own`` whose content was written in here: averages, as teachers hold."""
    left_out = {id(p) for p in own}
    others = [p for model in models for p in model.parameters() if id(p) not in left_out and not p.is_inference()]
    before = [(p._version, _place(p)) for p in others]
    changed: list[Tensor] = []
    yield changed
    changed += [p for p, mark in zip(others, before, strict=True) if (p._version, _place(p)) != mark]


def is_generator(value: Any) -> bool:
    return isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState))


def generator_state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    return value.bit_generator.state if isinstance(value, np.random.Generator) else value.get_state()


def restore_generator(value: Any, state: Any) -> None:
    if isinstance(value, torch.Generator):
        value.set_state(state)
    elif isinstance(value, random.Random):
        value.setstate(state)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    else:
        value.set_state(state)


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
