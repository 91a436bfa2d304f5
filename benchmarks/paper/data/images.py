"""What colour images go through: scaling, and the shifts and flips of training."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.paper.data.examples import standardised

SHIFT = 4


def normalised(images: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Images ``(N, C, H, W)`` of bytes as float32, each channel with mean 0 and deviation 1 over the first ones."""
    return standardised(images.float() / 255, test.float() / 255, over=(0, 2, 3))


def shifted_and_flipped(inputs: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Each image cut out at random after padding by 4, and mirrored with probability ½ (He et al. 2016)."""
    (x,) = inputs
    N, _, H, W = x.shape
    down, right = torch.randint(2 * SHIFT + 1, (2, N), generator=generator).to(x.device)
    flip = (torch.rand(N, generator=generator) < 0.5).to(x.device)
    rows = down[:, None] + torch.arange(H, device=x.device)
    columns = torch.arange(W, device=x.device).expand(N, W)
    columns = right[:, None] + torch.where(flip[:, None], W - 1 - columns, columns)
    padded = F.pad(x, (SHIFT, SHIFT, SHIFT, SHIFT))
    every = torch.arange(N, device=x.device)[:, None, None]
    out = padded[every, :, rows[:, :, None], columns[:, None, :]]
    return (out.permute(0, 3, 1, 2).contiguous(),)
