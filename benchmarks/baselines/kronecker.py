"""What KFAC and EKFAC share: the factors and their averages, the schedule, KL clipping, the state."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from apo import checks
from apo.matrix_view import matrix_views
from apo.objective import Closure
from apo.rates import get_rate
from benchmarks.baselines.base import Baseline, all_finite
from benchmarks.baselines.capture import FISHERS, Capture, Fisher
from benchmarks.baselines.damping import wide
from benchmarks.baselines.layers import FactoredLayer, Treatment, sort_out
from benchmarks.baselines.likelihood import Likelihood, likelihood_named

__all__ = ["KroneckerFactored"]

DTYPES = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)


class KroneckerFactored(Baseline):
    """Preconditions each layer's gradient by factors of its Fisher block.

    Args:
        model: whose layers are to be captured. The closure must call it, or a wrapper that calls it.
        likelihood: ``"categorical"``, ``"gaussian"``, ``"bernoulli"`` or a :class:`Likelihood`.
        params: parameters of the model's or param groups of them (keys: ``lr``, ``momentum``, ``weight_decay``,
            ``damping``); by default all that require grad. A weight and its bias belong in one group.
        lr: learning rate, >= 0.
        momentum: μ, of the preconditioned gradient, in [0, 1).
        weight_decay: λ, decoupled, >= 0.
        damping: γ, >= 0.
        decay: of the running averages, in [0, 1): after k batches the old average keeps ``min(1 − 1/k, decay)``.
        fisher: ``"sampled"`` from the model's predictions, at the price of a second backward on those steps, or
            ``"empirical"``, from the closure's own.
        factor_interval: take the batch into the averages every so many steps.
        inverse_interval: decompose anew every so many steps,
        warmup: and do both at each of the first so many.
        kl_clip: κ: the step is scaled down to ``lr² Σ ⟨P(G), G⟩ ≤ κ``, the sum over all layers with factors (Ba et
            al. 2017). None: no clipping.
        loss_weight: the loss is that many times the mean over terms of ``−log p``: 2 for a squared error summed
            over outputs without its ½, 2/d for ``F.mse_loss`` over d outputs. Factors are then those of the loss,
            and a step without damping doesn't depend on its scale.
        factor_dtype: what the factors and what is made of them are kept in. They are formed, decomposed and applied
            in float32 (float64 for float64 weights) and rounded once each. None: float32 (or float64).
        max_dim: a layer with a longer side gets the plain gradient.
        outputs: takes the tensor that the likelihood is of from what the model returns, such as the logits of
            those tokens that the loss counts. None: the model returns it.
        seed: of the generator that targets are drawn with. It is part of the state.

    Everything but Linear and Conv2d (norms, embeddings, attention's packed projections, lone parameters) gets its
    plain gradient, with the same momentum and ``lr``; param groups can give those a rate of their own.
    :meth:`treatment` lists what each parameter gets.

    Dimension 0 of what a layer is given counts the examples.

    Attributes:
        failed_inverses: how many decompositions failed and were tried again or left out.
        nonfinite_factors: how many times a layer's batch was left out of the averages for not being finite.
        steps, skipped_steps: see :class:`Baseline`.

    Raises:
        TypeError, ValueError: an argument isn't as above; at a step: no closure, or a closure that didn't call the
            model.
    """

    COUNTERS = (*Baseline.COUNTERS, "failed_inverses", "nonfinite_factors")
    failed_inverses: int
    nonfinite_factors: int

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood = "categorical",
        params: Iterable[Any] | None = None,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        decay: float = 0.95,
        fisher: Fisher = "sampled",
        factor_interval: int = 1,
        inverse_interval: int = 10,
        warmup: int = 10,
        kl_clip: float | None = None,
        loss_weight: float = 1.0,
        factor_dtype: torch.dtype | None = None,
        max_dim: int = 8192,
        outputs: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.model = checks.module("model", model)
        self.likelihood = likelihood_named(likelihood)
        self.decay = checks.fraction("decay", decay)
        checks.one_of("fisher", fisher, FISHERS)
        self.fisher = fisher
        self.factor_interval = checks.integer("factor_interval", factor_interval, least=1)
        self.inverse_interval = checks.integer("inverse_interval", inverse_interval, least=1)
        self.warmup = checks.integer("warmup", warmup, least=0)
        self.kl_clip = None if kl_clip is None else checks.number("kl_clip", kl_clip, above=True)
        self.loss_weight = checks.number("loss_weight", loss_weight, above=True)
        checks.one_of("factor_dtype", factor_dtype, DTYPES)
        self.factor_dtype = factor_dtype
        self.max_dim = checks.integer("max_dim", max_dim, least=1)
        self.outputs = outputs
        checks.integer("seed", seed, least=0)
        self.layers: list[FactoredLayer] = []
        self._treatment: list[tuple[FactoredLayer | None, Treatment]] = []
        self._init_counters()
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "damping": damping}
        super().__init__(params, defaults)
        device = self.param_groups[0]["params"][0].device
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model's, with their own settings."""
        super().add_param_group(param_group)
        try:
            views = matrix_views(self.model, self.param_groups[-1]["params"])
        except BaseException:
            self.param_groups.pop()
            raise
        for view, layer, reason in sort_out(self.model, views, len(self.param_groups) - 1, self.max_dim):
            if layer is not None:
                self.layers.append(layer)
            kind = "plain gradient" if layer is None else type(self).__name__
            detail = reason or f"F_A {view.n} x {view.n}, F_B {view.m} x {view.m}"
            self._treatment.append((layer, Treatment(view.name, view.shape, kind, detail)))

    def treatment(self) -> list[Treatment]:
        """What each parameter of the model gets; the frozen ones come last."""
        rows = []
        for layer, row in self._treatment:
            if layer is not None and self.steps > 0 and "F_A" not in self.state[layer.view.weight]:
                row = Treatment(row.name, row.shape, "plain gradient", "the layer has not been called so far")
            rows.append(row)
        held = {id(p) for group in self.param_groups for p in group["params"]}
        for name, p in self.model.named_parameters():
            if id(p) not in held:
                rows.append(Treatment(name, tuple(p.shape), "not trained", "frozen or in no param group"))
        return rows

    def step(self, closure: Closure | None = None) -> Any:
        """One step; the loss that the closure returned.

        Args:
            closure: clears the gradients, runs forward and backward, returns the loss: a mean over terms. Called
                once. Several forwards and backwards (accumulation) count as one batch.
        """
        if closure is None:
            raise ValueError("closure must be given: the factors come from the forward and backward that it runs")
        checks.closure(closure)
        capture = None
        with torch.enable_grad():
            if self._due(self.factor_interval):
                capture = Capture(self.model, self.layers, self.likelihood, self.outputs, self.fisher, self.generator)
                with capture:
                    loss = closure()
                if capture.terms == 0:
                    raise ValueError("closure must call the model, with gradients, but its forward was not seen")
            else:
                loss = closure()
        with torch.no_grad():
            if capture is not None:
                self._update_factors(capture)
            if self._due(self.inverse_interval):
                for layer in self.layers:
                    if {"F_A", "F_B"} <= self.state[layer.view.weight].keys():
                        self._decompose(layer)
            if capture is not None:
                self._after_factors(capture)
            self.steps += 1
            if self._gradients_finite():
                directions = self._directions()
                if all_finite(list(directions.values())):
                    self._descend(directions)
                    return loss
            self.skipped_steps += 1
        return loss

    @abstractmethod
    def _decompose(self, layer: FactoredLayer) -> None:
        """Make of the factors in the state what :meth:`_precondition` needs."""

    @abstractmethod
    def _precondition(self, layer: FactoredLayer, G: Tensor) -> Tensor | None:
        """``P(G)``, float32 or wider; None where there is nothing to do it with yet."""

    def _after_factors(self, capture: Capture) -> None:
        """Take more from the same batch, once the decompositions are up to date."""

    def _due(self, interval: int) -> bool:
        return self.steps < self.warmup or self.steps % interval == 0

    def _positions(self, layer: FactoredLayer, capture: Capture) -> list[tuple[Tensor, Tensor]]:
        """``ā`` and ``Ds`` of each call, ``Ds`` so scaled that the sum of ``Ds Dsᵀ`` is ``F_B``.

        Drawn: the loss's Fisher matrix is ``loss_weight / M`` times the sum over terms. Empirical: what the
        backward gave is ``loss_weight / M`` times the gradient of ``−log p``.
        """
        ratio = self.loss_weight / capture.terms
        scale = math.sqrt(ratio if self.fisher == "sampled" else 1 / ratio)
        return [layer.positions(wide(inputs), wide(grad) * scale) for inputs, grad in capture.calls.get(layer, [])]

    def _update_factors(self, capture: Capture) -> None:
        for layer in self.layers:
            if not capture.finite:
                self.nonfinite_factors += 1
                continue
            count, F_A, F_B = 0, None, None
            for a, Ds in self._positions(layer, capture):
                a, Ds = a.flatten(0, 1), Ds.flatten(0, 1)
                count += len(a)
                F_A = a.T @ a if F_A is None else F_A.addmm_(a.T, a)
                F_B = Ds.T @ Ds if F_B is None else F_B.addmm_(Ds.T, Ds)
            if F_A is None or F_B is None:
                continue
            F_A /= count
            if not all_finite([F_A, F_B]):
                self.nonfinite_factors += 1
                continue
            state = self.state[layer.view.weight]
            state["batches"] = state.get("batches", 0) + 1
            self._average(state, "F_A", F_A, state["batches"])
            self._average(state, "F_B", F_B, state["batches"])

    def _average(self, state: dict[str, Any], name: str, new: Tensor, batches: int) -> None:
        """Take ``new`` into a running average as its batch of this number."""
        if name in state:
            new = wide(state[name]).lerp(new, 1 - min(1 - 1 / batches, self.decay))
        rounded = new.to(self._dtype(new))
        if rounded.dtype == torch.float16 and not bool(rounded.isfinite().all()):
            self.nonfinite_factors += 1  # out of range: what was there stays
        else:
            state[name] = rounded

    def _dtype(self, work: Tensor) -> torch.dtype:
        return self.factor_dtype or work.dtype

    def _directions(self) -> dict[Tensor, Tensor]:
        """``P(G)`` or the plain gradient of each parameter that has one."""
        directions: dict[Tensor, Tensor] = {
            p: wide(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None
        }
        factored: list[Tensor] = []
        sizes: list[Tensor] = []
        for layer in self.layers:
            view = layer.view
            if view.weight.grad is None:
                continue
            G = wide(view.gather(p.grad for p in view.parameters))
            P = self._precondition(layer, G)
            if P is None:
                continue
            for p, part in zip(view.parameters, view.scatter(P), strict=True):
                if p.grad is not None:
                    directions[p] = part
                    factored.append(part)
            if self.kl_clip is not None:
                sizes.append(get_rate(self.param_groups[layer.group]) ** 2 * (P * G).sum())
        if self.kl_clip is not None and sizes:
            # indefinite after rounding to 16 bits, it can come out negative: its size is bounded all the same
            size = abs(torch.stack(sizes).sum().item())
            if size > self.kl_clip:
                torch._foreach_mul_(factored, math.sqrt(self.kl_clip / size))
        return directions

    def _settings(self) -> dict[str, Any]:
        return {"factor_dtype": str(self.factor_dtype), "fisher": self.fisher}

    def _extra_state(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())
