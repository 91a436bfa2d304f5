"""Learning rates as φ: log-parametrised rates in ``param_groups``, and AdaptiveLR over any linear optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from apo import checks
from apo.front_end import FrontEnd
from apo.linearity import OptimizerState, check_linear, get_rate, set_rate
from apo.lookahead import Lookahead
from apo.meta_optimizer import MetaOptimizer, MetaOptimizerName
from apo.objective import Closure, ProximalObjective

__all__ = ["AdaptiveLR", "LogRates"]

Group = dict[str, Any]


class LogRates:
    """``φ = log lr``, one a param group or one factor for all. The rates themselves stand in ``param_groups["lr"]``:
    whatever else writes there (a scheduler, a user) is taken as the new value to learn from.

    Args:
        count: number of groups.
        meta_lr: rate of the meta-optimizer: about how much ``log lr`` moves in an update.
        shared: one factor for all groups, whose rates keep their ratios.
        bounds: ``(least, greatest)`` rate. A rate of 0 is frozen and stays 0.
    """

    def __init__(
        self,
        count: int,
        *,
        meta_lr: float,
        meta_optimizer: MetaOptimizerName,
        meta_decay: float = 0.99,
        shared: bool,
        bounds: tuple[float, float],
    ) -> None:
        self.meta_lr = checks.number("meta_lr", meta_lr)
        self.shared = shared
        if not (isinstance(bounds, (tuple, list)) and len(bounds) == 2):
            raise TypeError(f"bounds must be a pair (least, greatest) of rates, but got {bounds!r}")
        self.bounds = float(bounds[0]), float(bounds[1])
        if not 0 < self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds must be rates 0 < least < greatest, but got {bounds!r}")
        self.meta = MetaOptimizer([], [], meta_optimizer, decay=meta_decay)
        self.grow(1 if shared else count)

    def grow(self, count: int = 1) -> None:
        """Take in further groups."""
        if self.shared and self.meta.tensors:
            return
        # Changes of log lr, not log lr itself: no meta-optimizer here looks at the value.
        self.meta.add([torch.zeros((), dtype=torch.float64) for _ in range(count)], [self.meta_lr] * count)

    def update(self, groups: Sequence[Group], slopes: Sequence[float]) -> list[float]:
        """Descend ``dQ/d log lr``, one slope a group. Returns each group's new rate over its old one."""
        slopes = [sum(slopes)] if self.shared else list(slopes)
        self.meta.step([torch.tensor(slope, dtype=torch.float64) for slope in slopes])
        changes = [t.item() for t in self.meta.tensors]
        for t in self.meta.tensors:
            t.zero_()
        if self.shared:
            changes *= len(groups)
        return [self._change(group, change) for group, change in zip(groups, changes, strict=True)]

    def shrink(self, groups: Sequence[Group]) -> None:
        """Divide every rate by e: the trial at these rates failed."""
        for group in groups:
            self._change(group, -1.0)

    def scale(self, groups: Sequence[Group], changes: Sequence[float], places: Sequence[int]) -> list[float]:
        """Change every log rate by the mean of the changes that stand for its group (for any group, where one
        factor is shared), not as a step of learning. Returns each group's new rate over its old one."""
        found = []
        for place, group in enumerate(groups):
            own = [c for c, at in zip(changes, places, strict=True) if self.shared or at == place]
            found.append(self._change(group, sum(own) / len(own)) if own else 1.0)
        return found

    def _change(self, group: Group, change: float) -> float:
        old = get_rate(group)
        if old == 0:
            return 1.0
        new = min(max(old * math.exp(change), self.bounds[0]), self.bounds[1])
        set_rate(group, new)
        return new / old

    def state_dict(self) -> dict[str, Any]:
        return self.meta.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.meta.load_state_dict(state)


def slopes(groups: Sequence[Group], V: Sequence[Tensor], steps: Sequence[Tensor]) -> list[float]:
    """``dQ/d log lr = ⟨V, θ′ − θ⟩`` of each group, summed in float64; one synchronisation."""
    sums, first = [], 0
    for group in groups:
        last = first + len(group["params"])
        products = [
            torch.sum(v * s, dtype=torch.float64) for v, s in zip(V[first:last], steps[first:last], strict=True)
        ]
        sums.append(torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64))
        first = last
    return [float(x) for x in torch.stack([s.cpu() for s in sums])]


