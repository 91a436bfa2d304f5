"""Memory under two names, one of which is written, is refused wherever it lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import apo_kernels as ak
from apo_kernels.memory import shared


def far(*shape: int) -> Tensor:
    return torch.zeros(shape)


SHARED: dict[str, tuple[Callable[[Tensor], list[Tensor]], str, str]] = {
    "weights, some rows": (lambda x: [x[:4, :4], x[2:6, :4], far(4, 4), far(4, 4)], "thetas", "thetas"),
    "a weight twice": (lambda x: [x[:4, :4], x[:4, :4], far(4, 4), far(4, 4)], "thetas", "thetas"),
    "some columns": (lambda x: [x[:4, :4], x[:4, 3:7], far(4, 4), far(4, 4)], "thetas", "thetas"),
    "weight and buffer": (lambda x: [x[:4, :4], far(4, 4), x[3:7, 1:5], far(4, 4)], "thetas", "momentum_buffers"),
    "weight is its buffer": (lambda x: [x[:4, :4], far(4, 4), x[:4, :4], far(4, 4)], "thetas", "momentum_buffers"),
    "a buffer twice": (lambda x: [far(4, 4), far(4, 4), x[:4, :4], x[:4, :4]], "momentum_buffers", "momentum_buffers"),
}


def operands() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return [torch.eye(4) for _ in "12"], [torch.eye(4) for _ in "12"], [torch.ones(4, 4) for _ in "12"]


def bound_step(thetas: list[Tensor], buffers: list[Tensor], bound: ak.ModelPreconditioner, Gs: Any = None) -> None:
    numbers: dict[str, Any] = {"lr": [1.0] * 2, "momentum": [0.9] * 2, "weight_decay": [0.0] * 2}
    Gs = Gs or [torch.ones(4, 4) for _ in "12"]
    bound.step_([(x,) for x in thetas], [(G,) for G in Gs], buffers, **numbers)


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("call", ["step", "bound", "bound, known"])
def test_what_is_written_twice(kind: str, call: str) -> None:
    make, first, second = SHARED[kind]
    memory = torch.zeros(8, 8)
    *thetas, one, other = make(memory)
    buffers, match = [one, other], rf"{first}\[0\].* is written and must not share memory with {second}\["
    A, B, S = operands()
    if call == "step":
        ones = [torch.ones(4, 4) for _ in "12"]
        with pytest.raises(ValueError, match=match):
            ak.foreach_precondition_step_(thetas, ones, A, B, S, lr=1.0, momentum=0.9, momentum_buffers=buffers)
    else:
        bound = ak.ModelPreconditioner(A, B, S, widths=[(4,)] * 2)
        if call == "bound, known":
            bound_step([far(4, 4), far(4, 4)], [far(4, 4), far(4, 4)], bound)
        for _ in "12":
            with pytest.raises(ValueError, match=match):
                bound_step(thetas, buffers, bound)
    assert not any(x.any() for x in (memory, *thetas, *buffers))


def test_a_trial_may_read_one_buffer_twice_but_writes_no_weight_twice() -> None:
    A, B, S = operands()
    bound = ak.ModelPreconditioner(A, B, S, widths=[(4,)] * 2)
    numbers: dict[str, Any] = {"lengths": [1.0] * 2, "momentum": [1.0] * 2, "shrink": [1.0] * 2}
    v, Gs = torch.ones(4, 4), [(torch.ones(4, 4),)] * 2
    thetas = [(torch.zeros(4, 4),), (torch.zeros(4, 4),)]
    bound.trial_(thetas, Gs, [v, v], **numbers)
    assert all((x == -2).all() for (x,) in thetas)
    with pytest.raises(
        ValueError, match=r"thetas\[0\]\[0\] is written and must not share memory with thetas\[1\]\[0\]"
    ):
        bound.trial_([thetas[0], thetas[0]], Gs, [v, v], **numbers)


@pytest.mark.parametrize("name", ["Gs", "As", "Bs", "Ss"])
def test_what_is_read_isnt_written(name: str) -> None:
    A, B, S = operands()
    bound = ak.ModelPreconditioner(A, B, S, widths=[(4,)] * 2)
    Gs = [torch.ones(4, 4) for _ in "12"]
    buffers = [far(4, 4), far(4, 4)]
    bound_step([far(4, 4), far(4, 4)], buffers, bound, Gs)
    theta = {"Gs": Gs, "As": A, "Bs": B, "Ss": S}[name][1]
    with pytest.raises(ValueError, match=rf"thetas\[0\]\[0\] is written and must not share memory with {name}\[1\]"):
        bound_step([theta, far(4, 4)], buffers, bound, Gs)
    thetas = [far(4, 4), far(4, 4)]
    bound_step(thetas, buffers, bound, Gs)
    with pytest.raises(ValueError, match=r"thetas\[1\]\[0\] is written and must not share memory with Gs\[0\]\[0\]"):
        bound_step(thetas, buffers, bound, [thetas[1], Gs[1]])  # only a gradient has moved


def test_columns_of_one_matrix_are_apart() -> None:
    memory = torch.zeros(4, 8)
    A, B, S = operands()
    bound_step(
        [memory[:, ::2], memory[:, 1::2]], [far(4, 4), far(4, 4)], ak.ModelPreconditioner(A, B, S, widths=[(4,)] * 2)
    )
    assert (memory == -1).all()
    ones = [torch.ones(4, 4) for _ in "12"]
    ak.foreach_precondition_step_([memory[:, ::2], memory[:, 1::2]], ones, A, B, S, lr=1.0)
    assert (memory == -2).all()


def test_it_agrees_with_the_bytes() -> None:
    """Of views of every form and dtype on one storage."""
    torch.manual_seed(0)
    memory = torch.zeros(256, dtype=torch.uint8)
    for _ in range(300):
        views, bytes_ = [], []
        for _ in "12":
            dtype = (torch.float32, torch.float16, torch.float64)[int(torch.randint(3, ()))]
            wide = dtype.itemsize
            shape = torch.randint(0, 4, (2,)).tolist()
            strides = torch.randint(0, 6, (2,)).tolist()
            first = int(torch.randint(0, 100 // wide, ()))
            views.append(memory[: 256 // wide * wide].view(dtype).as_strided(shape, strides, first))
            own = {first + i * strides[0] + j * strides[1] for i in range(shape[0]) for j in range(shape[1])}
            bytes_.append({entry * wide + k for entry in own for k in range(wide)})
        assert (shared(views, 1) == (0, 1)) == bool(bytes_[0] & bytes_[1])
