"""APO: the preconditioned optimizer (section 4.4 of the paper)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from apo import checks
from apo.fisher.sample import FisherSample
from apo.fisher.spectrum import Spectrum, sampled_gradients, spectrum_of
from apo.fisher.start import FisherStart
from apo.inner_products import norms
from apo.layers.arena import Arena, Parts
from apo.layers.matrix_view import matrix_views
from apo.layers.plan import Plan, plan_of
from apo.layers.portable_state import load_portable, misfit, portable
from apo.layers.preconditioner import PreconditionedLayer, start_momentum
from apo.loop.grad_scaler import Scaling
from apo.loop.held_parameters import HeldParameters
from apo.loop.remembering import apart
from apo.meta_learner import Elsewhere, MetaLearner, Trial
from apo.method import Method, check_sizes
from apo.noise.damping import NoiseDamping
from apo.noise.factor import NoiseFactor
from apo.noise.look_back import LookBack
from apo.objective import ProximalObjective, check_objective
from apo.phi.meta_optimizer import MetaOptimizer
from apo.phi.relative_steps import RelativeSteps
from apo.ranks.owners import Owners
from apo.ranks.placement_checks import check_placements, check_unplaced
from apo.ranks.sharded_views import local_views
from apo.ranks.sharding import any_over, is_placed
from apo.rates.log_rates import LogRates, get_rate
from apo.rates.scale_moves import move_scale_to_rates
from apo.rates.schedules import Schedules
from apo.rates.slopes import carried_in, decay_of, rate_slopes
from apo.safeguards.late_verdict import LateVerdicts
from apo.safeguards.promise import Promise
from apo.trial import Lookahead, Undisturbed

__all__ = ["APO"]

_DTYPE, _DEVICE = attrgetter("dtype"), attrgetter("device")

MOVED_EVERY = 10
"""Meta-updates between two moves of P's scale to the rates."""

FISHER_START = 300
"""Meta-updates that the Fisher start lasts by default."""
AGREE = 0.5
"""Share of what a step promised to its own batch that it promises to the next one too, where there is little noise."""


