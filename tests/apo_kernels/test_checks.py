"""Bad input: every kind is refused by an error that names the argument, and leaves every tensor as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import apo_kernels as ak

M, N = 4, 6


def r(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


class Around(Tensor):
    """A tensor around another one, with no memory of its own, as DTensor is."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Around:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], *_: object) -> Around:
        return Around(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{op}")


def good() -> dict[str, Any]:
    return {"G": r(M, N), "A": r(N, N), "B": r(M, M), "S": r(M, N)}


def batched() -> dict[str, Any]:
    return {"G": r(3, M, N), "A": r(3, N, N), "B": r(3, M, M), "S": r(3, M, N)}


T, V = TypeError, ValueError

# What is wrong, the error, what its message must say (after the argument's name), by argument.
OPERANDS: list[tuple[str, type[Exception], str, Callable[[], Any]]] = [
    ("G", T, "must be a torch.Tensor, but got None", lambda: None),
    ("G", T, "must be a torch.Tensor, but got 3.0", lambda: 3.0),
    ("G", T, "its dtype is torch.int64", lambda: torch.ones(M, N, dtype=torch.int64)),
    ("G", T, "its dtype is torch.bool", lambda: torch.ones(M, N, dtype=torch.bool)),
    ("G", T, "its dtype is torch.complex64", lambda: torch.ones(M, N, dtype=torch.complex64)),
    ("G", T, "its dtype is torch.float8_e4m3fn", lambda: r(M, N).to(torch.float8_e4m3fn)),
    ("G", T, "its layout is torch.sparse_coo", lambda: r(M, N).to_sparse()),
    ("G", V, "its shape is ()", lambda: torch.tensor(1.0)),
    ("G", V, "its shape is (6,)", lambda: r(N)),
    ("A", T, "must be a torch.Tensor, but got [[1.0]]", lambda: [[1.0]]),
    ("A", T, "its dtype is torch.int32", lambda: torch.ones(N, N, dtype=torch.int32)),
    ("A", T, "must be float64 exactly if G is", lambda: r(N, N, dtype=torch.float64)),
    ("A", V, "its shape is (6,)", lambda: r(N)),
    ("A", V, "its shape is (6, 5)", lambda: r(N, N - 1)),
    ("A", V, "must be full, (6, 6)", lambda: r(M, M)),
    ("A", V, "its shape is (1, 1, 6, 6)", lambda: r(1, 1, N, N)),
    ("A", V, "(ceil(6/b), b, b)", lambda: r(2, 4, 3)),
    ("A", V, "its shape is (3, 4, 4)", lambda: r(3, 4, 4)),
    ("A", V, "with b >= 1", lambda: r(3, 0, 0)),
    ("A", V, "must be on G's device, cpu, but is on meta", lambda: torch.empty(N, N, device="meta")),
    ("B", T, "its dtype is torch.uint8", lambda: torch.ones(M, M, dtype=torch.uint8)),
    ("B", T, "its layout is torch.sparse_coo", lambda: torch.eye(M).to_sparse()),
    ("B", V, "must be full, (4, 4)", lambda: r(N, N)),
    ("B", V, "its shape is (1, 3, 3)", lambda: r(1, 3, 3)),
    ("B", V, "but is on meta", lambda: torch.empty(M, M, device="meta")),
    ("S", T, "its dtype is torch.complex128", lambda: torch.ones(M, N, dtype=torch.complex128)),
    ("S", T, "must be float64 exactly if G is", lambda: r(M, N, dtype=torch.float64)),
    ("S", V, "must have G's shape (4, 6), but its shape is (6, 4)", lambda: r(N, M)),
    ("S", V, "its shape is (6,)", lambda: r(N)),
    ("S", V, "its shape is (1, 4, 6)", lambda: r(1, M, N)),
]


@pytest.mark.parametrize("call", ["precondition", "keep", "vjp", "foreach", "operator", "watched"])
@pytest.mark.parametrize(("name", "error", "text", "bad"), OPERANDS, ids=[f"{o[0]}: {o[2]}" for o in OPERANDS])
def test_operands(call: str, name: str, error: type[Exception], text: str, bad: Callable[[], Any]) -> None:
    arguments = {**good(), name: bad()}
    shown = f"{name}s[0]" if call == "foreach" else name
    if call == "operator" and not isinstance(arguments[name], (Tensor, type(None))):
        # The dispatcher refuses what is no tensor, before us and in its own words.
        error, shown, text = RuntimeError, "apo_kernels::precondition() Expected a value of type 'Tensor'", f"'{name}'"
    cotangent = r(M, N)
    calls: dict[str, Callable[[], object]] = {
        "precondition": lambda: ak.precondition(**arguments),
        "keep": lambda: ak.precondition(**arguments, keep=True),
        "vjp": lambda: ak.precondition_vjp(**arguments, V=cotangent),
        "foreach": lambda: ak.foreach_precondition(*([x] for x in arguments.values())),
        "operator": lambda: torch.ops.apo_kernels.precondition(*arguments.values()),
        "watched": lambda: ak.precondition(**{**arguments, "G" if name != "G" else "S": r(M, N).requires_grad_()}),
    }
    with pytest.raises(error) as raised:
        calls[call]()
    message = str(raised.value)
    assert message.startswith(shown)
    assert text in message.replace("s[0]", "")


@pytest.mark.parametrize("name", ["G", "A", "B", "S"])
def test_tensors_around_others_are_refused(name: str) -> None:
    arguments = good()
    arguments[name] = Around(arguments[name])
    text = "must lie in one tensor's memory, but is a Around"
    with pytest.raises(TypeError, match=f"^{name} {text}"):
        ak.precondition(**arguments)
    lists = [[x] for x in arguments.values()]
    with pytest.raises(TypeError, match=rf"^{name}s\[0\] {text}"):
        ak.foreach_precondition_vjp(*lists, [r(M, N)])
    with pytest.raises(TypeError, match=rf"^{name}s\[0\] {text}"):
        ak.foreach_precondition_step_([r(M, N)], *lists, lr=0.1)


@pytest.mark.parametrize("name", ["G", "A", "B", "S"])
def test_lazily_negated_tensors_are_what_they_stand_for(name: str) -> None:
    arguments = good()
    arguments[name] = torch._neg_view(arguments[name])
    resolved = {key: x.resolve_neg() for key, x in arguments.items()}
    torch.testing.assert_close(ak.precondition(**arguments), ak.precondition(**resolved))


BATCHES: list[tuple[str, str, Callable[[], Any]]] = [
    ("A", "(3, 6, 6)", lambda: r(N, N)),
    ("A", "(3, 6, 6)", lambda: r(2, N, N)),
    ("A", "(3, ceil(6/b), b, b)", lambda: r(2, 2, 4, 4)),
    ("B", "(3, 4, 4)", lambda: r(M, M)),
    ("B", "(3, ceil(4/b), b, b)", lambda: r(3, 3, 2, 2)),
    ("S", "(3, 4, 6)", lambda: r(M, N)),
]


@pytest.mark.parametrize(("name", "text", "bad"), BATCHES)
def test_batches_do_not_broadcast(name: str, text: str, bad: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name} must ") as raised:
        ak.precondition(**{**batched(), name: bad()})
    assert text in str(raised.value)


def kept_of(G: Tensor) -> ak.Kept:
    return ak.precondition(G, torch.eye(G.shape[1]), torch.eye(G.shape[0]), torch.ones_like(G), keep=True)[1]


VJP: list[tuple[type[Exception], str, dict[str, Callable[[], Any]]]] = [
    (V, "V must have G's shape (4, 6), but its shape is (6, 4)", {"V": lambda: r(N, M)}),
    (T, "V must be a torch.Tensor, but got None", {"V": lambda: None}),
    (T, "V must be float64 exactly if G is", {"V": lambda: r(M, N, dtype=torch.float64)}),
    (V, "wanted must be one or more different letters from 'GABS', but got ''", {"wanted": lambda: ""}),
    (V, "but got 'AX'", {"wanted": lambda: "AX"}),
    (V, "but got 'AA'", {"wanted": lambda: "AA"}),
    (T, "wanted must be a string", {"wanted": lambda: 3}),
    (T, "kept must be the Kept", {"kept": lambda: (r(M, N),) * 3}),
    (V, "kept.U must be a torch.float32 tensor of G's shape (4, 6)", {"kept": lambda: kept_of(r(M, N - 1))}),
    (V, "kept.M must be", {"kept": lambda: kept_of(r(M, N))._replace(M=None)}),
    (V, "kept.W must be", {"kept": lambda: kept_of(r(M, N))._replace(W=r(M, N).half())}),
    (V, "backend must be None or one of ['aten'", {"backend": lambda: "cuda"}),
    (T, "backend must be None or one of ['aten'", {"backend": lambda: 1}),
]


@pytest.mark.parametrize(("error", "text", "change"), VJP, ids=[v[1] for v in VJP])
def test_vjp(error: type[Exception], text: str, change: dict[str, Callable[[], Any]]) -> None:
    arguments = {**good(), "V": r(M, N), **{name: make() for name, make in change.items()}}
    with pytest.raises(error) as raised:
        ak.precondition_vjp(**arguments)
    assert text in str(raised.value)
    assert str(raised.value).startswith(next(iter(change)))


LISTS: list[tuple[type[Exception], str, tuple[int, Any]]] = [
    (T, "Gs must be a list or tuple of tensors, but got a Tensor", (0, r(2, M, N))),
    (T, "As must be a list or tuple of tensors, but got None", (1, None)),
    (V, "Bs must have the length of Gs, 2, but has 1", (2, [r(M, M)])),
    (V, "Ss[1] must have Gs[1]'s shape", (3, [r(M, N), r(M, M)])),
    (V, "As[1] must be full", (1, [r(N, N), r(M, M)])),
    (T, "Gs[1] must be a torch.Tensor, but got None", (0, [r(M, N), None])),
    (V, "Gs[1] must be on the device of Gs[0]", (-1, None)),
]


@pytest.mark.parametrize(("error", "text", "change"), LISTS, ids=[x[1] for x in LISTS])
def test_lists(error: type[Exception], text: str, change: tuple[int, Any]) -> None:
    operands: list[Any] = [[x, x.clone()] for x in good().values()]
    index, bad = change
    if index == -1:
        operands = [[x, y.to("meta")] for x, y in operands]
    else:
        operands[index] = bad
    with pytest.raises(error) as raised:
        ak.foreach_precondition(*operands)
    assert str(raised.value).startswith(text)


def test_kept_lists() -> None:
    operands = [[x] for x in good().values()]
    with pytest.raises(ValueError, match=r"^kept must be None or a list of 1 Kept"):
        ak.foreach_precondition_vjp(*operands, [r(M, N)], kept=[])
    with pytest.raises(ValueError, match=r"^kept\[0\]\.U must be"):
        ak.foreach_precondition_vjp(*operands, [r(M, N)], kept=[kept_of(r(M, N - 1))])
    flat = [r(M, N)] * 2
    with pytest.raises(ValueError, match=r"^kept must hold 3 tensors for each of the 1 matrices, but holds 2"):
        torch.ops.apo_kernels.foreach_precondition_vjp(*operands, [r(M, N)], flat, "ABS")


def test_keep_refuses_what_autograd_watches() -> None:
    operands = good()
    operands["A"].requires_grad_()
    with pytest.raises(ValueError, match=r"^A must not require grad, but does, in grad mode: keep=True"):
        ak.precondition(**operands, keep=True)
    with torch.no_grad():
        ak.precondition(**operands, keep=True)


def step_arguments() -> dict[str, Any]:
    lists: dict[str, Any] = {f"{name}s": [x, x.clone()] for name, x in good().items()}
    return {**lists, "thetas": [r(M, N), r(M, N)], "momentum_buffers": [r(M, N), r(M, N)], "lr": 0.1, "momentum": 0.9}


shared = r(M, N)
STEPS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (V, "lr must be finite and at least 0, but got -0.1", {"lr": -0.1}),
    (V, "lr must be finite and at least 0, but got nan", {"lr": float("nan")}),
    (V, "lr must be finite and at least 0, but got inf", {"lr": float("inf")}),
    (T, "lr must be a number, but got '0.1'", {"lr": "0.1"}),
    (T, "lr must be a number, but got True", {"lr": True}),
    (V, "lr must be a number or a floating-point tensor of no dimensions", {"lr": torch.ones(2)}),
    (V, "lr must be a number or a floating-point tensor of no dimensions", {"lr": torch.tensor(1)}),
    (V, "momentum must be at least 0 and below 1, but got 1.0", {"momentum": 1.0}),
    (V, "momentum must be at least 0 and below 1, but got -0.5", {"momentum": -0.5}),
    (T, "momentum must be a number, but got None", {"momentum": None}),
    (V, "momentum_buffers must be given where momentum is not 0, but momentum is 0.9", {"momentum_buffers": None}),
    (V, "momentum_buffers must have the length of Gs, 2, but has 1", {"momentum_buffers": [r(M, N)]}),
    (V, "momentum_buffers[1] must have Gs[1]'s shape", {"momentum_buffers": [r(M, N), r(N, M)]}),
    (V, "weight_decay must be finite and at least 0, but got -1", {"weight_decay": -1}),
    (T, "thetas must be a list or tuple of tensors", {"thetas": r(2, M, N)}),
    (V, "thetas[1] must have Gs[1]'s shape", {"thetas": [r(M, N), r(M, M)]}),
    (T, "thetas[1] must be float64, float32, bfloat16 or float16", {"thetas": [r(M, N), torch.ones(M, N).int()]}),
    (T, "thetas[1] must be float64 exactly if Gs[1] is", {"thetas": [r(M, N), r(M, N).double()]}),
    (V, "thetas[1] must be on Gs[1]'s device", {"thetas": [r(M, N), torch.empty(M, N, device="meta")]}),
    (V, "thetas[1] must not overlap itself", {"thetas": [r(M, N), r(1, N).expand(M, N)]}),
    (V, "thetas[1] must not overlap itself", {"thetas": [r(M, N), r(M + N - 1).unfold(0, N, 1)]}),
    (V, "thetas[1] must not require grad", {"thetas": [r(M, N), r(M, N).requires_grad_()]}),
    (V, "momentum_buffers[0] must not require grad", {"momentum_buffers": [r(M, N).requires_grad_(), r(M, N)]}),
    (V, "thetas[0] is written and must not share memory with thetas[1]", {"thetas": [shared, shared]}),
    (
        V,
        "thetas[0] is written and must not share memory with momentum_buffers[1]",
        {"thetas": [shared, r(M, N)], "momentum_buffers": [r(M, N), shared]},
    ),
    (
        V,
        "thetas[0] is written and must not share memory with Gs[0]",
        {"thetas": [shared, r(M, N)], "Gs": [shared, r(M, N)]},
    ),
    (
        V,
        "thetas[1] must be written as it lies in memory, but is lazily",
        {"thetas": [r(M, N), torch._neg_view(r(M, N))]},
    ),
    (V, "momentum_buffers[0] must be written", {"momentum_buffers": [torch._neg_view(r(M, N)), r(M, N)]}),
    (V, "Ss[1] must have Gs[1]'s shape", {"Ss": [r(M, N), r(M, M)]}),
    (V, "backend must be None or one of", {"backend": "cutlass"}),
]


