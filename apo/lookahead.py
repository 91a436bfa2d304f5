"""The one-step lookahead ``θ′(φ)`` in place: trial weights are written, evaluated, and taken back.

No functional copy of the model, no second-order graph: the meta-gradient needs only an ordinary gradient at θ′.
What an evaluation at trial weights must leave as it was: the weights to the bit, buffers (one non-finite trial
would leave NaN in BatchNorm's statistics for good), the random state, ``.grad``, train and eval flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Lookahead", "random_state", "restore_random_state", "surely", "undisturbed"]


class Lookahead:
    """Holds one copy of the weights, and puts it back when the block is left, whatever the reason.

    ::

        with Lookahead(parameters) as lookahead:
            ...                     # write trial weights, evaluate
            lookahead.commit()      # only then do the present weights stay

    Attributes:
        start: the copies, in the order of ``parameters``.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._committed = False
        self.start = [p.detach().clone() for p in self._parameters]

    def commit(self) -> None:
        """Keep the weights as they are now."""
        self._committed = True

    def restore(self) -> None:
        """Write the weights back, to the bit."""
        with torch.no_grad():
            for p, start in zip(self._parameters, self.start, strict=True):
                p.copy_(start)

    def __enter__(self) -> Lookahead:
        return self

    def __exit__(self, *_: object) -> None:
        if self._committed:
            return
        surely(self.restore)


@contextmanager
def undisturbed(model: nn.Module, parameters: Sequence[Tensor], *, train: bool = False) -> Iterator[None]:
    """Evaluate ``model``, and run its backward, without leaving a trace but in the weights.

    Inside, every ``.grad`` is None, and modules are in eval mode, or as they were if ``train``. Afterwards
    ``.grad``, buffers, flags and the random states of the CPU and of the weights' device are as they were.

    In eval mode an ``nn.RNN`` without dropout keeps its flag: cuDNN refuses its backward otherwise.
    """
    grads = [p.grad for p in parameters]
    flags = [(m, m.training) for m in model.modules()]
    buffers = [
        (m._buffers, name, b, b.detach().clone())
        for m in model.modules()
        for name, b in m._buffers.items()
        if b is not None
    ]
    rng = random_state(parameters)

    def restore() -> None:
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        for m, flag in flags:
            m.training = flag
        with torch.no_grad():
            for held, name, b, content in buffers:
                b.copy_(content)
                held[name] = b
        restore_random_state(rng)

    try:
        for p in parameters:
            p.grad = None
        if not train:
            for m, _ in flags:
                if not (isinstance(m, nn.RNNBase) and m.dropout == 0):
                    m.training = False
        yield
    finally:
        surely(restore)


def random_state(parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The states of torch's generators that a model on the parameters' device draws from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    for device in {p.device for p in parameters if p.device.type not in ("cpu", "meta")}:
        state[str(device)] = torch.get_device_module(device).get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    for name, content in state.items():
        if name == "cpu":
            torch.set_rng_state(content)
        else:
            torch.get_device_module(torch.device(name)).set_rng_state(content, torch.device(name))


def surely(restore: Callable[[], None]) -> None:
    """Run it to its end although Ctrl-C is pressed meanwhile. It must be safe to run twice."""
    try:
        restore()
    except BaseException:
        restore()
        raise
