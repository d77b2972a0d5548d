"""Train a small network in plain PyTorch, keeping it safe with ckptd.

The network learns what Python's colorsys computes: hue, saturation and value of a colour. It
needs no launcher, and takes less than a minute:

    python examples/plain.py

Kill it however you like, `kill -9` for one, and start it again: it goes on where its newest
snapshot is, and says the same numbers as a run that nobody has disturbed.
"""

import colorsys
import math
import random

import torch
from torch import Tensor, nn

import ckptd

STEPS = 3000
BATCH = 256


def colours() -> tuple[Tensor, Tensor]:
    """Random colours (BATCH, 3), and what to say of each: value, saturation, hue on a circle."""
    inputs, targets = [], []
    for _ in range(BATCH):
        rgb = random.random(), random.random(), random.random()
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        angle = 2 * math.pi * hue
        inputs.append(rgb)
        targets.append((value, saturation, math.cos(angle), math.sin(angle)))
    return torch.tensor(inputs), torch.tensor(targets)


def main() -> None:
    random.seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 4)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    ckpt = ckptd.Checkpointer(
        model=model, optimizer=optimizer, extra={"schedule": schedule}, job="colours"
    )
    start = ckpt.resume()
    print(f"from step {start} to {STEPS}", flush=True)

    for step in range(start, STEPS):
        inputs, targets = colours()
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        ckpt.step(step + 1)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:4d}  loss {loss.item():.6f}", flush=True)

    ckpt.close(finished=True)


if __name__ == "__main__":
    main()
