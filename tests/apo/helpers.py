"""Small problems that the tests of the front ends share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
import apo_kernels as ak
from apo.layers.matrix_view import MatrixView
from apo.layers.preconditioner import PreconditionedLayer

Problem = tuple[nn.Module, Tensor, Tensor, Tensor]
ROOT = Path(__file__).parents[2]


def played(worker: str, scene: str, ranks: int, folder: Path, *, failing: bool = False) -> list[Any]:
    """What each rank of a worker's scene saved; ``failing``: whatever the processes' exit codes."""
    command = [sys.executable, "-m", worker, scene, str(folder)]
    return _saved([[*command, str(rank), str(ranks)] for rank in range(ranks)], ranks, folder, failing=failing)


def played_by_forks(worker: str, scene: str, ranks: int, folder: Path, *, failing: bool = False) -> list[Any]:
    """The same of a worker that is given all ranks, so that it is imported once, and forks."""
    return _saved([[sys.executable, "-m", worker, scene, str(folder), str(ranks)]], ranks, folder, failing=failing)


def _saved(commands: list[list[str]], ranks: int, folder: Path, *, failing: bool) -> list[Any]:
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=280)
            assert process.returncode == 0 or failing, errors
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def mlp(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """``(model, x, t, x̃)``: five inputs, three classes."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    return model, torch.randn(16, 5, dtype=dtype), torch.randint(3, (16,)), torch.randn(12, 5, dtype=dtype)


def convnet(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """A convolution, a norm, a lone vector and a linear layer, all with biases."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, 3)
    ).to(dtype)
    x, other = torch.randn(8, 2, 4, 4, dtype=dtype), torch.randn(6, 2, 4, 4, dtype=dtype)
    return model, x, torch.randint(3, (8,)), other


def objective(model: nn.Module, inputs: Any, **settings: Any) -> apo.ProximalObjective:
    settings = {"fsd_weight": 0.7, "wsd_weight": 0.2, **settings}
    return apo.ProximalObjective(model, [inputs] if isinstance(inputs, Tensor) else inputs, **settings)


def apo_of(model: nn.Module, goal: apo.ProximalObjective, **settings: Any) -> apo.APO:
    """An APO of the optimizer's own settings and the method's together."""
    names = {field.name for field in fields(apo.Method)} & settings.keys()
    method = apo.Method(**{name: settings.pop(name) for name in names})
    return apo.APO(model, goal, **settings, method=method)


def scattered(view: MatrixView, matrix: Tensor) -> list[Tensor]:
    """The parts of a matrix ``(*batch, m, n)`` in the shapes of the view's parameters."""
    part = matrix if view.bias is None else matrix[..., :-1]
    like = view.weight.transpose(0, 1) if view.transposed else view.weight
    weight = part.reshape(like.shape)
    weight = weight.transpose(0, 1) if view.transposed else weight
    return [weight] if view.bias is None else [weight, matrix[..., -1].reshape(view.bias.shape)]


def precondition(layers: Sequence[PreconditionedLayer], matrices: Sequence[Tensor]) -> list[Tensor]:
    """``P(G)`` of each layer."""
    return [ak.precondition(G, *layer.operands) for layer, G in zip(layers, matrices, strict=True)]


def closure_of(
    opt: torch.optim.Optimizer,
    model: nn.Module,
    x: Tensor,
    t: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model(x), t)
        loss.backward()
        return loss

    return closure


def begun(opt: Any) -> None:
    """As after a first step: trials may rise along their step."""
    opt._note("apo_begun", True)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """To the bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def difference(f: Callable[[float], float], h: float = 1e-3) -> float:
    """``f′(0)`` by central differences of fourth order."""
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)
