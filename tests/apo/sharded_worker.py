"""Sharded training on gloo: ``python -m tests.apo.sharded_worker scene folder ranks``; each rank saves what it got."""

from __future__ import annotations

import itertools
import math
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import apo
from apo.ranks.sharding import local
from apo.safeguards.promise import Promise
from tests.apo.helpers import apo_of
from tests.apo.sharded_models import MODELS, data, groups, mlp, shard_fully, sharded

STEPS = 50
BLOCK = 3
"""Every part of every side that is cut is a multiple of it, or ends the side, on 2 ranks and on 4."""


def front_end(kind: str, model: nn.Module, goal: Any, params: Any, **settings: Any) -> Any:
    settings = {"interval": 2, "warmup": 5, **settings}
    if kind == "APO":
        settings = {"fisher_start": 0, **settings}
        return apo_of(model, goal, params=params, lr=0.01, block_size=BLOCK, **settings)
    bases = {
        "SGD": partial(torch.optim.SGD, lr=0.02, momentum=0.5),
        "AdamW": partial(torch.optim.AdamW, lr=1e-3, eps=1e-2),
        "RMSprop": partial(torch.optim.RMSprop, lr=1e-2, eps=1e-2),
    }
    return apo.AdaptiveLR(bases[kind](params), goal, shared_lr=True, **settings)


def least_likely(outputs: Tensor, generator: torch.Generator) -> list[Tensor]:
    """In the place of samples: targets that are the same for an example whichever rank has it."""
    targets = F.one_hot(outputs.argmin(-1), outputs.shape[-1])
    return [(outputs.detach().softmax(-1) - targets) / len(outputs) ** 0.5]


def train(
    kind: str, name: str, layout: str | None, ranks: int, dtype: torch.dtype, *, steps: int = STEPS,
    own_loss: bool = False, structure: str | None = None, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train on this rank's part of every batch; with no layout on all of it."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    part, parts = (0, 1) if layout is None else sharded(model, name, layout, ranks)
    own = slice(part * 8 // parts, (part + 1) * 8 // parts)
    batches, others = (data(name, steps, 8, dtype, seed) for seed in (1, 2))
    inputs = [(x[own], t[own].flatten()) if own_loss else x[own] for x, t in others]
    goal = apo.ProximalObjective(
        model, inputs, fsd_weight=1.0 if kind == "APO" else 5.0, loss=F.cross_entropy if own_loss else None
    )
    if settings.get("fisher_start"):
        goal.fisher_sample = least_likely  # type: ignore[method-assign]
    opt = front_end(kind, model, goal, groups(model, name, structure or layout or ""), **settings)
    if settings.get("fisher_start"):
        opt.param_groups[0]["apo_noise_factor"] = 0.6  # so that P is damped by noise too
    losses = []
    for batch, targets in batches:

        def closure(x: Tensor = batch[own], t: Tensor = targets[own]) -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), t.flatten())
            loss.backward()
            return loss

        losses.append(float(opt.step(closure).detach()))
    return outcome(opt, model) | {"losses": losses}


def whole(t: Tensor) -> Tensor:
    t = t.detach()
    return (t.full_tensor() if hasattr(t, "placements") else t).clone()


def outcome(opt: Any, model: nn.Module) -> dict[str, Any]:
    counts = [opt.failed_trials, opt.skipped_steps, opt.steps]
    numbers = [opt.param_groups[0]["lr"], opt.last.objective, opt.last.step_norm]
    square = opt.param_groups[0].get("apo_gradient_square", math.nan)
    numbers += [] if math.isnan(square) else [square]
    blocks = {
        f"{layer.view.name} {name}": part.tensor.clone()
        for layer in getattr(opt, "layers", [])
        for name, part in layer.parts.items()
        if name in layer.learned
    }
    return {
        "weights": {n: whole(p) for n, p in model.named_parameters()},
        "numbers": torch.tensor(numbers, dtype=torch.float64),
        "counts": counts,
        "blocks": blocks,
    }


