"""A context in which models run forward and backward without leaving a trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apo.ranks.sharding import local
from apo.trial.calls import calls_told
from apo.trial.contents import Attributes, Content, restored
from apo.trial.patched import patched
from apo.trial.random_state import random_state, restore_random_state
from apo.trial.restoring import surely
from apo.trial.walk import modules_of

__all__ = ["Undisturbed"]


class Undisturbed:
    """A context in which models run forward and backward without leaving a trace. It may be entered again.

    Inside, every known ``.grad`` is None, and modules are in eval mode, or as they were if ``train``; a closure that
    calls ``model.train()`` doesn't change that. A module that wasn't known is taken in when it is first called.

    Args:
        models: modules whose submodules, parameters and buffers are known from the start.
        tensors: further tensors whose ``.grad`` has to survive.
        train: leave train and eval flags as they are.
        own: tensors whose hooks after the backward run in here too. Those of others may step them.
        written: parameters of others whose content has to survive too, because the closure writes it.

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
        self._keeping: set[type] = set()
        self._contents: list[Content | Attributes] = []
        self._buffers: set[int] = set()
        self._plain_objects: dict[int, Any] = {}
        self._grads: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}
        self._rng: dict[str, Any] = {}
        self._exit = ExitStack()

    def __enter__(self) -> Undisturbed:
        self._rng = random_state(self._tensors)
        try:
            self._meet_again()
            for model in self._models:
                self._meet(model)
            for tensor in self._tensors:
                self._meet_tensor(tensor)
            self._contents += Content.of(self._written)
            self._written = []
            # a trial that leaps is refused, and isn't the anomaly that someone looks for
            self._exit.enter_context(torch.autograd.set_detect_anomaly(False))
            self._exit.enter_context(_without_hook_warning(self._modules.values()))
            self._exit.enter_context(calls_told(self._on_call))
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
        restored(self._contents)
        for module, flag in self._flags:
            _set_flag(module, flag if self._train or isinstance(module, nn.RNNBase) else False)

    def _on_call(self, module: nn.Module) -> None:
        if id(module) not in self._modules:
            self._meet(module)

    def _meet(self, root: nn.Module) -> None:
        fresh = [module for module in modules_of([root]) if id(module) not in self._modules]
        self._modules.update((id(module), module) for module in fresh)
        self._flags += [(module, module.training) for module in fresh]  # all first: some forward theirs to others
        each = (buffer for module in fresh for buffer in module._buffers.values())
        buffers = {id(x): x for x in each if x is not None and not x.is_meta and id(x) not in self._buffers}
        self._buffers.update(buffers)
        self._contents += Content.of(buffers.values())
        for module in fresh:
            self._enter_module(module)
            self._contents.append(Attributes(module, self._plain_objects))  # with the dropout that it has in here

    def _meet_again(self) -> None:
        """The modules that are known from the last time, which hold what they held."""
        for of_last_time in (self._grads, self._hooks, self._dropouts, self._keeping):
            of_last_time.clear()
        for module in self._modules.values():
            self._enter_module(module)

    def _enter_module(self, module: nn.Module) -> None:
        for p in module._parameters.values():
            if p is not None:
                self._meet_tensor(p)
        if not self._train:
            self._to_eval(module)

    def _to_eval(self, module: nn.Module) -> None:
        self._keep_flags(type(module))
        if isinstance(module, nn.RNNBase):
            self._dropouts.append((module, module.dropout))
            module.dropout = 0.0
        else:
            _set_flag(module, False)

    def _keep_flags(self, kind: type) -> None:
        """``model.train()`` in a closure would switch dropout on between the anchor and the trial. Copies that a
        closure makes of a module aren't concerned."""
        for owner in kind.__mro__:
            if "train" in vars(owner) and owner not in self._keeping:
                self._keeping.add(owner)
                self._exit.enter_context(patched(owner, "train", self._train_but))

    def _train_but(self, true: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module if id(module) in self._modules else true(module, *args, **kwargs)

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
        restored(self._contents)
        for hooks, former in self._hooks:
            hooks.update(former)
        for rnn, dropout in self._dropouts:
            rnn.dropout = dropout
        for module, flag in self._flags:
            _set_flag(module, flag)
        with torch.no_grad():
            for tensor, grad, content in self._grads.values():
                if tensor.grad is not grad:
                    tensor.grad = grad
                if grad is not None and content is not None:
                    grad.copy_(content)
        restore_random_state(self._rng)


def _set_flag(module: nn.Module, flag: bool) -> None:
    if "training" in module.__dict__:
        module.__dict__["training"] = flag  # what ``module.training = flag`` does, at a tenth of its time
    elif module.training != flag:  # some forward theirs to others
        module.training = flag


def _is_part(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory that holds more than it."""
    tensor = local(tensor)
    return tensor._is_view() or tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


@contextmanager
def _without_hook_warning(modules: Iterable[nn.Module]) -> Iterator[None]:
    """torch warns that a hook on all modules also fires for the one that ``torch.compile`` makes; ours may."""
    if not any("_orig_mod" in module._modules for module in modules):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
        yield
