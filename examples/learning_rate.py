"""Digits from a rate that is 300 times too small: Adam finds its own."""

import torch
from sklearn.datasets import load_digits
from torch.nn import Linear, ReLU, Sequential
from torch.nn.functional import cross_entropy

import apo

x, t = map(torch.tensor, load_digits(return_X_y=True))
x = x.float() / 16

model = Sequential(Linear(64, 256), ReLU(), Linear(256, 256), ReLU(), Linear(256, 10))
objective = apo.ProximalObjective(model, inputs=lambda: x[torch.randint(len(x), (128,))], discrepancy="kl")
opt = apo.AdaptiveLR(torch.optim.AdamW(model.parameters(), lr=1e-5), objective)
for step in range(401):
    b = torch.randint(len(x), (128,))
    def closure():
        opt.zero_grad(); loss = cross_entropy(model(x[b]), t[b]); loss.backward(); return loss
    loss = opt.step(closure)
    if step % 50 == 0: print(f"step {step}  loss {loss:.4f}  learned rate {opt.param_groups[0]['lr']:.1e}")