Case = tuple[str, str, str, torch.dtype, dict[str, Any]]
CASES: dict[int, list[Case]] = {
    2: [
        ("APO", "mlp", "fsdp", torch.float32, {}),
        ("APO", "conv", "fsdp", torch.float64, {"fisher_start": 12}),
        ("APO", "gpt", "fsdp", torch.float64, {}),
        ("APO", "even mlp", "tp", torch.float32, {}),
        ("APO", "gpt", "tp", torch.float64, {"fisher_start": 12}),
        ("APO", "mlp", "fsdp", torch.float64, {"meta_optimizer": "adam", "own_loss": True}),
        ("AdamW", "even mlp", "tp", torch.float32, {"own_loss": True}),
        ("AdamW", "even mlp", "tp", torch.float64, {"own_loss": True}),
        ("RMSprop", "conv", "fsdp", torch.float64, {}),
    ],
    4: [
        ("APO", "mlp", "fsdp", torch.float32, {}),
        ("APO", "even mlp", "hsdp", torch.float64, {"fisher_start": 12}),
        ("APO", "gpt", "2d", torch.float32, {"fisher_start": 6}),
        ("AdamW", "even mlp", "2d", torch.float64, {}),
    ],
}


def title(case: Case) -> str:
    return ", ".join(map(str, case))


def equal(ranks: int) -> dict[str, Any]:
    return {
        title(case): train(kind, name, layout, ranks, dtype, **settings)
        for case in CASES[ranks]
        for kind, name, layout, dtype, settings in [case]
    }


class Deep(nn.Module):
    """One layer that outweighs all others, two tied ones, a frozen one and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.frozen, self.norm = nn.Linear(7, 40), nn.Linear(40, 9), nn.LayerNorm(9)
        self.one, self.two, self.last = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 11)
        self.two.weight = self.one.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.frozen(torch.tanh(self.large(x))))
        out: Tensor = self.last(torch.tanh(self.two(torch.tanh(self.one(x)))))
        return out


def replicated(shard: str, dtype: torch.dtype, *, steps: int = 12, state: Any = None, **settings: Any) -> Any:
    """Replicas under DDP, each on its part of every batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    inner = Deep().to(dtype)
    model = nn.parallel.DistributedDataParallel(inner)
    own = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    batches, others = (data("mlp", steps, 8, dtype, seed) for seed in (1, 2))
    goal = apo.ProximalObjective(model, [x[own] for x, _ in others])
    trained = [p for p in inner.parameters() if p.requires_grad]
    groups = [{"params": trained[:2], "momentum": 0.5, "weight_decay": 0.1}, {"params": trained[2:]}]
    opt = apo_of(model, goal, params=groups, lr=0.01, interval=2, warmup=5, block_size=4, shard=shard, **settings)
    if state is not None:
        inner.load_state_dict(state["model"], strict=False)
        opt.load_state_dict(state["optimizer"])
    promises = []
    for batch, targets in batches:

        def closure(x: Tensor = batch[own], t: Tensor = targets[own]) -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), t)
            loss.backward()
            return loss

        opt.step(closure)
        promises.append(opt.metrics()["promise_factor"])
    return opt, inner, promises


def held(opt: Any) -> int:
    """Bytes of A, B, S, momentum and running means on this rank."""
    states = (layer.state() for layer in opt.layers)
    return sum(t.nbytes for state in states for t in state.values() if t.ndim and t.is_floating_point())


def uneven() -> nn.Module:
    """Enough layers to be shared out, whose rows are cut at multiples of 4 on 2 ranks and on 4."""
    widths = [16, 48, 32, 32, 16, 32, 48, 64, 32, 16, 32, 32, 48, 16, 32, 48, 16]
    return nn.Sequential(*(nn.Linear(n, m, bias=False) for n, m in itertools.pairwise(widths)))


def state_held(ranks: int) -> dict[str, Any]:
    """Bytes of A, of all state, and of the memory that it lies in, on this rank and unsharded."""
    found = {}
    for layout in ("whole", "owner", "fsdp"):
        model = uneven()
        if layout == "fsdp":
            fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
        shard = "owner" if layout == "owner" else "none"
        opt = apo_of(model, apo.ProximalObjective(model, [torch.ones(2, 16)]), block_size=4, shard=shard)
        named = [(name, t) for layer in opt.layers for name, t in layer.state().items() if t.is_floating_point()]
        memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in named if t.ndim}
        found[layout] = {
            "A": sum(t.nbytes for name, t in named if t.ndim and name.startswith("A")),
            "all": held(opt),
            "memory": sum(memory.values()),
        }
    return found


