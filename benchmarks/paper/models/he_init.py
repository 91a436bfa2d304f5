"""How convolutional networks start."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def he_init_(model: Module) -> Module:
    """He et al.'s (2015) normal weights for convolutions, biases 0: without batch norm a deep network needs it.

    Weights on the meta device, which are there to be counted, are left: drawing them costs seconds of imports.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
