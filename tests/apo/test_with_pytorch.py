"""The front ends among what else PyTorch offers."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.apo.helpers import apo_of, closure_of, mlp, objective, same, weights

Make = Callable[..., Any]


def adaptive(model: nn.Module, inputs: Any, **settings: Any) -> apo.AdaptiveLR:
    return apo.AdaptiveLR(torch.optim.Adam(model.parameters(), lr=1e-2), objective(model, inputs), **settings)


def preconditioned(model: nn.Module, inputs: Any, **settings: Any) -> apo.APO:
    return apo_of(model, objective(model, inputs), lr=0.05, **settings)


FRONT_ENDS: dict[str, Make] = {"AdaptiveLR": adaptive, "APO": preconditioned}
each_front_end = pytest.mark.parametrize("front_end", FRONT_ENDS)


@each_front_end
def test_closures_as_lightning_and_accelerate_pass_them(front_end: str) -> None:
    """A wrapped closure in, its loss out; ``zero_grad`` and the parameter groups where they are looked for."""
    model, x, t, other = mlp()
    opt = FRONT_ENDS[front_end](model, other)
    assert isinstance(opt, torch.optim.Optimizer)
    inner = closure_of(opt, model, x, t)
    results = []

    class Closure:
        def __call__(self) -> Tensor:
            results.append(inner())
            return results[-1]

    loss = opt.step(closure=Closure())
    assert loss is results[0]
    assert len(results) == 2
    opt.zero_grad()
    assert all(p.grad is None for group in opt.param_groups for p in group["params"])


@each_front_end
def test_under_no_grad_the_closure_still_differentiates(front_end: str) -> None:
    model, x, t, other = mlp()
    opt = FRONT_ENDS[front_end](model, other)
    before = weights(model)
    with torch.no_grad():
        opt.step(closure_of(opt, model, x, t))
    assert not same(weights(model), before)


@each_front_end
def test_accumulated_gradients_are_one_batch(front_end: str) -> None:
    runs = []
    for parts in (1, 4):
        model, x, t, other = mlp()
        opt = FRONT_ENDS[front_end](model, other)

        def closure(
            model: nn.Module = model, x: Tensor = x, t: Tensor = t, opt: Any = opt, parts: int = parts
        ) -> Tensor:
            opt.zero_grad()
            total = torch.zeros(())
            for xs, ts in zip(x.chunk(parts), t.chunk(parts), strict=True):
                loss = F.cross_entropy(model(xs), ts) / parts
                loss.backward()
                total = total + loss.detach()
            return total

        for _ in range(5):
            opt.step(closure)
        runs.append((weights(model), opt.last))
    (one, q_one), (four, q_four) = runs
    assert q_one.objective == pytest.approx(q_four.objective, rel=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(one, four, strict=True))


@each_front_end
def test_clipping_in_the_closure(front_end: str) -> None:
    model, x, t, other = mlp()
    opt = FRONT_ENDS[front_end](model, other, interval=1)
    inner = closure_of(opt, model, x, t)
    norms = []

    def closure() -> Tensor:
        loss = inner()
        norms.append((opt.in_trial, nn.utils.clip_grad_norm_(model.parameters(), 0.05).item()))
        return loss

    first = opt.step(closure).item()
    for _ in range(60):
        last = opt.step(closure).item()
    assert [trial for trial, _ in norms[:4]] == [False, True, False, True]
    assert norms[0][1] > 0.05
    assert last < 0.8 * first


@each_front_end
def test_autocast(front_end: str) -> None:
    model, x, t, other = mlp(dtype=torch.float32)
    opt = FRONT_ENDS[front_end](model, other)
    opt.objective = objective(model, other, context=lambda: torch.autocast("cpu", torch.bfloat16))
    seen = []
    model[2].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

    def closure() -> Tensor:
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), t)
        loss.backward()
        return loss

    first = opt.step(closure).item()
    assert seen == [torch.bfloat16] * 4
    for _ in range(60):
        last = opt.step(closure).item()
    assert last < 0.5 * first
    assert all(p.dtype == torch.float32 for p in model.parameters())


@each_front_end
def test_grad_scaler(front_end: str) -> None:
    """Scaled gradients train as unscaled ones do; steps that overflow are left out, and the scale falls."""
    runs = []
    for enabled in (False, True):
        model, x, t, other = mlp(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        opt = FRONT_ENDS[front_end](model, other, grad_scaler=scaler, interval=2)

        def closure(
            model: nn.Module = model, x: Tensor = x, t: Tensor = t, opt: Any = opt, scaler: Any = scaler
        ) -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), t)
            scaler.scale(loss).backward()
            return loss

        for _ in range(10):
            opt.step(closure)
            scaler.update()
        runs.append(weights(model))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*runs, strict=True))

    handle = model[0].weight.register_hook(lambda grad: grad * float("inf"))
    before, state, steps = weights(model), str(opt.state_dict()["state"]), opt.steps
    opt.step(closure)
    scaler.update()
    handle.remove()
    assert same(weights(model), before)
    assert str(opt.state_dict()["state"]) == state
    assert opt.steps == steps + 1
    assert opt.failed_trials == 0
    assert scaler.get_scale() == 2.0**9


@each_front_end
def test_compiled_models(front_end: str) -> None:
    runs = []
    for compiled in (False, True):
        model, x, t, other = mlp(dtype=torch.float32)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        opt = FRONT_ENDS[front_end](model, other)
        opt.objective = objective(run, other)
        for _ in range(5):
            opt.step(closure_of(opt, run, x, t))
        runs.append(weights(model))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*runs, strict=True))


@each_front_end
def test_step_hooks(front_end: str) -> None:
    model, x, t, other = mlp()
    opt = FRONT_ENDS[front_end](model, other, interval=1)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    opt.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    opt.step(closure_of(opt, model, x, t))
    opt.state_dict()
    assert seen == ["before", "after", "saved"]


@each_front_end
def test_schedulers(front_end: str) -> None:
    model, x, t, other = mlp()
    opt = FRONT_ENDS[front_end](model, other, interval=0)
    start = opt.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
    for _ in range(10):
        opt.step(closure_of(opt, model, x, t))
        scheduler.step()
    assert opt.param_groups[0]["lr"] < 1e-6 * start
    adapted = FRONT_ENDS[front_end](model, other)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adapted, patience=0, factor=0.5)
    adapted.step(closure_of(adapted, model, x, t))
    learned = adapted.param_groups[0]["lr"]
    plateau.step(1.0)
    plateau.step(2.0)
    assert adapted.param_groups[0]["lr"] == learned / 2


class Inputs:
    """B′ that can be copied and pickled."""

    def __init__(self, batch: Tensor) -> None:
        self.batch = batch

    def __call__(self) -> Tensor:
        return self.batch


@each_front_end
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alike_and_apart(front_end: str, how: str) -> None:
    model, x, t, other = mlp()
    opt = FRONT_ENDS[front_end](model, Inputs(other), interval=2)
    torch.optim.lr_scheduler.StepLR(opt, 100)  # wraps step
    for _ in range(4):
        opt.step(closure_of(opt, model, x, t))
    pair = (model, opt)
    model2, opt2 = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert opt2.param_groups[0]["params"][0] is model2[0].weight
    for _ in range(4):
        opt2.step(closure_of(opt2, model2, x, t))
    assert not same(weights(model), weights(model2))
    for _ in range(4):
        opt.step(closure_of(opt, model, x, t))
    assert same(weights(model), weights(model2))
    assert opt.param_groups[0]["lr"] == opt2.param_groups[0]["lr"]


@each_front_end
def test_state_dicts_load_with_weights_only(front_end: str) -> None:
    """And go on to the bit; the blocks keep float32 beside bf16 weights."""
    dtype = torch.bfloat16 if front_end == "APO" else torch.float32
    model, x, t, other = mlp(dtype=dtype)
    opt = FRONT_ENDS[front_end](model, Inputs(other), interval=2)
    for _ in range(5):
        opt.step(closure_of(opt, model, x, t))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model2, *_ = mlp(dtype=dtype, seed=5)
    opt2 = FRONT_ENDS[front_end](model2, Inputs(other), interval=2)
    model2.load_state_dict(saved["model"])
    opt2.load_state_dict(saved["opt"])
    assert opt2.steps == 5
    for _ in range(5):
        opt.step(closure_of(opt, model, x, t))
        opt2.step(closure_of(opt2, model2, x, t))
    assert same(weights(model), weights(model2))
    if front_end == "APO":
        assert opt2.layers[0].S.dtype == opt2.state[model2[0].weight]["S"].dtype == torch.float32


@each_front_end
def test_foreign_state_dicts_are_refused_whole(front_end: str) -> None:
    model, x, t, other = mlp()
    opt = FRONT_ENDS[front_end](model, other)
    opt.step(closure_of(opt, model, x, t))
    before = str(opt.state_dict())
    with pytest.raises(ValueError, match=f"state_dict must come from {front_end}"):
        opt.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
    stranger = {"AdaptiveLR": preconditioned, "APO": adaptive}[front_end](model, other)
    with pytest.raises(ValueError, match=f"state_dict must come from {front_end}"):
        opt.load_state_dict(stranger.state_dict())
    settings = {"AdaptiveLR": {"shared_lr": True}, "APO": {"meta_optimizer": "rmsprop"}}[front_end]
    with pytest.raises(ValueError, match="state_dict must come from settings"):
        opt.load_state_dict(FRONT_ENDS[front_end](model, other, **settings).state_dict())
    if front_end == "APO":
        other_blocks = preconditioned(model, other, block_size=2)
        with pytest.raises(ValueError, match=r"same model and block settings: A of 0.weight \+ bias must be"):
            opt.load_state_dict(other_blocks.state_dict())
    assert str(opt.state_dict()) == before


@each_front_end
def test_memory_is_flat_over_meta_steps(front_end: str) -> None:
    others = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]  # left by other tests, and kept meanwhile
    model, x, t, other = mlp(dtype=torch.float32)
    opt = FRONT_ENDS[front_end](model, other, interval=1)
    losses: list[weakref.ref[Tensor]] = []

    def closure() -> Tensor:
        loss = closure_of(opt, model, x, t)()
        losses[:] = [weakref.ref(loss)]
        return loss

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects()) - len(others)  # a dead proxy has no class

    for _ in range(310):  # beyond the Fisher start, which holds running means
        opt.step(closure)
    before = tensors()
    for _ in range(300):
        opt.step(closure)
    assert tensors() == before
    assert losses[0]() is None  # no graph is held either
    assert opt.steps == 610


@each_front_end
def test_channels_last_and_other_strides(front_end: str) -> None:
    runs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3)).double().to(memory_format=layout)
        x, t, other = torch.randn(5, 3, 6, 6).double(), torch.randint(3, (5,)), torch.randn(4, 3, 6, 6).double()
        opt = FRONT_ENDS[front_end](model, other)
        for _ in range(4):
            opt.step(closure_of(opt, model, x, t))
        runs.append(weights(model))
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(*runs, strict=True))
