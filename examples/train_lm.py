"""Train a small language model on the Python standard library, keeping it safe with ckptd.

With an agent running on this machine, and CKPTD_AGENT set to its socket: four processes, the model
sharded over them with FSDP2,

    ckptd run --job my-lm -- --standalone --nproc-per-node=4 examples/train_lm.py

or one plain process, no launcher:

    CKPTD_JOB=my-lm python examples/train_lm.py

The model is a byte-level transformer in the style of Llama. Every run with the same flags and the
same number of processes gives the same losses, bit for bit, whether it was interrupted or not:
compare two runs with --log-file and --digest, and with --no-ckptd train without any checkpoints.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sysconfig
import time
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

VOCABULARY = 256  # one token for each byte
CORPUS_BYTES = 4_000_000
WARMUP_STEPS = 20
PEAK_LEARNING_RATE = 1e-3
DROPOUT = 0.1


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class SwiGLU(nn.Module):
    """The gated feed-forward layer, about 8/3 as wide inside as outside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // (3 * 64)) * 64
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return result


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = SwiGLU(width)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class Transformer(nn.Module):
    rotation: Tensor

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.register_buffer("rotation", rotations(context, width // heads), persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotation)
        x = self.head(self.norm(x))
        return x


def rotations(context: int, size: int) -> Tensor:
    """Cosines and sines of the angle of each position and pair: (2, context, size / 2)."""
    frequency = 10_000.0 ** (-torch.arange(0, size, 2) / size)
    angle = torch.outer(torch.arange(context), frequency)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Batches:
    """Random windows of the text, without end. Its state says which windows come next."""

    def __init__(self, text: Tensor, batch: int, context: int, seed: str) -> None:
        self.text = text
        self.batch = batch
        self.context = context
        self.sampler = random.Random(seed)

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (batch, context); a target is the byte after its input."""
        last = len(self.text) - self.context - 1
        starts = [self.sampler.randint(0, last) for _ in range(self.batch)]
        windows = torch.stack([self.text[s : s + self.context + 1] for s in starts]).long()
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = self.sampler.getstate()
        return {"version": version, "words": list(words), "gauss": gauss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.setstate((state["version"], tuple(state["words"]), state["gauss"]))


def read_corpus() -> Tensor:
    """The first megabytes of the standard library's modules, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(text[:CORPUS_BYTES]), dtype=torch.uint8)


def learning_rate(step: int, steps: int) -> float:
    """The share of the peak at this step: a linear warm-up, then a cosine down to a tenth."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = min(1.0, (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS))
    return 0.55 + 0.45 * math.cos(math.pi * progress)


def mean_over_ranks(loss: Tensor) -> float:
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total.item()


def digest_of_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler
) -> str:
    """One sha256 for the parameters, optimizer state and schedule of all ranks, in rank order."""
    local = hashlib.sha256()

    def add(name: str, value: object) -> None:
        local.update(name.encode())
        if isinstance(value, DTensor):
            value = value.to_local()
        if isinstance(value, Tensor):
            local.update(f"{value.dtype} {tuple(value.shape)}".encode())
            local.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            local.update(repr(value).encode())

    for name, parameter in sorted(model.named_parameters()):
        add(name, parameter)
        for key, value in sorted(optimizer.state[parameter].items()):
            add(f"{name}/{key}", value)
    add("schedule", (scheduler.last_epoch, scheduler.get_last_lr()))
    digests = [local.hexdigest()]
    if dist.is_initialized():
        digests *= dist.get_world_size()
        dist.all_gather_object(digests, local.hexdigest())
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def write_line(log: TextIO | None, **fields: object) -> None:
    if log is not None:
        log.write(json.dumps({"time": time.time(), **fields}) + "\n")


def train(args: argparse.Namespace, rank: int, device: torch.device) -> None:
    torch.manual_seed(args.seed)  # the same on every rank: fully_shard keeps each rank's own slice
    model = Transformer(args.width, args.layers, args.heads, args.context).to(device)
    size = sum(parameter.numel() for parameter in model.parameters())
    if dist.is_initialized():
        for block in model.blocks:
            fully_shard(block, reshard_after_forward=False)  # small: gather once a step
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, fused=True)
    scheduler = LambdaLR(optimizer, lambda step: learning_rate(step, args.steps))
    batches = Batches(read_corpus(), args.batch, args.context, seed=f"{args.seed}/{rank}")
    torch.manual_seed(args.seed + 1 + rank)  # dropout differs from rank to rank

    ckpt = None
    if not args.no_ckptd:
        import ckptd

        extra = {"data": batches, "schedule": scheduler}
        ckpt = ckptd.Checkpointer(model=model, optimizer=optimizer, extra=extra, every=args.every)
    start = ckpt.resume() if ckpt is not None else 0

    log = args.log_file.open("a", buffering=1) if args.log_file is not None and rank == 0 else None
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    write_line(log, event="start", step=start, restart=restart)
    if rank == 0:
        print(f"{size / 1e6:.1f} million parameters, from step {start} to {args.steps}", flush=True)

    printed_step, printed_at = start, time.monotonic()
    for step in range(start, args.steps):
        began = time.monotonic()
        x, y = batches.next()
        logits = model(x.to(device))
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten().to(device))
        loss.backward()
        value = mean_over_ranks(loss)
        life = ckpt.life if ckpt is not None else 0
        write_line(log, step=step + 1, loss=value, life=life)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if ckpt is not None:
            ckpt.step(step + 1)
        time.sleep(max(0.0, began + args.min_step_seconds - time.monotonic()))

        if rank == 0 and (step + 1) % 10 == 0:
            rate = (step + 1 - printed_step) / (time.monotonic() - printed_at)
            printed_step, printed_at = step + 1, time.monotonic()
            print(f"step {step + 1:5d}  loss {value:.4f}  {rate:.2f} steps/s", flush=True)

    if ckpt is not None:
        ckpt.close(finished=True)
    if args.digest is not None:
        digest = digest_of_training(model, optimizer, scheduler)
        if rank == 0:
            args.digest.write_text(json.dumps({"step": args.steps, "sha256": digest}) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=200, help="steps to train in all")
    parser.add_argument("--every", type=int, default=1, help="steps from checkpoint to checkpoint")
    parser.add_argument("--batch", type=int, default=2, help="sequences in a step, on each rank")
    parser.add_argument("--context", type=int, default=64, help="bytes in a sequence")
    parser.add_argument("--width", type=int, default=288, help="width of the model")
    parser.add_argument("--layers", type=int, default=3, help="transformer blocks")
    parser.add_argument("--heads", type=int, default=4, help="attention heads in a block")
    parser.add_argument("--seed", type=int, default=0, help="of weights, dropout and data")
    parser.add_argument("--log-file", type=Path, help="append a JSON line here at each step")
    parser.add_argument("--digest", type=Path, help="write a sha256 of the final state here")
    parser.add_argument("--min-step-seconds", type=float, default=0.0, help="least time of a step")
    parser.add_argument("--no-ckptd", action="store_true", help="train without checkpoints")
    args = parser.parse_args()
    if args.width % (2 * args.heads):
        parser.error("--width must be a multiple of twice --heads")
    return args


def leave_process_group() -> None:
    """Leave together, and give gloo's threads a moment to let go of the last collective's tensors.

    A Python that finalises before they have done so aborts (pytorch/pytorch#179291): then the
    launcher would restart a job that has just finished.
    """
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.5)


def main() -> None:
    args = parse_args()
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # same sums in every run
        torch.use_deterministic_algorithms(True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(args, rank, device)
    if dist.is_initialized():
        leave_process_group()


if __name__ == "__main__":
    main()
