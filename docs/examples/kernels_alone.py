"""Use apo_kernels without apo: an optimizer of your own, whose A, B and S come from statistics.

    python docs/examples/kernels_alone.py

A and B are the eigenvectors of running means of GᵀG and GGᵀ; S² is one over the root of the running mean of the
squared gradient in that basis. That is the shape of SOAP's preconditioner, and the same operator
``B (S² ⊙ BᵀGA) Aᵀ`` applies it: only the statistics are written here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import apo_kernels as ak


class EigenbasisOptimizer(torch.optim.Optimizer):
    """For matrices and vectors; vectors are matrices of one row.

    Args:
        params: the parameters or param groups.
        lr: the learning rate.
        momentum: of the preconditioned gradient.
        decay: of the running means.
        every: steps between two new bases.
        damping: added to the mean of squares.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.9,
        decay: float = 0.95,
        every: int = 10,
        damping: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "decay": decay, "every": every, "damping": damping}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            gradients = [as_matrix(p.grad) for p in weights if p.grad is not None]
            states = [self._state_of(p, G) for p, G in zip(weights, gradients, strict=True)]
            for G, state in zip(gradients, states, strict=True):
                self._learn(G, state, group)
            # One call for the whole group, in place.
            ak.foreach_precondition_step_(
                [as_matrix(p) for p in weights],
                gradients,
                [state["A"] for state in states],
                [state["B"] for state in states],
                [state["S"] for state in states],
                lr=group["lr"],
                momentum=group["momentum"],
                momentum_buffers=[state["momentum"] for state in states],
            )

    def _state_of(self, p: Tensor, G: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            m, n = G.shape
            state["step"] = torch.zeros(())
            state["A"], state["B"] = ak.identity_block(n), ak.identity_block(m)
            state["right"], state["left"] = torch.zeros(n, n), torch.zeros(m, m)
            state["square"], state["S"], state["momentum"] = (torch.zeros(m, n) for _ in range(3))
        return state

    def _learn(self, G: Tensor, state: dict[str, Tensor], group: dict[str, float]) -> None:
        share = 1 - group["decay"]
        state["right"].lerp_(G.mT @ G, share)
        state["left"].lerp_(G @ G.mT, share)
        if state["step"] % group["every"] == 0:
            state["A"].copy_(torch.linalg.eigh(state["right"]).eigenvectors)
            state["B"].copy_(torch.linalg.eigh(state["left"]).eigenvectors)
        state["step"] += 1
        state["square"].lerp_((state["B"].mT @ G @ state["A"]).square(), share)
        mean = state["square"] / (1 - group["decay"] ** state["step"])
        # P holds S², which is to be 1/√mean.
        state["S"].copy_((mean + group["damping"]).pow(-0.25))


def as_matrix(tensor: Tensor) -> Tensor:
    """A view, so that what is written to it is written to the parameter."""
    return tensor.detach().view(1, -1) if tensor.ndim == 1 else tensor.detach().view(len(tensor), -1)


def main(argv: Sequence[str] | None = None) -> float:
    """Train on scikit-learn's digits, and return the last loss."""
    args = parsed(argv)
    torch.manual_seed(args.seed)
    print("backend:", ak.explain())
    x, t = map(torch.tensor, load_digits(return_X_y=True))
    x = x.float() / 16
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = EigenbasisOptimizer(model.parameters(), lr=args.lr)
    for step in range(args.steps):
        batch = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        loss = cross_entropy(model(x[batch]), t[batch])
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:3d}  loss {loss.item():.4f}")
    return loss.item()


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="An optimizer of one's own on apo_kernels.")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
