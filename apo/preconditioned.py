"""APO: the preconditioned optimizer (section 4.4 of the paper)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

import apo_kernels as ak
from apo import checks, preconditioner
from apo.fisher_start import FisherStart
from apo.held_parameters import HeldParameters
from apo.inner_products import inner_products
from apo.matrix_view import matrix_views
from apo.meta_learner import MetaLearner, Trial
from apo.meta_optimizer import MetaOptimizer
from apo.objective import Evaluation, ProximalObjective, check_objective
from apo.plan import Plan, plan_of
from apo.preconditioner import Layer
from apo.rates import LogRates, get_rate
from apo.relative_steps import RelativeSteps
from apo.schedules import Schedules
from apo.trial import Lookahead, without_autocast

__all__ = ["APO"]

META_LR = {"relative": 0.05, "adam": 0.01, "rmsprop": 0.01}
MOVED_EVERY = 10
"""Meta-updates between two moves of P's scale to the rates."""

MOST_PROMISED = 10.0
"""Greatest predicted decrease of a step, over the loss."""
LOSS_BETA = 0.9
"""Of the running mean of that loss, over meta-updates."""

_NUMBERS = {"apo_most_promised": math.inf, "apo_mean_loss": math.nan, "apo_overwritten": False}
"""What is remembered beside the rates."""

