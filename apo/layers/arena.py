"""The preconditioners of all layers as one operator: what a whole model's step, trial and slopes take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import apo_kernels as ak
from apo.inner_products import norms
from apo.layers.preconditioner import PreconditionedLayer
from apo.phi.meta_optimizer import Learned
from apo.ranks.owners import Owners
from apo.ranks.sharding import local, sum_over, sum_over_, summed_once

__all__ = ["Arena", "Parts"]

Parts = list[list[Tensor | None] | None]
"""For each layer its matrices side by side, weight and bias; None for a layer that takes no part."""


class Arena:
    """The layers of an optimizer, bound to the tensors that hold them until these are replaced.

    Args:
        owners: the ranks that the layers are given to.

    Attributes:
        layers: in the order of all lists that go in and come out.
    """

    def __init__(self, owners: Owners | None = None) -> None:
        self.owners = owners or Owners()
        self.layers: list[PreconditionedLayer] = []
        self._operator: ak.ModelPreconditioner | None = None
        self._places: object = None
        self._thetas: dict[int, list[Tensor | None]] = {}

    def renew(self) -> None:
        """Notice that layers were added, or that their tensors were replaced."""
        self._operator = None
        self._places, self._thetas = None, {}

    @property
    def operator(self) -> ak.ModelPreconditioner:
        """``P`` of all layers."""
        if self._operator is None:
            each = [layer.operands for layer in self.layers]
            self._operator = ak.ModelPreconditioner(
                [A for A, _, _ in each],
                [B for _, B, _ in each],
                [S for _, _, S in each],
                widths=[layer.view.widths for layer in self.layers],
                learned=[layer.learned for layer in self.layers],
            )
        return self._operator

    def parts(self, tensors: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Parts:
        """What was found for each of ``parameters``, layer by layer; None for a layer for which there is nothing."""
        found = dict(zip(map(id, parameters), tensors, strict=True))  # a tensor's own hash takes longer
        parts: Parts = []
        for layer in self.layers:
            own = [found[at] for at in layer.view.ids]
            parts.append(None if own[0] is None and own[-1] is None else layer.view.matrices(own))
        return parts

    def step(self, Gs: Parts, **numbers: Any) -> Tensor:
        """:meth:`apo_kernels.ModelPreconditioner.step_` of the layers' weights and momentum."""
        momenta = [layer.momentum for layer in self.layers]
        numbers["shares"], total = summed_once(numbers["shares"], [layer.view.over for layer in self.layers])
        operator = self.operator
        factor: Tensor = self._written(Gs, lambda thetas: operator.step_(thetas, Gs, momenta, total=total, **numbers))
        return factor

    def trial(self, Gs: Parts, **numbers: Any) -> object:
        """:meth:`apo_kernels.ModelPreconditioner.trial_` of the layers' weights."""
        momenta = [layer.momentum for layer in self.layers]
        return self._written(Gs, lambda thetas: self.operator.trial_(thetas, Gs, momenta, **numbers))

    @torch.no_grad()
    def step_back(self, Gs: Parts) -> None:
        """Take back the last step of the layers that have gradients, as far as their momentum holds it."""

        def write(thetas: Parts) -> None:
            _, own, steps = self._beside_momentum(thetas)
            if own:
                torch._foreach_add_(own, steps)

        self._written(Gs, write)

    @torch.no_grad()
    def along_momentum(self, Gs: Parts) -> Tensor:
        """``⟨G, v⟩`` and ``‖v‖²``, summed over all layers with gradients and the ranks that hold them: float64."""
        places, own, steps = self._beside_momentum(Gs)
        ways = list({layer.view.over: None for layer in self.layers})
        sums = self.layers[0].S.new_zeros(2, len(ways), dtype=torch.float64)
        if own:
            lengths, products = norms(steps), torch._foreach_mul(own, steps)
            for k, over in enumerate(ways):
                here = [j for j, i in enumerate(places) if self.layers[i].view.over == over]
                if here:
                    sums[0, k] = torch.cat([products[j].flatten() for j in here]).sum()
                    sums[1, k] = (lengths if len(ways) == 1 else lengths[here]).square().sum()
        return sum_over(sums.flatten(), ways * 2).view(2, -1).sum(1)

    @torch.no_grad()
    def mean_square(self, Gs: Parts) -> float:
        """Of the gradients' entries, over the ranks that hold them; one synchronisation."""
        found = [(i, x) for i, own in enumerate(Gs) if own is not None for x in own if x is not None]
        entries = sum(layer.view.entries for layer, own in zip(self.layers, Gs, strict=True) if own is not None)
        sums = self.layers[0].S.new_zeros(len(self.layers), dtype=torch.float64)
        if found:
            places = torch.tensor([i for i, _ in found]).to(sums.device, non_blocking=True)
            sums.index_add_(0, places, norms([x for _, x in found]).square_())
        return float(sum_over(sums, [layer.view.over for layer in self.layers]).sum()) / max(entries, 1)

    def _beside_momentum(self, parts: Parts) -> tuple[list[int], list[Tensor], list[Tensor]]:
        """The parts that there are of layers with momentum: the layer of each, the part, and its momentum."""
        found: list[tuple[int, Tensor, Tensor]] = []
        for i, (layer, own) in enumerate(zip(self.layers, parts, strict=True)):
            if own is not None and layer.momentum is not None and layer.view.held:
                pairs = zip(own, layer.momentum_parts(), strict=True)
                found += [(i, x, v) for x, v in pairs if x is not None]
        return [i for i, *_ in found], [x for _, x, _ in found], [v for *_, v in found]

    def _written(self, Gs: Parts, write: Callable[[Parts], Any]) -> Any:
        """Let the weights' matrices be written; those that can't be views of the weights are copied back."""
        flat = [local(p) for layer in self.layers for p in layer.view.parameters]
        places = [*map(Tensor.data_ptr, flat)], [*map(Tensor.stride, flat)]
        if places != self._places:
            self._places, self._thetas = places, {}
        thetas: Parts = [None] * len(Gs)
        copies: list[tuple[Tensor, Tensor]] = []
        for i, layer in enumerate(self.layers):
            if Gs[i] is None:
                continue
            if i in self._thetas:  # they are views of the weights, still
                thetas[i] = self._thetas[i]
                continue
            weights = [local(p) for p in layer.view.parameters]
            own = thetas[i] = layer.view.matrices(weights)
            assert own[0] is not None
            if layer.view.held and own[0].data_ptr() != weights[0].data_ptr():
                weight = weights[0]
                copies.append((weight.transpose(0, 1) if layer.view.transposed else weight, own[0]))
            elif layer.view.held:
                self._thetas[i] = own
        found = write(thetas)
        for weight, matrix in copies:
            weight.copy_(matrix.view(weight.shape))
        self.owners.share_(layer.view for layer, G in zip(self.layers, Gs, strict=True) if G is not None)
        return found

    def refresh(self) -> None:
        """Bring 16-bit working copies up to date with what was learned."""
        pairs = [pair for layer in self.layers for pair in layer.copies()]
        if pairs:
            torch._foreach_copy_([copy for copy, _ in pairs], [own for _, own in pairs])

    def derivatives(self, Gs: Parts, Vs: Parts, lengths: Sequence[float]) -> list[Tensor | None]:
        """What steps by the entry take: ``−length`` times the derivatives of ``⟨V, P(G)⟩`` with respect to the learned
        tensors, in their order."""
        found: list[Tensor | None] = []
        for layer, G, V, length in zip(self.layers, Gs, Vs, lengths, strict=True):
            if G is None:
                found += [None] * len(layer.learned)
                continue
            matrices = [layer.view.joined(x) for x in (G, V)]
            each = ak.precondition_vjp(matrices[0], *layer.operands, matrices[1], wanted=layer.learned)
            found += torch._foreach_mul(list(each), -length)
        return found

    def root_mean_squares(self) -> list[tuple[float, ...]]:
        """Of each layer's learned blocks, over the identity's, and of its S; one synchronisation."""
        if not self.layers:
            return []
        phi = self.phi
        ones = [own.tensor.numel() // max(own.tensor.shape[-1], 1) if own.block else own.tensor.numel() for own in phi]
        lengths = norms([own.tensor for own in phi])
        if any(own.over for own in phi):
            both = torch.stack([lengths.square(), lengths.new_tensor(ones)]).flatten()
            squares, counts = sum_over(both, [own.over for own in phi] * 2).view(2, -1)
            lengths, ones = squares.sqrt(), counts.tolist()
        found = iter([length / math.sqrt(one) for length, one in zip(lengths.tolist(), ones, strict=True)])
        return [tuple(next(found) for _ in layer.phi) for layer in self.layers]

    @property
    def phi(self) -> list[Learned]:
        """All that is learned, layer by layer."""
        return [own for layer in self.layers for own in layer.phi]

    def sum_blocks_(self, *found: Sequence[Tensor | None]) -> None:
        """Sum what was found for each of :attr:`phi` over the ranks that hold the same block, in place."""
        pairs = [(x, own.alike) for each in found for x, own in zip(each, self.phi, strict=True) if x is not None]
        sum_over_([x for x, alike in pairs if alike], [alike for _, alike in pairs if alike])

    def of_phi(self, *by_name: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What there is of the layers' A, B and S, three lists, in the order of :attr:`phi`."""
        of_layer = (dict(zip("ABS", each, strict=True)) for each in zip(*by_name, strict=True))
        return [own[name] for layer, own in zip(self.layers, of_layer, strict=True) for name in layer.learned]

    def gathered(self) -> dict[PreconditionedLayer, dict[str, Tensor]]:
        """The whole state of layers that have owners, on all ranks; to be called on all of them."""
        found: dict[PreconditionedLayer, dict[str, Tensor]] = {}
        for owner in range(self.owners.count) if self.owners.over else ():
            layers = [layer for layer in self.layers if layer.view.owner == owner]
            found |= zip(layers, self.owners.handed_on([x.state() for x in layers], owner), strict=True)
        return found

    def take_in(self, layers: Iterable[PreconditionedLayer]) -> None:
        """Add layers."""
        self.layers += layers
        self.renew()

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "owners": self.owners}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers, self.owners = state["layers"], state["owners"]
        self.renew()
