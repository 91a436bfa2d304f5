"""Tensor parallel: attention and the MLP are cut by rows and then by columns. Every rank sees the same batches.

torchrun --nproc-per-node 2 docs/examples/sharded/tensor_parallel.py
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from gpt import GPT, characters, loss_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import apo


def main(steps: int = 100) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    rank = dist.get_rank()
    torch.manual_seed(0)
    vocabulary, draw = characters(seed=0)
    model = GPT(vocabulary, length=32).to(device)
    for block in model.blocks:
        plan = dict.fromkeys("qkv", ColwiseParallel()) | {"proj": RowwiseParallel()}
        parallelize_module(block, mesh, plan | {"up": ColwiseParallel(), "down": RowwiseParallel()})

    # Build the optimizer after parallelize_module, which replaces the parameters.
    objective = apo.ProximalObjective(model, inputs=draw, loss=loss_of)
    optimizer = apo.APO(model, objective, lr=0.1, block_size=32, interval=5, warmup=20)
    if rank == 0:
        print(optimizer.plan())

    for step in range(steps):
        tokens, targets = (x.to(device) for x in draw())
        optimizer.zero_grad()
        loss = loss_of(model(tokens), targets)
        loss.backward()
        optimizer.step()
        if rank == 0 and (step % 10 == 0 or step == steps - 1):
            print(f"step {step:4d}  loss {loss.item():.3f}  lr {optimizer.metrics()['lr']:.2e}")
    dist.barrier()  # no rank closes its connections while another still reads
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
