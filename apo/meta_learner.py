"""Algorithm 1, once: anchor → lookahead → evaluate → verdict → learn or shrink → move.

What differs between the front ends are the hooks :meth:`MetaLearner._propose`, :meth:`MetaLearner._learn`,
:meth:`MetaLearner._shrink` and :meth:`MetaLearner._plain_step`; :meth:`MetaLearner._move` where the step after a trial
isn't a plain one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from apo import checks
from apo.inner_products import inner_products, norms
from apo.loop.accumulated import GradientsBefore
from apo.loop.grad_scaler import Scaling
from apo.loop.held_parameters import HeldParameters
from apo.loop.remembering import Remembering, apart
from apo.objective import Anchor, Closure, Evaluation, ProximalObjective, check_trained
from apo.ranks.distributed import Ranks
from apo.ranks.sharding import Shards, is_placed
from apo.rates.log_rates import get_rate
from apo.safeguards.finite_gradients import scale_of_gradients
from apo.safeguards.verdict import LONG, overshoots, passes
from apo.trial import (
    CallersAutocast,
    Lookahead,
    Undisturbed,
    WrittenMeanwhile,
    forget_casts,
    leaves_of_backwards,
    random_state,
    restore_random_state,
)

__all__ = ["Elsewhere", "MetaLearner", "Trial"]

_CHANGING = {"accepted", "in_trial"}

Elsewhere = Callable[[Callable[[], None]], AbstractContextManager[float]]
"""At the weights that a function writes, the gradients of the batch at hand, and what they are scaled by."""


@dataclass
class Trial:
    """What a lookahead gave.

    Attributes:
        V: ``∇_θ′ Q``, one dense tensor per parameter; of a DTensor, this rank's part.
        steps: ``θ′ − θ``, likewise.
        evaluation: the terms of Q.
        relative_length: ``‖θ′ − θ‖/‖θ‖`` of the matrices that aren't zero, over which a net's units are spread.
        usual_length: the same of all matrices, each taken to be at least as long as torch starts one of its shape.
    """

    V: list[Tensor]
    steps: list[Tensor]
    evaluation: Evaluation
    relative_length: float
    usual_length: float


class MetaLearner(Remembering):
    """A ``torch.optim.Optimizer`` whose ``step`` also adapts φ by the proximal objective.

    Attributes:
        objective: the :class:`~apo.ProximalObjective`.
        last: the :class:`~apo.Evaluation` of the last trial, or None.
        accepted: whether the last trial was accepted.
        in_trial: whether the closure or the model is being run for a trial. What logs or counts, in a closure or in
            hooks, may want to skip those runs. Clipping also clips the trial's gradient, so the loss weighs less
            against the FSD.
    """

    def _init_meta_learner(
        self,
        objective: ProximalObjective,
        interval: int,
        warmup: int,
        grad_scaler: GradScaler | None,
        process_group: Any,
    ) -> None:
        check_trained(objective, self.parameters)
        self.objective = objective
        self.interval = interval
        self.warmup = warmup
        self.grad_scaler = grad_scaler
        self.last: Evaluation | None = None
        self.accepted = False
        self.in_trial = False
        self._stepping = False
        self._used_rates: list[float | Tensor] = []
        self._gradient_scale = 1.0
        self._ranks = Ranks(process_group)
        self._shards = Shards(self.parameters)
        self._held = HeldParameters(self._models, self.parameters)
        self._others = WrittenMeanwhile(self._models, self.parameters)

    @property
    def meta_due(self) -> bool:
        """Whether the next step evaluates a trial and updates φ. Until a first one has passed, always. Never where
        ``interval`` or every rate is 0."""
        spacing, warmed = self.interval, self._warmed
        if warmed < self.warmup:
            spacing = max(1, warmed * self.interval // self.warmup)
        due = self.interval > 0 and (self.steps % spacing == 0 or not self._begun)
        return due and any(get_rate(group) for group in self.param_groups)

    @property
    def _warmed(self) -> int:
        """How many steps of the warm-up have passed."""
        return self.steps

    def step(self, closure: Closure | None = None) -> Any:
        """One step: φ first, if that is due, then the weights with the new φ (Algorithm 1).

        Args:
            closure: clears the gradients, runs forward and backward, returns the loss. Called at θ, and, at a
                meta-step of an objective that has no ``loss`` of its own, once more at θ′ on the same batch; by
                :class:`~apo.APO` before that at the weights before the last step. None, with the gradients in
                ``.grad``, will do otherwise.

        Returns:
            What the closure returned at θ; None without one.

        Raises:
            TypeError: ``closure`` isn't callable, or didn't return a loss.
            ValueError: a meta-step needs the closure, and there is none, or it ran no backward; parameters were
                replaced since the optimizer was built.
            RuntimeError: it is called within a step of the same optimizer, as by a hook.

        If the closure, the model, a hook or a check raises, the weights, the optimizer's state and φ are as before the
        step. Not so where memory runs out while they are being written.
        """
        return self._take(closure, move=True)

    def meta_step(self, closure: Closure | None = None) -> Any:
        """Update φ once, whether due or not, and leave the weights where they are. Returns the loss at them."""
        if closure is None:
            return self._take(None, move=False)
        with self._scaling().set_aside():
            return self._take(closure, move=False)

    def metrics(self) -> dict[str, float]:
        """What there is to log of the last step, as plain floats. Where rates lie on a GPU, this waits for it.

        The rates are those of the step, whatever a scheduler has written since.

        ==================  ======================================================================================
        ``lr``              the learned rate; ``lr/0``, ``lr/1``, ... where there are several param groups
        ``Q``               the objective at the last trial (:class:`~apo.Evaluation`); with the five below and
                            ``accepted`` it is there from the first trial on
        ``loss``            its first term, the loss at θ′
        ``base_loss``       the loss at θ that it is judged by
        ``fsd``, ``wsd``    the other terms, before λ
        ``step_norm``       ``‖θ′ − θ‖``
        ``accepted``        1 or 0: the verdict on the last trial
        ``steps``           steps taken, skipped ones counted
        ``failed_trials``   trials refused
        ``skipped_steps``   steps left out because of gradients that weren't finite
        ==================  ======================================================================================
        """
        rates = [float(rate) for rate in self._used_rates]
        if len(rates) != len(self.param_groups):
            rates = [get_rate(group) for group in self.param_groups]
        found = {"lr": rates[0]} if len(rates) == 1 else {f"lr/{i}": rate for i, rate in enumerate(rates)}
        if self.last is not None:
            found |= {
                "Q": self.last.objective,
                "loss": self.last.loss,
                "base_loss": self.last.base,
                "fsd": self.last.fsd,
                "wsd": self.last.wsd,
                "step_norm": self.last.step_norm,
                "accepted": float(self.accepted),
            }
        counts = {"steps": self.steps, "failed_trials": self.failed_trials, "skipped_steps": self.skipped_steps}
        return found | {name: float(count) for name, count in counts.items()}

    def _take(self, closure: Closure | None, *, move: bool) -> Any:
        forget_casts(self._gathering)  # gathered weights would stand in the parameters' places
        self._renew()
        self._shards = Shards(self.parameters)
        meta = self.meta_due or not move
        self._check_closure(closure, meta=meta)
        autocast = CallersAutocast({device.type for device in {p.device for p in self.parameters}})
        scaling = self._scaling()
        lifted = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
        with lifted, self._one_at_a_time(), scaling.one_step(move=move):
            return self._take_with(closure, autocast, scaling, meta=meta, move=move)

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        if self._stepping:
            raise RuntimeError(
                "step must not be called within a step of the same optimizer, but was, as by a hook that steps it in "
                "the backward: its trials run the model backward too"
            )
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    @contextmanager
    def _trying(self) -> Iterator[None]:
        """Here the closure and the model are run for a trial."""
        self.in_trial = True
        try:
            yield
        finally:
            self.in_trial = False

    def _take_with(
        self, closure: Closure | None, autocast: CallersAutocast, scaling: Scaling, *, meta: bool, move: bool
    ) -> Any:
        loss: Any = None
        touched = self.parameters
        begun = random_state(touched) if meta and self._goes_back else None
        if closure is not None and meta:
            before = GradientsBefore(touched, self._shards.any) if self.objective.loss is None else None
            with torch.enable_grad(), leaves_of_backwards() as leaves:
                loss = closure()
            touched = [*touched, *leaves]
            closure = closure if before is None else before.guarded(closure)
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
        written = self._others.look(self._models, self.parameters) if meta else []
        self._settle()  # after the closure, so that a GPU has its passes to do while the host waits
        with autocast.lifted():
            scaling.unscale()
            forget_casts(self._gathering)
            if not (move and not meta and self._judged_late(scaling)) and not self._gradients_are_finite(scaling):
                if move:
                    self._skip(meta, scaling)
                return loss
            self._check_gradients()
            if meta:

                def undisturbed_by(train: bool) -> Undisturbed:
                    return Undisturbed(self._models, touched, train=train, own=self.parameters, written=written)

                elsewhere = None
                if begun is not None and closure is not None:
                    around = closure, autocast, scaling, undisturbed_by(train=True), begun
                    elsewhere = partial(self._gradients_elsewhere, *around)
                self._look_back(elsewhere)
                undisturbed = undisturbed_by(self.objective.mode == "train")
                self._meta_step(closure, loss, autocast, scaling, undisturbed, move=move)
            elif move:
                self._plain_step()
            if move:
                forget_casts(self._gathering)
                self._used_rates = [apart(group["lr"]) for group in self.param_groups]
                self.steps += 1
        return loss

    def _meta_step(
        self,
        closure: Closure | None,
        loss: Any,
        autocast: CallersAutocast,
        scaling: Scaling,
        undisturbed: Undisturbed,
        *,
        move: bool,
    ) -> None:
        objective, parameters = self.objective, self.parameters
        if objective.loss is None and closure is not None:
            _scalar(loss, parameters[0])  # refused before anything is changed
        if all(p.grad is None for p in parameters):
            if move:
                self._plain_step()
            return
        self._ranks.settle(objective.model, parameters, self._replica_text(), placed=self._shards.placed)
        batch = objective.checked_draw() if objective.needs_inputs else None
        lookahead, anchor = Lookahead(parameters, self._gathering), None
        with ExitStack() as undo:
            self._begin(lookahead, undo)
            if objective.needs_inputs:
                # some modules renormalise their weights when called, so the lookahead is entered here too
                with lookahead, undisturbed, self._trying(), autocast.back():
                    anchor = objective.anchor(batch, self._look_at)
            with lookahead:
                proposal = self._propose(lookahead, undo)
                forget_casts(self._gathering)
                trial = self._evaluate(closure, loss, lookahead.start, anchor, autocast, scaling, undisturbed)
            self.accepted = self._verdict(trial) and not (move and not self._begun and self._too_far(trial))
            if self.accepted and move:
                learned = self._learn(proposal, trial)
                self._move(proposal, trial)
                undo.pop_all()
        if self.accepted and not move:
            learned = self._learn(proposal, trial)
        if not self.accepted:
            self._shrink()
        elif move and not self._begun:
            self._note("apo_begun", True)
        if not (self.accepted and learned):
            self._count("apo_failed_trials")

    def _evaluate(
        self,
        closure: Closure | None,
        loss: Any,
        start: list[Tensor],
        anchor: Anchor | None,
        autocast: CallersAutocast,
        scaling: Scaling,
        undisturbed: Undisturbed,
    ) -> Trial:
        """Q and V at the present trial weights, by ordinary backward passes; the same on all ranks."""
        parameters, objective = self.parameters, self.objective
        with undisturbed as models, self._trying(), scaling.set_aside():
            factor, sign = scaling.factor, self._sign()
            loss_there: Any = 0.0
            with autocast.back():
                if objective.loss is None:
                    loss_there = self._closure_elsewhere(closure, parameters, sign)
                    factor = scaling.left
                    models.start_over()  # as at the anchor
                own_loss, fsd = objective.terms(anchor) if anchor is not None else (None, None)
                if own_loss is not None:
                    loss_there = own_loss
                terms = [] if own_loss is None else [sign * own_loss]
                terms += [] if fsd is None else [(objective.fsd_weight or 0.0) * fsd]
                total = torch.stack(terms).sum() if terms else None
            if total is not None:
                if not total.requires_grad:
                    raise ValueError(
                        "outputs must depend on the model's weights, but what the discrepancy compares has no graph: "
                        "say which of what the model returns does with ProximalObjective(outputs=lambda returned: ...)"
                    )
                with torch.enable_grad():
                    (factor * total).backward()  # type: ignore[no-untyped-call]
            V = self._gradients_there()
        steps = list(torch._foreach_sub(self._shards.parts, start))
        if factor != 1.0:
            torch._foreach_mul_(V, 1.0 / factor)
        if terms:
            # the parts of DTensors have been averaged in the backward pass
            self._shards.mean_([v for v, p in zip(V, parameters, strict=True) if not is_placed(p)])
            self._ranks.average_(V)
        if objective.wsd_weight:
            torch._foreach_add_(V, steps, alpha=objective.wsd_weight)
        lengths = self._shards.sum(norms([*steps, *start]).square())
        squares = lengths[: len(steps)].sum()
        base = loss if anchor is None or anchor.loss is None else anchor.loss
        values = torch.stack([_scalar(loss_there, squares), _scalar(base, squares), _scalar(fsd or 0.0, squares)])
        self._shards.mean_([values])
        self._ranks.average_([values])
        # one synchronisation for all terms
        found = torch.cat([values, squares.reshape(1), lengths.to(values)]).tolist()
        self.last = self._evaluation(*found[:4])
        return Trial(V, steps, self.last, *_relative_lengths(parameters, found[4:]))

    def _gradients_there(self) -> list[Tensor]:
        """``.grad`` as dense tensors that no later backward writes to."""
        grads = zip(self._shards.grads(), self._shards.parts, strict=True)
        return [_own(grad, part) for grad, part in grads]

    def _evaluation(self, loss: float, base: float, fsd: float, square: float) -> Evaluation:
        weight, wsd_weight = self.objective.fsd_weight or 0.0, self.objective.wsd_weight or 0.0
        q = self._sign() * loss + weight * fsd + wsd_weight * square / 2
        return Evaluation(q, loss, fsd, square / 2, math.sqrt(square), base)

    def _closure_elsewhere(self, closure: Closure | None, parameters: list[Tensor], sign: float) -> Any:
        assert closure is not None
        with self.objective.explained():
            loss = closure()
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads:
            raise ValueError(
                "closure must clear the gradients and run forward and backward, because it is run again at the trial "
                "weights, but it ran no backward there. Where gradients are accumulated outside, give the "
                "ProximalObjective a loss=, whose trials need no closure"
            )
        if sign < 0:
            for grad in grads:
                grad.neg_()
        return loss

    def _verdict(self, trial: Trial) -> bool:
        """Whether a trial can be learned from."""
        return passes(trial.evaluation, self._base(trial), trial.relative_length * self._carried())

    def _carried(self) -> float:
        """How many times as far as the trial momentum will carry its step."""
        return 1.0

    def _too_far(self, trial: Trial) -> bool:
        """Whether a trial before the first step went too far."""
        if trial.relative_length > LONG:
            return True
        slope = float(self._shards.sum(inner_products(trial.V, trial.steps).double()).sum())
        return overshoots(trial.evaluation, self._base(trial), slope, fresh=self.objective.loss is not None)

    def _base(self, trial: Trial) -> float:
        """The loss at θ that a trial is judged by, as it is minimized."""
        return self._sign() * trial.evaluation.base

    @property
    def _goes_back(self) -> bool:
        """Whether :meth:`_look_back` needs gradients at other weights than θ."""
        return False

    def _look_back(self, elsewhere: Elsewhere | None) -> None:
        """Look at what the last step was worth to this batch. The gradients of ``elsewhere``, where they are needed,
        are those of the same batch, with the same random numbers."""

    @contextmanager
    def _gradients_elsewhere(
        self,
        closure: Closure,
        autocast: CallersAutocast,
        scaling: Scaling,
        undisturbed: Undisturbed,
        begun: dict[str, Any],
        write: Callable[[], None],
    ) -> Iterator[float]:
        """The closure's gradients at the weights that ``write`` leaves, with the random numbers that it ``begun``
        with. Yields what they are scaled by."""
        with Lookahead(self.parameters, self._gathering), undisturbed, self._trying(), scaling.set_aside():
            restore_random_state(begun)
            with torch.no_grad():
                write()
            forget_casts(self._gathering)
            with autocast.back():
                self._closure_elsewhere(closure, self.parameters, self._sign())
            yield scaling.left

    def _look_at(self, outputs: Any) -> None:
        """What the anchor compares, with its graph, before it is let go."""

    def _begin(self, lookahead: Lookahead, undo: ExitStack) -> None:
        """Before the model is run: note what hooks of the optimizer's may change, as for :meth:`_propose`."""

    @abstractmethod
    def _propose(self, lookahead: Lookahead, undo: ExitStack) -> Any:
        """Write the trial weights θ′. What is entered into ``undo`` is left again unless the step is taken."""

    @abstractmethod
    def _learn(self, proposal: Any, trial: Trial) -> bool:
        """Step φ down ``∇_φ Q``; False, and φ as it was, where that isn't finite. The weights are at θ."""

    @abstractmethod
    def _shrink(self) -> None:
        """Make the next trial shorter: this one failed."""

    def _move(self, proposal: Any, trial: Trial) -> None:
        """Take the step with the new φ."""
        self._plain_step()

    @abstractmethod
    def _plain_step(self) -> None: ...

    @property
    @abstractmethod
    def _models(self) -> list[nn.Module]:
        """The modules whose parameters are optimized, as far as they are known."""

    @property
    def _gathering(self) -> list[nn.Module]:
        """The modules that may hold gathered copies of the weights, as those under ``fully_shard`` do."""
        return self._models if self._shards.placed else []

    def _renew(self) -> None:
        """Take up what was changed since the last step: groups, the parameters' dtype and device, the rates."""
        self._held.refuse(self._held.replaced())

    def _sign(self) -> float:
        """1 where the loss is minimized, −1 where it is maximized."""
        return 1.0

    def _check_gradients(self) -> None:
        """Refuse gradients that can't be used, before anything is changed."""

    def _check_closure(self, closure: Closure | None, *, meta: bool) -> None:
        if closure is not None:
            checks.closure(closure)
        elif meta and self.objective.loss is None and any(p.grad is not None for p in self.parameters):
            raise ValueError(
                "closure must be given at a step that updates φ (meta_due), because it is run again at the trial "
                "weights: call step(closure); or give the ProximalObjective a loss=, whose trials need no closure; "
                "or build the optimizer with interval=0 to leave φ as it is"
            )

    def _gradients_are_finite(self, scaling: Scaling) -> bool:
        """One synchronisation, which a GradScaler has made already."""
        if scaling.active:
            return not self._shards.any(scaling.overflowed)
        self._gradient_scale = scale_of_gradients(self._shards)
        return math.isfinite(self._gradient_scale)

    def _judged_late(self, scaling: Scaling) -> bool:
        """Whether the coming step leaves itself out, on the device, where its gradients aren't finite, and
        :meth:`_settle` learns of it afterwards: so that nothing waits for the device."""
        return False

    def _skip(self, meta: bool, scaling: Scaling) -> None:
        """Leave out a step whose gradients aren't finite. A GradScaler's overflows say nothing of φ."""
        self._count("apo_skipped_steps")
        if meta and not scaling.active:
            self.accepted = False
            self._count("apo_failed_trials")
            self._shrink()
        self.steps += 1

    def _scaling(self) -> Scaling:
        return Scaling(self.grad_scaler, [self])

    def _replica_text(self) -> str:
        """What replicas of one model have in common and the members of a sweep haven't."""
        groups = [{k: str(v) for k, v in group.items() if k != "params"} for group in self.param_groups]
        objective = self.objective
        held = [self, getattr(self, "rates", None), getattr(self, "optimizer", None), objective, objective.discrepancy]
        settings = [(type(each).__name__, _plain_settings(each)) for each in held]
        return f"{self._settings_text()} {groups} {settings} {getattr(self, 'method', '')}"

    def _forget_last_step(self) -> None:
        self._used_rates = []


