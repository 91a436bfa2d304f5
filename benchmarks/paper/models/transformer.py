"""Transformer for translation (Vaswani et al. 2017, reference [79]), of linear layers that every optimizer knows.

``nn.MultiheadAttention`` keeps its weights outside of ``nn.Linear``, where KFAC and block preconditioners look.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Attention of ``heads`` heads: queries from ``x``, keys and values from ``memory``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, allowed: Tensor) -> Tensor:
        """``x (N, T, D)``, ``memory (N, M, D)``; ``allowed`` broadcasts to ``(N, heads, T, M)``."""
        query, key, value = (
            projected.reshape(*projected.shape[:2], self.heads, -1).transpose(1, 2)
            for projected in (self.query(x), self.key(memory), self.value(memory))
        )
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class TransformerLayer(nn.Module):
    """Self-attention, attention to the encoder (in a decoder), feed-forward; each normed after its residual sum."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, *, decoder: bool) -> None:
        super().__init__()
        self.own = Attention(width, heads)
        self.cross = Attention(width, heads) if decoder else None
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if decoder else 2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, allowed: Tensor, *encoded: Tensor) -> Tensor:
        """``encoded``: in a decoder, the encoder's output and where it may be looked at."""
        x = self.norms[0](x + self.dropout(self.own(x, x, allowed)))
        if self.cross is not None:
            x = self.norms[1](x + self.dropout(self.cross(x, *encoded)))
        y = self.down(self.dropout(F.relu(self.up(x))))
        out: Tensor = self.norms[-1](x + self.dropout(y))
        return out


class Transformer(nn.Module):
    """An encoder and a decoder over one shared vocabulary, whose embedding is also the output's weight.

    The default is section 6.1's, 6 + 6 layers of width 512, with the hidden width of 1,024 and the 4 heads that
    fairseq ([65]) has for IWSLT'14: 31,543,296 parameters and 512 for each word. With ``hidden=2048`` the layers
    hold the 44,138,496 of the base model (65M with its 37,000 words of embeddings).

    ``hidden`` is the width of the feed-forward part, ``layers`` the number of the encoder's, and of the decoder's,
    ``longest`` the most words in a sentence, ``pad`` the number of the padding word.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int = 512,
        layers: int = 6,
        heads: int = 4,
        hidden: int = 1024,
        dropout: float = 0.1,
        longest: int = 256,
        pad: int = 0,
    ) -> None:
        super().__init__()
        self.pad, self.width = pad, width
        weight = torch.empty(vocabulary, width)
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=pad, _weight=weight)
        self.encoder, self.decoder = (
            nn.ModuleList(TransformerLayer(width, heads, hidden, dropout, decoder=decoder) for _ in range(layers))
            for decoder in (False, True)
        )
        self.dropout = nn.Dropout(dropout)
        self.places: Tensor
        self.register_buffer("places", _sinusoids(longest, width), persistent=False)
        with torch.no_grad():
            for p in self.parameters():
                if p.dim() == 2:
                    nn.init.xavier_uniform_(p)
            if not self.embedding.weight.is_meta:
                self.embedding.weight.normal_(0, width**-0.5)[pad].zero_()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """``source (N, M)`` and ``target (N, T)``, which starts with the opening word, to logits ``(N, T, V)``."""
        return self.decode(target, *self.encode(source))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output ``(N, M, D)``, and where it may be looked at."""
        allowed = (source != self.pad)[:, None, None, :]
        x = self._embedded(source)
        for layer in self.encoder:
            x = layer(x, allowed)
        return x, allowed

    def decode(self, target: Tensor, memory: Tensor, allowed: Tensor) -> Tensor:
        """Logits ``(N, T, V)``; a place sees what lies before it. What pads the end is seen by pads alone."""
        T = target.shape[1]
        earlier = torch.ones(T, T, dtype=torch.bool, device=target.device).tril()
        x = self._embedded(target)
        for layer in self.decoder:
            x = layer(x, earlier, memory, allowed)
        return F.linear(x, self.embedding.weight)

    def _embedded(self, words: Tensor) -> Tensor:
        x = self.embedding(words) * math.sqrt(self.width)
        out: Tensor = self.dropout(x + self.places[: words.shape[1]].to(x.dtype))
        return out


def _sinusoids(longest: int, width: int) -> Tensor:
    """Section 3.5 of Vaswani et al.: ``(longest, width)``."""
    places, pairs = torch.arange(longest, device="cpu"), torch.arange(0, width, 2, device="cpu")
    angle = places[:, None] * torch.exp(pairs * (-math.log(10000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
