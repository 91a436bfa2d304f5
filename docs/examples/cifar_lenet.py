"""Train a LeNet on CIFAR-10 with APO.

    python docs/examples/cifar_lenet.py --data DIR      # holds cifar-10-batches-bin
    python docs/examples/cifar_lenet.py                 # synthetic images, to see that it runs

The data set in its binary version is on https://www.cs.toronto.edu/~kriz/cifar.html. A folder that holds only some
of the batches will do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import apo

RECORD = 1 + 3 * 32 * 32  # a label, and the red, green and blue planes


def main(argv: Sequence[str] | None = None) -> float:
    """Train, and return the loss of the last epoch."""
    args = parsed(argv)
    torch.manual_seed(args.seed)
    train, test = cifar10(args.data) if args.data else synthetic(2000)

    model = lenet()
    objective = apo.ProximalObjective(model, inputs=images_only(train, args.batch), discrepancy="kl")
    optimizer = apo.APO(model, objective, interval=args.interval, weight_decay=args.weight_decay)
    print(optimizer.plan())

    mean_loss, step = float("nan"), 0
    for epoch in range(args.epochs):
        losses = []
        for images, labels in DataLoader(train, args.batch, shuffle=True, drop_last=True):

            def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(model(images), labels)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
            step += 1
            if step == args.steps:
                break
        mean_loss = sum(losses) / len(losses)
        print(f"epoch {epoch}  loss {mean_loss:.4f}  accuracy {accuracy(model, test):.1f}%")
        print("  " + "  ".join(f"{name} {value:.3g}" for name, value in optimizer.metrics().items()))
        if step == args.steps:
            break
    return mean_loss


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(),
        nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10),
    )  # fmt: skip


def images_only(data: TensorDataset, batch: int) -> list[Tensor]:
    """Batches B′. The function-space term needs no labels."""
    images = data.tensors[0]
    return list(images[torch.randperm(len(images))].split(batch))


def cifar10(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    folder = folder / "cifar-10-batches-bin" if (folder / "cifar-10-batches-bin").is_dir() else folder
    train = sorted(folder.glob("data_batch_*.bin"))
    if not train:
        raise SystemExit(f"{folder} holds no data_batch_*.bin: see the top of this file")
    return read(train), read([folder / "test_batch.bin"])


def read(paths: Sequence[Path]) -> TensorDataset:
    content = bytearray(b"".join(path.read_bytes() for path in paths))
    records = torch.frombuffer(content, dtype=torch.uint8).view(-1, RECORD)
    images = records[:, 1:].reshape(-1, 3, 32, 32).float() / 255
    return TensorDataset((images - 0.47) / 0.25, records[:, 0].long())


def synthetic(count: int) -> tuple[TensorDataset, TensorDataset]:
    """Noise around one pattern per class."""
    patterns = torch.randn(10, 3, 32, 32)

    def draw(count: int) -> TensorDataset:
        labels = torch.randint(10, (count,))
        return TensorDataset(patterns[labels] + torch.randn(count, 3, 32, 32), labels)

    return draw(count), draw(count // 5)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    return 100 * (model(images).argmax(-1) == labels).float().mean().item()


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a LeNet on CIFAR-10 with APO.")
    parser.add_argument("--data", type=Path, help="folder with cifar-10-batches-bin (default: synthetic images)")
    parser.add_argument("--interval", type=int, default=10, help="steps between two meta-updates (default: 10)")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="stop after this many")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
