"""The proximal meta-objective (Eq. 8) at trial weights, and its gradient with respect to them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from apo import checks
from apo.discrepancy import KL, Discrepancy, discrepancy_named, takes_pairs
from apo.inputs.batches import moved, only_device, own_loader
from apo.inputs.padding import CountedPositions, Mask, kept_positions, select
from apo.ranks.sharding import local
from apo.trial import modules_of, parameters_of, random_state, restore_random_state, without_autocast

__all__ = ["Anchor", "Closure", "Evaluation", "ProximalObjective", "check_objective", "check_trained"]

IN_EVAL_MODE = (
    "This was raised in a trial, for which modules are in eval mode. If the model returns something else then than in "
    "train mode, give the ProximalObjective mode='train'."
)

Closure = Callable[[], Any]
"""Clears the gradients, runs forward and backward on the batch B, returns the loss."""


class Anchor(NamedTuple):
    """The batch B′, and what the model gave on it at θ.

    Attributes:
        batch: what ``inputs`` gave.
        outputs: what the discrepancy compares, detached; None where λ_FSD is 0.
        kept: the positions of the outputs that count; None: all.
        loss: the objective's own loss on B′ at θ; None where it has none.
        rng: the random state that both evaluations of B′ start from.
    """

    batch: Any
    outputs: Any
    kept: CountedPositions | None
    loss: Tensor | None
    rng: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """The terms of Eq. 8 at one trial, ``objective = loss + λ_FSD · fsd + λ_WSD · wsd``.

    ``wsd`` is ``½ ‖θ′ − θ‖²``, ``step_norm`` is ``‖θ′ − θ‖``, ``base`` is the loss at θ that the trial is judged by.
    """

    objective: float
    loss: float
    fsd: float
    wsd: float
    step_norm: float
    base: float


class ProximalObjective:
    """``Q = J_B(θ′) + λ_FSD · D_F(θ′, θ; B′) + λ_WSD/2 · ‖θ′ − θ‖²`` (Eq. 8).

    The loss comes from the closure that is given to ``step``, or from ``loss``; this holds the other two terms.

    Args:
        model: called on B′. Of a DistributedDataParallel module the inner one is called; V is averaged over the ranks.
        inputs: B′, batches of the model's inputs: an iterable, gone through again when it ends, or a callable that
            returns a batch. They should not be the batch that is trained on: the term is to measure what the step
            does to *other* examples. A tensor is called as ``model(batch)``, a tuple or list as
            ``model(*batch)``, a mapping as ``model(**batch)``, on the model's device. May be None where
            ``fsd_weight`` is 0.
        discrepancy: ``"kl"`` of softmax outputs, ``"mse"``, ``"bernoulli"``, ``"gaussian"``
            (:mod:`apo.discrepancy`), or any ``rho(new, old) -> scalar``.
        fsd_weight: λ_FSD, >= 0: the first setting to tune. Large is cautious. None, the default, takes the
            front end's: 0.3 for :class:`apo.AdaptiveLR` (0.1 with a ``loss``), 1 for :class:`apo.APO`. 0 leaves the
            term out. Without a ``loss`` only the batch itself then limits the step, and training diverges on most
            tasks.
        wsd_weight: λ_WSD, >= 0. None, the default, takes the front end's: 1e-4 for :class:`apo.APO`, otherwise 0.
        loss: the training loss, ``loss(returned, targets)``. Where it is given, batches of ``inputs`` are pairs
            ``(inputs, targets)``, or mappings, of which the loss then gets the whole
            (``lambda returned, batch: returned.loss``). The first term of Q is then the loss on B′, not the closure's
            on B. θ′ was fitted to B, so the loss on B favours long steps, the more so the noisier the gradient. The
            trial then needs no closure.
        forward: how to call the model, ``forward(model, batch)``, in place of the above.
        outputs: what the discrepancy compares, taken from what the model returned. By default: a tensor itself; a
            Hugging Face output's ``logits``; the first tensor of a tuple, mapping or dataclass that isn't a loss (all
            of a pair for ``"gaussian"``).
        mask: which positions the discrepancy averages over, so that it doesn't depend on how far a batch is padded:
            ``mask(batch) -> bool tensor`` over the outputs' leading dimensions; or an int, the target of positions
            that don't count (an ``ignore_index``). None finds padding by itself: a mapping's ``attention_mask``, or
            the tokens that the model's embeddings have as ``padding_idx``, or targets (a mapping's ``labels``) of
            -100. Positions that count are then what the discrepancy takes for examples. False: every position counts.
        mode: ``"eval"``: trials are evaluated with modules in eval mode; ``"train"``: as they are, with one dropout
            mask for both evaluations of B′. Eval measured better: a shared mask makes the rates too high, and batch
            statistics made them ten times too high.
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
        mask: Mask = None,
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
        if context is not None and hasattr(context, "__enter__") and not isinstance(context, type):
            raise TypeError(
                f"context must be callable and makes a context, but got a context itself, {type(context).__name__}: "
                "put a lambda: before it"
            )
        if mask is True or not (mask is None or callable(mask) or isinstance(mask, int)):
            raise TypeError(f"mask must be a callable, an int, None or False, but got {mask!r} ({type(mask).__name__})")
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
        self.mask = mask
        self._source: Iterable[Any] = ()
        self._iterator: Iterator[Any] | None = None
        self._forward = forward or _call
        self._outputs = outputs or (_whole if takes_pairs(self.discrepancy) else _main_output)
        self._context = context or nullcontext

    @property
    def module(self) -> nn.Module:
        """The model that is called on B′."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def needs_inputs(self) -> bool:
        """Whether Q has a term on B′."""
        return self.fsd_weight != 0 or self.loss is not None

    def draw(self) -> Any:
        """The next batch B′."""
        if self.inputs is None:
            raise ValueError("inputs must be given unless fsd_weight is 0 and no loss is given, but got None")
        if callable(self.inputs):
            return self.inputs()
        begun = self._iterator is not None
        if self._iterator is None:
            self._source = own_loader(self.inputs)
            self._iterator = iter(self._source)
        try:
            return next(self._iterator)
        except StopIteration:
            if not begun:
                raise ValueError("inputs must hold at least one batch, but got an empty iterable") from None
        self._iterator = iter(self._source)
        try:
            return next(self._iterator)
        except StopIteration:
            raise ValueError(
                "inputs has run out: it is an iterator, which goes through its batches once. Give the iterable "
                "itself (a list, a DataLoader), an endless iterator, or a callable."
            ) from None

    def checked_draw(self) -> Any:
        """The next batch B′, on the model's device; with targets, where there is a ``loss``.

        Drawing may advance the random state: it would otherwise meet the batches that training draws next.
        """
        batch = self.draw()
        if isinstance(batch, Iterator):
            raise TypeError(
                f"inputs must give batches, but gave an iterator of them, a {type(batch).__name__}: call the function "
                "that makes it, and give what it returns"
            )
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if self.loss is not None and not pair and not isinstance(batch, Mapping):
            raise TypeError(
                "inputs must be pairs (inputs, targets), or mappings, where a loss is given, "
                f"but got {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
            )
        device = only_device(self.module)
        return batch if device is None else moved(batch, device)

    def anchor(self, batch: Any, look: Callable[[Any], None] = lambda _: None) -> Anchor:
        """Evaluate B′ at the present weights, with gradients enabled as at the trial: some modules compute otherwise
        without them. ``look`` sees what the discrepancy compares, with its graph."""
        rng = random_state(parameters_of(modules_of([self.module])))
        returned = self._returned(batch)
        outputs, kept = None, None
        if self._weight:
            outputs = self._compared(returned)
            kept = kept_positions(self.mask, self.module, batch, self._targets(batch), outputs)
            outputs = outputs if kept is None else select(outputs, kept)
            look(outputs)
            outputs = _apart(outputs, self._overwritten)
        loss = None if self.loss is None else self._own_loss(returned, batch).detach()
        return Anchor(batch, outputs, kept, loss, rng)

    def terms(self, anchor: Anchor) -> tuple[Tensor | None, Tensor | None]:
        """At trial weights: the objective's own loss on B′, and the discrepancy; None where Q has no such term."""
        restore_random_state(anchor.rng)
        returned = self._returned(anchor.batch)
        loss = None if self.loss is None else self._own_loss(returned, anchor.batch)
        if not self._weight or (anchor.kept is not None and anchor.kept.none):
            return loss, None
        new = self._compared(returned)
        if anchor.kept is not None:
            new = select(new, anchor.kept)
        with without_autocast(new):
            return loss, _one_number("discrepancy", self._rho(new, anchor.outputs))

    def fisher_sample(self, outputs: Any, generator: torch.Generator) -> list[Tensor] | None:
        """The discrepancy's :data:`~apo.discrepancy.FisherSample`, one cotangent per tensor of the outputs that
        ``look`` of :meth:`anchor` saw; None where it has none."""
        sample = getattr(self._rho, "fisher_sample", None)
        return None if sample is None else list(sample(outputs, generator))

    @property
    def _rho(self) -> Discrepancy:
        return KL() if self._classes_moved else self.discrepancy

    def _overwritten(self, output: Tensor) -> bool:
        """Whether evaluating the trial writes over an output: a view of the weights, or in a CUDA graph's memory."""
        modules = modules_of([self.module])
        if output.is_cuda and any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in modules):
            return True
        if output.grad_fn is not None and not output._is_view():  # it was computed
            return False
        output = local(output)
        if is_traceable_wrapper_subclass(output):  # a collective's result, as of a row parallel layer
            return True
        address = output.untyped_storage().data_ptr()
        return any(local(p).untyped_storage().data_ptr() == address for p in parameters_of(modules))

    @property
    def _weight(self) -> float:
        if self.fsd_weight is None:
            raise RuntimeError("fsd_weight is None: no front end has filled in its default")
        return self.fsd_weight

    @property
    def _classes_moved(self) -> bool:
        return isinstance(self.discrepancy, KL) and self.discrepancy.dim != -1

    def _compared(self, returned: Any) -> Any:
        """What the discrepancy compares; classes last, so that positions lead."""
        with self._context():
            outputs = self._outputs(returned)
        if isinstance(self.discrepancy, KL) and self._classes_moved and isinstance(outputs, Tensor):
            return outputs.movedim(self.discrepancy.dim, -1)
        return outputs

    def _returned(self, batch: Any) -> Any:
        pair = self.loss is not None and not isinstance(batch, Mapping)
        with self._context(), self.explained():
            return self._forward(self.module, batch[0] if pair else batch)

    def _targets(self, batch: Any) -> Any:
        if self.loss is None:
            return None
        return batch if isinstance(batch, Mapping) else batch[1]

    def _own_loss(self, returned: Any, batch: Any) -> Tensor:
        assert self.loss is not None
        with self._context(), self.explained():
            loss = self.loss(returned, self._targets(batch))
        return _one_number("loss", loss)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """An error of the user's own code in here is said to come from a trial, where modules are in eval mode."""
        try:
            yield
        except Exception as error:
            if self.mode == "eval" and hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(IN_EVAL_MODE)
            raise

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
        return {**self.__dict__, "_iterator": None, "_source": ()}


