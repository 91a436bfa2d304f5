"""Nothing is hidden in the first step: its time and memory are a later meta-step's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, sys, time, torch
import torch.nn.functional as F
from torch import nn
import apo

torch.set_num_threads(1)

class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(40_000, 256), nn.Linear(256, 10)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1))

def held():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])

model, tokens, t = Bag(), torch.randint(40_000, (8, 16)), torch.randint(10, (8,))
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
    begun, before = time.process_time(), held()
    opt.step(closure)
    rows.append((time.process_time() - begun, held()))
print(json.dumps({"rows": rows, "weights": 4 * sum(p.numel() for p in model.parameters())}))
"""


@pytest.mark.parametrize("name", ["AdamW", "SGD", "APO"])
def test_the_first_step_costs_what_a_later_one_does(name: str) -> None:
    """In a process of its own, by process time, which other processes don't lengthen much."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells a process its peak memory")
    ran = subprocess.run([sys.executable, "-c", PROGRAM, name], cwd=ROOT, check=True, capture_output=True, timeout=240)
    found = json.loads(ran.stdout)
    (first_time, first_peak), *later = found["rows"]
    assert first_time < 1.5 * max(time for time, _ in later) + 0.1  # libraries that torch loads at a first step
    # a later peak holds the base's state as well
    assert first_peak < max(peak for _, peak in later) + 0.5 * found["weights"]