@mock.patch.object(Promise, "MOST", 0.01)  # so that steps are scaled down
def owners(ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dtype in (torch.float64, torch.float32):
        for shard in ("none", "owner"):
            opt, inner, promises = replicated(shard, dtype, fisher_start=9)
            result = outcome(opt, inner) | {"bytes": held(opt), "promises": promises, "state": opt.state_dict()}
            found[f"{shard} {dtype}"] = result | {"owners": [layer.view.owner for layer in opt.layers]}
    state = {"model": found["owner torch.float64"]["weights"], "optimizer": found["owner torch.float64"]["state"]}
    for shard in ("none", "owner"):
        opt, inner, _ = replicated(shard, torch.float64, state=state, fisher_start=9)
        found[f"resumed {shard}"] = outcome(opt, inner)
    opt, inner, _ = replicated("auto", torch.float64, meta_optimizer="adam", steps=6)
    found["adam owner"] = outcome(opt, inner)
    opt, inner, _ = replicated("none", torch.float64, meta_optimizer="adam", steps=6)
    found["adam none"] = outcome(opt, inner)
    return found


def spoiled(kind: str, where: str, layout: str = "fsdp") -> dict[str, Any]:
    """Something isn't finite, on rank 1 alone and at one step."""
    torch.manual_seed(0)
    rank, model = dist.get_rank(), mlp()
    if layout == "fsdp":
        shard_fully(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    replica = nn.parallel.DistributedDataParallel(model) if layout == "ddp" else model
    drawn: list[Tensor] = []

    def inputs() -> Tensor:
        drawn.append(torch.randn(4, 7))
        return drawn[-1] * (float("nan") if where == "inputs" and rank == 1 and opt.steps == 3 else 1)

    owner = {"shard": "owner"} if layout == "ddp" and kind == "APO" else {}
    opt = front_end(kind, model, apo.ProximalObjective(model, inputs), model.parameters(), interval=1, **owner)
    x, t = torch.randn(4, 7), torch.randint(11, (4,))
    states = []

    def closure() -> Tensor:
        now = rank == 1 and opt.steps == 3
        opt.zero_grad()
        loss = F.cross_entropy(replica(x * (float("nan") if now and where == "batch" else 1)), t)
        loss.backward()
        if now and where == "gradient":
            local(opt.parameters[0].grad)[0] = float("nan")
        return loss * (float("nan") if now and where == "loss" else 1)

    for _ in range(6):
        opt.step(closure)
        states.append(torch.cat([whole(p).flatten() for p in model.parameters()]))
    return {"counts": [opt.skipped_steps, opt.failed_trials, opt.steps], "states": states}


SPOILED = [
    ("APO", "batch", "fsdp"),
    ("APO", "gradient", "fsdp"),
    ("APO", "inputs", "fsdp"),
    ("APO", "loss", "fsdp"),
    ("APO", "batch", "ddp"),
    ("APO", "inputs", "ddp"),
    ("SGD", "gradient", "fsdp"),
    ("SGD", "inputs", "fsdp"),
]


def not_finite(ranks: int) -> dict[str, Any]:
    return {f"{case}": spoiled(*case) for case in SPOILED}


def stopping(ranks: int, how: str = "raise", layout: str = "fsdp", at: str = "trial") -> dict[str, Any]:
    """Rank 1 raises, or dies, in its closure; the other must neither hang nor go on by itself."""
    torch.manual_seed(0)
    rank, model = dist.get_rank(), mlp()
    if layout == "fsdp":
        shard_fully(model, init_device_mesh("cpu", (ranks,)))
    replica = nn.parallel.DistributedDataParallel(model) if layout == "ddp" else model
    owner = {"shard": "owner"} if layout == "ddp" else {}
    opt = front_end("APO", model, apo.ProximalObjective(model, [torch.randn(4, 7)]), None, **owner)
    x, t = torch.randn(4, 7), torch.randint(11, (4,))

    def closure() -> Tensor:
        if rank == 1 and opt.steps == 2 and opt.in_trial == (at == "trial"):
            if how == "die":
                torch.save({}, Path(sys.argv[2]) / "1.pt")
                os._exit(1)
            raise RuntimeError("stop")
        opt.zero_grad()
        loss = F.cross_entropy(replica(x), t)
        loss.backward()
        return loss

    before: list[Tensor] = []
    try:
        for _ in range(4):
            before = [local(p).detach().clone() for p in opt.parameters]
            before += [t.clone() for layer in opt.layers for t in layer.state().values()]
            opt.step(closure)
    except RuntimeError as error:
        after = [local(p).detach() for p in opt.parameters]
        after += [t for layer in opt.layers for t in layer.state().values()]
        kept = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return {"steps": opt.steps, "error": str(error), "kept": kept}
    return {"steps": opt.steps, "error": None, "kept": False}


def resumable() -> nn.Module:
    """Whose sides are cut at multiples of the blocks on 2, 3 and 4 ranks."""
    return nn.Sequential(nn.Linear(7, 36), nn.Tanh(), nn.Linear(36, 36))


SAVED = [("APO", "fsdp"), ("AdamW", "fsdp"), ("APO", "tp")]


def resumed(kind: str, layout: str, folder: Path, ranks: int | None, *, save: bool = False) -> dict[str, Any]:
    """Ten steps, a checkpoint and ten more; or ten steps from that checkpoint. No ranks: whole, without DTensors."""
    torch.manual_seed(0 if save else 1)
    model = resumable()
    part, parts = (0, 1) if ranks is None else sharded(model, "even mlp", layout, ranks)
    own = slice(part * 12 // parts, (part + 1) * 12 // parts)
    batches, others = (data("mlp", 20, 12, torch.float32, seed) for seed in (1, 2))
    inputs = [x[own] for x, _ in others]
    drawn = iter(inputs if save else inputs[10:])
    goal = apo.ProximalObjective(model, lambda: next(drawn), fsd_weight=1.0 if kind == "APO" else 5.0)
    goal.fisher_sample = least_likely  # type: ignore[method-assign]
    starts = {"fisher_start": 14} if kind == "APO" else {}
    opt = front_end(kind, model, goal, groups(model, "even mlp", layout), interval=1, **starts)

    def train(batches: list[tuple[Tensor, Tensor]]) -> None:
        for x, t in batches:

            def closure(x: Tensor = x[own], t: Tensor = t[own]) -> Tensor:
                opt.zero_grad()
                loss = F.cross_entropy(model(x), t)
                loss.backward()
                return loss

            opt.step(closure)

    place = folder / f"checkpoint {kind} {layout}"
    if save:
        train(batches[:10])
        of_model, of_optimizer = get_state_dict(model, opt)
        dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=place)
    else:
        of_model, of_optimizer = get_state_dict(model, opt)
        state = {"model": of_model, "optimizer": of_optimizer}
        dcp.load(state, checkpoint_id=place, no_dist=ranks is None)
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(batches[10:])
    return outcome(opt, model)


def saving(ranks: int) -> dict[str, Any]:
    return {" ".join(case): resumed(*case, Path(sys.argv[2]), ranks, save=True) for case in SAVED}


def loading(ranks: int) -> dict[str, Any]:
    """What two ranks have saved, in a folder beside."""
    return {" ".join(case): resumed(*case, Path(sys.argv[2]).parent / "2", ranks) for case in SAVED}


def single(layout: str | None) -> dict[str, Any]:
    """One layer of two rows: some ranks have nothing of it."""
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(7, 2).double()
    rank, ranks = (0, 1) if layout is None else (dist.get_rank(), dist.get_world_size())
    replica = model
    if layout == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    elif layout == "ddp":
        replica = nn.parallel.DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(1)
    x, t, other = (torch.randn(8, n, generator=generator).double() for n in (7, 2, 7))
    own = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    goal = apo.ProximalObjective(replica, [other[own]], "mse")
    goal.fisher_sample = lambda outputs, _: [outputs.detach() / len(outputs) ** 0.5]  # type: ignore[method-assign]
    owner = {"shard": "owner"} if layout == "ddp" else {}
    opt = apo_of(model, goal, lr=0.1, block_size=1, warmup=30, weight_decay=0.1, fisher_start=12, **owner)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.mse_loss(replica(x[own]), t[own])
        loss.backward()
        return loss

    for _ in range(25):
        opt.step(closure)
    return outcome(opt, model)


def nothing(ranks: int) -> dict[str, Any]:
    return {layout: single(layout) for layout in ("fsdp", "ddp")}


class Sent(TorchDispatchMode):
    """Bytes that are all-reduced and broadcast while it counts, and in how many calls. Under FSDP2 that is the
    optimizer's part, for the model's own passes gather and scatter. ``CommDebugMode`` counts calls alone, and its hooks
    raise an IndexError where a model is run after a backward pass, as in a meta-step; so it counts plain steps."""

    counts, bytes, calls = True, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.counts and func._schema.name in ("c10d::allreduce_", "c10d::broadcast_"):
            self.bytes += sum(t.nbytes for t in args[0])
            self.calls += 1
        return func(*args, **(kwargs or {}))


def sending(name: str, layout: str, dtype: torch.dtype, ranks: int, **settings: Any) -> dict[str, Any]:
    """Bytes of a plain step and of a step with a meta-update, counted and planned."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    replica = model
    if layout == "ddp":
        replica = nn.parallel.DistributedDataParallel(model)
    else:
        sharded(model, name, layout, ranks)
    (x, t), (other, _) = data(name, 2, 8, dtype, 0)
    goal = apo.ProximalObjective(replica, [other])
    opt = front_end("APO", model, goal, None, interval=2, warmup=0, **settings)
    counted: dict[str, Any] = {}

    def closure() -> Tensor:
        sent.counts = False
        opt.zero_grad()
        loss = F.cross_entropy(replica(x), t.flatten())
        loss.backward()
        sent.counts = True
        return loss

    calls = []
    for _ in range(2):
        with Sent() as sent:
            opt.step(closure)
        counted["meta"] = sent.bytes
        closure()
        with CommDebugMode() as torchs_own, Sent() as sent:
            opt.step()
        counted["step"] = sent.bytes
        calls.append((sent.calls, torchs_own.get_total_counts()))
    plan = opt.plan()
    return {"counted": counted, "planned": {"step": plan.step_sent, "meta": plan.meta_sent}, "calls": calls}


SENT: list[tuple[str, str, torch.dtype, dict[str, Any]]] = [
    ("mlp", "fsdp", torch.float32, {}),
    ("gpt", "fsdp", torch.float64, {}),
    ("mlp", "fsdp", torch.float32, {"meta_optimizer": "adam"}),
    ("even mlp", "tp", torch.float32, {}),
    ("mlp", "ddp", torch.float32, {"shard": "owner"}),
]


def sent(ranks: int) -> dict[str, Any]:
    return {str(case[:2] + case[3:]): sending(*case[:3], ranks, **case[3]) for case in SENT}


STOPPING = {
    "raise, fsdp, theta": ("raise", "fsdp", "theta"),
    "raise, ddp, trial": ("raise", "ddp", "trial"),
    "die, fsdp, trial": ("die", "fsdp", "trial"),
}
ALL: dict[int, list[Callable[[int], Any]]] = {
    2: [equal, owners, state_held, not_finite, saving, loading, sent],
    3: [loading],
    4: [equal, owners, state_held, loading, nothing],
}


def everything(ranks: int) -> dict[str, Any]:
    """In one process for each rank, for it takes longer to start one than to play a scene."""
    return {scene.__name__: scene(ranks) for scene in ALL[ranks]}


SCENES: dict[str, Callable[[int], Any]] = {
    "nothing": nothing,
    "sent": sent,
    "everything": everything,
    **{name: partial(stopping, how=how, layout=layout, at=at) for name, (how, layout, at) in STOPPING.items()},
}


def main(scene: str, folder: Path, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    start = partial(dist.init_process_group, "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    start(timeout=timedelta(seconds=20 if scene in STOPPING else 60))
    torch.save(SCENES[scene](ranks), folder / f"{rank}.pt")
    if scene not in STOPPING:
        dist.destroy_process_group()


def fork(scene: str, folder: Path, ranks: int) -> int:
    """Play it on as many processes as there are ranks. How many of them failed."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                main(scene, folder, rank, ranks)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


if __name__ == "__main__":
    sys.exit(fork(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