@pytest.mark.parametrize(("error", "text", "change"), STEPS, ids=[f"{i}: {s[1]}" for i, s in enumerate(STEPS)])
def test_step_refuses_and_writes_nothing(error: type[Exception], text: str, change: dict[str, Any]) -> None:
    arguments = {**step_arguments(), **change}
    tensors = [x for value in arguments.values() if isinstance(value, list) for x in value if x.device.type != "meta"]
    before = [x.detach().clone() for x in tensors]
    with pytest.raises(error) as raised:
        ak.foreach_precondition_step_(**arguments)
    assert str(raised.value).startswith(text)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


@pytest.mark.parametrize("text", ["lr must be", "thetas[1] must not overlap itself"])
def test_the_operators_step_refuses_too(text: str) -> None:
    arguments = step_arguments()
    lr = -1.0 if text.startswith("lr") else 0.1
    thetas = [r(M, N), r(1, N).expand(M, N)] if lr > 0 else arguments["thetas"]
    before = thetas[0].clone()
    operands = (arguments[name] for name in ("Gs", "As", "Bs", "Ss", "momentum_buffers"))
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        torch.ops.apo_kernels.foreach_precondition_step_(thetas, *operands, lr, None, 0.9, 0.0)
    assert torch.equal(thetas[0], before)


