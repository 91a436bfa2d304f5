"""Classify scikit-learn's digits with AdaptiveLR, APO or plain AdamW.

    python docs/examples/digits.py --optimizer adaptive
    python docs/examples/digits.py --optimizer apo --interval 10

AdaptiveLR and AdamW start from the same learning rate, so ``--lr 1e-5`` shows what learning it is worth.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import apo


def main(argv: Sequence[str] | None = None) -> float:
    """Train, and return the accuracy on the held-out part in percent."""
    args = parsed(argv)
    torch.manual_seed(args.seed)
    inputs, targets = map(torch.tensor, load_digits(return_X_y=True))
    digits = TensorDataset(inputs.float() / 16, targets)
    train, test = random_split(digits, [0.8, 0.2])

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = make_optimizer(args, model, DataLoader(train, args.batch, shuffle=True))

    for epoch in range(args.epochs):
        for images, labels in DataLoader(train, args.batch, shuffle=True):
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        rate = optimizer.param_groups[0]["lr"]
        print(f"epoch {epoch:2d}  loss {loss.item():.4f}  lr {rate:.2e}  accuracy {accuracy(model, test):.1f}%")
    return accuracy(model, test)


def make_optimizer(args: argparse.Namespace, model: nn.Module, other_batches: DataLoader) -> torch.optim.Optimizer:
    """The objective gets batches of its own. With ``loss=`` no closure is needed."""
    if args.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=args.lr)
    objective = apo.ProximalObjective(model, other_batches, discrepancy="kl", loss=cross_entropy)
    if args.optimizer == "apo":
        optimizer = apo.APO(model, objective, interval=args.interval)
        print(optimizer.plan())
        return optimizer
    base = torch.optim.AdamW(model.parameters(), lr=args.lr)
    return apo.AdaptiveLR(base, objective, interval=args.interval)


@torch.no_grad()
def accuracy(model: nn.Module, data: Sequence[tuple[Tensor, Tensor]]) -> float:
    images, labels = (torch.stack(column) for column in zip(*data, strict=True))
    return 100 * (model(images).argmax(-1) == labels).float().mean().item()


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Classify scikit-learn's digits.")
    parser.add_argument("--optimizer", choices=["adaptive", "apo", "adamw"], default="adaptive")
    parser.add_argument("--lr", type=float, default=1e-4, help="where AdaptiveLR and AdamW start (default: 1e-4)")
    parser.add_argument("--interval", type=int, default=10, help="steps between two meta-updates (default: 10)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