def check_objective(value: object) -> None:
    """Refuse what isn't an objective, with a TypeError."""
    if not isinstance(value, ProximalObjective):
        raise TypeError(f"objective must be an apo.ProximalObjective, but got {type(value).__name__}")


def check_trained(objective: ProximalObjective, trained: Iterable[Tensor]) -> None:
    """Refuse an objective that no step can change: its model has parameters, and none of them is trained.

    A ``forward`` of the user's may call any other model.

    Raises:
        ValueError: so it is.
    """
    own = list(parameters_of(modules_of([objective.module])))
    if not objective.needs_inputs or objective._forward is not _call or not own:
        return
    trained = list(trained)
    if {id(p) for p in own}.isdisjoint(map(id, trained)) and _memory(own).isdisjoint(_memory(trained)):
        raise ValueError(
            "objective must be of the model that the optimizer trains, but its model, a "
            f"{type(objective.module).__name__}, shares no parameter with the optimizer's param groups"
        )


def _memory(parameters: Iterable[Tensor]) -> set[int]:
    """Where they lie: of flattened weights, parameters are views."""
    return {local(p).untyped_storage().data_ptr() for p in parameters} - {0}


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
    logits = getattr(returned, "logits", None)
    if isinstance(returned, Tensor) or isinstance(logits, Tensor):
        return returned if isinstance(returned, Tensor) else logits
    if isinstance(returned, Mapping):
        if "logits" in returned:
            return returned["logits"]
        parts = list(returned.values())
    elif isinstance(returned, (tuple, list)):
        parts = list(returned)
    elif dataclasses.is_dataclass(returned):
        parts = [getattr(returned, field.name) for field in dataclasses.fields(returned)]
    else:
        return returned
    # (loss, logits): a loss has no dimensions, or one of length 1
    tensors = [x for x in parts if isinstance(x, Tensor)]
    shaped = [x for x in tensors if x.ndim > 0 and x.is_floating_point()]  # not the classes that it predicts
    larger = [x for x in shaped if x.shape != (1,)]
    return next(iter(larger or shaped or parts), returned)


def _apart(outputs: Any, overwritten: Callable[[Tensor], bool]) -> Any:
    """The outputs without their graph, copied where they are about to be overwritten."""

    def own(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.detach().clone() if overwritten(x) else x.detach()
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return dataclasses.replace(
                x, **{f.name: _apart(getattr(x, f.name), overwritten) for f in dataclasses.fields(x)}
            )
        return x

    return tree_map(own, outputs)


def _one_number(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TypeError(f"{name} must return a tensor of one element, but got {_described(value)}")
    return value.squeeze()


def _described(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
