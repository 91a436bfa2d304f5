"""The proximal meta-objective (Eq. 8) at trial weights, and its gradient with respect to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apo import checks
from apo.discrepancy import Discrepancy, discrepancy_named, takes_pairs
from apo.lookahead import random_state, restore_random_state, undisturbed

__all__ = ["Anchor", "Closure", "Evaluation", "ProximalObjective"]

Closure = Callable[[], Any]
"""Clears the gradients, runs forward and backward on the batch B, returns the loss."""


class Anchor(NamedTuple):
    """The batch B′ and the model's outputs on it at θ; None where λ_FSD is 0."""

    batch: Any
    outputs: Any
    rng: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """The terms of Eq. 8 at one trial, ``objective = loss + λ_FSD · fsd + λ_WSD · wsd``.

    ``wsd`` is ``½ ‖θ′ − θ‖²``, ``step_norm`` is ``‖θ′ − θ‖``.
    """

    objective: float
    loss: float
    fsd: float
    wsd: float
    step_norm: float


class ProximalObjective:
    """``Q = J_B(θ′) + λ_FSD · D_F(θ′, θ; B′) + λ_WSD/2 · ‖θ′ − θ‖²`` (Eq. 8).

    The loss comes from the closure that is given to ``step``, or from ``loss``; this holds the other two terms.

    Args:
        model: called on B′. Under DDP: the DDP module, so that ranks agree on the gradient.
        inputs: B′, batches of the model's inputs: an iterable, gone through again when it ends, or a callable that
            returns a batch. They should not be the batch that is trained on: the term is to measure what the step
            does to *other* examples. A tensor is called as ``model(batch)``, a tuple or list as
            ``model(*batch)``, a mapping as ``model(**batch)``. May be None where ``fsd_weight`` is 0.
        discrepancy: ``"kl"`` of softmax outputs, ``"mse"``, ``"bernoulli"``, ``"gaussian"``
            (:mod:`apo.discrepancy`), or any ``rho(new, old) -> scalar``.
        fsd_weight: λ_FSD, >= 0: the first setting to tune. Large is cautious. None, the default, takes the
            front end's: 0.3 for :class:`apo.AdaptiveLR` (0.1 with a ``loss``), 1 for :class:`apo.APO`. 0 leaves the
            term out; without a ``loss`` the step is then held back by nothing but the batch itself, and diverges on
            most tasks.
        wsd_weight: λ_WSD, >= 0. None, the default, takes the front end's: 0.001 for :class:`apo.APO`, otherwise 0.
        loss: the training loss, ``loss(returned, targets)``. Where it is given, batches of ``inputs`` are pairs
            ``(inputs, targets)``, and the first term of Q is the loss on B′ in place of the closure's on B: θ′ has
            been fitted to B, whose loss therefore praises long steps the more, the noisier the gradient. The trial
            then costs no further run of the closure.
        forward: how to call the model, ``forward(model, batch)``, in place of the above.
        outputs: what the discrepancy compares, taken from what the model returned. By default: a tensor itself; a
            Hugging Face output's ``logits``; the first of a tuple or a mapping (all of a pair for ``"gaussian"``).
        mode: ``"eval"``: trials are evaluated with modules in eval mode; ``"train"``: as they are, with one dropout
            mask for both evaluations of B′. Eval is the better by measurement: with a shared mask the rates
            turn greedy, and with batch statistics they ran ten times too high.
        context: makes a context in which the model is called on B′, such as
            ``lambda: torch.autocast("cuda", torch.bfloat16)``.

    Raises:
        TypeError, ValueError: an argument isn't as above.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Iterable[Any] | Callable[[], Any] | None = None,
        discrepancy: str | Discrepancy = "kl",
        *,
        fsd_weight: float | None = None,
        wsd_weight: float | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        outputs: Callable[[Any], Any] | None = None,
        mode: Literal["eval", "train"] = "eval",
        context: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.model = checks.module("model", model)
        self.discrepancy = discrepancy_named(discrepancy)
        self.fsd_weight = None if fsd_weight is None else checks.number("fsd_weight", fsd_weight)
        self.wsd_weight = None if wsd_weight is None else checks.number("wsd_weight", wsd_weight)
        checks.one_of("mode", mode, ("eval", "train"))
        self.mode = mode
        for name, value in (("forward", forward), ("outputs", outputs), ("context", context), ("loss", loss)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be callable or None, but got {value!r} ({type(value).__name__})")
        if inputs is None and (self.fsd_weight != 0 or loss is not None):
            raise ValueError("inputs must be given unless fsd_weight is 0 and no loss is given, but got None")
        if isinstance(inputs, (Tensor, str, Mapping)) or not (
            inputs is None or callable(inputs) or isinstance(inputs, Iterable)
        ):
            raise TypeError(
                f"inputs must be an iterable of batches or a callable that returns one, but got {type(inputs).__name__}"
            )
        self.inputs = inputs
        self.loss = loss
        self._iterator: Iterator[Any] | None = None
        self._forward = forward or _call
        self._outputs = outputs or (_whole if takes_pairs(self.discrepancy) else _main_output)
        self._context = context or nullcontext

    @property
    def replicated(self) -> bool:
        """Whether the model is a DDP module, whose ranks must take the same meta-steps."""
        return isinstance(self.model, DistributedDataParallel)

    def draw(self) -> Any:
        """The next batch B′."""
        if self.inputs is None:
            raise ValueError("inputs must be given unless fsd_weight is 0 and no loss is given, but got None")
        if callable(self.inputs):
            return self.inputs()
        if self._iterator is None:
            self._iterator = iter(self.inputs)
        try:
            return next(self._iterator)
        except StopIteration:
            again = iter(self.inputs)
            if again is self._iterator:
                raise ValueError(
                    "inputs has run out: it is an iterator, which goes through its batches once. Give the iterable "
                    "itself (a list, a DataLoader), an endless iterator, or a callable."
                ) from None
            self._iterator = again
        try:
            return next(self._iterator)
        except StopIteration:
            raise ValueError("inputs must hold at least one batch, but got an empty iterable") from None

    def anchor(self, parameters: Sequence[Tensor]) -> Anchor | None:
        """Draw B′ and evaluate it at the present weights; None where Q has no use for it.

        Drawing may advance the random state (it would else meet the batches that training is to draw next);
        evaluating doesn't.
        """
        if self.fsd_weight == 0 and self.loss is None:
            return None
        batch = self.draw()
        if self.loss is not None and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise TypeError(
                f"inputs must be pairs (inputs, targets) where a loss is given, but got {type(batch).__name__}"
                + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
            )
        with undisturbed(self.model, parameters, train=self.mode == "train"), torch.no_grad():
            rng = random_state(parameters)
            held = {p.untyped_storage().data_ptr() for p in parameters}
            outputs = _apart(self._outputs_of(self._returned(batch)), held) if self.fsd_weight else None
            return Anchor(batch, outputs, rng)

    def gradient(
        self,
        closure: Closure,
        parameters: Sequence[Tensor],
        start: Sequence[Tensor],
        anchor: Anchor | None,
        *,
        scale: float = 1.0,
    ) -> tuple[list[Tensor], Evaluation]:
        """``V = ∇_θ′ Q`` at the present weights θ′, by ordinary backward passes, and the terms of Q.

        Args:
            closure: see :data:`Closure`. Run in mode ``mode``, unless Q has a ``loss`` of its own.
            parameters: the weights, at θ′.
            start: θ, one tensor a parameter.
            anchor: what :meth:`anchor` returned at θ.
            scale: the factor that the closure's gradients carry (a GradScaler's), taken out of V.

        Returns:
            V, one dense tensor a parameter, and the :class:`Evaluation`. Neither need be finite.
        """
        train = self.mode == "train"
        with undisturbed(self.model, parameters, train=train), torch.enable_grad():
            loss = closure() if self.loss is None else 0.0
            fsd: Tensor | float = 0.0
            if anchor is not None:
                if train:
                    restore_random_state(anchor.rng)
                returned = self._returned(anchor.batch)
                if self._weight:
                    fsd = self._discrepancy(returned, anchor)
                if self.loss is not None:
                    loss = self._fresh_loss(returned, anchor)
                    (scale * (loss + self._weight * fsd)).backward()  # type: ignore[no-untyped-call]
                else:
                    (self._weight * scale * fsd).backward()  # type: ignore[union-attr]
            V = [_dense(p.grad, p) for p in parameters]
        with torch.no_grad():
            steps = [p - s for p, s in zip(parameters, start, strict=True)]
            if scale != 1.0:
                torch._foreach_mul_(V, 1.0 / scale)
            if self.wsd_weight:
                torch._foreach_add_(V, steps, alpha=self.wsd_weight)
            squares = torch.stack([n.double() for n in torch._foreach_norm(steps)]).square().sum()
            terms = torch.stack([_scalar(loss, squares), _scalar(fsd, squares), squares])
            if self.replicated:  # all ranks must judge the trial alike
                terms = average_over_ranks(terms, self.model)
            loss_value, fsd_value, square = terms.tolist()  # the one synchronisation of a meta-step
        objective = loss_value + self._weight * fsd_value + (self.wsd_weight or 0.0) * square / 2
        return V, Evaluation(objective, loss_value, fsd_value, square / 2, square**0.5)

    @property
    def _weight(self) -> float:
        if self.fsd_weight is None:
            raise RuntimeError("fsd_weight is None: no front end has filled in its default")
        return self.fsd_weight

    def _discrepancy(self, returned: Any, anchor: Anchor) -> Tensor:
        return _one_number("discrepancy", self.discrepancy(self._outputs_of(returned), anchor.outputs))

    def _fresh_loss(self, returned: Any, anchor: Anchor) -> Tensor:
        assert self.loss is not None
        with self._context():
            loss = self.loss(returned, anchor.batch[1])
        return _one_number("loss", loss)

    def _returned(self, batch: Any) -> Any:
        with self._context():
            return self._forward(self.model, batch if self.loss is None else batch[0])

    def _outputs_of(self, returned: Any) -> Any:
        with self._context():
            return self._outputs(returned)

    def with_defaults(self, *, fsd_weight: float, wsd_weight: float = 0.0) -> ProximalObjective:
        """Itself, or, where a λ was left to the front end, a copy with these in their place."""
        if self.fsd_weight is not None and self.wsd_weight is not None:
            return self
        filled = copy.copy(self)
        filled.fsd_weight = fsd_weight if self.fsd_weight is None else self.fsd_weight
        filled.wsd_weight = wsd_weight if self.wsd_weight is None else self.wsd_weight
        return filled

    def __getstate__(self) -> dict[str, Any]:
        # A running iterator can be neither copied nor pickled: the copy begins its inputs anew.
        return {**self.__dict__, "_iterator": None}


def average_over_ranks(x: Tensor, model: nn.Module) -> Tensor:
    """The mean over the ranks of a DDP module's process group."""
    assert isinstance(model, DistributedDataParallel)
    device = next(model.parameters()).device
    x = x.to(device)
    torch.distributed.all_reduce(x, group=model.process_group)
    return x / torch.distributed.get_world_size(model.process_group)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def _whole(returned: Any) -> Any:
    return returned


