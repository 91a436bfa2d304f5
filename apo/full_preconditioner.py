"""A full preconditioning matrix (Eq. 7), for problems small enough to hold one: the object of Theorem 1."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apo import checks
from apo.meta_learner import MetaLearner, Trial
from apo.objective import ProximalObjective, check_objective
from apo.phi.meta_optimizer import Learned, MetaOptimizer, MetaOptimizerName
from apo.ranks.placement_checks import check_unplaced
from apo.rates.log_rates import get_rate
from apo.trial import Lookahead

__all__ = ["FullPreconditioner"]

LARGEST = 8192


class FullPreconditioner(MetaLearner):
    """``θ ← θ − lr · P ∇J_B(θ)`` with ``φ = P``, a free ``(d, d)`` matrix over all weights, which starts as I.

    Under the linearised loss and the quadratic FSD the best ``lr · P`` is ``(λ_FSD G + λ_WSD I)⁻¹`` (Theorem 1).

    Args:
        model: whose parameters that require grad are trained; at most 8192 numbers.
        objective: the :class:`~apo.ProximalObjective`. Its λ_FSD is 1 if it was left open.
        lr: a fixed scale in front, > 0.
        interval: a meta-update every N steps. 0: never.
        warmup: over the first N steps the interval grows from 1.
        meta_lr: entrywise rate of the meta-optimizer.
        meta_optimizer: ``"adam"`` or ``"rmsprop"``.
        process_group: as for :class:`~apo.AdaptiveLR`.

    Attributes:
        P: ``(d, d)``, in the order of the model's parameters.

    A trial fails where Q isn't finite or leaps: the step is left out, ``P`` is divided by e, and
    ``failed_trials`` counts it.

    Raises:
        TypeError, ValueError: an argument isn't as above.
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
        process_group: Any = None,
    ) -> None:
        self.model = checks.module("model", model)
        check_objective(objective)
        checks.number("lr", lr, above=True)
        checks.integer("interval", interval, least=0)
        checks.integer("warmup", warmup, least=0)
        self.meta_lr = checks.number("meta_lr", meta_lr)
        weights = [p for p in model.parameters() if p.requires_grad]
        checks.parameters(weights)
        check_unplaced("FullPreconditioner", weights, "use APO")
        size = sum(p.numel() for p in weights)
        if not 0 < size <= LARGEST:
            raise ValueError(f"model must have 1 to {LARGEST} trainable numbers, but has {size}")
        self.meta = MetaOptimizer(meta_optimizer)
        super().__init__(weights, {"lr": lr})
        dtype = torch.promote_types(weights[0].dtype, torch.float32)
        self.P = torch.eye(size, dtype=dtype, device=weights[0].device)
        self.meta.add([Learned(self.P, meta_lr)])
        self._prepare_group(self.param_groups[0])
        self._show_state()
        filled = objective.with_defaults(fsd_weight=1.0)
        self._init_meta_learner(filled, interval, warmup, None, process_group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: P is of all the weights together."""
        if self.param_groups:
            raise ValueError("param_group can't be added: P is one matrix of all weights; build a new optimizer")
        super().add_param_group(param_group)

    @property
    def _models(self) -> list[nn.Module]:
        return [self.model, self.objective.model]

    def _flat(self, tensors: list[Tensor | None]) -> Tensor:
        parts = [
            torch.zeros(p.numel(), dtype=self.P.dtype, device=self.P.device) if t is None else t.reshape(-1).to(self.P)
            for p, t in zip(self.parameters, tensors, strict=True)
        ]
        return torch.cat(parts)

    def _take_step(self) -> Tensor:
        """Subtract ``lr · P g`` from the weights; returns g."""
        gradient = self._flat([p.grad for p in self.parameters])
        scale = self._gradient_scale
        step = scale * get_rate(self.param_groups[0]) * (self.P @ (gradient / scale))
        for p, part in zip(self.parameters, torch.split(step, [p.numel() for p in self.parameters]), strict=True):
            if p.grad is not None:  # one that was frozen stays, although P mixes all weights
                p.sub_(part.view_as(p).to(p.dtype))
        return gradient

    def _plain_step(self) -> None:
        self._take_step()

    def _propose(self, lookahead: Lookahead, undo: ExitStack) -> Tensor:
        return self._take_step()

    def _learn(self, proposal: Tensor, trial: Trial) -> bool:
        rate = get_rate(self.param_groups[0])
        V = [None if p.grad is None else v for p, v in zip(self.parameters, trial.V, strict=True)]
        slope = torch.outer(self._flat(V), proposal).mul_(-rate)  # dQ/dP = −lr · V gᵀ
        if not bool(slope.isfinite().all()):
            return False
        self.meta.step([slope])
        return True

    def _shrink(self) -> None:
        self.P.div_(torch.e)

    def _settings(self) -> dict[str, Any]:
        return {"meta_optimizer": self.meta.name}

    def _state(self) -> dict[str, Tensor]:
        """P and what the meta-optimizer remembers of it, kept under the first parameter."""
        (own,) = self.meta.learned
        return {"step": own.count, "P": self.P, **{f"P_{k}": t for k, t in own.buffers.items()}}

    def _show_state(self) -> None:
        self.state.clear()
        for p in self.parameters:
            self.state[p] = {"step": self.meta.learned[0].count}
        self.state[self.parameters[0]] = self._state()

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["state"].get(state_dict["param_groups"][0]["params"][0], {}).get("P")
        if saved is None or saved.shape != self.P.shape:
            shape = None if saved is None else tuple(saved.shape)
            raise ValueError(f"state_dict must hold a P of shape {tuple(self.P.shape)}, but it is {shape}")

    def _load(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["state"][state_dict["param_groups"][0]["params"][0]]
        Optimizer.load_state_dict(self, state_dict)
        for name, tensor in self._state().items():
            tensor.copy_(saved[name])
        self._show_state()
