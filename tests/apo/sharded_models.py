"""The models of ``sharded_worker``, their data, and how each is cut among ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 23), nn.Tanh(), nn.Linear(23, 11), nn.Tanh(), nn.Linear(11, 11))


def even_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 24), nn.Tanh(), nn.Linear(24, 11), nn.Tanh(), nn.Linear(11, 11))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 23, 3, stride=2, bias=False)
        self.norm, self.last = nn.GroupNorm(1, 23), nn.Linear(23, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.second(torch.tanh(self.first(x))))
        out: Tensor = self.last(torch.tanh(x).mean((-2, -1)))
        return out


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.v = nn.Linear(width, width), nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)  # the gradient of a bias would be rounding errors alone
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        h = self.norm_1(x)
        q, k, v = (layer(h).view(n, t, -1, 3).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, -1)
        x = x + self.proj(h)
        return x + self.down(F.gelu(self.up(self.norm_2(x))))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """With tied embeddings."""

    def __init__(self, vocabulary: int = 13, width: int = 12) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(5, width)
        self.blocks = nn.ModuleList([Block(width)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out.flatten(0, 1)


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "even mlp": even_mlp, "conv": ConvNet, "gpt": GPT}
ROWWISE = {"even mlp": ["2"], "gpt": ["blocks.0.proj", "blocks.0.down"]}
COLWISE = {"even mlp": ["0"], "gpt": [f"blocks.0.{name}" for name in ("q", "k", "v", "up")]}


def data(name: str, steps: int, count: int, dtype: torch.dtype, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(192, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for _ in range(steps):
        if name == "gpt":
            tokens = torch.randint(13, (count, 6), generator=generator)
            found.append((tokens[:, :-1], tokens[:, 1:]))
        else:
            shape = (count, 3, 8, 8) if name == "conv" else (count, 7)
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            found.append((x, (x.flatten(1).to(torch.float64) @ teacher[: x[0].numel()]).argmax(-1)))
    return found


def sharded(model: nn.Module, name: str, layout: str, ranks: int) -> tuple[int, int]:
    """Shard a model in place. Which part of the batch this rank takes, and of how many."""
    rank = dist.get_rank()
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (ranks,))
        shard_fully(model, mesh)
        return rank, ranks
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
        shard_fully(model, mesh)
        return rank, ranks
    across = ranks if layout == "tp" else 2
    mesh = init_device_mesh("cpu", (ranks // across, across), mesh_dim_names=("dp", "tp"))
    plan = dict.fromkeys(COLWISE[name], ColwiseParallel()) | dict.fromkeys(ROWWISE[name], RowwiseParallel())
    parallelize_module(model, mesh["tp"], plan)
    if layout == "2d":
        shard_fully(model, mesh["dp"])
    return rank // across, ranks // across


def shard_fully(model: nn.Module, mesh: Any, **options: Any) -> None:
    for inner in getattr(model, "blocks", []):
        fully_shard(inner, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def groups(model: nn.Module, name: str, layout: str) -> list[dict[str, Any]]:
    """One group; and one of the biases that row parallel layers leave whole, which are vectors then."""
    lone = {f"{layer}.bias" for layer in ROWWISE.get(name, []) if layout in ("tp", "2d")}
    named = list(model.named_parameters())
    found = [{"params": [p for n, p in named if n not in lone]}]
    return [*found, {"params": [p for n, p in named if n in lone]}] if lone else found
