"""Solve −u″ = f on [0, 1] with u(0) = u(1) = 0 by a network: a physics-informed regression.

    python docs/examples/pinn.py --optimizer apo
    python docs/examples/pinn.py --optimizer adamw

The loss holds second derivatives of the network, so its curvature is bad and first-order optimizers are slow. The
function-space term compares u itself before and after the step, in squared error.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import apo

FREQUENCY = 2 * math.pi


def main(argv: Sequence[str] | None = None) -> float:
    """Train, and return the relative error of u in percent."""
    args = parsed(argv)
    torch.manual_seed(args.seed)
    model = nn.Sequential(
        nn.Linear(1, args.width), nn.Tanh(), nn.Linear(args.width, args.width), nn.Tanh(), nn.Linear(args.width, 1)
    )
    if args.optimizer == "apo":
        objective = apo.ProximalObjective(model, inputs=lambda: torch.rand(args.points, 1), discrepancy="mse")
        optimizer: torch.optim.Optimizer = apo.APO(model, objective, interval=args.interval)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    for step in range(args.steps):
        closure = closure_on(torch.rand(args.points, 1), model, optimizer)
        loss = optimizer.step(closure)
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3e}  error {error(model):.2f}%")
    return error(model)


def closure_on(x: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    """APO runs it once more at the trial weights, on the same points."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = residual(model, x).square().mean()
        loss.backward()
        return loss

    return closure


def solution(x: Tensor, model: nn.Module) -> Tensor:
    """u, with the boundary condition built in."""
    u: Tensor = x * (1 - x) * model(x)
    return u


def residual(model: nn.Module, x: Tensor) -> Tensor:
    """``−u″ − f`` for the f whose solution is ``sin(FREQUENCY · x)``, over FREQUENCY squared."""
    x = x.requires_grad_()
    u = solution(x, model)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return -curvature / FREQUENCY**2 - torch.sin(FREQUENCY * x)


@torch.no_grad()
def error(model: nn.Module) -> float:
    x = torch.linspace(0, 1, 501).unsqueeze(-1)
    exact = torch.sin(FREQUENCY * x)
    return 100 * float((solution(x, model) - exact).norm() / exact.norm())


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Solve a Poisson equation by a network.")
    parser.add_argument("--optimizer", choices=["apo", "adamw"], default="apo")
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW's (default: 3e-3)")
    parser.add_argument("--interval", type=int, default=1, help="steps between two meta-updates (default: 1)")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--points", type=int, default=128)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
