"""AdaptiveLR: the learning rate of any optimizer that is linear in it."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from apo import checks
from apo.inner_products import inner_products
from apo.loop import past_weights
from apo.loop.grad_scaler import Scaling
from apo.loop.held_parameters import HeldParameters
from apo.meta_learner import MetaLearner, Trial
from apo.objective import ProximalObjective, check_objective
from apo.ranks.placement_checks import check_placements
from apo.rates.log_rates import LogRates, RateOptimizer
from apo.rates.schedules import Schedules
from apo.rates.steady_steps import Stride
from apo.safeguards.verdict import SHORT, worth
from apo.trial import Lookahead
from apo.wrapped.lengths import carried, lasting, lengthened
from apo.wrapped.linearity import check_linear, is_proportional
from apo.wrapped.snapshot import Rehearsal, with_wrapped

__all__ = ["AdaptiveLR"]

Group = dict[str, Any]


class AdaptiveLR(MetaLearner):
    """Learns the learning rate of ``optimizer`` while it trains (section 4.2 of the paper, Algorithm 1).

    With ``φ = log lr``, and θ′ the weights after a trial step, a meta-update descends ::

        dQ/d log lr = ⟨∇_θ′ Q, θ′ − θ⟩

    The real step is the optimizer's own at the new rate, from the same state, gradients and random numbers. A meta-step
    runs the closure once more, evaluates B′ twice, and takes one more backward pass; with a ``loss`` in the objective
    the closure isn't run again. While it runs it holds a copy of the weights and of the optimizer's state, so that an
    exception or a failed trial can be undone. Two means of the weights are held throughout, and saved in checkpoints.

    The one-step objective is short-sighted, and a step always fits the noise of its own batch. So the rate changes only
    where slopes say so clearly, or where the way that the weights have come does (:mod:`apo.rates.steady_steps`), and a
    ``loss`` in the objective, which is taken on B′, says it best. To follow each slope, as the paper does, give a
    ``loss`` and ``meta_optimizer="rmsprop"``.

    Step hooks of ``optimizer``, and of optimizers that it wraps, still run. Those before the step run once, in the
    trial, which needs the gradients as they leave them. Those after it run where the step is taken.

    A scheduler may be put on top, with the AdaptiveLR as its optimizer: where the length of training is known, let the
    rate fall to 0 over its last third. What is learned is the schedule's height: it doesn't make up for its falls.
    Schedulers that multiply the rate keep what was learned. Those that set it from a base of their own need
    ``rescale_schedule``.

    Args:
        optimizer: any ``torch.optim.Optimizer`` whose step is proportional to ``lr``: SGD, RMSprop, Adam, AdamW,
            Adagrad, NAdam, ..., with momentum, Nesterov and weight decay. Checked at the first meta-step. A step that
            is linear in ``lr`` beside a constant is served as well (a rate inside the momentum, wrappers such as
            Lookahead), for one more step of the optimizer in a meta-step.
        objective: the :class:`~apo.ProximalObjective`. Its λ_FSD, if left open, is 0.3, or 0.1 if it has a ``loss``.
        interval: a meta-update every N steps (K of Algorithm 1). 0: never.
        warmup: over the first N steps the interval grows from 1, so that training can start from any rate.
        meta_lr: the most that ``log lr`` rises by in a meta-update; about how much it moves with ``"rmsprop"`` or
            ``"adam"``. None: 0.3, or 0.1 with these.
        meta_optimizer: of ``log lr``: ``"steady"``, or ``"rmsprop"`` (the paper's) or ``"adam"``, which follow each
            slope.
        meta_decay: of the latter two's mean of squares. None: 0.99, or 0.9 if the objective has a ``loss``.
        reach: evaluate Q after this fraction of the step, in (0, 1]. The rate settles about 1/reach higher. Keep 1 with
            momentum. Without momentum, try 0.4 with a ``loss`` and a λ_WSD of 0.01.
        shared_lr: one learned factor for all param groups; otherwise each group's rate is learned separately.
        bounds: least and greatest rate.
        rescale_schedule: multiply what a scheduler sets by what was learned, for schedulers that set the rate from
            their own base (``LambdaLR``, ``OneCycleLR``, transformers' Trainer always). Otherwise what they set
            replaces what was learned, with one warning.
        grad_scaler: the GradScaler whose ``scale`` the closure calls. Then ``step`` unscales, unless the closure has,
            and leaves out steps whose gradients overflowed. Call ``scaler.update()`` afterwards, as always. Where no
            closure is needed, ``scaler.step`` does the same.
        process_group: the ranks that train one model. None: DDP's own, or found at the first meta-step
            (:mod:`apo.ranks.distributed`).

    A trial fails if Q isn't finite or leaps (:attr:`failed_trials`), if it gains nothing by a step that momentum will
    carry further than the weights are long, or, with a reach below 1, if its slope says that the whole step would leap.
    The step is then left out, every rate is divided by e, and ``failed_trials`` counts it.

    Raises:
        TypeError, ValueError: an argument isn't as above; at the first meta-step: the optimizer isn't linear.
    """

    NUMBERS: ClassVar = {"apo_last_update": 0, "apo_clipped_by": 1.0}

    def __init__(
        self,
        optimizer: Optimizer,
        objective: ProximalObjective,
        *,
        interval: int = 10,
        warmup: int = 200,
        meta_lr: float | None = None,
        meta_optimizer: RateOptimizer = "steady",
        meta_decay: float | None = None,
        reach: float = 1.0,
        shared_lr: bool = False,
        bounds: tuple[float, float] = (1e-10, 1e4),
        rescale_schedule: bool = False,
        grad_scaler: GradScaler | None = None,
        process_group: Any = None,
    ) -> None:
        checks.optimizer("optimizer", optimizer)
        if isinstance(optimizer, MetaLearner):
            raise TypeError(f"optimizer must not adapt itself already, but got {type(optimizer).__name__}")
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
            meta_lr=(0.3 if meta_optimizer == "steady" else 0.1) if meta_lr is None else meta_lr,
            meta_optimizer=meta_optimizer,
            meta_decay=(0.9 if fresh else 0.99) if meta_decay is None else meta_decay,
            fitted=not fresh,
            shared_lr=checks.boolean("shared_lr", shared_lr),
            bounds=bounds,
            rescale_schedule=rescale_schedule,
        )
        super().__init__([torch.zeros(0)], {})  # hooks and the like; the groups are the optimizer's
        self.optimizer = optimizer
        self.rates = rates
        self._rehearsal: Rehearsal | None = None
        self._found_proportional: bool | None = None
        self._schedules = Schedules([self, optimizer])
        filled = objective.with_defaults(fsd_weight=0.1 if fresh else 0.3)
        check_placements([objective.model], [p for g in optimizer.param_groups for p in g["params"]], process_group)
        self._link()
        self._sign()  # refuses what can't be served
        for group in self.param_groups:
            for name in [k for k in group if k.startswith("apo_")]:
                del group[name]  # of another AdaptiveLR before this one
        self._prepare_groups()
        self._init_meta_learner(filled, interval, warmup, grad_scaler, process_group)
        self._placed = _placed(self.parameters)

    def _link(self) -> None:
        """Share the optimizer's own groups and state: loading a state dict replaces both objects."""
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        self.defaults = self.optimizer.defaults

    def _prepare_groups(self) -> None:
        for group in self.param_groups:
            self.rates.prepare(group)
            self._prepare_group(group)
            group["apo_proportional"] = None  # not known yet
        _part_tensor_rates(self.param_groups)

    def add_param_group(self, param_group: Group) -> None:
        """As the optimizer's own, to which groups may be added too; the new group's rate is learned as well."""
        if not hasattr(self, "optimizer"):
            super().add_param_group(param_group)  # from Optimizer.__init__
            return
        self.optimizer.add_param_group(param_group)
        try:
            _check_groups(self.optimizer.param_groups)
        except BaseException:
            self.optimizer.param_groups.pop()
            raise
        self._renew()

    def _renew(self) -> None:
        self._link()
        if any("apo_steps" not in group for group in self.param_groups):
            _check_groups(self.param_groups)
            self._prepare_groups()
            self._held = HeldParameters(self._models, self.parameters)
        super()._renew()
        placed = _placed(self.parameters)
        if placed != self._placed:
            checks.parameters(self.parameters)
            if self.optimizer.state:  # loading is how torch casts and moves a state to its parameters
                self.optimizer.load_state_dict(self.optimizer.state_dict())
                self._link()
            self._placed = placed
        self.rates.notice(self.param_groups, self._schedules)

    @property
    def _models(self) -> list[nn.Module]:
        return [self.objective.model]

    @property
    def _steady(self) -> bool:
        """Whether the rate is learned by more than single slopes."""
        return self.rates.meta_optimizer == "steady"

    def _sign(self) -> float:
        signs = {-1.0 if group.get("maximize", False) else 1.0 for group in self.param_groups}
        if len(signs) > 1:
            raise ValueError("optimizer must maximize in all of its param groups or in none")
        return signs.pop()

    @property
    def _proportional(self) -> bool | None:
        """What :func:`check_linear` found, or that it ceased to be so. From the first step on it stands in the groups,
        so that checkpoints hold it."""
        noted: bool | None = self.param_groups[0].get("apo_proportional")
        return self._found_proportional if noted is None else noted

    def _scaling(self) -> Scaling:
        return Scaling(self.grad_scaler, [self, *with_wrapped(self.optimizer)])

    def _plain_step(self) -> None:
        self.optimizer.step()
        if self.steps == 0 and self._steady:
            past_weights.begin(self.state, self.parameters, self._shards.parts)

    def _begin(self, lookahead: Lookahead, undo: ExitStack) -> None:
        if self._proportional is None:
            self._found_proportional = check_linear(self.optimizer)
        self._rehearsal = Rehearsal(self.optimizer, lookahead)
        undo.callback(self._rehearsal.start_over)

    def _propose(self, lookahead: Lookahead, undo: ExitStack) -> _Attempt:
        assert self._rehearsal is not None
        reach = self.reach / (lengthened(self.optimizer) if self._steady else 1.0)
        attempt, self._rehearsal = _Attempt(self._rehearsal, lookahead, reach), None
        attempt.rehearsal.rehearse(attempt.reach)
        return attempt

    def _carried(self) -> float:
        """As far as trials are judged by it: those of Algorithm 1 itself aren't."""
        return carried(self.optimizer) if self._steady else 1.0

    def _verdict(self, trial: Trial) -> bool:
        passed, further = super()._verdict(trial), self._carried()
        if further > 1 and self.failed_trials and not self._begun:  # the rate was found too large
            passed = passed and trial.relative_length * further <= SHORT
        if passed and self.reach < 1:
            # Q at the whole step wasn't evaluated. A leap is as b s²; at s = reach its slope is 2 b s.
            slope = sum(self._products((trial.V, trial.steps))[0])
            passed = slope / (2 * self.reach**2) <= 1 + abs(trial.evaluation.objective)
        return passed

    def _learn(self, proposal: _Attempt, trial: Trial) -> bool:
        steps = trial.steps if self._proportional is not False else self._without_constant(proposal, trial)
        pairs, sizes, clipped_by = [(trial.V, steps)], None, 1.0
        ways: list[past_weights.Way] = []
        if self._steady:
            G = self._gradients_there()
            pairs += [(G, steps), (trial.V, trial.V), (G, G)]
            pairs += [(G, way) for way in past_weights.ways_to(self.state, self.parameters)]
        by_group, *others = self._products(*pairs)
        if others:
            sizes, ours, theirs, *along = others
            clipped_by = self._clipped_by(sum(ours), sum(theirs))
            sizes = [clipped_by * abs(size) for size in sizes]
            scale = self._sign() * clipped_by
            ways = [past_weights.Way.by(scale * past, scale * recent) for past, recent in zip(*along, strict=True)]
        if not all(map(math.isfinite, [*by_group, *(sizes or ()), *(x for way in ways for x in way)])):
            return False
        proposal.rehearsal.start_over()  # some optimizers hook the model's passes
        now = self.steps + 1
        share = max(1, now - self.param_groups[0]["apo_last_update"]) / now
        base = self._base(trial)
        of_step = None if self.objective.loss is None else worth(trial.evaluation, base, sum(by_group))
        length = trial.usual_length / self.reach
        stride = Stride(length * lasting(self.optimizer), length * carried(self.optimizer))
        proposal.share = share
        proposal.factors = self.rates.update(self.param_groups, by_group, sizes, share, of_step, base, ways, stride)
        self._note("apo_last_update", now)
        self._note("apo_clipped_by", clipped_by)
        return True

    def _clipped_by(self, ours: float, theirs: float) -> float:
        """How many times as long V is as G, of these squared lengths, where that lasts: the closure clips. Otherwise 1.

        V is longer as well where a trial leaps. So this grows slowly, and falls at once.
        """
        most: float = 1.1 * self.param_groups[0]["apo_clipped_by"]
        return max(1.0, min(most, math.sqrt(ours / theirs))) if ours > 0 and theirs > 0 else 1.0

    def _without_constant(self, attempt: _Attempt, trial: Trial) -> list[Tensor]:
        """``lr · d`` where ``θ′ − θ = c + lr · d``: twice what the step at half the rate falls short by."""
        with attempt.lookahead:
            attempt.rehearsal.rehearse(attempt.reach / 2)
            return [
                2 * (whole - (p - start))
                for whole, p, start in zip(trial.steps, self._shards.parts, attempt.lookahead.start, strict=True)
            ]

    def _products(self, *pairs: tuple[list[Tensor], list[Tensor]]) -> list[list[float]]:
        """Of each pair its inner product in each group, as ``dQ/d log lr = ⟨V, θ′ − θ⟩``; one synchronisation."""
        counts = [len(group["params"]) for group in self.param_groups]
        each = self._shards.sum(torch.cat([inner_products(*pair) for pair in pairs]))
        sums = torch.stack([part.sum() for part in torch.split(each, counts * len(pairs))])
        values: list[list[float]] = sums.view(len(pairs), -1).tolist()
        return values

    def _move(self, proposal: _Attempt, trial: Trial) -> None:
        """The optimizer's own step at the new rates."""
        proposal.rehearsal.perform()
        self._note("apo_proportional", self._proportional)
        if proposal.factors is None:
            return
        if self._steady:
            past_weights.follow(self.state, self.parameters, proposal.lookahead.start, proposal.share)
        if not self._proportional:
            return
        sizes = [len(group["params"]) for group in self.param_groups]
        factors = [f / proposal.reach for f, size in zip(proposal.factors, sizes, strict=True) for _ in range(size)]
        # Steps may cease to be proportional later, as where weights are drawn to an average of theirs now and then.
        if not is_proportional(proposal.lookahead.start, trial.steps, self._shards, factors):
            self._note("apo_proportional", False)

    def _shrink(self) -> None:
        self.rates.shrink(self.param_groups)

    def _settings(self) -> dict[str, Any]:
        return {"meta_optimizer": self.rates.meta_optimizer, "shared_lr": self.rates.shared_lr}

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
        means = past_weights.taken(state_dict)
        self.optimizer.load_state_dict(state_dict)
        self._link()
        past_weights.put(self.state, self.parameters, means)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


@dataclass
class _Attempt:
    """A trial's step: what takes it again, the weights at θ, how much of the step the trial is, each group's new rate
    over its old one, and the share of training since the last update."""

    rehearsal: Rehearsal
    lookahead: Lookahead
    reach: float
    factors: list[float] | None = None
    share: float = 0.0


def _placed(parameters: list[Tensor]) -> list[tuple[torch.dtype, torch.device]]:
    return [(p.dtype, p.device) for p in parameters]


def _check_groups(groups: list[Group]) -> None:
    for i, group in enumerate(groups):
        if "lr" not in group:
            raise ValueError(f"optimizer must have an 'lr' in each param group, but group {i} has none")
        rate = group["lr"]
        checks.number(f"optimizer.param_groups[{i}]['lr']", _number(rate))
    checks.parameters(p for group in groups for p in group["params"])


def _number(rate: Any) -> Any:
    """What a rate of NumPy's or in a tensor holds, if that is one number."""
    return rate.item() if getattr(rate, "size", None) == 1 or (isinstance(rate, Tensor) and rate.numel() == 1) else rate


def _part_tensor_rates(groups: list[Group]) -> None:
    """Give each group a rate of its own: torch puts one and the same tensor into all of them."""
    held = set[int]()
    for group in groups:
        if isinstance(group["lr"], Tensor) and id(group["lr"]) in held:
            group["lr"] = group["lr"].clone()
        held.add(id(group["lr"]))
