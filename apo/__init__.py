"""Front ends of Amortized Proximal Optimization on the apo_kernels backend.

* :class:`AdaptiveLR` learns the learning rate of any ``torch.optim.Optimizer`` whose step is linear in it;
* :class:`APO` learns a structured preconditioner and the learning rate in front of it;
* :class:`FullPreconditioner` learns one full matrix, for small problems;
* :class:`ProximalObjective` is what they minimise (Eq. 8);
* :mod:`apo.proximal` holds the proximal point methods that they amortize;
* :mod:`apo.reference` is Algorithm 1 on one page, which they are tested against.
"""

from apo import proximal
from apo.adaptive_lr import AdaptiveLR
from apo.discrepancy import KL, BernoulliKL, GaussianKL, SquaredError
from apo.fisher.spectrum import Spectrum
from apo.full_preconditioner import FullPreconditioner
from apo.method import Method
from apo.objective import Evaluation, ProximalObjective
from apo.preconditioned import APO
from apo_kernels import __version__

__all__ = [
    "APO",
    "KL",
    "AdaptiveLR",
    "BernoulliKL",
    "Evaluation",
    "FullPreconditioner",
    "GaussianKL",
    "Method",
    "ProximalObjective",
    "Spectrum",
    "SquaredError",
    "__version__",
    "proximal",
]
