"""APO's arithmetic layer by layer, in plain torch: what the optimizer's whole-model operations must give.

Nothing here is fast, and there is nothing around the arithmetic: no checkpoints, schedules, ranks or 16-bit blocks, and
no gradients that aren't finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apo import Method
from apo.layers.matrix_view import MatrixView, matrix_views
from apo.noise.factor import NoiseFactor
from apo.safeguards.promise import Promise
from apo_kernels.reference import precondition, precondition_vjp

Part = Tensor | None
Loss = Callable[[], Tensor]

LEAST = 1e-150
"""Keeps squares that underflow from being divided by."""


@dataclass(eq=False)
class Group:
    """A param group, and what is remembered of its rate."""

    params: list[Tensor]
    lr: float = 0.1
    momentum: float = 0.5
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = True
    block_size: int | None = 64
    slope_square: float = 0.0
    slope_mean: float = 0.0
    updates: int = 0

    @property
    def decay(self) -> float:
        """λ, where the decay isn't part of the gradient."""
        return self.weight_decay if self.decoupled_weight_decay else 0.0

    @property
    def carried(self) -> float:
        """How many times its own length momentum will carry a step."""
        return 1 / (1 - self.momentum)


@dataclass(eq=False)
class Layer:
    """A matrix: its parameters, the A, B and S of its preconditioner, its momentum, and its running means by name."""

    view: MatrixView
    group: Group
    A: Tensor
    B: Tensor
    S: Tensor
    v: Tensor
    learned: str
    means: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    updates: int = 0

    @property
    def learned_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.learned}


