"""What KFAC and EKFAC share: the factors and their averages, the schedule, KL clipping, the state."""

import math
from abc import abstractmethod
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import checks
from benchmarks.common.fisher.capture import FISHERS, Capture, Fisher
from benchmarks.common.fisher.damping import wide
from benchmarks.common.fisher.layers import FactoredLayer, factored_layers, sums_of_squares
from benchmarks.common.fisher.likelihood import NAMED, Likelihood
from benchmarks.paper.baselines.base import Baseline, Closure, all_finite


class KroneckerFactored(Baseline):
    """Preconditions each layer's gradient by factors of its Fisher block.

    Args:
        model: whose layers are to be captured. The closure must call it, or a wrapper that calls it.
        damping: γ.
        decay: of the running averages, in [0, 1): after k batches the old average keeps ``min(1 − 1/k, decay)``.
        fisher: ``"sampled"`` from the model's predictions, which costs a second backward on those steps, or
            ``"empirical"``, from the closure's own.
        factor_interval: update the averages every N steps.
        inverse_interval: decompose every N steps.
        warmup: do both at each of the first N steps.
        kl_clip: κ: the step is scaled down to ``lr² Σ ⟨P(G), G⟩ ≤ κ``, the sum over all layers with factors (Ba et
            al. 2017). None: no clipping.
        settings: ``lr``, ``momentum`` and ``weight_decay`` of :class:`Baseline`.

    The loss must be the mean of ``−log p`` over its terms. Dimension 0 of what a layer is given counts the examples.
    Everything but Linear and Conv2d (norms, embeddings, attention's packed projections, lone parameters) gets its
    plain gradient, with the same momentum and ``lr``.

    Attributes:
        failed_inverses: how many decompositions failed and were tried again or left out.
        nonfinite_factors: how many times a layer's batch was left out of the averages because it wasn't finite.
    """

    COUNTERS = (*Baseline.COUNTERS, "failed_inverses", "nonfinite_factors")
    failed_inverses: int
    nonfinite_factors: int

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood = "categorical",
        *,
        damping: float = 1e-3,
        decay: float = 0.95,
        fisher: Fisher = "sampled",
        factor_interval: int = 1,
        inverse_interval: int = 10,
        warmup: int = 10,
        kl_clip: float | None = None,
        **settings: float,
    ) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], damping=damping, **settings)
        self.model = model
        self.likelihood = likelihood if isinstance(likelihood, Likelihood) else NAMED[likelihood]
        self.decay = checks.number("decay", decay, below=1)
        if fisher not in FISHERS:
            raise ValueError(f"fisher must be one of {', '.join(FISHERS)}, but got {fisher!r}")
        self.fisher = fisher
        self.factor_interval = checks.integer("factor_interval", factor_interval, least=1)
        self.inverse_interval = checks.integer("inverse_interval", inverse_interval, least=1)
        self.warmup = checks.integer("warmup", warmup, least=0)
        self.kl_clip = None if kl_clip is None else checks.number("kl_clip", kl_clip, above=True)
        self.layers = factored_layers(model)
        self.generator = torch.Generator(self.param_groups[0]["params"][0].device).manual_seed(0)

    def step(self, closure: Closure | None = None) -> Any:
        """One step; the loss that the closure returned.

        It is called once. Several forwards and backwards in it (accumulation) count as one batch.
        """
        if closure is None:
            raise ValueError("closure must be given: the factors come from the forward and backward that it runs")
        capture = None
        if self._due(self.factor_interval):
            capture = Capture(self.model, self.layers, self.likelihood, self.fisher, self.generator)
        with torch.enable_grad(), capture or nullcontext():
            loss = closure()
        if capture is not None and capture.terms == 0:
            raise ValueError("closure must call the model, with gradients, but its forward was not seen")
        with torch.no_grad():
            if capture is not None:
                self._update_factors(capture)
            if self._due(self.inverse_interval):
                for layer in self.layers:
                    if {"F_A", "F_B"} <= self.state[layer.weight].keys():
                        self._decompose(layer)
            if capture is not None:
                self._after_factors(capture)
            self._step_along(self._directions)
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

        Drawn: the loss's Fisher matrix is the sum over its M terms, divided by M. Empirical: what the backward gave
        is the gradient of ``−log p``, divided by M.
        """
        scale = capture.terms ** (-0.5 if self.fisher == "sampled" else 0.5)
        return [layer.positions(wide(inputs), wide(grad) * scale) for inputs, grad in capture.calls.get(layer, [])]

    def _update_factors(self, capture: Capture) -> None:
        if not capture.finite:
            self.nonfinite_factors += len(self.layers)
            return
        for layer in self.layers:
            sums = [sums_of_squares(a, Ds) for a, Ds in self._positions(layer, capture)]
            if not sums:
                continue
            F_A, F_B, count = (sum(parts[1:], parts[0]) for parts in zip(*sums, strict=True))
            F_A = F_A / count
            if not all_finite([F_A, F_B]):
                self.nonfinite_factors += 1
                continue
            state = self.state[layer.weight]
            state["batches"] = state.get("batches", 0) + 1
            self._average(state, "F_A", F_A, state["batches"])
            self._average(state, "F_B", F_B, state["batches"])

    def _average(self, state: dict[str, Any], name: str, new: Tensor, batches: int) -> None:
        """Take ``new`` into a running average as its batch of this number."""
        state[name] = state[name].lerp(new, 1 - min(1 - 1 / batches, self.decay)) if name in state else new

    def _directions(self) -> dict[Tensor, Tensor]:
        """``P(G)`` or the plain gradient of each parameter that has one."""
        group = self.param_groups[0]
        directions: dict[Tensor, Tensor] = {p: wide(p.grad) for p in group["params"] if p.grad is not None}
        factored: list[Tensor] = []
        sizes: list[Tensor] = []
        for layer in self.layers:
            if layer.weight.grad is None:
                continue
            G = layer.gradient()
            P = self._precondition(layer, G)
            if P is None:
                continue
            for p, part in zip(layer.parameters, layer.parts(P), strict=True):
                if p.grad is not None:
                    directions[p] = part
                    factored.append(part)
            if self.kl_clip is not None:
                sizes.append(float(group["lr"]) ** 2 * (P * G).sum())
        if self.kl_clip is not None and sizes:
            # indefinite after rounding to 16 bits, it can come out negative: its size is bounded all the same
            size = abs(torch.stack(sizes).sum().item())
            if size > self.kl_clip:
                torch._foreach_mul_(factored, math.sqrt(self.kl_clip / size))
        return directions

    def state_dict(self) -> dict[str, Any]:
        """With the state of the generator that targets are drawn with."""
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.generator.set_state(state_dict["generator"].cpu())
