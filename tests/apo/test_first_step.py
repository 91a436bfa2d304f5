"""Nothing is hidden in the first step: its work and memory are a later meta-step's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, sys, torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
import apo

torch.set_num_threads(1)

class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20_000, 256), nn.Linear(256, 10)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1))

class Work(TorchDispatchMode):
    # counts the bytes that operations write: what time goes with here, and the same in every run
    written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            returned = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            in_place = [x for x in tree_leaves(args[:1]) if isinstance(x, torch.Tensor)]
            self.written += sum(x.nbytes for x in returned or in_place if x.layout is torch.strided)
        return out

def held():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])

model, tokens, t = Bag(), torch.randint(20_000, (8, 16)), torch.randint(10, (8,))
goal = apo.ProximalObjective(model, [tokens])
if sys.argv[1] == "APO":
    opt = apo.APO(model, goal)
else:
    base = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD, "Muon-like": torch.optim.NAdam}[sys.argv[1]]
    opt = apo.AdaptiveLR(base(model.parameters(), lr=1e-3), goal)

def closure():
    opt.zero_grad()
    loss = F.cross_entropy(model(tokens), t)
    loss.backward()
    return loss

closure()  # what torch itself does at a first backward
opt.zero_grad()
rows = []
for _ in range(4):
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    with Work() as work:
        opt.step(closure)
    rows.append((work.written, held()))
print(json.dumps({"rows": rows, "weights": 4 * sum(p.numel() for p in model.parameters())}))
"""


@pytest.mark.parametrize("name", ["AdamW", "SGD", "APO"])
def test_the_first_step_costs_what_a_later_one_does(name: str) -> None:
    """In a process of its own, whose peak memory is this model's."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells a process its peak memory")
    # or malloc keeps some of what was freed, one time and not another
    usual = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", PROGRAM, name]
    ran = subprocess.run(command, cwd=ROOT, env=usual, check=True, capture_output=True, timeout=240)
    found = json.loads(ran.stdout)
    (first_work, first_peak), *later = found["rows"]
    assert found["weights"] < first_work < 2 * max(work for work, _ in later)
    # a later peak holds the base's state as well
    assert first_peak < max(peak for _, peak in later) + 0.5 * found["weights"]
