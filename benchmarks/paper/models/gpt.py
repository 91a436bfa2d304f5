"""A small decoder-only Transformer, which norms before each part (Radford et al. 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.paper.models.transformer import Attention


class Block(nn.Module):
    """Attention to what lies before, then the feed-forward part, both added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor, earlier: Tensor) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, earlier)
        out: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return out


class GPT(nn.Module):
    """Numbers ``(N, T)`` of characters to logits ``(N, T, vocabulary)`` of the next; T is ``longest`` at most."""

    def __init__(self, vocabulary: int, width: int = 128, layers: int = 2, heads: int = 4, longest: int = 64) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for embedding in (self.embedding, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, numbers: Tensor) -> Tensor:
        T = numbers.shape[1]
        earlier = torch.ones(T, T, dtype=torch.bool, device=numbers.device).tril()
        x = self.embedding(numbers) + self.places.weight[:T]
        for block in self.blocks:
            x = block(x, earlier)
        out: Tensor = self.head(self.norm(x))
        return out
