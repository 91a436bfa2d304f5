"""All modules and parameters of models, in one quick walk: torch's own generators take as long as a small layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

__all__ = ["modules_of", "parameters_of"]


def modules_of(models: Iterable[nn.Module]) -> list[nn.Module]:
    """The models and what they hold, each once, in the order of ``Module.modules``."""
    found: dict[int, nn.Module] = {}
    waiting = list(models)[::-1]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            if module._modules:
                held = [each for each in module._modules.values() if each is not None]
                waiting += held[::-1]
    return list(found.values())


def parameters_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """The modules' own parameters; one that is held twice comes twice."""
    for module in modules:
        if module._parameters:
            for p in module._parameters.values():
                if p is not None:
                    yield p