def _main_output(returned: Any) -> Any:
    """What a discrepancy of tensors compares: see ``outputs`` of :class:`ProximalObjective`."""
    if isinstance(returned, Tensor):
        return returned
    logits = getattr(returned, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(returned, Mapping) and returned:
        return returned["logits"] if "logits" in returned else next(iter(returned.values()))
    if isinstance(returned, (tuple, list)) and returned:
        return returned[0]
    return returned


def _apart(outputs: Any, held: set[int]) -> Any:
    """The outputs, copied where they are views of the weights, which are about to be overwritten."""
    if isinstance(outputs, Tensor):
        return outputs.clone() if outputs.untyped_storage().data_ptr() in held else outputs
    if type(outputs) in (tuple, list):
        return type(outputs)(_apart(x, held) for x in outputs)
    return outputs


def _dense(grad: Tensor | None, p: Tensor) -> Tensor:
    if grad is None:
        return torch.zeros_like(p)
    return grad.detach().to_dense() if grad.layout != torch.strided else grad.detach()


def _scalar(value: Any, like: Tensor) -> Tensor:
    """A loss that a closure returned, as a float64 tensor on the parameters' device."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"closure must return the loss as one number, but got {_described(value)}")
        return value.detach().to(like).squeeze()
    if isinstance(value, (int, float)):
        return torch.as_tensor(value).to(like)
    raise TypeError(f"closure must return the loss, a tensor of one element or a number, but got {_described(value)}")


def _one_number(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TypeError(f"{name} must return a tensor of one element, but got {_described(value)}")
    return value.squeeze()


def _described(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