def _plain_settings(holder: object) -> dict[str, Any]:
    """The public attributes that are numbers, words or tuples of them."""
    found = getattr(holder, "__dict__", {})
    return {
        name: value
        for name, value in found.items()
        if not name.startswith("_")
        and issubclass(type(value), (bool, int, float, str, tuple))
        and name not in _CHANGING
    }


def _relative_lengths(parameters: list[Tensor], squares: list[float]) -> tuple[float, float]:
    """The lengths of a trial, by the squared ones of steps, and then those of the weights."""
    of_all = zip(parameters, squares, squares[len(parameters) :], strict=False)
    matrices = [(step, weight, p.shape[0] / 3) for p, step, weight in of_all if p.ndim > 1]  # E‖U(±1/√fan_in)‖²
    there = [(step, weight) for step, weight, _ in matrices if weight > 0]
    return _over(there), _over([(step, max(weight, usual)) for step, weight, usual in matrices])


def _over(squares: list[tuple[float, float]]) -> float:
    """``‖a‖/‖b‖`` by the squared lengths of their parts; 0 where b has none."""
    a, b = (sum(each) for each in zip(*squares, strict=True)) if squares else (0.0, 0.0)
    return math.sqrt(a / b) if b else 0.0


def _own(found: Tensor | None, part: Tensor) -> Tensor:
    """A gradient as a dense tensor that no later backward writes to; zeros like the weights where there is none."""
    if found is None:
        return torch.zeros_like(part)
    grad = found.detach().to_dense()
    shared = found._is_view() or grad.untyped_storage().nbytes() > grad.numel() * grad.element_size()
    return grad.clone() if shared else grad


def _scalar(value: Any, like: Tensor) -> Tensor:
    """A loss as a float64 tensor on the parameters' device."""
    if isinstance(value, Tensor) and is_placed(value):
        value = value.full_tensor()  # type: ignore[attr-defined]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().to(like).squeeze()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.as_tensor(value).to(like)
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"closure must return the loss, a tensor of one element or a number, but got {got}")
