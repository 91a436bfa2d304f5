"""Broken on purpose: for each way to get the algorithm wrong, a named test that fails.

A breakage is patched in, and the test it names is run: it has to fail then (the suite itself shows that it passes
otherwise). End-to-end runs don't do: several of these train as well as the right thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apo
import apo_kernels as ak
from apo import front_end, learning_rate, linearity, lookahead, objective, optimizer, preconditioner
from tests.apo import test_adaptive_lr, test_lookahead, test_meta_gradient
from tests.apo.helpers import mlp

Patch = pytest.MonkeyPatch


def fsd_dropped(patch: Patch) -> None:
    patch.setattr(objective.ProximalObjective, "anchor", lambda self, parameters: None)


def wsd_dropped(patch: Patch) -> None:
    gradient = objective.ProximalObjective.gradient

    def without(self: apo.ProximalObjective, *args: Any, **kwargs: Any) -> Any:
        weight, self.wsd_weight = self.wsd_weight, 0.0
        try:
            return gradient(self, *args, **kwargs)
        finally:
            self.wsd_weight = weight

    patch.setattr(objective.ProximalObjective, "gradient", without)


def derivatives_changed(change: Callable[..., tuple[Tensor, ...]]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        true = ak.foreach_precondition_vjp

        def vjp(
            Gs: Any, As: Any, Bs: Any, Ss: Any, Vs: Any, *, kept: Any, wanted: str, relative: bool
        ) -> list[tuple[Tensor, ...]]:
            if wanted != "ABS":
                return true(Gs, As, Bs, Ss, Vs, kept=kept, wanted=wanted, relative=relative)
            found = true(Gs, As, Bs, Ss, Vs, kept=kept, wanted=wanted)
            changed = [change(*operands) for operands in zip(Gs, As, Bs, Ss, Vs, found, strict=True)]
            if not relative:
                return changed
            return [(A.mT @ dA, B.mT @ dB, dS) for A, B, (dA, dB, dS) in zip(As, Bs, changed, strict=True)]

        patch.setattr(preconditioner.ak, "foreach_precondition_vjp", vjp)

    return apply


def half_of_dA(G: Tensor, A: Tensor, B: Tensor, S: Tensor, V: Tensor, d: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return V.mT @ B @ (S**2 * (B.mT @ G @ A)), *d[1:]


def half_of_dB(G: Tensor, A: Tensor, B: Tensor, S: Tensor, V: Tensor, d: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return d[0], V @ A @ (S**2 * (B.mT @ G @ A)).mT, d[2]


def half_of_dS(*operands: Any) -> tuple[Tensor, ...]:
    *_, (dA, dB, dS) = operands
    return dA, dB, dS / 2


def signs_turned(*operands: Any) -> tuple[Tensor, ...]:
    return tuple(-d for d in operands[-1])


def undisturbed_but(**changes: Any) -> Callable[[Patch], None]:
    """``undisturbed`` that leaves something as the trial had it, or is told to keep train mode."""

    def apply(patch: Patch) -> None:
        @contextmanager
        def broken(model: nn.Module, parameters: Sequence[Tensor], *, train: bool = False) -> Iterator[None]:
            left: dict[Tensor, Tensor] = {}
            rng = None
            with lookahead.undisturbed(model, parameters, train=train or "train" in changes):
                yield
                if "buffers" in changes:
                    left = {b: b.clone() for b in model.buffers()}
                if "rng" in changes:
                    rng = torch.get_rng_state()
                if "grads" in changes:
                    left = {p: p.grad for p in parameters if p.grad is not None}
            if rng is not None:
                torch.set_rng_state(rng)
            for tensor, content in left.items():
                if "grads" in changes:
                    tensor.grad = content
                else:
                    tensor.copy_(content)
            if "flags" in changes:
                model.eval()

        patch.setattr(objective, "undisturbed", broken)

    return apply


def the_same_batch_twice(patch: Patch) -> None:
    patch.setattr(objective.ProximalObjective, "draw", lambda self: mlp()[1])


def weights_not_restored(patch: Patch) -> None:
    patch.setattr(lookahead.Lookahead, "restore", lambda self: None)


def optimizer_state_not_restored(patch: Patch) -> None:
    class Leaving(linearity.OptimizerState):
        def restore(self) -> None:
            pass

    patch.setattr(learning_rate, "OptimizerState", Leaving)


def momentum_outside_the_lookahead(patch: Patch) -> None:
    def velocities(self: apo.APO, layers: Any, directions: Any) -> list[Tensor]:
        return [d * self._group(layer)["lr"] for layer, d in zip(layers, directions, strict=True)]

    patch.setattr(optimizer.APO, "_velocities", velocities)


def failed_trials_learned_from(patch: Patch) -> None:
    evaluate = front_end.FrontEnd._evaluate
    patch.setattr(front_end.FrontEnd, "_evaluate", lambda self, *args: (evaluate(self, *args)[0], True))


def rate_ascends(patch: Patch) -> None:
    true = learning_rate.slopes
    patch.setattr(learning_rate, "slopes", lambda *args: [-x for x in true(*args)])


def one_mask_each(patch: Patch) -> None:
    patch.setattr(objective, "restore_random_state", lambda state: None)


def blocks_test(patch: Patch) -> None:
    test_meta_gradient.test_blocks_equal_finite_differences("mlp", None, True, "relative", patch)


def terms_test(patch: Patch) -> None:
    test_lookahead.test_loss_at_the_lookahead_is_taken_on_the_same_batch_and_fsd_on_another()


def unrolled_test(patch: Patch) -> None:
    for settings in (("whole", "relative"), ("step", "adam")):
        test_meta_gradient.test_blocks_equal_autograd_through_an_unrolled_step("mlp", None, *settings, patch)


def rate_test(patch: Patch) -> None:
    test_meta_gradient.test_log_rate_equals_finite_differences_and_autograd("momentum", patch)


def traces_test(patch: Patch) -> None:
    test_lookahead.test_a_trial_leaves_buffers_random_state_gradients_and_flags("APO", "train")


def eval_test(patch: Patch) -> None:
    test_lookahead.test_trials_are_evaluated_in_eval_mode_unless_asked_otherwise("AdaptiveLR")


def batch_norm_test(patch: Patch) -> None:
    test_lookahead.test_a_non_finite_trial_leaves_batch_norms_statistics_finite("AdaptiveLR")


def exception_test(patch: Patch) -> None:
    test_lookahead.test_an_exception_in_a_trial_undoes_everything("AdaptiveLR", KeyboardInterrupt, 2)


def caution_test(patch: Patch) -> None:
    test_adaptive_lr.test_larger_fsd_weight_is_more_cautious()


def failure_test(patch: Patch) -> None:
    test_adaptive_lr.test_failed_trials_shrink_the_rate_until_steps_are_taken_again()


def mask_test(patch: Patch) -> None:
    test_lookahead.test_train_mode_gives_both_evaluations_of_the_batch_one_dropout_mask()


BROKEN: dict[str, tuple[Callable[[Patch], None], Callable[[Patch], None]]] = {
    "FSD dropped": (fsd_dropped, unrolled_test),
    "FSD dropped, as it shows in training": (fsd_dropped, caution_test),
    "WSD dropped": (wsd_dropped, unrolled_test),
    "the second term of dA dropped": (derivatives_changed(half_of_dA), blocks_test),
    "the second term of dB dropped": (derivatives_changed(half_of_dB), blocks_test),
    "the 2 of dS dropped": (derivatives_changed(half_of_dS), blocks_test),
    "the blocks ascend": (derivatives_changed(signs_turned), blocks_test),
    "the rate ascends": (rate_ascends, rate_test),
    "momentum outside the lookahead": (momentum_outside_the_lookahead, unrolled_test),
    "buffers not restored": (undisturbed_but(buffers=True), traces_test),
    "random state not restored": (undisturbed_but(rng=True), traces_test),
    "gradients not restored": (undisturbed_but(grads=True), traces_test),
    "flags not restored": (undisturbed_but(flags=True), traces_test),
    "trials left in train mode": (undisturbed_but(train=True), eval_test),
    "B and B' the same batch": (the_same_batch_twice, terms_test),
    "a non-finite trial let into BatchNorm's statistics": (undisturbed_but(buffers=True), batch_norm_test),
    "a failed trial learned from": (failed_trials_learned_from, failure_test),
    "weights not restored": (weights_not_restored, exception_test),
    "the optimizer's state not restored": (optimizer_state_not_restored, exception_test),
    "a dropout mask for each evaluation of B'": (one_mask_each, mask_test),
}
"""What is broken, how, and the test that sees it."""


@pytest.mark.parametrize("name", BROKEN)
def test_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, named_test = BROKEN[name]
    with monkeypatch.context() as patch:
        break_it(patch)
        with pytest.raises(AssertionError):
            named_test(patch)


def test_the_named_tests_pass_unbroken(monkeypatch: pytest.MonkeyPatch) -> None:
    for named_test in {test for _, test in BROKEN.values()}:
        with monkeypatch.context() as patch:
            named_test(patch)
