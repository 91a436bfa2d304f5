"""Replicas under DDP; each layer's preconditioner is held and computed by one rank.

torchrun --nproc-per-node 2 docs/examples/sharded/ddp.py
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from gpt import GPT, characters, loss_of
from torch.nn.parallel import DistributedDataParallel

import apo


def main(steps: int = 100) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    vocabulary, draw = characters(seed=rank)  # batches of its own
    model = DistributedDataParallel(GPT(vocabulary, length=32))

    objective = apo.ProximalObjective(model, inputs=draw, loss=loss_of)
    optimizer = apo.APO(model, objective, lr=0.1, interval=5, warmup=20, method=apo.Method(shard="owner"))
    if rank == 0:
        print(optimizer.plan())

    for step in range(steps):
        tokens, targets = draw()
        optimizer.zero_grad()
        loss = loss_of(model(tokens), targets)
        loss.backward()
        optimizer.step()
        if rank == 0 and (step % 10 == 0 or step == steps - 1):
            print(f"step {step:4d}  loss {loss.item():.3f}  lr {optimizer.metrics()['lr']:.2e}")

    state = optimizer.state_dict()  # on all ranks: each gives what it owns, and gets the whole
    if rank == 0 and len(sys.argv) > 2:
        torch.save({"model": model.module.state_dict(), "optimizer": state}, sys.argv[2])
    dist.barrier()  # no rank closes its connections while another still reads
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
