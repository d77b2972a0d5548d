"""Trains with a snapshot at every step, and prints by how many MiB its own memory has grown."""

from pathlib import Path

import torch
from torch import nn

import ckptd

WIDTH, LAYERS = 1024, 12  # 151 MiB with the optimizer's moments


def anonymous_mib() -> float:
    """Resident memory that is no file's: mapped slots are not in it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Ten steps without ckptd, then thirty with it."""
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    inputs = torch.randn(8, WIDTH)

    def train() -> None:
        optimizer.zero_grad()
        model(inputs).sum().backward()
        optimizer.step()

    assert ckptd.Checkpointer  # imports what it needs of torch
    for _ in range(10):
        train()
    before = anonymous_mib()
    with ckptd.Checkpointer(model=model, optimizer=optimizer) as ckpt:
        ckpt.resume()
        for step in range(30):
            train()
            ckpt.step(step + 1)
        print(anonymous_mib() - before, ckpt.stats.captures)


if __name__ == "__main__":
    main()
