"""AdaptiveLR: the learning rate of any optimizer that is linear in it."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from apo import checks
from apo.grad_scaler import Scaling
from apo.held_parameters import HeldParameters
from apo.inner_products import inner_products
from apo.linearity import Linearity, check_linear
from apo.meta_learner import MetaLearner, Trial
from apo.objective import ProximalObjective, check_objective
from apo.rates import LogRates, RateOptimizer
from apo.snapshot import OptimizerSnapshot, run_post_hooks, with_wrapped, without_hooks
from apo.trial import Lookahead

__all__ = ["AdaptiveLR"]

Group = dict[str, Any]


class AdaptiveLR(MetaLearner):
    """Learns the learning rate of ``optimizer`` while it trains (section 4.2 of the paper, Algorithm 1).

    ``φ = log lr``; ``dQ/d log lr = ⟨∇_θ′ Q, θ′ − θ⟩``, so that a meta-step costs one more run of the closure, two
    evaluations of B′ and a backward (no run of the closure where the objective has a ``loss`` of its own), and the
    real step is the trial's, scaled: ``θ + (lr_new / lr_old)(θ′ − θ)``. While one runs it holds a copy of the weights
    and of the optimizer's state, so that an exception or a failed trial can undo it.

    The one-step objective is short-sighted: on deterministic problems it settles below the best fixed rate of plain
    SGD and RMSprop. And where gradient noise dominates, the loss on B itself doesn't let it decay the rate as a
    schedule would, for a step always fits the noise of its own batch. What decays it is the objective's ``loss``, on
    B′. Training loss after 1800 steps, batch 100, of an MLP 784-256-256-10 on MNIST (one seed), SGD with momentum:

    ===================================================  ==========================================
    best of four fixed rates; best of four schedules     0.042; 0.027
    loss on B, λ_FSD 0.3; 1; 3; 10                       0.67; 0.11; 0.074; 0.13: the rate rises
    loss on B, λ_FSD 1; 3, ``meta_decay`` 0.9            0.32; 0.061
    loss on B′, λ_FSD 0, ``meta_decay`` 0.99             0.045: after the warmup the rate hardly moves
    loss on B′, λ_FSD 0; 0.1; 0.3; 1                     0.028; 0.030; 0.034; 0.040: the rate falls
    ===================================================  ==========================================

    A scheduler may be put on top: it is the optimizer that ``torch.optim.lr_scheduler`` is given. Schedulers that
    multiply the rate keep what was learned; those that set it from their own base need ``rescale_schedule``.

    Args:
        optimizer: any ``torch.optim.Optimizer`` whose step is proportional to ``lr``: SGD, RMSprop, Adam, AdamW,
            Adagrad, NAdam, ..., with momentum, Nesterov and weight decay. Checked at the first meta-step.
        objective: the :class:`~apo.ProximalObjective`. Its λ_FSD, if it was left open, is 0.3, or 0.1 where it has a
            ``loss`` of its own.
        interval: a meta-update every so many steps (K of Algorithm 1). 0: never.
        warmup: and at each of the first so many, which is what lets it start from any rate.
        meta_lr: about how much ``log lr`` moves in a meta-update.
        meta_optimizer: ``"rmsprop"`` or ``"adam"``, of ``log lr``.
        meta_decay: of the meta-optimizer's mean of squares. The first slopes are the largest by orders of magnitude:
            a long memory of them holds the rate where it was. None: 0.99, or 0.9 where the objective has a ``loss``
            of its own, whose slope may be followed (table above).
        reach: Q is evaluated where a rate of ``reach · lr`` leads, so that the rate settles at 1/reach times the
            short-sighted one. For optimizers *without* momentum, with a ``loss`` on B′, and some λ_WSD, whose weight
            against a loss that sinks is what decays the rate: RMSprop on the task above, best of four fixed rates
            0.046, best of three schedules 0.027; learned, reach 1: 0.24; 0.75: 0.17; 0.5: 0.048, with λ_WSD 0.01
            0.034; 0.4 with λ_WSD 0.03: 0.018 (second seed 0.024); 0.3 with λ_WSD 0.1: 0.028. With momentum 1 is
            right: 0.65 to 1 were alike there with λ_FSD 0, and 0.56 and less diverged or nearly so.
        shared: one learned factor for all param groups; otherwise each group's rate is learned for itself.
        bounds: least and greatest rate.
        rescale_schedule: a scheduler sets the rate from its own base (``LambdaLR``, ``OneCycleLR``, transformers'
            Trainer always): multiply what it sets by what was learned. Otherwise it replaces what was learned, and
            one warning says so.
        grad_scaler: the GradScaler whose ``scale`` the closure calls. Then ``step`` unscales, unless the closure has,
            and leaves out steps whose gradients overflowed; ``scaler.update()`` is called afterwards as ever.
            ``scaler.step`` will do where no closure is needed.
        process_group: the ranks that train one model. None: DDP's own, or found out at the first meta-step
            (:mod:`apo.distributed`).

    A trial fails where Q isn't finite or leaps (:attr:`failed_trials`), or, with a reach below 1, where its slope says
    that the whole step would make it leap: the step is then left out, every rate is divided by e, and
    ``failed_trials`` counts it.

    Raises:
        TypeError, ValueError: an argument isn't as above; at the first meta-step: the optimizer isn't linear.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        objective: ProximalObjective,
        *,
        interval: int = 10,
        warmup: int = 50,
        meta_lr: float = 0.1,
        meta_optimizer: RateOptimizer = "rmsprop",
        meta_decay: float | None = None,
        reach: float = 1.0,
        shared: bool = False,
        bounds: tuple[float, float] = (1e-10, 1e4),
        rescale_schedule: bool = False,
        grad_scaler: GradScaler | None = None,
        process_group: Any = None,
    ) -> None:
        checks.optimizer("optimizer", optimizer)
        if isinstance(optimizer, MetaLearner):
            raise TypeError(f"optimizer must not adapt itself already, but got {type(optimizer).__name__}")
        check_objective(objective)
        check_objective(objective)
        _check_groups(optimizer.param_groups)
        checks.integer("interval", interval, least=0)
        checks.integer("warmup", warmup, least=0)
        checks.grad_scaler("grad_scaler", grad_scaler)
        self.reach = checks.number("reach", reach, above=True)
        if self.reach > 1:
            raise ValueError(f"reach must be at most 1, but got {reach!r}")
        fresh = objective.loss is not None
        rates = LogRates(
            meta_lr=meta_lr,
            meta_optimizer=meta_optimizer,
            meta_decay=(0.9 if fresh else 0.99) if meta_decay is None else meta_decay,
            shared=shared,
            bounds=bounds,
            rescale_schedule=rescale_schedule,
        )
        super().__init__([torch.zeros(0)], {})  # hooks and the like; the groups are the optimizer's
        self.optimizer = optimizer
        self.rates = rates
        self._linearity: Linearity | None = None
        filled = objective.with_defaults(fsd_weight=0.1 if fresh else 0.3)
        self._link()
        self._sign()  # refuses what can't be served
        for group in self.param_groups:
            for name in [k for k in group if k.startswith("apo_")]:
                del group[name]  # of another AdaptiveLR before this one
        self._prepare_groups()
        self._init_meta_learner(filled, interval, warmup, grad_scaler, process_group)

    def _link(self) -> None:
        """Share the optimizer's own groups and state: loading a state dict replaces both objects."""
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        self.defaults = self.optimizer.defaults

    def _prepare_groups(self) -> None:
        for group in self.param_groups:
            self.rates.prepare(group)
            self._prepare_group(group)

    def add_param_group(self, param_group: Group) -> None:
        """As the optimizer's own, to which groups may be added too; the new group's rate is learned as well."""
        if not hasattr(self, "optimizer"):
            super().add_param_group(param_group)  # from Optimizer.__init__
            return
        self.optimizer.add_param_group(param_group)
        self._renew()

    def _renew(self) -> None:
        self._link()
        if any("apo_steps" not in group for group in self.param_groups):
            _check_groups(self.param_groups)
            self._prepare_groups()
            self._held = HeldParameters(self._models, self.parameters)
        super()._renew()
        self.rates.notice(self.param_groups)

    @property
    def _models(self) -> list[nn.Module]:
        return [self.objective.model]

    def _sign(self) -> float:
        signs = {-1.0 if group.get("maximize", False) else 1.0 for group in self.param_groups}
        if len(signs) > 1:
            raise ValueError("optimizer must maximize in all of its param groups or in none")
        return signs.pop()

    def _scaling(self) -> Scaling:
        return Scaling(self.grad_scaler, [self, self.optimizer])

    def _plain_step(self) -> None:
        self.optimizer.step()

    def _propose(self, lookahead: Lookahead, undo: ExitStack) -> _Factors:
        if self._linearity is None:
            self._linearity = check_linear(self.optimizer)
        undo.enter_context(OptimizerSnapshot(self.optimizer))
        if self._linearity is not None and self._linearity.edits_gradients:
            held = [(p, p.grad, p.grad.clone()) for p in self.parameters if p.grad is not None]
            undo.callback(_restore_gradients, held)
        with without_hooks(with_wrapped(self.optimizer)):
            self.optimizer.step()
        if self.reach < 1:
            torch._foreach_lerp_(self.parameters, lookahead.start, 1 - self.reach)
        return _Factors([1.0] * len(self.param_groups))

    def _verdict(self, trial: Trial) -> bool:
        passed = super()._verdict(trial)
        if passed and self.reach < 1:
            # Q at the whole step wasn't evaluated. A leap is as b s²; at s = reach its slope is 2 b s.
            slope = sum(self._slopes(trial))
            passed = slope / (2 * self.reach**2) <= 1 + abs(trial.evaluation.objective)
        return passed

    def _learn(self, proposal: _Factors, trial: Trial) -> bool:
        by_group = self._slopes(trial)
        if not all(map(math.isfinite, by_group)):
            return False
        proposal.by_group = self.rates.update(self.param_groups, by_group)
        return True

    def _slopes(self, trial: Trial) -> list[float]:
        """``dQ/d log lr = ⟨V, θ′ − θ⟩`` of each group; one synchronisation."""
        products = inner_products(trial.V, trial.steps)
        counts = [len(group["params"]) for group in self.param_groups]
        values: list[float] = torch.stack([part.sum() for part in torch.split(products, counts)]).tolist()
        return values

    def _move(self, proposal: _Factors, trial: Trial) -> None:
        """``θ + (lr_new / lr_old)(θ′ − θ)``: the optimizer's state doesn't depend on the rate."""
        each = zip(proposal.by_group, self.param_groups, strict=True)
        torch._foreach_mul_(trial.steps, [factor / self.reach for factor, group in each for _ in group["params"]])
        torch._foreach_add_(self.parameters, trial.steps)
        run_post_hooks(with_wrapped(self.optimizer))

    def _shrink(self) -> None:
        self.rates.shrink(self.param_groups)

    def _settings(self) -> dict[str, Any]:
        return {"meta_optimizer": self.rates.meta_optimizer, "shared": self.rates.shared}

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own, in which the groups hold what is remembered of the rates too."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = copy.deepcopy(self.optimizer.state_dict())
        for after in self._optimizer_state_dict_post_hooks.values():
            state = after(self, state) or state
        return state

    def _load(self, state_dict: dict[str, Any]) -> None:
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        self.optimizer.load_state_dict(state_dict)
        self._link()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


@dataclass
class _Factors:
    """Each group's new rate over its old one."""

    by_group: list[float]


def _restore_gradients(held: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for p, grad, content in held:
        grad.copy_(content)
        p.grad = grad


def _check_groups(groups: list[Group]) -> None:
    for i, group in enumerate(groups):
        if "lr" not in group:
            raise ValueError(f"optimizer must have an 'lr' in each param group, but group {i} has none")
        rate = group["lr"]
        checks.number(f"optimizer.param_groups[{i}]['lr']", rate.item() if isinstance(rate, Tensor) else rate)
    checks.parameters(p for group in groups for p in group["params"])
