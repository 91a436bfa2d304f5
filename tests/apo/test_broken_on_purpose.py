"""Broken on purpose: for each way to get the algorithm wrong, a named test that fails.

A breakage is patched in, and the test it names is run: it has to fail then (the suite itself shows that it passes
otherwise). End-to-end runs don't do: several of these train as well as the right thing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import apo_kernels as ak
from apo import adaptive_lr, meta_learner, objective, preconditioned, trial
from apo.layers import arena
from apo.wrapped import snapshot
from tests.apo import test_adaptive_lr, test_first_trials, test_meta_gradient, test_noise_factor, test_trial
from tests.apo.helpers import mlp

Patch = pytest.MonkeyPatch


def fsd_dropped(patch: Patch) -> None:
    terms = objective.ProximalObjective.terms
    patch.setattr(objective.ProximalObjective, "terms", lambda self, anchor: (terms(self, anchor)[0], None))


def wsd_dropped(patch: Patch) -> None:
    evaluate = meta_learner.MetaLearner._evaluate

    def without(self: Any, *args: Any) -> Any:
        weight, self.objective.wsd_weight = self.objective.wsd_weight, 0.0
        try:
            return evaluate(self, *args)
        finally:
            self.objective.wsd_weight = weight

    patch.setattr(meta_learner.MetaLearner, "_evaluate", without)


def slopes_times(**factors: float) -> Callable[[Patch], None]:
    """The slopes of A, B and S, each times a number."""

    def apply(patch: Patch) -> None:
        true = ak.ModelPreconditioner.slopes

        def slopes(*args: Any, **kwargs: Any) -> ak.ModelSlopes:
            found = true(*args, **kwargs)
            for name, factor in factors.items():
                for x in getattr(found, name):
                    x.mul_(factor)
            return found

        patch.setattr(ak.ModelPreconditioner, "slopes", slopes)

    return apply


def undisturbed_but(**changes: Any) -> Callable[[Patch], None]:
    """``Undisturbed`` that leaves something as the trial had it, or is told to keep train mode."""

    class Broken(trial.Undisturbed):
        def __init__(self, models: Any, tensors: Any, *, train: bool = False, **others: Any) -> None:
            super().__init__(models, tensors, train=train or "train" in changes, **others)

        def _restore(self) -> None:
            left = {}
            if "buffers" in changes:
                left = {b: b.clone() for model in self._models for b in model.buffers()}
            grads = {tensor: tensor.grad for tensor, *_ in self._grads.values()}
            rng = torch.get_rng_state()
            super()._restore()
            for tensor, content in left.items():
                tensor.copy_(content)
            if "grads" in changes:
                for tensor, grad in grads.items():
                    tensor.grad = grad
            if "rng" in changes:
                torch.set_rng_state(rng)
            if "flags" in changes:
                for model in self._models:
                    model.eval()

    return lambda patch: patch.setattr(meta_learner, "Undisturbed", Broken)


def the_same_batch_twice(patch: Patch) -> None:
    patch.setattr(objective.ProximalObjective, "draw", lambda self: mlp()[1])


def weights_not_restored(patch: Patch) -> None:
    patch.setattr(trial.Lookahead, "__exit__", lambda self, *_: None)


def optimizer_state_not_restored(patch: Patch) -> None:
    class Leaving(snapshot.OptimizerSnapshot):
        def restore(self) -> None:
            pass

    patch.setattr(snapshot, "OptimizerSnapshot", Leaving)


def momentum_outside_the_lookahead(patch: Patch) -> None:
    patch.setattr(preconditioned, "carried_in", lambda group: 1.0)


def failed_trials_learned_from(patch: Patch) -> None:
    patch.setattr(meta_learner.MetaLearner, "_verdict", lambda self, trial: True)
    first_trials_may_overshoot(patch)


def first_trials_may_overshoot(patch: Patch) -> None:
    patch.setattr(meta_learner.MetaLearner, "_too_far", lambda self, trial: False)


def first_trials_test(patch: Patch) -> None:
    test_first_trials.test_the_rate_falls_until_a_trial_ends_before_the_minimum("AdaptiveLR", 1)


def rate_ascends(patch: Patch) -> None:
    true = adaptive_lr.AdaptiveLR._products
    patch.setattr(adaptive_lr.AdaptiveLR, "_products", lambda *args: [[-x for x in own] for own in true(*args)])


def one_mask_each(patch: Patch) -> None:
    patch.setattr(objective, "restore_random_state", lambda state: None)


def no_way_back(patch: Patch) -> None:
    patch.setattr(arena.Arena, "step_back", lambda self, Gs: None)


def other_random_numbers_at_a_look(patch: Patch) -> None:
    patch.setattr(meta_learner, "restore_random_state", lambda state: None)


def look_test(patch: Patch) -> None:
    test_noise_factor.test_what_is_compared_is_the_slope_before_the_last_step_and_after(0, patch)


def look_mask_test(patch: Patch) -> None:
    test_noise_factor.test_a_look_repeats_the_batch_in_train_mode_with_the_same_random_numbers()


def blocks_test(patch: Patch) -> None:
    test_meta_gradient.test_blocks_equal_finite_differences("mlp", None, True, "relative", patch)


def terms_test(patch: Patch) -> None:
    test_trial.test_loss_at_the_lookahead_is_taken_on_the_same_batch_and_fsd_on_another()


def unrolled_test(patch: Patch) -> None:
    for settings in (("whole", "relative"), ("step", "adam")):
        test_meta_gradient.test_blocks_equal_autograd_through_an_unrolled_step("mlp", None, *settings, patch)


def rate_test(patch: Patch) -> None:
    test_meta_gradient.test_log_rate_equals_finite_differences_and_autograd("momentum", patch)


def traces_test(patch: Patch) -> None:
    test_trial.test_a_trial_leaves_buffers_random_state_gradients_and_flags("APO", "train")


def eval_test(patch: Patch) -> None:
    test_trial.test_trials_are_evaluated_in_eval_mode_unless_asked_otherwise("AdaptiveLR")


def batch_norm_test(patch: Patch) -> None:
    test_trial.test_a_non_finite_trial_leaves_batch_norms_statistics_finite("AdaptiveLR")


def exception_test(patch: Patch) -> None:
    test_trial.test_an_exception_in_a_trial_undoes_everything("AdaptiveLR", KeyboardInterrupt, 2)


def caution_test(patch: Patch) -> None:
    test_adaptive_lr.test_larger_fsd_weight_is_more_cautious()


def failure_test(patch: Patch) -> None:
    test_adaptive_lr.test_failed_trials_shrink_the_rate_until_steps_are_taken_again()


def mask_test(patch: Patch) -> None:
    test_trial.test_train_mode_gives_both_evaluations_of_the_batch_one_dropout_mask()


BROKEN: dict[str, tuple[Callable[[Patch], None], Callable[[Patch], None]]] = {
    "FSD dropped": (fsd_dropped, unrolled_test),
    "FSD dropped, as it shows in training": (fsd_dropped, caution_test),
    "WSD dropped": (wsd_dropped, unrolled_test),
    "a term of dA dropped": (slopes_times(A=0.5), blocks_test),
    "a term of dB dropped": (slopes_times(B=0.5), blocks_test),
    "the 2 of dS dropped": (slopes_times(S=0.5), blocks_test),
    "the blocks ascend": (slopes_times(A=-1.0, B=-1.0, S=-1.0), blocks_test),
    "the rate ascends": (rate_ascends, rate_test),
    "no way back to the weights before the last step": (no_way_back, look_test),
    "other random numbers at a look": (other_random_numbers_at_a_look, look_mask_test),
    "momentum outside the lookahead": (momentum_outside_the_lookahead, unrolled_test),
    "buffers not restored": (undisturbed_but(buffers=True), traces_test),
    "random state not restored": (undisturbed_but(rng=True), traces_test),
    "gradients not restored": (undisturbed_but(grads=True), traces_test),
    "flags not restored": (undisturbed_but(flags=True), traces_test),
    "trials left in train mode": (undisturbed_but(train=True), eval_test),
    "B and B' the same batch": (the_same_batch_twice, terms_test),
    "a non-finite trial let into BatchNorm's statistics": (undisturbed_but(buffers=True), batch_norm_test),
    "a failed trial learned from": (failed_trials_learned_from, failure_test),
    "a first trial that overshoots": (first_trials_may_overshoot, first_trials_test),
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
