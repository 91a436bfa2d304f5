"""What a rank would hold and send for models that are too large for this machine: nothing is allocated.

python docs/examples/sharded/plan_on_paper.py --ranks 8 64
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import apo
from apo.layers.plan import Plan


def gpt2_xl() -> nn.Module:
    """48 blocks of width 1600; embeddings are tied."""
    block = [(1600, 1600, True)] * 4 + [(1600, 6400, True), (6400, 1600, True)]
    return _model(48, block, norms=4, width=1600, embeddings=(50257, 1024), head=None)


def llama_7b() -> nn.Module:
    """32 blocks of width 4096, gated MLPs of 11008, a head of its own."""
    block = [(4096, 4096, False)] * 4 + [(4096, 11008, False)] * 2 + [(11008, 4096, False)]
    return _model(32, block, norms=2, width=4096, embeddings=(32000,), head=32000)


def _model(
    layers: int, block: list[tuple[int, int, bool]], *, norms: int, width: int, embeddings: tuple[int, ...],
    head: int | None,
) -> nn.Module:  # fmt: skip
    parts: dict[str, nn.Module] = {f"embedding {n}": nn.Embedding(n, width) for n in embeddings}
    for i in range(layers):
        linear = {f"linear {k}": nn.Linear(m, n, bias=bias) for k, (m, n, bias) in enumerate(block)}
        parts[f"block {i}"] = nn.ModuleDict({**linear, **{f"scale {k}": nn.RMSNorm(width) for k in range(norms)}})
    if head is not None:
        parts["head"] = nn.Linear(width, head, bias=False)
    return nn.Sequential(OrderedDict(parts))


def main(argv: Sequence[str] | None = None) -> dict[tuple[str, int], Plan]:
    parser = argparse.ArgumentParser(description="Plan large models on many ranks.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--models", nargs="+", choices=["gpt2_xl", "llama_7b"], default=["gpt2_xl", "llama_7b"])
    args = parser.parse_args(argv)
    found = {}
    print("model     ranks  weights  state per rank  step      meta-step  sent in a step  in a meta-step")
    for name in args.models:
        for ranks in args.ranks:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
            with torch.device("meta"):
                model = globals()[name]()
            count = sum(p.numel() for p in model.parameters())
            fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
            after_start = apo.Method(fisher_start=0)
            plan = apo.APO(model, apo.ProximalObjective(model, [None]), method=after_start).plan()
            found[name, ranks] = plan
            print(
                f"{name:9} {ranks:5}  {count / 1e9:5.2f} G  {plan.memory_bytes / 1e9:11.2f} GB  "
                f"{plan.step_flops / 1e12:5.2f} T  {plan.meta_flops / 1e12:6.2f} T  {plan.step_sent:12} B  "
                f"{plan.meta_sent / 1e6:11.1f} MB"
            )
            dist.destroy_process_group()
    return found


if __name__ == "__main__":
    main()