class AdaptiveLR(FrontEnd):
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
    multiply the rate keep what was learned; those that set it from their own base replace it.

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
        grad_scaler: the GradScaler whose ``scale`` the closure calls. Then ``step`` unscales, and leaves out steps
            whose gradients overflowed; ``scaler.update()`` is called afterwards as ever, ``scaler.step`` never.

    A trial fails where Q isn't finite or leaps (:class:`~apo.front_end.FrontEnd`), or, with a reach below 1, where its
    slope says that the whole step would make it leap: the step is then left out,
    every rate is divided by e, and ``failed_trials`` counts it.

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
        meta_optimizer: MetaOptimizerName = "rmsprop",
        meta_decay: float | None = None,
        reach: float = 1.0,
        shared: bool = False,
        bounds: tuple[float, float] = (1e-10, 1e4),
        grad_scaler: GradScaler | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, but got {type(optimizer).__name__}")
        if isinstance(optimizer, FrontEnd):
            raise TypeError(f"optimizer must not adapt itself already, but got {type(optimizer).__name__}")
        if not isinstance(objective, ProximalObjective):
            raise TypeError(f"objective must be an apo.ProximalObjective, but got {type(objective).__name__}")
        for i, group in enumerate(optimizer.param_groups):
            if "lr" not in group:
                raise ValueError(f"optimizer must have an 'lr' in each param group, but group {i} has none")
            checks.number(f"optimizer.param_groups[{i}]['lr']", get_rate(group))
        checks.parameters(p for g in optimizer.param_groups for p in g["params"])
        checks.integer("interval", interval, least=0)
        checks.integer("warmup", warmup, least=0)
        self.reach = checks.number("reach", reach, above=True)
        if self.reach > 1:
            raise ValueError(f"reach must be at most 1, but got {reach!r}")
        fresh = objective.loss is not None
        rates = LogRates(
            len(optimizer.param_groups),
            meta_lr=meta_lr,
            meta_optimizer=meta_optimizer,
            meta_decay=checks.fraction("meta_decay", (0.9 if fresh else 0.99) if meta_decay is None else meta_decay),
            shared=shared,
            bounds=bounds,
        )
        super().__init__([torch.zeros(0)], {})  # hooks and the like; the groups are the optimizer's
        self.optimizer = optimizer
        self.rates = rates
        self.linear = False
        self._init_front_end(objective.with_defaults(fsd_weight=0.1 if fresh else 0.3), interval, warmup, grad_scaler)
        self._link()

    def _link(self) -> None:
        """Share the optimizer's own groups and state: loading a state dict replaces both objects."""
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        self.defaults = self.optimizer.defaults

    def add_param_group(self, param_group: Group) -> None:
        """As the optimizer's own; the new group's rate is learned too."""
        if not hasattr(self, "optimizer"):
            super().add_param_group(param_group)  # from Optimizer.__init__
            return
        self.optimizer.add_param_group(param_group)
        self.rates.grow()
        self._link()

    def _plain_step(self) -> None:
        self._link()
        self.optimizer.step()

    def _meta_step(self, closure: Closure, loss: Any, *, move: bool) -> None:
        self._link()
        if not self.linear:
            self.linear = check_linear(self.optimizer)
        groups, parameters = self.param_groups, self.parameters
        anchor = self.objective.anchor(parameters)
        with Lookahead(parameters) as lookahead, OptimizerState(self.optimizer) as state:
            self.optimizer.step()
            if self.reach < 1:
                torch._foreach_lerp_(parameters, lookahead.start, 1 - self.reach)
            V, passed = self._evaluate(closure, loss, lookahead.start, anchor)
            steps = torch._foreach_sub(parameters, lookahead.start)
            by_group = slopes(groups, V, steps)
            finite = all(map(math.isfinite, by_group))
            if passed and self.reach < 1:
                # Q at the whole step wasn't evaluated. A leap is as b s²; at s = reach its slope is 2 b s.
                assert self.last is not None
                passed = sum(by_group) / (2 * self.reach**2) <= 1 + abs(self.last.objective)
            if passed and move:
                factors = self.rates.update(groups, by_group) if finite else [1.0] * len(groups)
                torch._foreach_mul_(
                    steps, [f / self.reach for f, g in zip(factors, groups, strict=True) for _ in g["params"]]
                )
                torch._foreach_add_(steps, lookahead.start)
                torch._foreach_copy_(parameters, steps)
                lookahead.commit()
                state.commit()
        # Unless committed, weights and state are as before the step.
        if not (passed and finite):
            self.failed_trials += 1
        if not passed:
            self.rates.shrink(groups)
        elif finite and not move:
            self.rates.update(groups, by_group)

    def _settings(self) -> dict[str, Any]:
        return {"meta_optimizer": self.rates.meta.name, "shared": self.rates.shared}

    def _meta_state(self) -> dict[str, Any]:
        return {"rates": self.rates.state_dict(), "linear": self.linear}

    def _load_meta_state(self, state: dict[str, Any], raw: dict[str, Any]) -> None:
        self.optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self._link()
        self.rates.load_state_dict(state["rates"])
        self.linear = state["linear"]
