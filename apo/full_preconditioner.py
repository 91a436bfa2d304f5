"""A full preconditioning matrix (Eq. 7), for problems small enough to hold one: the object of Theorem 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apo import checks
from apo.front_end import FrontEnd
from apo.linearity import get_rate
from apo.lookahead import Lookahead
from apo.meta_optimizer import MetaOptimizer, MetaOptimizerName
from apo.objective import Closure, ProximalObjective

__all__ = ["FullPreconditioner"]

LARGEST = 8192


class FullPreconditioner(FrontEnd):
    """``θ ← θ − lr · P ∇J_B(θ)`` with ``φ = P``, a free ``(d, d)`` matrix over all weights, which starts as I.

    Under the linearised loss and the quadratic FSD the best ``lr · P`` is ``(λ_FSD G + λ_WSD I)⁻¹`` (Theorem 1).

    Args:
        model: whose parameters that require grad are trained; at most 8192 numbers.
        objective: the :class:`~apo.ProximalObjective`. Its λ_FSD is 1 if it was left open.
        lr: a fixed scale in front, > 0.
        interval, warmup: as for :class:`~apo.APO`.
        meta_lr: entrywise rate of the meta-optimizer.
        meta_optimizer: ``"adam"`` or ``"rmsprop"``.

    Attributes:
        P: ``(d, d)``, in the order of the model's parameters.

    A trial fails where Q isn't finite or leaps: the step is left out, ``P`` is divided by e, and
    ``failed_trials`` counts it.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: ProximalObjective,
        *,
        lr: float = 0.1,
        interval: int = 1,
        warmup: int = 0,
        meta_lr: float = 1e-2,
        meta_optimizer: MetaOptimizerName = "adam",
    ) -> None:
        checks.module("model", model)
        if not isinstance(objective, ProximalObjective):
            raise TypeError(f"objective must be an apo.ProximalObjective, but got {type(objective).__name__}")
        checks.number("lr", lr, above=True)
        checks.integer("interval", interval, least=0)
        checks.integer("warmup", warmup, least=0)
        checks.number("meta_lr", meta_lr)
        weights = [p for p in model.parameters() if p.requires_grad]
        checks.parameters(weights)
        size = sum(p.numel() for p in weights)
        if not 0 < size <= LARGEST:
            raise ValueError(f"model must have 1 to {LARGEST} trainable numbers, but has {size}")
        super().__init__(weights, {"lr": lr})
        dtype = torch.promote_types(weights[0].dtype, torch.float32)
        self.P = torch.eye(size, dtype=dtype, device=weights[0].device)
        self.meta = MetaOptimizer([self.P], [meta_lr], meta_optimizer)
        self._init_front_end(objective.with_defaults(fsd_weight=1.0), interval, warmup, None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: P is of all the weights together."""
        if self.param_groups:
            raise ValueError("param_group can't be added: P is one matrix of all weights; build a new optimizer")
        super().add_param_group(param_group)

    def _flat(self, tensors: list[Tensor | None]) -> Tensor:
        parts = [
            torch.zeros(p.numel(), dtype=self.P.dtype, device=self.P.device) if t is None else t.reshape(-1).to(self.P)
            for p, t in zip(self.parameters, tensors, strict=True)
        ]
        return torch.cat(parts)

    def _write(self, step: Tensor) -> None:
        for p, part in zip(self.parameters, torch.split(step, [p.numel() for p in self.parameters]), strict=True):
            p.sub_(part.view_as(p).to(p.dtype))

    def _plain_step(self) -> None:
        rate = get_rate(self.param_groups[0])
        self._write(rate * (self.P @ self._flat([p.grad for p in self.parameters])))

    def _meta_step(self, closure: Closure, loss: Any, *, move: bool) -> None:
        anchor = self.objective.anchor(self.parameters)
        rate = get_rate(self.param_groups[0])
        gradient = self._flat([p.grad for p in self.parameters])
        with Lookahead(self.parameters) as lookahead:
            self._write(rate * (self.P @ gradient))
            V, passed = self._evaluate(closure, loss, lookahead.start, anchor)
        slope = torch.outer(self._flat(list(V)), gradient).mul_(-rate)  # dQ/dP = −lr · V gᵀ
        finite = bool(slope.isfinite().all())
        if not (passed and finite):
            self.failed_trials += 1
        if not passed:
            self.P.div_(torch.e)
            return
        if finite:
            self.meta.step([slope])
        if move:
            self._plain_step()

    def _settings(self) -> dict[str, Any]:
        return {"meta_optimizer": self.meta.name}

    def _meta_state(self) -> dict[str, Any]:
        return {"P": self.P, "meta": self.meta.state_dict()}

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        if state_dict["apo"]["P"].shape != self.P.shape:
            raise ValueError(
                f"state_dict must hold a P of shape {tuple(self.P.shape)}, "
                f"but it is {tuple(state_dict['apo']['P'].shape)}"
            )

    def _load_meta_state(self, state: dict[str, Any], raw: dict[str, Any]) -> None:
        self.P.copy_(state["P"])
        self.meta.load_state_dict(state["meta"])
