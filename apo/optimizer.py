"""APO: the preconditioned optimizer (section 4.4 of the paper)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from apo import checks, preconditioner
from apo.front_end import FrontEnd
from apo.learning_rate import LogRates
from apo.linearity import get_rate
from apo.lookahead import Lookahead
from apo.matrix_view import matrix_views
from apo.meta_optimizer import MetaOptimizer
from apo.objective import Closure, ProximalObjective
from apo.plan import Plan, plan_of
from apo.preconditioner import Layer
from apo.relative_steps import RelativeSteps

__all__ = ["APO"]

META_LR = {"relative": 0.05, "adam": 0.01, "rmsprop": 0.01}
MOVED_EVERY = 10
"""Meta-updates between two moves of P's scale to the rates."""

_BLOCK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class APO(FrontEnd):
    """Learns a structured preconditioner while it trains: second-order steps without an inverse.

    Each weight, read as a matrix and joined by its bias (:mod:`apo.matrix_view`), steps by ::

        v ← μ v + lr·P(G),   P(G) = B (S² ⊙ BᵀGA) Aᵀ        (Eq. 10)
        θ ← (1 − lr·λ) θ − v

    ``φ = (log lr, A, B, S)`` descends the proximal objective at the lookahead (Eq. 8). ``P`` starts as the identity,
    which makes the start momentum SGD; ``lr``, the scale in front, is learned with it, lets it start from any rate,
    and is given, every ten meta-updates, what scale P has gained (unless a scheduler overwrites it). It stands inside
    the momentum: φ answers for what it adds to the step, not for old gradients too.

    No step promises more than there is to gain: ``P(G)`` is scaled down to ``lr/(1 − μ) ⟨G, P(G)⟩ ≤ J + 1`` in all,
    J the loss at the last good trial. Without it one odd batch, between two trials, ended a run on digits in NaN, for
    P had grown as the curvature of saturated outputs went.

    Args:
        model: whose parameters are trained, the module or its DDP.
        objective: the :class:`~apo.ProximalObjective`. Where they were left open its λ_FSD is 1, larger being steadier
            (10 where gradients are noisy), and its λ_WSD 0.001, which keeps P from growing without end where outputs
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
        lr_meta_lr: about how much ``log lr`` moves in a meta-update.
        shared_lr: one learned factor for all param groups; otherwise each group's rate is learned for itself.
        bounds: least and greatest rate.
        grad_scaler: as for :class:`~apo.AdaptiveLR`.

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

    **How the sizes were chosen.** At a width of 1000 and interval 10 a step costs 2.9 of SGDm's with blocks of 64 and
    16.4 with full ones (``benchmarks/overhead.py``; with the defaults 11): so 64. ``max_dim`` bounds memory: 0.8 GB for
    a full block with its meta-optimizer's state and derivative.

    A trial fails where Q isn't finite or leaps (:class:`~apo.front_end.FrontEnd`): the step is then left out,
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
        momentum: float = 0.75,
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
        lr_meta_lr: float = 0.03,
        shared_lr: bool = True,
        bounds: tuple[float, float] = (1e-10, 1e4),
        grad_scaler: GradScaler | None = None,
    ) -> None:
        self.model = checks.module("model", model)
        if not isinstance(objective, ProximalObjective):
            raise TypeError(f"objective must be an apo.ProximalObjective, but got {type(objective).__name__}")
        checks.integer("interval", interval, least=0)
        checks.integer("warmup", warmup, least=0)
        self.adapt_lr = adapt_lr
        self.layers: list[Layer] = []
        checks.one_of("meta_optimizer", meta_optimizer, ("relative", "adam", "rmsprop"))
        checks.one_of("lookahead", lookahead, ("whole", "step"))
        self.meta_lr = META_LR[meta_optimizer] if meta_lr is None else checks.number("meta_lr", meta_lr)
        self.lookahead = lookahead
        self.most_promised = math.inf
        self.left_rates: list[float] | None = None
        self.overwritten = False
        self.meta: MetaOptimizer | RelativeSteps
        self.meta = RelativeSteps() if meta_optimizer == "relative" else MetaOptimizer([], [], meta_optimizer)
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
        self.rates = LogRates(0, meta_lr=lr_meta_lr, meta_optimizer="rmsprop", shared=shared_lr, bounds=bounds)
        super().__init__(params, defaults)
        self._init_front_end(objective.with_defaults(fsd_weight=1.0, wsd_weight=1e-3), interval, warmup, grad_scaler)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model's, with their own settings; their preconditioner starts as the identity."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            checks.parameters(self.parameters)
            if group["block_dtype"] is not None and any(p.dtype == torch.float64 for p in group["params"]):
                raise ValueError(f"block_dtype must be None for float64 weights, but got {group['block_dtype']}")
            place = len(self.param_groups) - 1
            layers = [
                Layer.start(view, group["block_size"], group["max_dim"], group["block_dtype"], place)
                for view in matrix_views(self.model, group["params"])
            ]
        except BaseException:
            self.param_groups.pop()
            raise
        for layer in layers:
            self.layers.append(layer)
            self.state[layer.view.weight] = layer.state()
            if isinstance(self.meta, RelativeSteps):
                are_blocks = [name != "S" for name in layer.learned]
                self.meta.add(layer.tensors(), [self.meta_lr] * len(are_blocks), are_blocks)
            else:
                self.meta.add(layer.tensors(), layer.meta_rates(self.meta_lr))
        self.rates.grow()
        self.left_rates = None

    def plan(self) -> Plan:
        """Which parameter gets which treatment, and what that costs in memory and FLOPs. ``print`` it."""
        return plan_of(self.model, self.layers, self.param_groups, self.meta.name)

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
        directions = preconditioner.apply(layers, gradients)
        self._bound_promise(layers, gradients, directions)
        for layer in layers:
            if layer.momentum is None and self._group(layer)["momentum"] != 0:
                layer.momentum = torch.zeros_like(layer.S)
                self.state[layer.view.weight] = layer.state()
        # From here on everything is in place: nothing is half done for want of memory.
        for layer, direction in zip(layers, directions, strict=True):
            rate = get_rate(self._group(layer))
            if layer.momentum is None:
                direction.mul_(rate)
            else:
                layer.momentum.mul_(self._group(layer)["momentum"]).add_(direction, alpha=rate)
        self._write(layers, [d if x.momentum is None else x.momentum for x, d in zip(layers, directions, strict=True)])

    def _bound_promise(
        self, layers: Sequence[Layer], gradients: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> None:
        """Scale the directions down to ``Σ lr/(1 − μ) ⟨G, P(G)⟩ ≤ J + 1``, J the loss of the last good trial.

        Where outputs saturate, P grows as curvature goes, and one odd batch, between two trials, would leap. To first
        order no step promises more than there is to gain. No synchronisation, and the same on all ranks.
        """
        if not layers or self.most_promised == math.inf:
            return
        shares = [get_rate(self._group(x)) * self._carried(x) for x in layers]
        each = zip(shares, gradients, directions, strict=True)
        total = torch.stack([share * _inner(G, d, layers[0].S.dtype) for share, G, d in each]).sum()
        factor = (self.most_promised / total.clamp_min(self.most_promised)).to(directions[0].dtype)
        if factor.device.type == "cpu" and factor.item() == 1:  # to look at it costs nothing there
            return
        torch._foreach_mul_(list(directions), factor)

    def _meta_step(self, closure: Closure, loss: Any, *, move: bool) -> None:
        layers, gradients = self._gradients()
        anchor = self.objective.anchor(self.parameters)
        directions, kept = preconditioner.apply_and_keep(layers, gradients)
        has_grad = {p: p.grad is not None for p in self.parameters}
        with Lookahead(self.parameters) as lookahead:
            self._write(layers, self._velocities(layers, directions))
            V, passed = self._evaluate(closure, loss, lookahead.start, anchor)
        if not passed:
            self.failed_trials += 1
            self._shrink()
            return
        assert self.last is not None
        self.most_promised = abs(self.last.loss) + 1
        V_of = {p: v if has_grad[p] else None for p, v in zip(self.parameters, V, strict=True)}
        cotangents = [layer.view.gather(V_of[p] for p in layer.view.parameters) for layer in layers]
        by_group = self._slopes(layers, directions, cotangents) if self.adapt_lr else []
        relative = isinstance(self.meta, RelativeSteps)
        derivatives = preconditioner.block_gradients(layers, gradients, cotangents, kept, relative=relative)
        sizes = preconditioner.sizes(layers, kept) if relative else {}
        del kept, V
        if self._learn(derivatives, sizes, by_group):
            for layer in self.layers:
                layer.refresh()
        else:
            self.failed_trials += 1
        if move:
            self._plain_step()

    def _learn(
        self,
        derivatives: dict[Layer, tuple[Tensor, ...]],
        sizes: dict[Layer, tuple[Tensor, ...]],
        by_group: Sequence[float],
    ) -> bool:
        """Step φ down what ``⟨V, P(G)⟩`` and the rates' slopes say of Q, unless they aren't all finite."""
        for layer in derivatives:
            # dQ/dφ = −(∂u/∂φ)ᵀ V with u = … + lr·P(G), relative to the blocks where the steps are
            length = get_rate(self._group(layer)) * self._reach(layer)
            torch._foreach_mul_(derivatives[layer], -length)
            if sizes:
                torch._foreach_mul_(sizes[layer], length)
        judged = [x for own in derivatives.values() for x in own]
        judged += [first for first, *_ in sizes.values()]  # the others are sums of the same, or its terms
        if judged and not bool(torch.stack(torch._foreach_norm(judged)).isfinite().all()):
            return False
        if not all(map(math.isfinite, by_group)):
            return False
        if isinstance(self.meta, RelativeSteps):
            self.meta.step(self._in_order(derivatives), self._in_order(sizes))
        else:
            self.meta.step(self._in_order(derivatives))
        if self.adapt_lr:
            self._note_overwritten_rates()
            self.rates.update(self.param_groups, by_group)
            if isinstance(self.meta, RelativeSteps) and max(self.meta.steps) % MOVED_EVERY == 0:
                if not self.overwritten:
                    self._move_scale_to_rates()
                self.overwritten = False
            self.left_rates = self._rates()
        return True

    def _rates(self) -> list[float]:
        return [get_rate(group) for group in self.param_groups]

    def _note_overwritten_rates(self) -> None:
        """A scheduler that sets rates from its own base would throw away what P's scale has been moved to."""
        if self.left_rates is not None and self.left_rates != self._rates():
            self.overwritten = True

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
            if own[0] is not None:
                layers.append(layer)
                gradients.append(layer.view.gather(own))
        return layers, gradients

    def _velocities(self, layers: Sequence[Layer], directions: Sequence[Tensor]) -> list[Tensor]:
        """What the trial subtracts from θ, without touching v."""
        velocities = []
        for layer, direction in zip(layers, directions, strict=True):
            group = self._group(layer)
            step = direction * (get_rate(group) * self._reach(layer))
            if self.lookahead == "step" and layer.momentum is not None:
                step.add_(layer.momentum, alpha=group["momentum"])
            velocities.append(step)
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
        """``dQ/d log lr = −lr ⟨V, c P(G) + λθ⟩`` of each group, the rows' sums in float64 (every entry in float64
        takes ten times as long); one synchronisation."""
        device = self.parameters[0].device
        sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in self.param_groups]
        for layer, direction, V in zip(layers, directions, cotangents, strict=True):
            group = self._group(layer)
            reach = get_rate(group) * self._reach(layer)
            sums[layer.group] -= reach * torch.sum(V * direction, -1, dtype=layer.S.dtype).sum(dtype=torch.float64)
            decay = group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
            if decay:
                theta = layer.view.gather(layer.view.parameters)
                decayed = torch.sum(V * theta, -1, dtype=layer.S.dtype).sum(dtype=torch.float64)
                sums[layer.group] -= get_rate(group) * decay * decayed
        values: list[float] = torch.stack(sums).tolist()
        return values

    def _write(self, layers: Sequence[Layer], velocities: Sequence[Tensor]) -> None:
        """``θ ← (1 − lr·λ) θ − v`` of every parameter that has a gradient."""
        weights, steps = [], []
        for layer, velocity in zip(layers, velocities, strict=True):
            group = self._group(layer)
            decay = group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
            for p, step in zip(layer.view.parameters, layer.view.scatter(velocity), strict=True):
                if p.grad is not None:
                    weights.append(p)
                    steps.append(step)
                    if decay:
                        p.mul_(1 - get_rate(group) * decay)
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
            self._note_overwritten_rates()
            self.rates.shrink(self.param_groups)
            self.left_rates = self._rates()

    def _group(self, layer: Layer) -> dict[str, Any]:
        return self.param_groups[layer.group]

    def _meta_state(self) -> dict[str, Any]:
        meta = {"meta": self.meta.state_dict(), "rates": self.rates.state_dict()}
        own = {"most_promised": self.most_promised, "left_rates": self.left_rates, "overwritten": self.overwritten}
        return {**meta, **own}

    def _settings(self) -> dict[str, Any]:
        return {"meta_optimizer": self.meta.name, "lookahead": self.lookahead, "shared_lr": self.rates.shared}

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        saved, own = state_dict["param_groups"], self.param_groups
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in own]:
            raise ValueError(
                "state_dict must have param groups of the same sizes, "
                f"but got {[len(g['params']) for g in saved]} for {[len(g['params']) for g in own]}"
            )
        for layer, state in self._saved(state_dict):
            misfit = layer.misfit(state)
            if misfit:
                raise ValueError(f"state_dict must come from the same model and block settings: {misfit}")

    def _load_meta_state(self, state: dict[str, Any], raw: dict[str, Any]) -> None:
        # torch has cast the blocks to the weights' dtype: take them from the source
        self.state = defaultdict(dict)
        for layer, saved in self._saved(raw):
            layer.load(saved)
            self.state[layer.view.weight] = layer.state()
        self.meta.load_state_dict(state["meta"])
        self.rates.load_state_dict(state["rates"])
        self.most_promised = state["most_promised"]
        self.left_rates, self.overwritten = state["left_rates"], state["overwritten"]

    def _saved(self, state_dict: dict[str, Any]) -> list[tuple[Layer, Any]]:
        """Each layer with its entry in a state dict, which names parameters by their place."""
        places = [i for group in state_dict["param_groups"] for i in group["params"]]
        place_of = dict(zip(self.parameters, places, strict=True))
        return [(layer, state_dict["state"].get(place_of[layer.view.weight])) for layer in self.layers]


def _check_group(group: dict[str, Any]) -> None:
    checks.number("lr", get_rate(group))
    checks.fraction("momentum", group["momentum"])
    checks.number("weight_decay", group["weight_decay"])
    for name in ("block_size", "max_dim"):
        if group[name] is not None:
            checks.integer(name, group[name], least=1)
    checks.one_of("block_dtype", group["block_dtype"], (None, *_BLOCK_DTYPES))


def _inner(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """``⟨x, y⟩`` of two matrices, summed in ``dtype``."""
    if x.device.type == "cpu" and x.dtype == dtype and x.is_contiguous() and y.is_contiguous():
        return torch.dot(x.flatten(), y.flatten())  # a pass and no copy
    return torch.sum(x * y, dtype=dtype)