_BLOCK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class APO(MetaLearner):
    """Learns a structured preconditioner while it trains: second-order steps without an inverse.

    Each weight, read as a matrix and joined by its bias (:mod:`apo.matrix_view`), steps by ::

        v ← μ v + lr·P(G),   P(G) = B (S² ⊙ BᵀGA) Aᵀ        (Eq. 10)
        θ ← (1 − lr·λ) θ − v

    ``φ = (log lr, A, B, S)`` descends the proximal objective at the lookahead (Eq. 8). ``P`` starts as the identity,
    which makes the start momentum SGD; ``lr``, the scale in front, is learned with it, lets it start from any rate,
    and is given, every ten meta-updates, what scale P has gained (unless a scheduler overwrites it). It stands inside
    the momentum: φ answers for what it adds to the step, not for old gradients too.

    No step promises much more than there is to gain: ``P(G)`` is scaled down so that ``lr/(1 − μ) ⟨G, P(G)⟩``, in all,
    is at most ten times the loss. Without it one odd batch, or a few steps between two trials, can end a run.

    Args:
        model: whose parameters are trained, the module or its DDP.
        objective: the :class:`~apo.ProximalObjective`. Where they were left open its λ_FSD is 1, larger being steadier
            (10 where gradients are noisy), and its λ_WSD 0.0001, which keeps P from growing without end where outputs
            saturate; 0 where curvatures much smaller than that matter.
        params: parameters of the model's or param groups of them (keys: ``lr``, ``momentum``, ``weight_decay``,
            ``decoupled_weight_decay``, ``block_size``, ``max_dim``, ``block_dtype``); by default all that require
            grad. A weight and its bias in different groups aren't joined.
        lr: initial rate, >= 0.
        momentum: μ, of the preconditioned gradient, in [0, 1).
        weight_decay: λ, >= 0.
        decoupled_weight_decay: as above; otherwise ``G`` gets ``λθ`` added (L2).
        block_size: side of the squares of block-diagonal blocks; None: full blocks. The cost of a step goes with
            it: ``8 · block_size`` FLOPs a weight against ``4 (m + n)``.
        max_dim: a side longer than this gets no block at all; None: no bound.
        block_dtype: what the products read A, B and S as: float32, bfloat16 or float16, whatever the weights'
            dtype. Masters stay float32. None: the masters themselves.
        interval: a meta-update every so many steps (K of Algorithm 1). 0: never. A step with one takes three passes
            forward and backward; 10 makes most steps nearly as cheap as SGD's, and learns more slowly.
        warmup: and at each of the first so many.
        meta_lr: rate of the meta-optimizer. Of relative steps: ε, the share that one changes A, B and S by; by default
            0.05. Of the others: S's, divided for A and B by the block's side; 0.01.
        meta_optimizer: of A, B and S: ``"relative"`` (:mod:`apo.relative_steps`), ``"adam"`` or ``"rmsprop"``.
        lookahead: what the trial takes. ``"whole"``: ``θ′ = θ − lr·P(G)/(1 − μ)``, the whole way that momentum
            will carry this gradient. ``"step"``: ``θ − μv − lr·P(G)``, the next step.
        adapt_lr: learn ``lr`` too.
        lr_meta_lr: the most that ``log lr`` moves in a meta-update. Its slope is measured by what it would be if V
            equalled G.
        shared_lr: one learned factor for all param groups; otherwise each group's rate is learned for itself.
        bounds: least and greatest rate.
        fisher_start: in the first so many meta-updates P is also whitened by sampled Fisher gradients
            (:mod:`apo.fisher_start`), at the cost of one more backward on B′ each. 0: the paper's bare algorithm.
        rescale_schedule, grad_scaler, process_group: as for :class:`~apo.AdaptiveLR`.

    **How the meta-update was chosen** (``python -m benchmarks studies``; all ways and figures are in
    ``benchmarks/results/studies/meta-update.md``). Training loss after equal steps, median of three seeds; the other
    optimizers at the best of 12 settings each:

    ====================================  ===============  ========  =======  ===========
    optimizer                             ill-conditioned  diabetes  digits   autoencoder
    ====================================  ===============  ========  =======  ===========
    APO, defaults                         2.3e-9           6.7e-7    4.6e-6   15.0
    the same, interval 2                  2.3e-9           1.5e-6    5.0e-6   15.3
    the same, interval 10                 2.3e-9           3.3e-6    5.8e-6   16.0
    the same, λ_WSD 0                     1.9e-10          1.5e-7    1.8e-3   15.1
    the same, momentum 0                  3.0e-9           9.2e-6    6.2e-6   14.9
    the same, momentum 0.9                2.2e-9           1.7e-7    6.3e-6   15.2
    the same, full blocks                 2.3e-9           5.2e-7    5.8e-6   15.0
    steps by their length alone           2.8e-9           1.1e-5    5.8e-6   15.2
    and with momentum 0.9 and λ_WSD 0     2.8e-13          1.9e-6    4.8e-6   15.5
    Adam on A, B, S                       2.2e-8           3.3e-4    1.5e-4   15.3
    KFAC                                  2.2e-13          3.5e-6    4.5e-5   15.2
    Shampoo                               4.2e-9           5.2e-3    1.2e-3   16.7
    SGDm                                  6.6e-10          2.5e-3    1.1e-4   16.6
    Adam                                  2.1e-9           3.4e-3    1.7e-5   15.8
    ====================================  ===============  ========  =======  ===========

    What decided: steps that measure each direction by its size rather than by the length of all (15.0 for 15.2 on the
    autoencoder, 6.7e-7 for 1.1e-5 on diabetes); λ_WSD, without which P grows on digits until steps leap; a trial that
    goes the whole way of momentum (the next step alone: 9.8e-5 on diabetes); meta-updates at every step, most of all
    early (on diabetes 1.1e-3 if only the first 50 are). λ_WSD costs on curvatures far below it: the ill-conditioned
    regression wants 0, and even then one of three seeds stays at 3e-9. On the autoencoder a finer search finds 15.2
    for Shampoo and 14.6 for KFAC.

    By time ``interval`` 2 to 10 is the better choice: a run on the autoencoder took 26 s with the defaults, 9 s with
    interval 10, 16 s with KFAC.

    **How the sizes were chosen.** At a width of 1000 and interval 10 a step costs 4.0 of SGDm's with blocks of 64 and
    13.9 with full ones (``python -m benchmarks overhead``; with the defaults 13): so 64. ``max_dim`` bounds memory:
    0.8 GB for a full block with its meta-optimizer's state and derivative.

    A trial fails where Q isn't finite or leaps (:attr:`failed_trials`): the step is then left out,
    ``lr`` (or P, where ``lr`` isn't learned) and the momentum are divided by e, and ``failed_trials`` counts it.

    Raises:
        TypeError, ValueError: an argument isn't as above; at a step: a sparse gradient, by its parameter's name.
    """

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
        max_dim: int | None = 8192,
        block_dtype: torch.dtype | None = None,
        interval: int = 1,
        warmup: int = 300,
        meta_lr: float | None = None,
        meta_optimizer: Literal["relative", "adam", "rmsprop"] = "relative",
        lookahead: Literal["whole", "step"] = "whole",
        adapt_lr: bool = True,
        lr_meta_lr: float = 0.1,
        shared_lr: bool = True,
        bounds: tuple[float, float] = (1e-10, 1e4),
        fisher_start: int = 300,
        rescale_schedule: bool = False,
        grad_scaler: GradScaler | None = None,
        process_group: Any = None,
    ) -> None:
        self.model = checks.module("model", model)
        check_objective(objective)
        checks.integer("interval", interval, least=0)
        checks.integer("warmup", warmup, least=0)
        checks.grad_scaler("grad_scaler", grad_scaler)
        self.adapt_lr = checks.boolean("adapt_lr", adapt_lr)
        self.layers: list[Layer] = []
        checks.one_of("meta_optimizer", meta_optimizer, ("relative", "adam", "rmsprop"))
        checks.one_of("lookahead", lookahead, ("whole", "step"))
        self.meta_optimizer = meta_optimizer
        self.meta_lr = META_LR[meta_optimizer] if meta_lr is None else checks.number("meta_lr", meta_lr)
        self.lookahead = lookahead
        self.meta = _meta_optimizer(meta_optimizer)
        self._start = FisherStart(checks.integer("fisher_start", fisher_start, least=0))
        self._sampled: list[Tensor | None] | None = None
        self._promise: Tensor | float = 1.0
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "block_size": block_size,
            "max_dim": max_dim,
            "block_dtype": block_dtype,
        }
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise ValueError("model must have parameters that require grad, but got none")
        elif not isinstance(params, Iterable):
            raise TypeError(f"params must be parameters of the model or param groups of them, but got {params!r}")
        self.rates = LogRates(
            meta_lr=checks.number("lr_meta_lr", lr_meta_lr),
            meta_optimizer="relative",
            shared=checks.boolean("shared_lr", shared_lr),
            bounds=bounds,
            rescale_schedule=rescale_schedule,
        )
        self._schedules = Schedules([self])
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
            layers = self._layers_of(group)
        except BaseException:
            self.param_groups.pop()
            raise
        self.rates.prepare(group)
        self._prepare_group(group)
        for name, start in _NUMBERS.items():
            group[name] = self.param_groups[0].get(name, start)
        self._take_in(layers)
        self._held = HeldParameters(self._models, self.parameters)

    def _layers_of(self, group: dict[str, Any]) -> list[Layer]:
        if group["block_dtype"] is not None and any(p.dtype == torch.float64 for p in group["params"]):
            raise ValueError(f"block_dtype must be None for float64 weights, but got {group['block_dtype']}")
        place = next(i for i, own in enumerate(self.param_groups) if own is group)
        sizes = group["block_size"], group["max_dim"], group["block_dtype"]
        return [Layer.start(view, *sizes, place) for view in matrix_views(self.model, group["params"])]

    def _take_in(self, layers: Sequence[Layer]) -> None:
        """Let the meta-optimizer learn these layers, and checkpoints hold them, from now on."""
        for layer in layers:
            relative = isinstance(self.meta, RelativeSteps)
            rates = [self.meta_lr] * len(layer.phi) if relative else layer.entrywise_rates(self.meta_lr)
            for own, rate in zip(layer.phi, rates, strict=True):
                own.rate = rate
            if self._group(layer)["momentum"] != 0:
                layer.momentum = torch.zeros_like(layer.S)
            self.layers.append(layer)
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
    def _models(self) -> list[nn.Module]:
        return [self.model, self.objective.model] if hasattr(self, "objective") else [self.model]

    def plan(self) -> Plan:
        """Which parameter gets which treatment, and what that costs in memory and FLOPs. ``print`` it."""
        return plan_of(self.model, self.layers, self.param_groups, self.meta.name, starts=self._starts)

    def metrics(self) -> dict[str, float]:
        """As :meth:`MetaLearner.metrics`, and ``promise_factor``: by what the last step was scaled down to keep what
        it promises below the loss."""
        return super().metrics() | {"promise_factor": float(self._promise)}

    def _renew(self) -> None:
        replaced = self._held.replaced()
        if replaced and all(
            held.is_meta and isinstance(now, nn.Parameter) and not hasattr(now, "placements")
            for _, held, now in replaced
        ):
            self._adopt({id(held): now for _, held, now in replaced})
        super()._renew()
        held = {id(p) for layer in self.layers for p in layer.view.parameters}
        if held != {id(p) for p in self.parameters if p.numel()}:
            raise ValueError(
                "param_groups must hold the parameters that they were given, but something replaced them: build the "
                "optimizer after fully_shard or accelerate's prepare"
            )
        if any(layer.outdated for layer in self.layers):
            self._rebuild()
        if self.rates.notice(self.param_groups, self._schedules):
            self._note("apo_overwritten", True)

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
        fresh = [layer for group in self.param_groups for layer in self._layers_of(group)]
        self.layers, self.meta = [], _meta_optimizer(self.meta_optimizer)
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
        layers, gradients = self._gradients()
        scale = self._gradient_scale  # P(G) of a huge G would overflow
        if scale != 1:
            gradients = list(torch._foreach_div(gradients, scale))
        directions = preconditioner.apply(layers, gradients)
        self._bound_promise(layers, gradients, directions, scale)
        for layer in layers:
            if layer.momentum is None and self._group(layer)["momentum"] != 0:
                layer.momentum = torch.zeros_like(layer.S)
                self.state[layer.view.weight] = layer.state()
        if not layers:
            return
        # Nothing is allocated below, so running out of memory can't leave a partial step.
        rates = [get_rate(self._group(layer)) * scale for layer in layers]
        momenta = [layer.momentum for layer in layers if layer.momentum is not None]
        alike = len(momenta) == len(layers) and len(set(rates)) == 1
        if not alike:
            torch._foreach_mul_(directions, rates)
        if momenta:
            carried = [(x, d) for x, d in zip(layers, directions, strict=True) if x.momentum is not None]
            torch._foreach_mul_(momenta, [float(self._group(layer)["momentum"]) for layer, _ in carried])
            # one rate for all saves a pass
            torch._foreach_add_(momenta, [d for _, d in carried], alpha=rates[0] if alike else 1.0)
        self._write(layers, [d if x.momentum is None else x.momentum for x, d in zip(layers, directions, strict=True)])

    def _bound_promise(
        self, layers: Sequence[Layer], gradients: Sequence[Tensor], directions: Sequence[Tensor], scale: float
    ) -> None:
        """Safeguard: the predicted decrease ``Σ lr/(1 − μ) ⟨G, P(G)⟩`` never exceeds ten times the loss, of the last
        good trial or in the mean over those before.

        A Newton step on a quadratic predicts at most twice the loss. Where P is too large in a direction that trials
        didn't see, the steps between two trials would else grow until the run ends. No synchronisation, and the same
        on all ranks.
        """
        most = self.param_groups[0]["apo_most_promised"]
        self._promise = 1.0
        if not layers or most == math.inf:
            return
        if scale != 1:  # ⟨G, P(G)⟩ is so large that what may be left of the step underflows
            self._promise = 0.0
            torch._foreach_zero_(list(directions))
            return
        shares = [get_rate(self._group(x)) * self._carried(x) for x in layers]
        promises = inner_products(gradients, directions)
        total = torch.dot(promises, torch.tensor(shares, dtype=promises.dtype, device=promises.device))
        factor = (most / total.clamp_min(most)).to(directions[0].dtype)
        self._promise = factor
        if factor.device.type == "cpu" and factor.item() == 1:  # to look at it costs nothing there
            return
        torch._foreach_mul_(list(directions), factor)

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
        """Send a sample of the outputs' Fisher matrix back through the model, in the first meta-updates."""
        self._sampled = None
        if not self._starts:
            return
        tensors = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        if not all(isinstance(x, Tensor) and x.requires_grad for x in tensors):
            return  # the discrepancy says what is wrong
        # a generator of its own, the same for a run that was resumed
        generator = torch.Generator(tensors[0].device).manual_seed(self._ranks.rank * 2**32 + self._updates)
        cotangents = self.objective.fisher_sample(outputs, generator)
        if cotangents is None:
            return
        with without_autocast(tensors[0]):
            torch.autograd.backward(tensors, [c.to(t.dtype) for c, t in zip(cotangents, tensors, strict=True)])
        self._sampled = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None

    def _take_sample(self, layers: Sequence[Layer]) -> bool:
        """Let the start see the sampled gradient, if there is one and it is finite."""
        sampled, self._sampled = self._sampled, None
        if sampled is None:
            return False
        held = [w for w in sampled if w is not None]
        self._ranks.average_(held)
        if not held or not bool(torch.stack(torch._foreach_norm(held)).isfinite().all()):
            return False
        torch._foreach_mul_(held, math.sqrt(self._ranks.count))  # a sum over n examples of each rank, over √n
        w_of = dict(zip(self.parameters, sampled, strict=True))
        W = [layer.view.gather(w_of[p] for p in layer.view.parameters) for layer in layers]
        self._start.look(layers, W)
        return True

    def _propose(self, lookahead: Lookahead, undo: ExitStack) -> _Proposal:
        layers, gradients = self._gradients()
        directions, kept = preconditioner.apply_and_keep(layers, gradients)
        has_grad = {p: p.grad is not None for p in self.parameters}
        self._write(layers, self._velocities(layers, directions))
        return _Proposal(layers, gradients, directions, kept, has_grad)

    def _learn(self, proposal: _Proposal, trial: Trial) -> bool:
        """Step φ down what ``⟨V, P(G)⟩`` and the rates' slopes say of Q, unless they aren't all finite."""
        self._note_loss(trial.evaluation)
        layers = proposal.layers
        V_of = {p: v if proposal.has_grad[p] else None for p, v in zip(self.parameters, trial.V, strict=True)}
        cotangents = [layer.view.gather(V_of[p] for p in layer.view.parameters) for layer in layers]
        by_group = self._slopes(layers, proposal.directions, cotangents) if self.adapt_lr else []
        magnitudes = self._slope_sizes(layers, proposal.directions, proposal.gradients) if self.adapt_lr else []
        relative = isinstance(self.meta, RelativeSteps)
        derivatives = preconditioner.block_gradients(
            layers, proposal.gradients, cotangents, proposal.kept, relative=relative
        )
        sizes = preconditioner.sizes(layers, proposal.kept) if relative else {}
        proposal.kept.clear()
        trial.V.clear()
        trial.steps.clear()
        done, started = self._updates, self._take_sample(layers)
        if not self._step_phi(derivatives, sizes, by_group, magnitudes):
            return False
        if started:
            delta = (self.objective.wsd_weight or 0.0) / (self.objective.fsd_weight or 1.0)
            self._start.step(layers, delta, done)
        self._end_start()
        for layer in self.layers:
            layer.refresh()
        return True

    def _note_loss(self, trial: Evaluation) -> None:
        """Set what a step may promise by the loss at this trial and by those before."""
        loss, mean = max(abs(trial.loss), abs(trial.base)), self.param_groups[0]["apo_mean_loss"]
        mean = loss if math.isnan(mean) else LOSS_BETA * mean + (1 - LOSS_BETA) * loss
        self._note("apo_mean_loss", mean)
        self._note("apo_most_promised", MOST_PROMISED * max(loss, mean))

    def _step_phi(
        self,
        derivatives: dict[Layer, tuple[Tensor, ...]],
        sizes: dict[Layer, tuple[Tensor, ...]],
        by_group: Sequence[float],
        magnitudes: Sequence[float],
    ) -> bool:
        # dQ/dφ = −(∂u/∂φ)ᵀ V with u = … + lr·P(G), relative to the blocks where the steps are
        for found, sign in ((derivatives, -1.0), (sizes, 1.0)):
            scaled = [x for own in found.values() for x in own]
            lengths = [get_rate(self._group(layer)) * self._reach(layer) for layer in found for _ in found[layer]]
            if scaled:
                torch._foreach_mul_(scaled, [sign * length for length in lengths])
        judged = [x for own in derivatives.values() for x in own]
        judged += [first for first, *_ in sizes.values()]  # the others are sums of the same, or its terms
        if judged and not bool(torch.stack(torch._foreach_norm(judged)).isfinite().all()):
            return False
        if not all(map(math.isfinite, [*by_group, *magnitudes])):
            return False
        if isinstance(self.meta, RelativeSteps):
            self.meta.step(self._in_order(derivatives), self._in_order(sizes))
        else:
            self.meta.step(self._in_order(derivatives))
        if self.adapt_lr:
            self.rates.update(self.param_groups, by_group, magnitudes)
            if isinstance(self.meta, RelativeSteps) and self._updates % MOVED_EVERY == 0:
                if not self.param_groups[0]["apo_overwritten"]:
                    self._move_scale_to_rates()
                self._note("apo_overwritten", False)
        return True

    def _in_order(self, found: dict[Layer, tuple[Tensor, ...]]) -> list[Tensor | None]:
        """What was found, one for each of the tensors that are learned; None where a layer had no gradient."""
        return [x for layer in self.layers for x in found.get(layer, (None,) * len(layer.learned))]

    def _move_scale_to_rates(self) -> None:
        """Give A and B the identity's RMS, S one of 1 in the mean over the layers, and the rates what P loses.

        Only ``lr·P`` means anything, so that P would else grow while ``lr`` falls, to the bounds of the rate and of
        16-bit blocks.
        """
        rms = preconditioner.root_mean_squares(self.layers)
        if not all(0 < x < math.inf for own in rms for x in own):
            return
        growths = [2 * sum(map(math.log, own)) for own in rms]  # P goes with the squares
        moved = self.rates.scale(self.param_groups, growths, [layer.group for layer in self.layers])
        factors = []
        for layer, (*of_blocks, _) in zip(self.layers, rms, strict=True):
            factors += [*(1 / x for x in of_blocks), math.prod(of_blocks) / math.sqrt(moved[layer.group])]
        torch._foreach_mul_([x for layer in self.layers for x in layer.tensors()], factors)
        self._start.rescale(self.layers, [1 / moved[layer.group] for layer in self.layers])

    def _gradients(self) -> tuple[list[Layer], list[Tensor]]:
        """The layers whose weight has a gradient, and the gradients' matrices, with L2 decay."""
        layers, gradients = [], []
        for layer in self.layers:
            group = self._group(layer)
            decay = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
            own = [p.grad for p in layer.view.parameters]
            if decay:
                own = [
                    None if g is None else g.add(p, alpha=decay)
                    for g, p in zip(own, layer.view.parameters, strict=True)
                ]
            if any(g is not None for g in own):
                layers.append(layer)
                gradients.append(layer.view.gather(own))
        return layers, gradients

    def _velocities(self, layers: Sequence[Layer], directions: Sequence[Tensor]) -> list[Tensor]:
        """What the trial subtracts from θ, without touching v."""
        if not layers:
            return []
        lengths = [get_rate(self._group(layer)) * self._reach(layer) for layer in layers]
        velocities = list(torch._foreach_mul(list(directions), lengths))
        if self.lookahead == "step":
            for layer, velocity in zip(layers, velocities, strict=True):
                if layer.momentum is not None:
                    velocity.add_(layer.momentum, alpha=self._group(layer)["momentum"])
        return velocities

    def _carried(self, layer: Layer) -> float:
        """How many times its own length momentum will carry a step."""
        return 1 / (1 - float(self._group(layer)["momentum"]))

    def _reach(self, layer: Layer) -> float:
        """How many times ``lr·P(G)`` the trial takes."""
        return self._carried(layer) if self.lookahead == "whole" else 1.0

    def _slopes(
        self, layers: Sequence[Layer], directions: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> list[float]:
        """``dQ/d log lr = −lr ⟨V, c P(G) + λθ⟩`` of each group; one synchronisation."""
        sums = [0.0] * len(self.param_groups)
        if not layers:
            return sums
        decayed = [layer for layer in layers if self._decay(layer)]
        V_of = dict(zip(layers, cotangents, strict=True))
        thetas = [layer.view.gather(layer.view.parameters) for layer in decayed]
        values = inner_products([*cotangents, *(V_of[layer] for layer in decayed)], [*directions, *thetas]).tolist()
        weights = [self._reach(layer) for layer in layers] + [self._decay(layer) for layer in decayed]
        for layer, weight, value in zip([*layers, *decayed], weights, values, strict=True):
            sums[layer.group] -= get_rate(self._group(layer)) * weight * value
        return sums

    def _slope_sizes(
        self, layers: Sequence[Layer], directions: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> list[float]:
        """What :meth:`_slopes` would give, except the sign and the weights' decay, if V equalled G."""
        sums = [0.0] * len(self.param_groups)
        values = inner_products(gradients, directions).tolist()
        for layer, value in zip(layers, values, strict=True):
            sums[layer.group] += get_rate(self._group(layer)) * self._reach(layer) * abs(value)
        return sums

    def _decay(self, layer: Layer) -> float:
        """λ, where the decay isn't part of the gradient."""
        group = self._group(layer)
        return float(group["weight_decay"]) if group["decoupled_weight_decay"] else 0.0

    def _write(self, layers: Sequence[Layer], velocities: Sequence[Tensor]) -> None:
        """``θ ← (1 − lr·λ) θ − v`` of every parameter that has a gradient."""
        weights, steps, shrunk = [], [], []
        for layer, velocity in zip(layers, velocities, strict=True):
            shrink = 1 - get_rate(self._group(layer)) * self._decay(layer)
            for p, step in zip(layer.view.parameters, layer.view.scatter(velocity), strict=True):
                if p.grad is not None:
                    weights.append(p)
                    steps.append(step)
                    shrunk.append(shrink)
        if any(shrink != 1 for shrink in shrunk):
            torch._foreach_mul_(weights, shrunk)
        if weights:
            torch._foreach_sub_(weights, steps)

    def _shrink(self) -> None:
        """Divide the step by e, what momentum adds to it included."""
        for layer in self.layers:
            if layer.momentum is not None:
                layer.momentum.div_(math.e)
            if not self.adapt_lr:
                layer.S.mul_(math.exp(-0.5))
                layer.refresh()
        if self.adapt_lr:
            self.rates.shrink(self.param_groups)

    def _group(self, layer: Layer) -> dict[str, Any]:
        return self.param_groups[layer.group]

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`MetaLearner.state_dict`; once the start is over with zeros in the place of its running means, so
        that checkpoints have the same entries early and late."""
        state = super().state_dict()
        if self._start.updates:
            for layer, saved in self._saved(state):
                for name, zeros in self._start.missing(layer).items():
                    saved.setdefault(name, zeros)
        return state

    def _settings(self) -> dict[str, Any]:
        return {"meta_optimizer": self.meta_optimizer, "lookahead": self.lookahead, "shared_lr": self.rates.shared}

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        for layer, state in self._saved(state_dict):
            misfit = layer.misfit(state)
            if misfit:
                raise ValueError(f"state_dict must come from the same model and block settings: {misfit}")

    def _load(self, state_dict: dict[str, Any]) -> None:
        # torch casts the blocks to the weights' dtype, so they are taken from the source
        saved = self._saved(state_dict)
        Optimizer.load_state_dict(self, state_dict)
        if self._start.updates:
            self._start.prepare(self.layers)
        for layer, state in saved:
            layer.load(state)
        self._show_state()
        self._end_start()

    def _saved(self, state_dict: dict[str, Any]) -> list[tuple[Layer, Any]]:
        """Each layer with its entry in a state dict, which names parameters by their place."""
        places = [i for group in state_dict["param_groups"] for i in group["params"]]
        place_of = dict(zip(self.parameters, places, strict=True))
        return [(layer, state_dict["state"].get(place_of[layer.view.weight])) for layer in self.layers]


@dataclass
class _Proposal:
    """A trial's step: the layers that have a gradient, their matrices G and P(G), and what P(G) was made of."""

    layers: list[Layer]
    gradients: list[Tensor]
    directions: list[Tensor]
    kept: list[ak.Kept]
    has_grad: dict[Tensor, bool]


def _meta_optimizer(name: Literal["relative", "adam", "rmsprop"]) -> MetaOptimizer | RelativeSteps:
    return RelativeSteps() if name == "relative" else MetaOptimizer(name)


def _check_group(group: dict[str, Any]) -> None:
    checks.number("lr", group["lr"].item() if isinstance(group["lr"], Tensor) else group["lr"])
    checks.fraction("momentum", group["momentum"])
    checks.number("weight_decay", group["weight_decay"])
    checks.boolean("decoupled_weight_decay", group["decoupled_weight_decay"])
    for name in ("block_size", "max_dim"):
        if group[name] is not None:
            checks.integer(name, group[name], least=1)
    checks.one_of("block_dtype", group["block_dtype"], (None, *_BLOCK_DTYPES))
