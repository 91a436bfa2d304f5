"""FSDP2: weights, gradients and the preconditioner's S, B and momentum are cut by rows.

torchrun --nproc-per-node 2 docs/examples/sharded/fsdp.py
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gpt import GPT, characters, loss_of
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import apo


def main(steps: int = 100) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    rank = dist.get_rank()
    torch.manual_seed(0)
    vocabulary, draw = characters(seed=rank)  # batches of its own
    model = GPT(vocabulary, length=32).to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # Build the optimizer after fully_shard, which replaces the parameters.
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

    if len(sys.argv) > 2:  # may be loaded on any number of ranks
        of_model, of_optimizer = get_state_dict(model, optimizer)
        dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=sys.argv[2])
    dist.barrier()  # no rank closes its connections while another still reads
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
