"""``import apo`` stays light, and optimizers are found under what trainers wrap around them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer

from apo.integrations import front_end
from tests.integrations.helpers import each_front_end, loader, net, optimizer_of, others


def test_importing_apo_imports_no_trainer() -> None:
    code = "import sys, apo; print({'lightning', 'transformers', 'accelerate', 'torchmetrics'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@each_front_end
def test_front_ends_are_found_under_wrappers(name: str) -> None:
    optimizer = optimizer_of(name, net(), others(), None)
    Accelerator(cpu=True)
    assert front_end(optimizer) is optimizer
    assert front_end(LightningOptimizer(optimizer)) is optimizer
    assert front_end(AcceleratedOptimizer(optimizer)) is optimizer
    assert front_end(AcceleratedOptimizer(AcceleratedOptimizer(optimizer))) is optimizer


@pytest.mark.parametrize("wrap", [lambda x: x, LightningOptimizer])
def test_other_optimizers_are_none(wrap: Any) -> None:
    assert front_end(wrap(torch.optim.AdamW(net().parameters()))) is None
    assert front_end(None) is None


@each_front_end
def test_fabric(name: str) -> None:
    """Lightning's Fabric wraps optimizers too, and passes closures on."""
    fabric = Fabric(accelerator="cpu", devices=1)
    model = net()
    optimizer = optimizer_of(name, model, others(), F.cross_entropy)
    model, wrapped = fabric.setup(model, optimizer)
    assert front_end(wrapped) is optimizer
    losses = []
    for x, t in [*loader()] * 4:
        wrapped.zero_grad()
        losses.append(F.cross_entropy(model(x), t))
        fabric.backward(losses[-1])
        wrapped.step()
    assert losses[-1] < losses[0]
