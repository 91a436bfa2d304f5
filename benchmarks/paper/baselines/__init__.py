"""The baselines that APO is compared with: KFAC, EKFAC and Shampoo, as ``torch.optim.Optimizer`` subclasses.

All three step with ``opt.step(closure)``, resume to the bit, keep their curvature in at least float32 unless told
otherwise, refresh it at each of the first ``warmup`` steps and then at intervals, and survive a decomposition that
fails. Their momentum is ``v ← μ v + P(G)``, ``θ ← (1 − lr·λ) θ − lr·v``: the weight decay λ is decoupled.
"""

from benchmarks.common.fisher.likelihood import Bernoulli, Categorical, Gaussian, Likelihood
from benchmarks.paper.baselines.ekfac import EKFAC
from benchmarks.paper.baselines.kfac import KFAC
from benchmarks.paper.baselines.shampoo import Shampoo

__all__ = ["EKFAC", "KFAC", "Bernoulli", "Categorical", "Gaussian", "Likelihood", "Shampoo"]