BLOCKS: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (V, "block_size must be at least 1, but got -2", lambda: ak.identity_block(4, -2)),
    (V, "block_size must be at least 1, but got 0", lambda: ak.identity_block(4, 0)),
    (T, "block_size must be an int, but got 2.0", lambda: ak.identity_block(4, 2.0)),  # type: ignore[arg-type]
    (V, "size must be at least 0, but got -1", lambda: ak.identity_block(-1)),
    (T, "size must be an int, but got True", lambda: ak.identity_block(True)),
    (V, "block_size must be at least 1, but got -1", lambda: ak.blocks_from_dense(r(4, 4), -1)),
    (V, "dense must be square", lambda: ak.blocks_from_dense(r(4, 5), 2)),
    (V, "stack must be a stack of squares", lambda: ak.blocks_to_dense(r(4, 4), 4)),
    (V, "stack must hold 2 blocks of side 3 for size 5", lambda: ak.blocks_to_dense(r(3, 3, 3), 5)),
]


@pytest.mark.parametrize(("error", "text", "call"), BLOCKS, ids=[b[1] for b in BLOCKS])
def test_blocks(error: type[Exception], text: str, call: Callable[[], object]) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(text)


def test_all_of_an_overlapping_but_sound_layout_is_taken() -> None:
    """Columns of one matrix share a range of memory, but no entry."""
    joint = torch.zeros(M, 2 * N)
    arguments = {**step_arguments(), "thetas": [joint[:, :N], joint[:, N:]]}
    ak.foreach_precondition_step_(**arguments)
    assert (joint != 0).all()
