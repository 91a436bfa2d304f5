"""What a bound model refuses, by name and with nothing written; and how threads, modes and copies share it."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import apo_kernels as ak

STEP: dict[str, Any] = {"lr": [0.1] * 2, "momentum": [0.9] * 2, "weight_decay": [0.0] * 2}
TRIAL: dict[str, Any] = {"lengths": [0.1] * 2, "momentum": [0.9] * 2, "shrink": [0.5] * 2}


def two(**options: Any) -> ak.ModelPreconditioner:
    As, Bs, Ss = ([torch.eye(4) for _ in "12"], [torch.eye(4) for _ in "12"], [torch.ones(4, 4) for _ in "12"])
    return ak.ModelPreconditioner(As, Bs, Ss, **({"widths": [(4,)] * 2} | options))


BAD_NUMBERS: list[tuple[str, dict[str, Any], str]] = [
    *(
        (call, {name: [0.5, bad]}, rf"{name}\[1\] must be")
        for call, names in (("step_", STEP), ("trial_", TRIAL))
        for name in names
        for bad in ("x", None, True, math.nan, math.inf, -math.inf, torch.tensor(0.5), 10**400)
    ),
    *(("step_", {"most": bad, "shares": [1.0] * 2}, "most must be") for bad in (-1.0, math.nan, -math.inf, "x", None)),
    *(
        ("step_", {"most": 1.0, "shares": bad}, match)
        for bad, match in (
            (None, "shares must be a list with a number for each"),
            ([1.0, math.nan], r"shares\[1\] must be a number"),
            (["x", 1.0], r"shares\[0\] must be a number"),
        )
    ),
    ("step_", {"most": 1.0, "shares": [1.0] * 2, "total": 5}, "total must be None or a function"),
]


@pytest.mark.parametrize(("call", "changed", "match"), BAD_NUMBERS, ids=[str(each[:2]) for each in BAD_NUMBERS])
def test_numbers_that_are_none(call: str, changed: dict[str, Any], match: str) -> None:
    bound, thetas, buffers = two(), torch.ones(2, 4, 4), torch.ones(2, 4, 4)
    numbers = (STEP if call == "step_" else TRIAL) | changed
    with pytest.raises((TypeError, ValueError), match=match):
        getattr(bound, call)([(x,) for x in thetas], [(torch.ones(4, 4),)] * 2, [*buffers], **numbers)
    assert (thetas == 1).all()
    assert (buffers == 1).all()


def test_lengths_of_slopes_are_numbers() -> None:
    bound, Gs = two(), [(torch.ones(4, 4),)] * 2
    with pytest.raises(TypeError, match=r"lengths\[0\] must be a number"):
        bound.slopes(Gs, bound.keep(Gs), lengths=[None, 0.1])  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_no_step_goes_by_a_negative_number(name: str) -> None:
    theta = torch.ones(4, 4)
    with pytest.raises(ValueError, match=rf"{name}\[1\] must be .*at least 0"):
        two().step_([(theta,), (theta + 0,)], [(theta + 0,), (theta + 0,)], [None] * 2, **(STEP | {name: [0.1, -0.1]}))
    assert (theta == 1).all()


def test_momentum_below_1() -> None:
    ones = [(torch.ones(4, 4),) for _ in "1234"]
    with pytest.raises(ValueError, match=r"momentum\[0\] must be at least 0 and below 1, but got 1"):
        two().step_(ones[:2], ones[2:], [None] * 2, **(STEP | {"momentum": [1, 0.5]}))


def test_transforms_are_refused_by_name() -> None:
    bound, thetas, Gs = two(), [(torch.ones(4, 4),) for _ in "12"], [(torch.ones(4, 4),) for _ in "12"]

    def stepped(G: Tensor) -> Tensor:
        bound.step_(thetas, [Gs[0], (G,)], [None] * 2, **STEP)
        return thetas[1][0].sum()

    match = r"Gs\[1\]\[0\] must be a plain tensor"
    for attempt in (torch.func.grad(stepped), torch.func.vmap(lambda G: stepped(G).expand(4))):
        with pytest.raises(ValueError, match=match):
            attempt(torch.ones(4, 4))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match=match):
        stepped(torch.autograd.forward_ad.make_dual(torch.ones(4, 4), torch.ones(4, 4)))
    assert all((theta == 1).all() for (theta,) in thetas)


def test_huge_and_negative_numbers_are_taken() -> None:
    bound, Gs = two(), [(torch.zeros(4, 4),)] * 2
    thetas = [(torch.ones(4, 4),), (torch.ones(4, 4),)]
    bound.step_(thetas, Gs, [None] * 2, **(STEP | {"lr": [1e300, 1]}), most=1.0, shares=[math.inf, 1.0])
    bound.trial_(thetas, Gs, [None] * 2, lengths=[-1e300, 2], momentum=[0.0, 0], shrink=[-3.0, 1e30])


def test_a_negated_buffer() -> None:
    bound, thetas = two(), torch.zeros(2, 4, 4)
    buffers = [torch.ones(4, 4), torch._neg_view(torch.ones(4, 4))]
    with pytest.raises(ValueError, match=r"momentum_buffers\[1\] must be written as it lies in memory"):
        bound.step_([(x,) for x in thetas], [(torch.ones(4, 4),)] * 2, buffers, **STEP)
    assert not thetas.any()


def odd(kind: str) -> Tensor:
    if kind == "nested":
        return torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(2, 4)])
    return torch.ones(4, 4).to_mkldnn() if kind == "mkldnn" else torch.ones(4, 4).to_sparse_csr()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nested", "mkldnn", "csr"])
@pytest.mark.parametrize("name", ["thetas", "Gs", "momentum_buffers"])
def test_tensors_that_dont_lie_in_memory(kind: str, name: str) -> None:
    if kind == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("no mkldnn")
    tensors = {each: [torch.ones(4, 4) for _ in "12"] for each in ("thetas", "Gs", "momentum_buffers")}
    bound = two()

    def step() -> None:
        parts = [xs if each == "momentum_buffers" else [(x,) for x in xs] for each, xs in tensors.items()]
        bound.step_(*parts, **STEP)  # type: ignore[arg-type]

    step()
    tensors[name][1] = odd(kind)
    with pytest.raises(TypeError, match=rf"{name}\[1\].* must be a dense \(strided\) tensor"):
        step()


@pytest.mark.filterwarnings("ignore")
def test_nested_tensors_of_the_functions() -> None:
    eye, ones = torch.eye(4), torch.ones(4, 4)
    with pytest.raises(TypeError, match="A must be a dense"):
        ak.precondition(ones, odd("nested"), eye, ones)
    with pytest.raises(TypeError, match=r"thetas\[0\] must be a dense"):
        ak.foreach_precondition_step_([odd("nested")], [ones], [eye], [eye], [ones], lr=0.1)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        *(
            ({"widths": [(4,), bad]}, r"widths\[1\] must be one or two ints")
            for bad in (4, None, (2.0, 2), (True, 3), ())
        ),
        *(({"learned": ["S", bad]}, r"learned\[1\] must be different letters") for bad in (None, "SS", 5, "ASA")),
    ],
)
def test_models_that_arent_one(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        two(**changed)


def test_kept_of_another() -> None:
    bound, Gs = two(), [(torch.ones(4, 4),)] * 2
    for bad in (None, "x", []):
        with pytest.raises(TypeError, match="kept must be what trial_ or keep returned"):
            bound.slopes(Gs, bad, lengths=[0.1] * 2)
    with pytest.raises(ValueError, match="kept must be what trial_ or keep of this preconditioner returned"):
        bound.slopes(Gs, two().keep(Gs), lengths=[0.1] * 2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ak.explain(None, torch.ones(2, 2)), "Gs must be a list or tuple of tensors"),  # type: ignore[arg-type]
        (lambda: ak.explain(None, [None]), r"Gs\[0\] must be a torch.Tensor"),  # type: ignore[list-item]
        (lambda: ak.blocks_to_dense([1], 3), "stack must be a torch.Tensor"),  # type: ignore[arg-type]
        (lambda: ak.blocks_from_dense([1], 3), "dense must be a torch.Tensor"),  # type: ignore[arg-type]
        (lambda: ak.by_square(torch.ones(10), torch.ones(2, 3, 3)), "side must be of a length that 2 squares of 3"),
        (lambda: ak.by_square(torch.ones(2), torch.ones(2, 3, 3)), "side must be of a length that 2 squares of 3"),
    ],
)
def test_what_the_small_functions_refuse(call: Callable[[], object], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        call()


def test_scalings_of_two_dtypes_in_one_storage() -> None:
    memory = torch.zeros(96, dtype=torch.uint8)
    Ss = [memory[:64].view(torch.float32).view(4, 4), memory[64:].view(torch.bfloat16).view(4, 4)]
    for S in Ss:
        S.fill_(1)
    eyes = [torch.eye(4) for _ in "12"]
    bound = ak.ModelPreconditioner(eyes, eyes, Ss, widths=[(4,)] * 2, backend="aten")
    Gs = [(torch.full((4, 4), 3.0),)] * 2
    found = bound.slopes(Gs, bound.keep(Gs), lengths=[0.5] * 2)
    assert all(S is not None and (S == -9).all() for S in found.S)


@pytest.mark.parametrize("where", ["built", "first used"])
@pytest.mark.parametrize("side", [4, 1100])
def test_inference_mode_is_left_again(where: str, side: int) -> None:
    """1100: memory that is used again."""
    eye = torch.eye(side)
    G = torch.ones(side, side)

    def bind() -> ak.ModelPreconditioner:
        return ak.ModelPreconditioner([eye], [eye], [torch.ones(side, side)], widths=[(side,)])

    if where == "built":
        with torch.inference_mode():
            bound = bind()
    else:
        bound = bind()
        with torch.inference_mode():
            bound.energies([(G,)])
            bound.slopes([(G,)], bound.keep([(G,)]), lengths=[1.0])
    theta = torch.zeros(side, side)
    bound.step_([(theta,)], [(G,)], [None], lr=[1.0], momentum=[0.0], weight_decay=[0.0], most=1e9, shares=[0.0])
    assert (theta == -1).all()
    assert bound.energies([(G,)]).S[0] is not None


def test_a_weight_of_inference_mode_is_refused_outside() -> None:
    with torch.inference_mode():
        theirs = torch.zeros(4, 4)
    thetas, buffers = [(torch.zeros(4, 4),), (theirs,)], [torch.zeros(4, 4) for _ in "12"]
    bound, Gs = two(), [(torch.ones(4, 4),)] * 2
    with torch.inference_mode():
        bound.step_([thetas[1], None], [Gs[0], None], [None] * 2, **STEP)
    with pytest.raises(
        ValueError, match=r"thetas\[1\]\[0\] must be a tensor that can be written outside of torch.inference_mode"
    ):
        bound.step_(thetas, Gs, buffers, **STEP)
    assert not any(x.any() for x in (thetas[0][0], *buffers))
    eyes, ones = [torch.eye(4)] * 2, [torch.ones(4, 4)] * 2
    with pytest.raises(
        ValueError, match=r"thetas\[1\] must be a tensor that can be written outside of torch.inference_mode"
    ):
        ak.foreach_precondition_step_([thetas[0][0], theirs], ones, eyes, eyes, ones, lr=1.0)
    assert not thetas[0][0].any()


def test_threads_take_turns() -> None:
    torch.manual_seed(0)
    count, side = 4, 96
    blocks = [[torch.randn(6, 16, 16) / 4 for _ in range(count)] for _ in "AB"]
    bound = ak.ModelPreconditioner(*blocks, [torch.ones(side, side)] * count, widths=[(side,)] * count)
    Gs = [[(torch.randn(side, side),) for _ in range(count)] for _ in range(4)]

    def call(k: int) -> list[Tensor]:
        thetas = [(torch.zeros(side, side),) for _ in range(count)]
        numbers = {"lengths": [1.0] * count, "momentum": [0.0] * count, "shrink": [1.0] * count}
        kept = bound.trial_(thetas, Gs[k], [None] * count, **numbers)
        found = bound.slopes(Gs[k], kept, lengths=[1.0] * count)
        return [theta for (theta,) in thetas] + [x for x in found.A if x is not None]

    alone = [call(k) for k in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, [0, 1, 2, 3] * 30))
    for own, expected in zip(found, alone * 30, strict=True):
        assert all(map(torch.equal, own, expected))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_is_bound_to_its_own_blocks(copied: Callable[[Any], Any]) -> None:
    As = [torch.eye(4) for _ in "12"]
    bound, Gs = two(), [(torch.ones(4, 4),)] * 2
    bound = ak.ModelPreconditioner(As, As, [torch.ones(4, 4)] * 2, widths=[(4,)] * 2)
    other = copied(bound)
    kept = copied(bound.keep(Gs))
    As[0].zero_()
    theta = torch.zeros(4, 4)
    other.step_([(theta,), None], [Gs[0], None], [None] * 2, **STEP)
    assert torch.allclose(theta, torch.tensor(-0.1))
    assert (other.slopes(Gs, kept, lengths=[1.0] * 2).inner == 16).all()
