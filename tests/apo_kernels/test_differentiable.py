"""The functions under ``torch.func`` and forward-mode AD, against the definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import apo_kernels as ak
from apo_kernels import reference
from tests.apo_kernels.cases import TOLERANCE, make, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Function = Callable[..., Tensor]
FORMS = [(None, None), (2, 2), (1, 3)]


def own(*operands: Tensor) -> Tensor:
    return ak.precondition(*operands)


def of_a_list(*operands: Tensor) -> Tensor:
    return ak.foreach_precondition(*([x] for x in operands))[0]


def dual(f: Function, x: Tensor, t: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent
        assert tangent is not None
        return tangent


def square(f: Function) -> Function:
    return lambda x: f(x).square().sum()


func = torch.func
TRANSFORMS: dict[str, Callable[[Function, Tensor, Tensor], Any]] = {
    "grad": lambda f, x, t: func.grad(square(f))(x),
    "grad of grad": lambda f, x, t: func.grad(square(func.grad(square(f))))(x),
    "vjp": lambda f, x, t: func.vjp(f, x)[1](f(x)),
    "jvp": lambda f, x, t: func.jvp(f, (x,), (t,)),
    "jacrev": lambda f, x, t: func.jacrev(f)(x),
    "jacfwd": lambda f, x, t: func.jacfwd(f)(x),
    "hessian": lambda f, x, t: func.hessian(square(f))(x),
    "vmap": lambda f, x, t: func.vmap(f)(torch.stack([x, t])),
    "vmap of grad": lambda f, x, t: func.vmap(func.grad(square(f)))(torch.stack([x, t])),
    "dual": dual,
    "vectorized jacobian": lambda f, x, t: torch.autograd.functional.jacobian(f, x, vectorize=True),
}


@pytest.mark.parametrize("function", [own, of_a_list])
@pytest.mark.parametrize(("b_A", "b_B"), FORMS)
@pytest.mark.parametrize("how", TRANSFORMS)
def test_transforms(how: str, b_A: int | None, b_B: int | None, function: Function) -> None:
    layer = make(3, 4, b_A, b_B)
    for k in range(4):
        x, t = layer.operands[k], torch.randn_like(layer.operands[k])

        def of(f: Function, k: int = k) -> Function:
            return lambda own: f(*layer.operands[:k], own, *layer.operands[k + 1 :])

        found, expected = (tree_leaves(TRANSFORMS[how](of(f), x, t)) for f in (function, reference.precondition))
        for y, truth in zip(found, expected, strict=True):
            assert y.shape == truth.shape
            assert relative_error(y, truth) < 1e-12


def test_results_have_the_dtype_of_the_gradient() -> None:
    layer = make(6, 5, dtype=torch.bfloat16)
    found = torch.func.vmap(ak.precondition)(*(x[None] for x in layer.operands))[0]
    assert found.dtype == torch.bfloat16
    assert relative_error(found, layer.forward()) < TOLERANCE[torch.bfloat16]


def test_what_isnt_served_is_refused() -> None:
    layer = make(3, 4)
    G, A, B, S = layer.operands
    theta = torch.zeros_like(G)
    calls: list[Function] = [
        lambda x: ak.precondition(G, A, B, x, keep=True)[0],
        lambda x: ak.foreach_precondition([G], [A], [B], [x], keep=True)[0][0],
        lambda x: ak.precondition_vjp(G, A, B, x, layer.V)[0],
        lambda x: ak.foreach_precondition_step_([theta], [G], [A], [B], [x], lr=0.1) or x,  # type: ignore[func-returns-value]
        lambda x: ak.BoundStep([theta], [G], [A], [B], [x]) and x,
    ]
    for call in calls:
        for how in ("vmap", "jvp", "dual"):
            with pytest.raises(ValueError, match=r"^Ss\[0\] must be a plain tensor"):
                TRANSFORMS[how](call, S, S)
    assert not theta.any()
