"""What the layers see while a closure runs: their inputs and the gradients of their outputs.

Targets are drawn at the end of the model's own forward pass, and their gradients are taken on the graph that the
closure's backward uses next: one more backward pass, the same dropout masks, no running statistic updated twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from benchmarks.common.fisher.layers import FactoredLayer
from benchmarks.common.fisher.likelihood import Likelihood

Fisher = Literal["sampled", "empirical"]
FISHERS = ("sampled", "empirical")


class Capture:
    """Use as a context around a closure.

    Args:
        fisher: which output gradients. ``"sampled"``: of the sum of ``−log p`` over terms, for targets drawn from the
            model. ``"empirical"``: of the closure's loss, by its own backward.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[FactoredLayer],
        likelihood: Likelihood,
        fisher: Fisher,
        generator: torch.Generator,
    ) -> None:
        self.model, self.layers, self.likelihood = model, layers, likelihood
        self.fisher, self.generator = fisher, generator
        self.calls: dict[FactoredLayer, list[tuple[Tensor, Tensor]]] = {}  # inputs and output gradients of each call
        self.terms = 0  # of the mean that is the loss, over all forward passes of the closure
        self.finite = True  # whether all outputs were: of others no targets could be drawn
        self._open: list[tuple[FactoredLayer, Tensor, GradientEdge]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Capture:
        for layer in self.layers:
            for module in layer.modules:
                self._hooks.append(module.register_forward_hook(self._layer_hook(layer)))
        self._hooks.append(self.model.register_forward_hook(self._model_hook))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._open.clear()

    def _layer_hook(self, layer: FactoredLayer) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not output.requires_grad:
                return
            seen = inputs[0].detach()
            if self.fisher == "empirical":
                output.register_hook(lambda grad: self._keep(layer, seen, grad))
            else:  # the edge, not the tensor: an activation in place would make it another's
                self._open.append((layer, seen, get_gradient_edge(output)))

        return hook

    def _model_hook(self, model: nn.Module, inputs: tuple[Any, ...], z: Any) -> None:
        if not isinstance(z, Tensor):
            raise TypeError(f"the model must return the tensor that the likelihood is of, but got {type(z).__name__}")
        if not z.requires_grad:  # not part of the loss: an evaluation
            self._open.clear()
            return
        self.terms += self.likelihood.terms(z)
        if self.fisher == "empirical":
            return
        if bool(z.detach().isfinite().all()):
            Ds = self.likelihood.sample(z, self.generator).to(z.dtype)
            edges = [edge for _, _, edge in self._open]
            found = torch.autograd.grad(z, edges, Ds, retain_graph=True, allow_unused=True) if edges else ()
            for (layer, seen, _), grad in zip(self._open, found, strict=True):
                if grad is not None:
                    self._keep(layer, seen, grad)
        else:
            self.finite = False
        self._open.clear()

    def _keep(self, layer: FactoredLayer, inputs: Tensor, grad: Tensor) -> None:
        self.calls.setdefault(layer, []).append((inputs, grad.detach()))