class PerLayer:
    """APO of a model in float64, with the settings of :class:`apo.APO` and :class:`apo.Method`.

    Args:
        groups: param groups, with keys like those of :class:`Group`.
        discrepancy: ρ(new, old) of the objective.

    Attributes:
        failed, bounded: the steps whose trial failed, and whose promise was bounded.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[dict[str, Any]],
        *,
        discrepancy: Callable[[Tensor, Tensor], Tensor],
        fsd_weight: float,
        wsd_weight: float,
        interval: int = 1,
        warmup: int = 500,
        method: Method,
    ) -> None:
        self.groups = [Group(**group) for group in groups]
        self.parameters = [p for group in self.groups for p in group.params]
        self.layers = [
            _start(view, group, method.max_dim) for group in self.groups for view in matrix_views(model, group.params)
        ]
        self.discrepancy, self.fsd_weight, self.wsd_weight = discrepancy, fsd_weight, wsd_weight
        self.interval, self.warmup, self.method = interval, warmup, method
        self.most_promised, self.mean_loss = math.inf, math.nan
        self.looked: tuple[float, float, float | None] | None = None
        self.noise: dict[str, Any] = dict(NoiseFactor.NUMBERS)
        self.steps, self.begun = 0, False
        self.failed: list[int] = []
        self.bounded: list[int] = []

    def step(self, loss: Loss, outputs: Loss, own_loss: Callable[[Tensor], Tensor] | None = None) -> None:
        """One step from the loss on B, the outputs on B′, and the objective's own loss of these, if it has one."""
        J = loss()
        g = self._gradients(J)
        Gs = self._matrices(g)
        spacing, warmed = self.interval, self.steps // 2 if self.noise["apo_noise_gain"] > 0.5 else self.steps
        if warmed < self.warmup:
            spacing = max(1, warmed * self.interval // self.warmup)
        due = self.steps % spacing == 0 or not self.begun
        if due and own_loss is None:
            self._look_back(g, Gs, loss)
        if not due or self._meta_update(g, Gs, J.item(), loss, outputs, own_loss):
            self._move(g, Gs)
        self.steps += 1

    def _gradients(self, J: Tensor) -> dict[Tensor, Part]:
        """Of each parameter, with L2 decay."""
        found = torch.autograd.grad(J, self.parameters, allow_unused=True)
        g: dict[Tensor, Part] = dict(zip(self.parameters, found, strict=True))
        for group in self.groups:
            for p in group.params:
                grad = g[p]
                if grad is not None and not group.decoupled_weight_decay:
                    g[p] = grad + group.weight_decay * p.detach()
        return g

    def _matrices(self, g: dict[Tensor, Part]) -> dict[Layer, Tensor]:
        return {layer: _matrix(layer.view, g) for layer in self.layers if any(g[p] is not None for p in _own(layer))}

    def _look_back(self, g: dict[Tensor, Part], Gs: dict[Layer, Tensor], loss: Loss) -> None:
        """``⟨G, v⟩`` of this batch before the last step and after it."""
        moved = [layer for layer in Gs if layer.group.momentum]
        self.looked = None
        if not (self.method.look_back and moved and any(layer.updates for layer in self.layers)):
            return

        def slope(G: dict[Layer, Tensor]) -> float:
            return sum((G[layer] * layer.v).sum().item() for layer in moved if layer in G)

        before = None
        if NoiseFactor.sees_cost(self.noise):
            theta = {p: p.detach().clone() for p in self.parameters}
            with torch.no_grad():
                for layer in moved:
                    _write(layer, g, 1.0, -layer.v)
            before = slope(self._matrices(self._gradients(loss())))
            with torch.no_grad():
                for p in self.parameters:
                    p.copy_(theta[p])
        self.looked = slope(Gs), sum(layer.v.square().sum().item() for layer in moved), before

    def _note_noise(self, size: float) -> None:
        if self.looked is not None and size > 0:
            self.noise = NoiseFactor().look(self.noise, *self.looked, size, step=self.steps, loss=self.mean_loss)
        self.looked = None

    @torch.no_grad()
    def _move(self, g: dict[Tensor, Part], Gs: dict[Layer, Tensor]) -> None:
        """``v ← μ v + κ·lr·f·P(G)``, ``θ ← (1 − κ·lr·λ) θ − v``; f keeps the promise of all layers at what it may be, κ
        is the noise factor."""
        directions = {layer: precondition(G, layer.A, layer.B, layer.S) for layer, G in Gs.items()}
        taken = self.noise["apo_noise_factor"]
        promised = sum(
            taken * layer.group.lr * layer.group.carried * (G * directions[layer]).sum().item()
            for layer, G in Gs.items()
        )
        f = self.most_promised / promised if promised > self.most_promised else 1.0
        self.bounded += [self.steps] if f < 1 else []
        for layer, direction in directions.items():
            group = layer.group
            layer.v = group.momentum * layer.v + taken * group.lr * f * direction
            _write(layer, g, 1 - taken * group.lr * group.decay, layer.v)

    def _meta_update(
        self,
        g: dict[Tensor, Part],
        Gs: dict[Layer, Tensor],
        J: float,
        loss: Loss,
        outputs: Loss,
        own_loss: Callable[[Tensor], Tensor] | None,
    ) -> bool:
        """φ ← φ − α ∇_φ Q at the lookahead. Whether the trial was good; where not, steps are made shorter."""
        theta = {p: p.detach().clone() for p in self.parameters}
        old = outputs().detach()
        base = J if own_loss is None else own_loss(old).item()
        with torch.no_grad():
            for layer, G in Gs.items():
                whole, group = self.method.lookahead == "whole", layer.group
                step = group.lr * self._reach(group) * precondition(G, layer.A, layer.B, layer.S)
                step = step if whole else step + group.momentum * layer.v
                _write(layer, g, 1 - group.lr * group.decay, step)

        new = outputs()
        J_there = loss() if own_loss is None else own_loss(new)
        Q = J_there + self.fsd_weight * self.discrepancy(new, old)
        found = torch.autograd.grad(Q, self.parameters, allow_unused=True)
        V: dict[Tensor, Part] = {}
        q, slope = Q.item(), 0.0
        with torch.no_grad():
            for p, v in zip(self.parameters, found, strict=True):
                q += self.wsd_weight / 2 * (p - theta[p]).square().sum().item()
                V[p] = (torch.zeros_like(p) if v is None else v) + self.wsd_weight * (p - theta[p])
                slope += (V[p] * (p - theta[p])).sum().item()
                V[p] = None if g[p] is None else V[p]
                p.copy_(theta[p])
            if not q <= base + abs(base) + 1 or (
                not self.begun and slope > 0 and (own_loss is None or 2 * (q - base) < slope)
            ):
                self.failed.append(self.steps)
                self._shrink()
                return False
            self.begun = True
            most = max(abs(J_there.item()), abs(base))
            self.mean_loss = most if math.isnan(self.mean_loss) else 0.9 * self.mean_loss + 0.1 * most
            self.most_promised = Promise.MOST * max(most, self.mean_loss)
            self._learn(Gs, V)
        return True

    def _reach(self, group: Group) -> float:
        return group.carried if self.method.lookahead == "whole" else 1.0

    def _shrink(self) -> None:
        for layer in self.layers:
            layer.v /= math.e
            if not self.method.adapt_lr:
                layer.S *= math.exp(-0.5)
        if self.method.adapt_lr:
            for group in self.groups:
                self._change_rate(group, -1.0)

    def _learn(self, Gs: dict[Layer, Tensor], V: dict[Tensor, Part]) -> None:
        slopes, sizes = dict.fromkeys(self.groups, 0.0), dict.fromkeys(self.groups, 0.0)
        for layer, G in Gs.items():
            group, own_V = layer.group, _matrix(layer.view, V)
            length = group.lr * self._reach(group)
            P_G = precondition(G, layer.A, layer.B, layer.S)
            slopes[group] -= length * (own_V * P_G).sum().item()
            sizes[group] += length * (G * P_G).sum().item()
            for p in _own(layer):
                v = V[p]
                slopes[group] -= 0.0 if v is None else group.lr * group.decay * (v * p).sum().item()
            self._step_phi(layer, G, own_V, length)
        self._note_noise(sum(sizes.values()))
        if not self.method.adapt_lr:
            return
        for group in self.groups:
            slope, size = (sum(x.values()) if self.method.shared_lr else x[group] for x in (slopes, sizes))
            group.updates += 1
            if self.method.meta_optimizer == "relative":
                ratio = min(max(slope / size, -1.0), 1.0) if size else 0.0
                group.slope_mean = 0.8 * group.slope_mean + 0.2 * ratio
                step = group.slope_mean / (1 - 0.8**group.updates)
            else:
                group.slope_square = 0.99 * group.slope_square + 0.01 * slope**2
                step = slope / (math.sqrt(group.slope_square) + LEAST)
            self._change_rate(group, -self.method.lr_meta_lr * step)
        if self.method.meta_optimizer == "relative" and max(layer.updates for layer in self.layers) % 10 == 0:
            self._move_scale_to_rates()

    def _step_phi(self, layer: Layer, G: Tensor, V: Tensor, length: float) -> None:
        relative, own = self.method.meta_optimizer == "relative", (layer.A, layer.B, layer.S)
        _, *derivatives = precondition_vjp(G, *own, V, relative=relative)
        _, *for_V_as_G = precondition_vjp(G, *own, G, relative=True)
        layer.updates += 1
        for i, name in enumerate("ABS"):
            if name not in layer.learned:
                continue
            if not relative:
                side = {"A": layer.view.n, "B": layer.view.m, "S": 1}[name]
                width = side if layer.group.block_size is None else min(side, layer.group.block_size)
                rate = self.method.phi_lr / width
                _step_by_the_entry(layer, name, -length * derivatives[i], rate, self.method.meta_optimizer)
            elif name == "S":
                slope, size = -length * layer.S * derivatives[i], length * layer.S * for_V_as_G[i]
                _step_scaling(layer, slope, size, self.method.phi_lr)
            else:
                size = length * for_V_as_G[i].diagonal(dim1=-2, dim2=-1)
                _step_block(layer, name, -length * derivatives[i], size, self.method.phi_lr)

    def _change_rate(self, group: Group, change: float) -> float:
        """Change log lr. Returns the new rate over the old one."""
        old = group.lr
        if old:
            group.lr = min(max(old * math.exp(change), self.method.bounds[0]), self.method.bounds[1])
        return group.lr / old if old else 1.0

    def _move_scale_to_rates(self) -> None:
        """Give A and B the identity's RMS, S one of 1 in the mean over the layers, and the rates what P loses."""
        rms = {layer: {name: _rms(x, name) for name, x in layer.learned_tensors.items()} for layer in self.layers}
        for group in self.groups:
            of_group = [x for x in self.layers if self.method.shared_lr or x.group is group]
            growth = sum(math.log(math.prod(rms[layer].values()) ** 2) for layer in of_group)
            moved = self._change_rate(group, growth / len(of_group))
            for layer in self.layers:
                if layer.group is group:
                    layer.S *= math.prod(rms[layer].values()) / rms[layer]["S"] / math.sqrt(moved)
        for layer in self.layers:
            for name in layer.learned.replace("S", ""):
                getattr(layer, name).div_(rms[layer][name])


def _start(view: MatrixView, group: Group, max_dim: int | None) -> Layer:
    """The identity. A side without a block is a stack of ones."""
    sides = dict(zip("AB", view.sides(group.block_size, max_dim), strict=True))
    blocks = {}
    for name, side in sides.items():
        one = torch.eye(side.width).double()
        if side.block_size is not None:
            one = one.repeat(-(-side.length // side.width), 1, 1)
        blocks[name] = one.repeat(*view.batch, *[1] * one.ndim)
    S = torch.ones(view.shape).double()
    learned = "".join(name for name in "AB" if sides[name].learned) + "S"
    return Layer(view, group, blocks["A"], blocks["B"], S, torch.zeros_like(S), learned)


def _own(layer: Layer) -> list[Tensor]:
    return layer.view.parameters


def _matrix(view: MatrixView, found: dict[Tensor, Part]) -> Tensor:
    """The weight's and the bias's tensors as one matrix; None counts as zeros."""
    return view.joined(view.matrices([found[p] for p in view.parameters]))


def _write(layer: Layer, g: dict[Tensor, Part], shrink: float, step: Tensor) -> None:
    """``θ ← shrink·θ − step`` of the parameters that have a gradient."""
    view = layer.view
    for p, part in zip(view.parameters, step.split(list(view.widths), -1), strict=True):
        if g[p] is not None:
            turned = p.transpose(0, 1) if view.transposed and p is view.weight else p
            turned.copy_(shrink * turned - part.reshape(turned.shape))


def _rms(x: Tensor, name: str) -> float:
    """Of S; of a block over the identity's."""
    return math.sqrt(x.square().sum().item() / (x.numel() if name == "S" else x.numel() // x.shape[-1]))


def _means(layer: Layer, name: str, new: tuple[Tensor, Tensor], betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Running means of two tensors."""
    before = layer.means.get(name, (0.0, 0.0))
    first, second = (beta * x + (1 - beta) * y for x, y, beta in zip(before, new, betas, strict=True))
    layer.means[name] = first, second
    return first, second


def _unbias(layer: Layer, betas: tuple[float, float]) -> float:
    """What takes the bias from the ratio of the two means."""
    return float((1 - betas[1] ** layer.updates) / (1 - betas[0] ** layer.updates))


def _step_block(layer: Layer, name: str, slope: Tensor, size: Tensor, rate: float) -> None:
    """``X ← X (I − ε R)`` of each square, with ``R = sym(slope) / √(size_i size_j)`` of the means, ``‖R‖_F <= 2``."""
    X = getattr(layer, name)
    mean, mean_size = _means(layer, name, (slope, size), (0.5, 0.9))
    root = (mean_size + 1e-6 * mean_size.mean(-1, keepdim=True) + LEAST).sqrt()
    R = _unbias(layer, (0.5, 0.9)) * (mean + mean.mT) / 2 / root.unsqueeze(-1) / root.unsqueeze(-2)
    R = R * (2 / R.norm(dim=(-2, -1), keepdim=True).clamp_min(2))
    X.copy_(X - rate * (X @ R))


def _step_scaling(layer: Layer, slope: Tensor, size: Tensor, rate: float) -> None:
    """``S ← S exp(−ε r)``, with ``r = mean slope / mean size``, ``|r| <= 1``."""
    mean, mean_size = _means(layer, "S", (slope, size), (0.9, 0.99))
    r = _unbias(layer, (0.9, 0.99)) * mean / (mean_size + 1e-3 * mean_size.mean() + LEAST)
    layer.S *= torch.exp(-rate * r.clamp(-1, 1))


def _step_by_the_entry(layer: Layer, name: str, slope: Tensor, rate: float, meta_optimizer: str) -> None:
    """Adam, or RMSprop without correction of the bias."""
    mean, square = _means(layer, name, (slope, slope**2), (0.9, 0.99))
    if meta_optimizer == "adam":
        mean, square = mean / (1 - 0.9**layer.updates), square / (1 - 0.99**layer.updates)
    else:
        mean = slope
    getattr(layer, name).sub_(rate * mean / (square.sqrt() + LEAST))
