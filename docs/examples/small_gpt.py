"""Train a small GPT on characters, with a learned rate for AdamW.

    python docs/examples/small_gpt.py --text FILE
    python docs/examples/small_gpt.py                # the source of Python's argparse

It shows what a language model usually needs beside the loop: param groups with and without weight decay, gradient
accumulation, gradient clipping, a scheduler on top of the learned rate, and a checkpoint that is taken up again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import apo


class GPT(nn.Module):
    """A decoder of characters; returns logits ``(batch, length, vocabulary)``."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.tokens(tokens) + self.positions(torch.arange(length))
        future = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.norm(self.layers(x, mask=future, is_causal=True)))


def main(argv: Sequence[str] | None = None) -> float:
    """Train, and return the mean loss of the last ten steps, in nats per character."""
    args = parsed(argv)
    torch.manual_seed(args.seed)
    text = (args.text or Path(argparse.__file__)).read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    data = torch.tensor([alphabet.index(c) for c in text])

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(data) - args.length - 1, (args.batch, 1))
        places = starts + torch.arange(args.length + 1)
        return data[places[:, :-1]], data[places[:, 1:]]

    model = GPT(len(alphabet), args.length, args.width, args.layers, heads=4)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]

    # Q's loss is taken on batches of its own, so that the rate falls as the gradient gets noisier, and no closure
    # is needed.
    objective = apo.ProximalObjective(model, inputs=batch, loss=mean_loss, discrepancy="kl")
    base = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    optimizer = apo.AdaptiveLR(base, objective, shared_lr=True, rescale_schedule=True)
    # The schedule's shape times what is learned.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / args.warmup))

    if args.checkpoint and args.checkpoint.exists():
        saved = torch.load(args.checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])

    losses: list[float] = []
    for step in range(args.steps):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(args.accumulate):
            tokens, targets = batch()
            loss = mean_loss(model(tokens), targets) / args.accumulate
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(total)
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  loss {total:.3f}  lr {optimizer.metrics()['lr/0']:.2e}")

    if args.checkpoint:
        state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        torch.save({name: each.state_dict() for name, each in state.items()}, args.checkpoint)
    recent = losses[-10:]
    return sum(recent) / len(recent)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT on characters.")
    parser.add_argument("--text", type=Path, help="what to learn (default: the source of argparse)")
    parser.add_argument("--checkpoint", type=Path, help="go on from this file if it is there, and write it")
    parser.add_argument("--lr", type=float, default=1e-3, help="where the rate starts (default: 1e-3)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=20, help="steps in which the schedule rises (default: 20)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=2, help="batches per step (default: 2)")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
