"""Optimizers that people use, from packages that the extra ``peers`` installs. Imported where one is made."""

import importlib
import importlib.metadata
from typing import Any

from torch import nn
from torch.optim import Optimizer


def muon(model: nn.Module, lr: float = 0.02, **settings: Any) -> Optimizer:
    """Muon, of hidden matrices. Vectors, embeddings and the last matrix are its AdamW's, at a tenth of the rate."""
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    last = [p for p in model.parameters() if p.ndim > 1][-1:]
    others = {id(p) for p in (*embeddings, *last, *(p for p in model.parameters() if p.ndim < 2))}
    groups = [
        {"params": [p for p in model.parameters() if (id(p) not in others) == hidden], "use_muon": hidden}
        for hidden in (True, False)
    ]
    made: Optimizer = _package("pytorch_optimizer").Muon(groups, lr=lr, adamw_lr=lr / 10, **settings)
    return made


def soap(model: nn.Module, **settings: Any) -> Optimizer:
    made: Optimizer = _package("pytorch_optimizer").SOAP(model.parameters(), **settings)
    return made


def schedule_free(model: nn.Module, **settings: Any) -> Optimizer:
    """AdamW, whose rate needs no schedule because it averages weights."""
    made: Optimizer = _package("schedulefree").AdamWScheduleFree(model.parameters(), **settings)
    return made


def versions() -> dict[str, str]:
    """Of the packages, by name."""
    return {_package(name).__name__: importlib.metadata.version(name) for name in ("pytorch_optimizer", "schedulefree")}


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'{name} is not installed; pip install -e ".[peers]" brings it') from error
