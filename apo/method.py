"""How APO learns: what seldom has to be set, apart from the optimizer's own arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from apo import checks
from apo.ranks.owners import Shard

__all__ = ["Method"]

META_LR = {"relative": 0.05, "adam": 0.01, "rmsprop": 0.01}
_BLOCK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Method:
    """The method's constants, for ``APO(..., method=apo.Method(...))``.

    Args:
        meta_optimizer: of A, B and S: ``"relative"`` (:mod:`apo.phi.relative_steps`), ``"adam"`` or ``"rmsprop"``.
        meta_lr: its rate. For relative steps ε, the share by which one changes A, B and S; by default 0.05. For the
            others the rate of S, divided by the block's side for A and B; by default 0.01.
        lookahead: what the trial takes. ``"whole"``: ``θ′ = θ − lr·P(G)/(1 − μ)``, the whole way that momentum
            will carry this gradient. ``"step"``: ``θ − μv − lr·P(G)``, the next step.
        adapt_lr: learn ``lr`` too.
        lr_meta_lr: the most that ``log lr`` moves in a meta-update. Its slope is divided by what it would be if V
            equalled G.
        shared_lr: one learned factor for all param groups; otherwise each group's rate is learned separately.
        bounds: least and greatest rate.
        max_dim: a side longer than this gets no block at all; None: no bound.
        block_dtype: what the products read A, B and S as: float32, bfloat16 or float16, whatever the weights'
            dtype. Masters stay float32. None: the masters themselves.
        shard: who holds A, B, S and momentum of a model that every rank holds whole, as under DDP. ``"none"``: every
            rank. ``"owner"``: one rank for each layer, of the process group (DDP's, else the default one); it computes
            the layer's steps and broadcasts the weights. Call ``state_dict()`` and ``load_state_dict()`` on all ranks
            then. ``"auto"``: ``"owner"`` where a process group or DDP is given. DTensors are sharded as they lie.
        fisher_start: for the first N meta-updates, whiten P by sampled Fisher gradients too
            (:mod:`apo.fisher.start`). Each costs one more backward on B′. None: 300, or 0 for another
            ``meta_optimizer``. 0: the paper's bare algorithm.
        look_back: at each meta-update, see what the step before was worth to B, and shorten steps where that is little
            (:mod:`apo.noise.factor`). Every third look takes one more forward and backward. It needs a closure,
            momentum, and an objective without a ``loss``; without them steps are as long as the trial's.

    Raises:
        TypeError, ValueError: an argument isn't as above.
    """

    meta_optimizer: Literal["relative", "adam", "rmsprop"] = "relative"
    meta_lr: float | None = None
    lookahead: Literal["whole", "step"] = "whole"
    adapt_lr: bool = True
    lr_meta_lr: float = 0.1
    shared_lr: bool = True
    bounds: tuple[float, float] = (1e-10, 1e4)
    max_dim: int | None = 8192
    block_dtype: torch.dtype | None = None
    shard: Shard = "none"
    fisher_start: int | None = None
    look_back: bool = True

    def __post_init__(self) -> None:
        checks.one_of("meta_optimizer", self.meta_optimizer, ("relative", "adam", "rmsprop"))
        checks.one_of("lookahead", self.lookahead, ("whole", "step"))
        if self.meta_lr is not None:
            checks.number("meta_lr", self.meta_lr)
        checks.boolean("adapt_lr", self.adapt_lr)
        checks.number("lr_meta_lr", self.lr_meta_lr)
        checks.boolean("shared_lr", self.shared_lr)
        checks.increasing_pair("bounds", self.bounds)
        if self.fisher_start is not None:
            checks.integer("fisher_start", self.fisher_start, least=0)
        checks.boolean("look_back", self.look_back)
        checks.one_of("shard", self.shard, ("none", "auto", "owner"))
        check_sizes({"max_dim": self.max_dim, "block_dtype": self.block_dtype})

    @property
    def phi_lr(self) -> float:
        """The rate of A, B and S."""
        return META_LR[self.meta_optimizer] if self.meta_lr is None else self.meta_lr


def check_sizes(group: dict[str, object]) -> None:
    """Refuse sizes of blocks, as far as they are given."""
    for name in ("block_size", "max_dim"):
        if group.get(name) is not None:
            checks.integer(name, group[name], least=1)
    checks.one_of("block_dtype", group["block_dtype"], (None, *_BLOCK_DTYPES))
