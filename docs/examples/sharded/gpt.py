"""A small GPT on characters, and its batches: what the scripts beside this one train on several ranks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 16
"""Width of an attention head."""


class Block(nn.Module):
    """Projections apart, so that each can be cut by rows or by columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        h = self.norm_1(x)
        q, k, v = (layer(h).view(n, t, -1, HEAD).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, -1)
        x = x + self.proj(h)
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Returns logits ``(batch, length, vocabulary)``; its embeddings are tied."""

    def __init__(self, vocabulary: int, length: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=width**-0.5)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def characters(seed: int, batch: int = 8, length: int = 32) -> tuple[int, Callable[[], tuple[Tensor, Tensor]]]:
    """The vocabulary's size, and what draws batches ``(tokens, targets)`` of the source of Python's argparse."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    data = torch.tensor([alphabet.index(c) for c in text])
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(data) - length - 1, (batch, 1), generator=generator)
        places = starts + torch.arange(length + 1)
        return data[places[:, :-1]], data[places[:, 1:]]

    return len(alphabet), draw


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy, in nats per character."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
