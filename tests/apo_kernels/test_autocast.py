"""No result depends on the caller's autocast: each is the same to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import apo_kernels as ak
from tests.apo_kernels.cases import make

FORMS = [
    (12, 10, None, None, ()),
    (12, 10, 4, 4, ()),
    (10, 12, None, 4, ()),
    (5, 6, None, None, (3,)),
    (5, 6, 4, 4, (2, 3)),
    (257, 259, 32, None, ()),
]


def lowering() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def assert_unaffected(call: Callable[[], Any]) -> None:
    expected = tree_leaves(call())
    with lowering():
        found = tree_leaves(call())
        assert torch.is_autocast_enabled("cpu")
    assert found
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def operands(m: int, n: int, b_A: int | None, b_B: int | None, batch: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    layer = make(m, n, b_A, b_B, batch=batch, dtype=torch.float32)
    return list(layer.operands), layer.V


def check_functions(form: Any, backend: str) -> None:
    own, V = operands(*form)
    lists = [[x] for x in own]
    assert_unaffected(lambda: ak.precondition(*own, backend=backend))
    assert_unaffected(lambda: ak.precondition(*own, keep=True, backend=backend))
    assert_unaffected(lambda: ak.foreach_precondition(*lists, keep=True, backend=backend))
    for relative in (False, True):
        options: dict[str, Any] = {"wanted": "GABS", "relative": relative, "backend": backend}
        assert_unaffected(lambda options=options: ak.precondition_vjp(*own, V, **options))  # type: ignore[misc]
        assert_unaffected(lambda options=options: ak.foreach_precondition_vjp(*lists, [V], **options))  # type: ignore[misc]

    def step() -> Tensor:
        theta = torch.zeros_like(V)
        ak.foreach_precondition_step_([theta], *lists, lr=1.0, backend=backend)
        ak.BoundStep([theta], *lists, backend=backend)(lr=0.5)
        return theta

    assert_unaffected(step)


@pytest.mark.parametrize("form", FORMS)
def test_functions(form: Any) -> None:
    check_functions(form, "aten")


@pytest.mark.parametrize("form", FORMS[:5])
def test_autograd_to_the_third_order(form: Any) -> None:
    """With every backward under autocast, too."""

    def derivatives() -> list[Tensor]:
        own, V = operands(*form)
        watched = [x.requires_grad_() for x in own]
        found, value = [], (ak.precondition(*watched) * V).square().sum()
        for order in range(3):
            grads = torch.autograd.grad(value, watched, create_graph=order < 2)
            found += grads
            value = sum(x.square().sum() for x in grads)  # type: ignore[assignment]
        return [x.detach() for x in found]

    assert_unaffected(derivatives)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["eager", "aot_eager"])
def test_compiled(how: str) -> None:
    own, V = operands(*FORMS[0])
    lists = [[x] for x in own]

    def train(theta: Tensor, *watched: Tensor) -> tuple[Any, ...]:
        Y = ak.precondition(*watched)
        ak.foreach_precondition_step_([theta], *lists, lr=1.0)
        return Y, ak.precondition(*own, keep=True), ak.precondition_vjp(*own, V), theta

    def all_of_it() -> list[Tensor]:
        torch._dynamo.reset()
        watched = [x.clone().requires_grad_() for x in own]
        Y, *others = torch.compile(train, fullgraph=True, backend=how)(torch.zeros_like(V), *watched)
        Y.backward(V)
        return [Y.detach(), *tree_leaves(others), *(x.grad for x in watched if x.grad is not None)]

    assert_unaffected(all_of_it)


@pytest.mark.parametrize("name", ["precondition", "foreach_precondition", "foreach_precondition_keep"])
def test_operators(name: str) -> None:
    own, _ = operands(*FORMS[0])
    given = own if name == "precondition" else [[x] for x in own]
    assert_unaffected(lambda: getattr(torch.ops.apo_kernels, name)(*given))


def check_relative_steps(backend: str) -> None:
    X, slope, new = torch.randn(3, 8, 8), torch.randn(3, 8, 8), torch.randn(3, 8, 8)
    size, new_size = torch.rand(3, 8), torch.rand(3, 8)
    options: dict[str, Any] = {"rate": 0.1, "betas": (0.5, 0.9), "correction": 1.0, "floor": 1e-2, "backend": backend}

    def squares() -> list[Tensor]:
        written = [x.clone() for x in (X, slope, size)]
        ak.relative_step_squares_(*written, new, new_size, longest=2.0, **options)
        return written

    def scalings() -> list[Tensor]:
        written = [x.flatten().clone() for x in (X, slope, new.square())]
        ak.relative_step_scalings_(*written, new.flatten(), slope.square().flatten(), lengths=[92, 100], **options)
        return written

    assert_unaffected(squares)
    assert_unaffected(scalings)


def test_relative_steps() -> None:
    check_relative_steps("aten")


def check_bound_model(n: int, backend: str) -> None:
    (G, A, B, S), V = operands(3, n, None, None, ())
    bound = ak.ModelPreconditioner([A], [B], [S], widths=[(n,)], backend=backend)

    def all_of_it() -> list[Tensor]:
        theta, other = torch.zeros_like(G), torch.zeros_like(G)
        numbers = {"momentum": [0.0], "lengths": [0.1], "shrink": [1.0]}
        kept = bound.trial_([(theta,)], [(G,)], [None], **numbers)
        found = [bound.slopes([(V,)], each, lengths=[0.1]) for each in (kept, bound.keep([(G,)]))]
        f = bound.step_([(other,)], [(G,)], [None], lr=[0.1], momentum=[0.0], weight_decay=[0.0], most=1.0, shares=[1])
        every = tree_leaves([theta, other, f, found, bound.energies([(G,)])])
        return [x.clone() for x in every if isinstance(x, Tensor)]

    assert_unaffected(all_of_it)


@pytest.mark.parametrize("n", [10, 70])
def test_a_bound_model(n: int) -> None:
    check_bound_model(n, "aten")