class APO(MetaLearner):
    """Learns a structured preconditioner while it trains: second-order steps without an inverse.

    Each weight, read as a matrix and joined by its bias (:mod:`apo.layers.matrix_view`), steps by ::

        v ← μ v + κ·lr·P(G),   P(G) = B (S² ⊙ BᵀGA) Aᵀ      (Eq. 10)
        θ ← (1 − κ·lr·λ) θ − v

    with κ <= 1, which is 1 unless noise adds up (:mod:`apo.noise.factor`). ``φ = (log lr, A, B, S)`` descends the
    proximal objective at the lookahead (Eq. 8). ``P`` starts as the identity, so training starts as SGD with momentum.
    ``lr`` scales ``P`` and is learned with it, from any initial value. Every ten meta-updates the scale that P has
    gained moves into ``lr``, unless a scheduler overwrites the rates. ``lr`` enters the momentum with the gradient, so
    φ is judged by the present gradient alone.

    Safeguard: ``P(G)`` is scaled down so that the predicted decrease ``lr/(1 − μ) ⟨G, P(G)⟩``, summed over all layers,
    is at most twice the loss, which a Newton step on a quadratic may predict. Without it one odd batch, or a few steps
    between two trials, can end a run.

    Args:
        model: whose parameters are trained, the module or its DDP.
        objective: the :class:`~apo.ProximalObjective`. Its λ_FSD, if left open, is 1. Larger is steadier. Its
            λ_WSD, if left open, is 0.0001, which bounds P where outputs saturate. Set it to 0 where much smaller
            curvatures matter.
        params: parameters of the model's or param groups of them (keys: ``lr``, ``momentum``, ``weight_decay``,
            ``decoupled_weight_decay``, ``block_size``, ``max_dim``, ``block_dtype``); by default all that require
            grad. A weight and its bias in different groups aren't joined.
        lr: initial rate, >= 0.
        momentum: μ, of the preconditioned gradient, in [0, 1).
        weight_decay: λ, >= 0.
        decoupled_weight_decay: as above; otherwise ``λθ`` is added to ``G`` (L2).
        block_size: side of the squares of block-diagonal blocks; None: full blocks. A step costs ``8 · block_size``
            FLOPs per weight, with full blocks ``4 (m + n)``.
        interval: a meta-update every N steps (K of Algorithm 1). 0: never. A step with a meta-update takes four
            passes forward and three backward, every third one more of each; with a ``loss`` in the objective three
            and two. In the first 300 meta-updates it takes one more backward.
        warmup: over the first N steps the interval grows from 1, in proportion, to what it was set to; half as fast
            where there is little noise, as trials tell more there.
        rescale_schedule, grad_scaler, process_group: as for :class:`~apo.AdaptiveLR`.
        method: how it learns (:class:`~apo.Method`): what seldom has to be set.

    A trial fails where Q isn't finite or leaps (:attr:`failed_trials`): the step is then left out,
    ``lr`` (or P, where ``lr`` isn't learned) and the momentum are divided by e, and ``failed_trials`` counts it.

    Raises:
        TypeError, ValueError: an argument isn't as above; at a step: a sparse gradient, by its parameter's name.
    """

    JUDGED_LATE: ClassVar = frozenset({"cuda"})
    """Kinds of devices where to look at the gradients would be to wait for them."""
    NUMBERS: ClassVar = {
        "apo_overwritten": False,
        **Promise.NUMBERS,
        **NoiseFactor.NUMBERS,
        **NoiseDamping.NUMBERS,
    }

    def __init__(
        self,
        model: nn.Module,
        objective: ProximalObjective,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 0.1,
        momentum: float = 0.5,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        block_size: int | None = 64,
        interval: int = 50,
        warmup: int = 500,
        rescale_schedule: bool = False,
        grad_scaler: GradScaler | None = None,
        process_group: Any = None,
        method: Method | None = None,
    ) -> None:
        self.model = checks.module("model", model)
        check_objective(objective)
        checks.integer("interval", interval, least=0)
        checks.integer("warmup", warmup, least=0)
        checks.grad_scaler("grad_scaler", grad_scaler)
        method = Method() if method is None else method
        if not isinstance(method, Method):
            raise TypeError(f"method must be an apo.Method, but got {method!r}")
        self.method = method
        self.meta = _meta_optimizer(method)
        self._sample = FisherSample()
        self._look = LookBack()
        self._promise: Tensor | float = 1.0
        self._late = LateVerdicts()
        self._known_form: object = None
        self._process_group = process_group
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "block_size": block_size,
            "max_dim": method.max_dim,
            "block_dtype": method.block_dtype,
        }
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError("model must have parameters that require grad, but got none")
        elif not isinstance(params, Iterable):
            raise TypeError(f"params must be parameters of the model or param groups of them, but got {params!r}")
        self.rates = LogRates(
            meta_lr=method.lr_meta_lr,
            meta_optimizer="relative" if method.meta_optimizer == "relative" else "rmsprop",
            shared_lr=method.shared_lr,
            bounds=method.bounds,
            rescale_schedule=rescale_schedule,
        )
        self._schedules = Schedules([self])
        starts = FISHER_START if method.meta_optimizer == "relative" else 0
        self._start = FisherStart(starts if method.fisher_start is None else method.fisher_start)
        self._arena = Arena(self._found_owners())
        super().__init__(params, defaults)
        filled = objective.with_defaults(fsd_weight=1.0, wsd_weight=1e-4)
        self._init_meta_learner(filled, interval, warmup, grad_scaler, process_group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model's, with their own settings; their preconditioner starts as the identity."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            checks.parameters(self.parameters)
            check_placements(self._models, self.parameters, self._process_group)
            if self.method.shard == "owner":
                check_unplaced("shard='owner'", self.parameters, "leave it out: their state is sharded as they are")
            layers = self._layers_of(group, self._arena.owners)
        except BaseException:
            self.param_groups.pop()
            raise
        self.rates.prepare(group)
        self._prepare_group(group)
        self._take_in(layers)
        self._held = HeldParameters(self._models, self.parameters)

    def _found_owners(self) -> Owners:
        parameters = list(self.model.parameters())
        placed = any(map(is_placed, parameters))
        return Owners() if placed else Owners.found(self.method.shard, self._process_group, self.model, parameters)

    def _layers_of(self, group: dict[str, Any], owners: Owners) -> list[PreconditionedLayer]:
        if group["block_dtype"] is not None and any(p.dtype == torch.float64 for p in group["params"]):
            raise ValueError(f"block_dtype must be None for float64 weights, but got {group['block_dtype']}")
        checks.one_precision(self.model, self.parameters)
        place = next(i for i, own in enumerate(self.param_groups) if own is group)
        sizes = group["block_size"], group["max_dim"], group["block_dtype"]
        views = local_views(matrix_views(self.model, group["params"]), *sizes[:2])
        return [PreconditionedLayer.start(view, *sizes, place) for view in owners.views(views, *sizes[:2])]

    def _take_in(self, layers: Sequence[PreconditionedLayer]) -> None:
        """Let the meta-optimizer learn these layers, and checkpoints hold them, from now on."""
        for layer in layers:
            relative = isinstance(self.meta, RelativeSteps)
            rates = [self.method.phi_lr] * len(layer.phi) if relative else layer.entrywise_rates(self.method.phi_lr)
            for own, rate in zip(layer.phi, rates, strict=True):
                own.rate = rate
        start_momentum([layer for layer in layers if self._group(layer)["momentum"] != 0])
        self._arena.take_in(layers)
        self.meta.add([own for layer in layers for own in layer.phi])
        if self._start.updates:
            self._start.prepare(layers)
        self._show_state()

    def _show_state(self) -> None:
        counts = {p: layer.count for layer in self.layers for p in layer.view.parameters}
        self.state = defaultdict(dict)
        for p in self.parameters:
            count = counts[p] if p in counts else torch.zeros((), dtype=torch.float32, device="cpu")
            self.state[p] = {"step": count}
        for layer in self.layers:
            self.state[layer.view.weight] = layer.state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._show_state()

    @property
    def layers(self) -> list[PreconditionedLayer]:
        """The matrices of the model's with their preconditioners."""
        return self._arena.layers

    @property
    def _models(self) -> list[nn.Module]:
        return [self.model, self.objective.model] if hasattr(self, "objective") else [self.model]

    def plan(self) -> Plan:
        """Which parameter gets which treatment, and what that costs in memory and FLOPs. ``print`` it."""
        extras = {"starts": self._starts, "looks": self._may_look_back}
        return plan_of(self.model, self.layers, self.param_groups, self.meta.name, **extras)

    def spectrum(self, batch: Any = None, *, samples: int = 32) -> Spectrum:
        """How P compares with the inverse of the Fisher matrix, by layer and decade of curvature. ``print`` it.

        It takes eigenvectors of the sides and keeps all samples, each as large as the weights: a diagnosis, not a part
        of training, which it leaves as it is.

        Args:
            batch: inputs B′; None: the objective's next.
            samples: of the Fisher matrix, 2 or more. Each takes a backward pass.

        Raises:
            ValueError: λ_FSD is 0, the discrepancy can't be sampled, or layers are shared out over ranks.
        """
        checks.integer("samples", samples, least=2)
        if not self.objective.fsd_weight:
            raise ValueError("objective must have an fsd_weight above 0 for a spectrum, but it is 0")
        if any(layer.view.over for layer in self.layers):
            raise ValueError("spectrum needs whole layers on each rank, but they are sharded or have owners")
        found: list[list[Tensor | None]] = []

        def sample(outputs: Any) -> None:
            for grads in sampled_gradients(self.objective, outputs, self.parameters, samples):
                Ws = zip(self.layers, self._arena.parts(grads, self.parameters), strict=True)
                found.append([None if W is None else layer.view.joined(W).clone() for layer, W in Ws])

        drawn = self.objective.checked_draw() if batch is None else batch
        with Undisturbed(self._models, self.parameters), torch.enable_grad():
            self.objective.anchor(drawn, sample)
        delta = (self.objective.wsd_weight or 0.0) / self.objective.fsd_weight
        return spectrum_of(self.layers, found, self._each(get_rate), delta)

    def metrics(self) -> dict[str, float]:
        """As :meth:`MetaLearner.metrics`, and the factors by which the last step was shortened: ``noise_factor``
        against noise, and the safeguard's ``promise_factor``."""
        return super().metrics() | {"noise_factor": self._noise_factor, "promise_factor": float(self._promise)}

    def _renew(self) -> None:
        replaced = self._held.replaced()
        if replaced and all(
            held.is_meta and isinstance(now, nn.Parameter) and is_placed(now) == is_placed(held)
            for _, held, now in replaced
        ):
            self._adopt({id(held): now for _, held, now in replaced})
            replaced = self._held.replaced()
        self._held.refuse(replaced)
        form = _form(self.parameters)
        if form != self._known_form:
            self._renew_layers()
            self._known_form = form
        if self.rates.notice(self.param_groups, self._schedules):
            self._note("apo_overwritten", True)

    def _renew_layers(self) -> None:
        """Where the parameters aren't those, or not of the form, that the layers were made for."""
        given = [id(p) for p in self.parameters if p.numel()]
        held = [id(p) for layer in self.layers for p in layer.view.parameters]
        if len(given) != len(held) or set(given) != set(held):
            raise ValueError(
                "param_groups must hold the parameters that they were given, but something replaced them: build the "
                "optimizer after fully_shard or accelerate's prepare"
            )
        if any(layer.outdated for layer in self.layers):
            self._rebuild()

    def _adopt(self, now: dict[int, Tensor]) -> None:
        """Take the parameters that a model on meta was materialised to."""
        for group in self.param_groups:
            group["params"] = [now.get(id(p), p) for p in group["params"]]
        checks.parameters(self.parameters)
        self._held = HeldParameters(self._models, self.parameters)
        self._rebuild()

    def _rebuild(self) -> None:
        """Make the blocks anew in the parameters' dtype and on their device, with what was learned so far."""
        former = {layer.view.name: layer for layer in self.layers}
        owners = self._found_owners()
        fresh = [layer for group in self.param_groups for layer in self._layers_of(group, owners)]
        self._arena, self.meta = Arena(owners), _meta_optimizer(self.method)
        self._take_in(fresh)
        for layer in self.layers:
            if not former[layer.view.name].S.is_meta:
                layer.load(former[layer.view.name].state())
        self._show_state()

    def _check_gradients(self) -> None:
        for layer in self.layers:
            for p in layer.view.parameters:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise TypeError(
                        f"the gradient of {layer.view.name} must be dense, but is {p.grad.layout}: "
                        "build the embedding with sparse=False"
                    )

    def _plain_step(self) -> None:
        Gs = self._gradients()
        if all(G is None for G in Gs):
            return
        each = zip(self.layers, Gs, strict=True)
        late = [x for x, G in each if G is not None and x.momentum is None and self._group(x)["momentum"] != 0]
        start_momentum(late)
        for layer in late:
            self.state[layer.view.weight] = layer.state()
        scale = self._gradient_scale  # P(G) of a huge G would overflow
        if scale != 1:
            Gs = [None if G is None else [None if x is None else x / scale for x in G] for G in Gs]
        promise, taken = min(scale * scale, 1e38), self._noise_factor
        self._promise = self._arena.step(
            Gs,
            lr=self._each(lambda group: taken * get_rate(group) * scale),
            momentum=self._each(lambda group: float(group["momentum"])),
            weight_decay=self._each(lambda group: decay_of(group) / scale),
            most=self.param_groups[0]["apo_most_promised"],
            shares=self._each(lambda group: taken * get_rate(group) * carried_in(group) * promise),
        )
        self._late.await_verdict(self._promise)

    def _judged_late(self, scaling: Scaling) -> bool:
        self._gradient_scale = 1.0
        bounded = self.param_groups[0]["apo_most_promised"] < math.inf
        device = self.layers[0].S.device.type if self.layers else "cpu"
        return self._late.allowed(device in self.JUDGED_LATE and bounded and not scaling.active)

    def _settle(self) -> None:
        if self._late.left_out():
            self._count("apo_skipped_steps")
            self._promise = 1.0

    def _each(self, number: Callable[[dict[str, Any]], float]) -> list[float]:
        """A number of its param group for each layer."""
        of_group = [number(group) for group in self.param_groups]
        return [of_group[layer.group] for layer in self.layers]

    @property
    def _updates(self) -> int:
        """How many meta-updates there have been."""
        return int(max((layer.count.item() for layer in self.layers), default=0))

    @property
    def _starts(self) -> bool:
        """Whether P is still started by sampled Fisher gradients."""
        wanted = self._start.updates > 0 and bool(self.objective.fsd_weight)
        return wanted and self._updates < self._start.updates

    def _end_start(self) -> None:
        """Let go of what the start holds, once it is over."""
        if not self._starts and self._start.release(self.layers):
            self._show_state()

    def _look_at(self, outputs: Any) -> None:
        """Draw a sample of the outputs' Fisher matrix, in the first meta-updates."""
        number = self._updates if self._starts else None
        self._sample.draw(self.objective, outputs, self._shards, self._ranks, number=number)

    def _take_sample(self) -> list[PreconditionedLayer]:
        """Let the start see the sample, if there is one. Which layers it has seen."""
        sampled = self._sample.take(self._shards, self._ranks)
        return [] if sampled is None else self._start.take(self._arena, sampled, self.parameters)

    @property
    def _noise_factor(self) -> float:
        return float(self.param_groups[0]["apo_noise_factor"])

    @property
    def _warmed(self) -> int:
        return self.steps // 2 if self.param_groups[0]["apo_noise_gain"] > AGREE else self.steps

    @property
    def _may_look_back(self) -> bool:
        wanted = self.method.look_back and self.objective.loss is None
        return wanted and any(layer.momentum is not None for layer in self.layers)

    @property
    def _looks_back(self) -> bool:
        return self._may_look_back and self._updates > 0

    @property
    def _goes_back(self) -> bool:
        return self._looks_back and NoiseFactor.sees_cost(self.param_groups[0])

    def _look_back(self, elsewhere: Elsewhere | None) -> None:
        self._look.forget()
        if self._looks_back and self._gradient_scale == 1:
            self._look.look(self._arena, self._gradients, elsewhere, self._ranks)

    def _propose(self, lookahead: Lookahead, undo: ExitStack) -> _Proposal:
        Gs = self._gradients()
        whole = self.method.lookahead == "whole"
        lengths = self._each(lambda group: get_rate(group) * self._trial_factor(group))
        kept = self._arena.trial(
            Gs,
            lengths=lengths,
            momentum=self._each(lambda group: 0.0 if whole else float(group["momentum"])),
            shrink=self._each(lambda group: 1 - get_rate(group) * decay_of(group)),
        )
        return _Proposal(Gs, kept, lengths)

    def _learn(self, proposal: _Proposal, trial: Trial) -> bool:
        """Step φ down what ``⟨V, P(G)⟩`` and the rates' slopes say of Q, unless they aren't all finite."""
        loss = max(abs(trial.evaluation.loss), abs(trial.evaluation.base))
        self._note_all(Promise.noted(self.param_groups[0], loss))
        given = {p for p in self.parameters if p.grad is not None}
        V = [v if p in given else None for p, v in zip(self.parameters, trial.V, strict=True)]
        Vs = self._arena.parts(V, self.parameters)
        slopes = self._arena.operator.slopes(Vs, proposal.kept, lengths=proposal.lengths)
        factors = [self._trial_factor(group) for group in self.param_groups]
        by_group, magnitudes = rate_slopes(slopes, self.layers, self.param_groups, V, factors)
        derivatives = self._arena.of_phi(slopes.A, slopes.B, slopes.S)
        sizes = self._arena.of_phi(slopes.size_A, slopes.size_B, slopes.size_S)
        if not isinstance(self.meta, RelativeSteps):
            derivatives = self._arena.derivatives(proposal.Gs, Vs, proposal.lengths)
            sizes = [None] * len(sizes)
        self._arena.sum_blocks_(derivatives, sizes)
        damped = NoiseDamping.wanted(self.param_groups[0]) and self._starts
        square = self._arena.mean_square(proposal.Gs) if damped else math.nan
        proposal.kept = None
        del V, Vs, slopes
        trial.V.clear()
        trial.steps.clear()
        done, started = self._updates, self._take_sample()
        if not self._step_phi(derivatives, sizes, by_group, magnitudes):
            return False
        self._note_all(self._look.taken_up(self.param_groups[0], sum(magnitudes), step=self.steps))
        if math.isfinite(square):
            self._note("apo_gradient_square", NoiseDamping.mean(self.param_groups[0], square))
        if started:
            delta = (self.objective.wsd_weight or 0.0) / (self.objective.fsd_weight or 1.0)
            self._start.step(started, max(delta, NoiseDamping.delta(self.param_groups[0])), done)
        self._end_start()
        self._arena.refresh()
        return True

    def _step_phi(
        self,
        derivatives: list[Tensor | None],
        sizes: list[Tensor | None],
        by_group: Sequence[float],
        magnitudes: Sequence[float],
    ) -> bool:
        # those of S, and all sizes, are summed up in what the rates go by
        relative = isinstance(self.meta, RelativeSteps)
        each = zip(self._arena.phi, derivatives, strict=True)
        judged = [x for own, x in each if x is not None and (own.block or not relative)]
        wrong = bool(judged) and not bool(norms(judged).isfinite().all())
        if any_over(wrong, self._shards.groups or self._arena.owners.over, self.layers[0].S.device):
            return False
        if not all(map(math.isfinite, [*by_group, *magnitudes])):
            return False
        if isinstance(self.meta, RelativeSteps):
            self.meta.step(derivatives, sizes)
        else:
            self.meta.step(derivatives)
        if self.method.adapt_lr:
            self.rates.update(self.param_groups, by_group, magnitudes if relative else None)
            if relative and self._updates % MOVED_EVERY == 0:
                if not self.param_groups[0]["apo_overwritten"]:
                    self._move_scale_to_rates()
                self._note("apo_overwritten", False)
        return True

    def _move_scale_to_rates(self) -> None:
        moved = move_scale_to_rates(self._arena, self.rates, self.param_groups)
        if moved:
            self._start.rescale(self.layers, [1 / lost for lost in moved])

    def _gradients(self) -> Parts:
        """The gradients' matrices, with L2 decay, of the layers that have any."""
        found, parts = self._shards.grads(), self._shards.parts
        decays = [
            0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
            for group in self.param_groups
            for _ in group["params"]
        ]
        if any(decays):
            each = zip(found, parts, decays, strict=True)
            found = [g if g is None or not decay else g.add(p, alpha=decay) for g, p, decay in each]
        return self._arena.parts(found, self.parameters)

    def _trial_factor(self, group: dict[str, Any]) -> float:
        """How many times ``lr·P(G)`` the trial takes."""
        return carried_in(group) if self.method.lookahead == "whole" else 1.0

    def _shrink(self) -> None:
        """Divide the step by e, what momentum adds to it included."""
        for layer in self.layers:
            if layer.momentum is not None:
                layer.momentum.div_(math.e)
            if not self.method.adapt_lr:
                layer.S.mul_(math.exp(-0.5))
        if self.method.adapt_lr:
            self.rates.shrink(self.param_groups)
        else:
            self._arena.refresh()

    def _group(self, layer: PreconditionedLayer) -> dict[str, Any]:
        return self.param_groups[layer.group]

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`MetaLearner.state_dict`; once the start is over with zeros in the place of its running means, so
        that checkpoints have the same entries early and late. Where layers have owners, all ranks must call it
        together: each gets the whole, which may be loaded on any number of ranks."""
        state = super().state_dict()
        gathered = self._arena.gathered()
        for layer, saved in self._saved(state):
            held = gathered.get(layer, saved)
            if self._start.updates:
                held |= self._start.missing(layer, held)
            form = portable(layer, held, whole=bool(gathered))
            saved.clear()
            saved.update(tree_map(apart, form))
        return state

    def _settings(self) -> dict[str, Any]:
        method = self.method
        return {
            "meta_optimizer": method.meta_optimizer,
            "lookahead": method.lookahead,
            "shared_lr": method.shared_lr,
        }

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        for layer, state in self._saved(state_dict):
            wrong = misfit(layer, state)
            if wrong:
                raise ValueError(f"state_dict must come from the same model and block settings: {wrong}")

    def _load(self, state_dict: dict[str, Any]) -> None:
        # torch casts the blocks to the weights' dtype, so they are taken from the source
        saved = self._saved(state_dict)
        Optimizer.load_state_dict(self, state_dict)
        if self._start.updates:
            self._start.prepare(self.layers)
        for layer, state in saved:
            load_portable(layer, state)
        self._show_state()
        self._end_start()

    def _saved(self, state_dict: dict[str, Any]) -> list[tuple[PreconditionedLayer, Any]]:
        """Each layer with its entry in a state dict, which names parameters by their place."""
        places = [i for group in state_dict["param_groups"] for i in group["params"]]
        place_of = dict(zip(self.parameters, places, strict=True))
        return [(layer, state_dict["state"].get(place_of[layer.view.weight])) for layer in self.layers]


@dataclass
class _Proposal:
    """A trial's step: the gradients, what the slopes need of their products, and how far the trial goes."""

    Gs: Parts
    kept: object
    lengths: list[float]


def _form(parameters: Sequence[Tensor]) -> object:
    """What there is to notice when parameters are replaced, cast, moved or emptied."""
    ps = parameters
    return [*map(id, ps)], [*map(_DTYPE, ps)], [*map(_DEVICE, ps)], [*map(Tensor.numel, ps)]


def _meta_optimizer(method: Method) -> MetaOptimizer | RelativeSteps:
    name = method.meta_optimizer
    return RelativeSteps() if name == "relative" else MetaOptimizer(name)


def _check_group(group: dict[str, Any]) -> None:
    checks.number("lr", group["lr"].item() if isinstance(group["lr"], Tensor) else group["lr"])
    checks.fraction("momentum", group["momentum"])
    checks.number("weight_decay", group["weight_decay"])
    checks.boolean("decoupled_weight_decay", group["decoupled_weight_decay"])
    check_sizes(group)
