"""What the outputs of a model mean, and targets drawn from them.

KFAC's Fisher matrix is the second moment of the gradients of ``−log p(y|x)`` at targets ``y`` that the model itself
draws (Martens & Grosse 2015, section 2). Only the gradient by the outputs is needed, so a draw returns just that.
"""

import torch
from torch import Tensor

from benchmarks.common.fisher.damping import wide


class Likelihood:
    """``p(y|z)`` of outputs ``z``."""

    def terms(self, outputs: Tensor) -> int:
        """How many terms ``−log p`` the loss of these outputs is the mean of: one per example."""
        return len(outputs)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """``−∂ Σ log p(y|z) / ∂z`` with ``y ~ p(·|z)``, in the shape of the outputs; float32 or wider."""
        raise NotImplementedError


class Categorical(Likelihood):
    """Logits ``(*, C)``: one term per entry of the leading dimensions, as in ``F.cross_entropy`` of ``(N, C)``.

    A draw's gradient is ``softmax(z) − onehot(y)``.
    """

    def terms(self, outputs: Tensor) -> int:
        return outputs.numel() // outputs.shape[-1]

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        p = wide(outputs.detach()).softmax(-1).flatten(0, -2)
        y = torch.multinomial(p, 1, generator=generator)
        return p.scatter_add(1, y, p.new_full((), -1).expand(y.shape)).reshape(outputs.shape)


class Gaussian(Likelihood):
    """Means ``(N, *)`` of unit variance: ``½ ‖z − y‖²``, summed over outputs. A draw's gradient is standard normal."""

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        z = wide(outputs.detach())
        return torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)


class Bernoulli(Likelihood):
    """Logits ``(N, *)``: binary cross-entropies, summed over outputs. A draw's gradient is ``σ(z) − y``."""

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        p = wide(outputs.detach()).sigmoid()
        return p - torch.bernoulli(p, generator=generator)


NAMED = {"categorical": Categorical(), "gaussian": Gaussian(), "bernoulli": Bernoulli()}
