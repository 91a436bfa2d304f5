"""Both front ends in all three trainers, alone or as one of two ranks: ``python ddp_worker.py folder``.

As a rank it is started with the variables that ``torchrun`` sets, which is how the trainers find each other.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from tests.integrations.helpers import NAMES, by_hand, data, forget_accelerators, net, optimizer_of, weights
from tests.integrations.language import batches, language_model, own_loss, sentences

SIZE = 16
EPOCHS = 2
DTYPE = torch.float64


def rank_and_world() -> tuple[int, int]:
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def share(batch: Any) -> Any:
    """A rank's half of a batch."""
    rank, world = rank_and_world()
    if isinstance(batch, tuple):
        return tuple(map(share, batch))
    return batch.chunk(world)[rank]


def fresh() -> list[Any]:
    x, t = data(DTYPE).tensors
    return [share(batch) for batch in zip(x.flip(0).split(SIZE), t.flip(0).split(SIZE), strict=True)]


def training_data() -> DataLoader[Any]:
    """A rank's batches, in order: its half of each joint batch."""
    pairs = [share(batch) for batch in zip(*(x.split(SIZE) for x in data(DTYPE).tensors), strict=True)]
    x, t = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return DataLoader(TensorDataset(x, t), SIZE // rank_and_world()[1])


def result(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {
        "weights": weights(model),
        "rate": float(optimizer.param_groups[0]["lr"]),
        "failed": optimizer.failed_trials,
        "Q": optimizer.last.objective,
    }


def with_accelerate(name: str, loss: Any) -> dict[str, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = net(DTYPE)
    optimizer = optimizer_of(name, model, fresh(), loss)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    for batch in [*training_data()] * EPOCHS:

        def closure(batch: Any = batch) -> Any:
            prepared.zero_grad()
            found = nn.functional.cross_entropy(wrapped(batch[0]), batch[1])
            accelerator.backward(found)
            return found

        if loss is None:
            prepared.step(closure)
        else:
            closure()
            prepared.step()
    return result(model, optimizer)


def with_trainer(name: str, loss: Any, folder: Path) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    from apo.integrations.transformers import APOTrainerMixin

    class ClosureTrainer(APOTrainerMixin, Trainer):
        pass

    model = language_model(DTYPE)
    optimizer = optimizer_of(name, model, batches(), loss, rescale_schedule=True)  # B′ in whole: halves differ in words
    arguments = TrainingArguments(
        str(folder / "trainer"),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8 // rank_and_world()[1],
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        ddp_backend="gloo" if rank_and_world()[1] > 1 else None,
    )
    kind = ClosureTrainer if loss is None else Trainer
    kind(model, arguments, train_dataset=sentences(), optimizers=(optimizer, None)).train()
    return result(model, optimizer)


def with_lightning(name: str, loss: Any) -> dict[str, Any]:
    from tests.integrations.test_lightning import Script, trainer

    world = rank_and_world()[1]
    module = Script(lambda model: optimizer_of(name, model, fresh(), loss), DTYPE)
    settings = {"devices": world, "strategy": "ddp" if world > 1 else "auto", "use_distributed_sampler": False}
    fit = trainer(max_epochs=EPOCHS, **settings)
    fit.fit(module, training_data())
    return result(module.net, fit.optimizers[0])


def under_fully_shard(name: str, loss: Any) -> dict[str, list[torch.Tensor]]:
    """What Lightning's strategy for FSDP2, accelerate's and a loop by hand come to."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    from tests.integrations.test_lightning import Script, trainer

    class Sharded(Script):
        def configure_model(self) -> None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    world = rank_and_world()[1]
    module = Sharded(lambda model: optimizer_of(name, model, fresh(), loss), DTYPE)
    strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    trainer(max_epochs=EPOCHS, devices=world, strategy=strategy, use_distributed_sampler=False).fit(
        module, training_data()
    )
    model = net(DTYPE)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    by_hand(model, optimizer_of(name, model, fresh(), loss), [*training_data()] * EPOCHS)
    prepared = prepared_by_accelerate()
    by_hand(prepared, optimizer_of(name, prepared, fresh(), loss), [*training_data()] * EPOCHS)
    return {
        kind: [p.full_tensor() for p in weights(each)]  # type: ignore[attr-defined]
        for kind, each in (("Lightning", module.net), ("by hand", model), ("accelerate", prepared))
    }


def prepared_by_accelerate() -> nn.Module:
    """Sharded by accelerate, which replicates on CPUs unless its state is set, and asks for an optimizer."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    model = net(DTYPE)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    forget_accelerators()
    return model


def train(folder: Path) -> dict[str, dict[str, Any]]:
    results = {}
    for name in NAMES:
        for own in (False, True):
            key = f"{name}, {'own loss' if own else 'closure'}"
            usual = nn.functional.cross_entropy if own else None
            results[f"accelerate, {key}"] = with_accelerate(name, usual)
            results[f"Trainer, {key}"] = with_trainer(name, own_loss if own else None, folder)
            results[f"Lightning, {key}"] = with_lightning(name, usual)
    return results


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    cases = [(name, loss) for name in NAMES for loss in (None, nn.functional.cross_entropy)]
    sharded = [under_fully_shard(*case) for case in cases]
    torch.save({"replicas": train(folder), "sharded": sharded}, folder / f"{rank_and_world()[0]}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
