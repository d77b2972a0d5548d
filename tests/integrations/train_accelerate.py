"""A small network, trained with accelerate."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diary import end_of_step, numbers, parse_args, say
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckptd.integrations.accelerate import checkpointer

EPOCHS = 3


def main():
    args = parse_args(accumulate=1, seedable=0, generator=0, workers=0)
    torch.set_num_threads(1)
    set_seed(3)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.accumulate)
    accelerator.dataloader_config.use_seedable_sampler = bool(args.seedable)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
    loader = DataLoader(
        TensorDataset(numbers(52, 8, seed=0)),
        batch_size=5,
        shuffle=True,
        generator=torch.Generator().manual_seed(4) if args.generator else None,
        num_workers=args.workers,
    )
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    step, first, batches, ckpt = 0, 0, lambda: loader, None
    if not args.plain:
        ckpt = checkpointer(accelerator, model, optimizer, scheduler=scheduler, dataloader=loader)
        step, batches = ckpt.resume(), ckpt.batches
        first = ckpt.epoch
    say(event="start", step=step)
    for epoch in range(first, EPOCHS):
        for (rows,) in batches():
            with accelerator.accumulate(model):
                loss = (model(rows) - rows.sum(1, keepdim=True)).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                if ckpt is not None:
                    ckpt.step(step)
                schedule = (epoch, scheduler.get_last_lr())
                end_of_step(args, step, model, [optimizer], schedule)
    if ckpt is not None:
        ckpt.close(finished=True)
    say(event="end", step=step)


if __name__ == "__main__":
    main()
