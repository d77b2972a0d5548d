"""What `ckptd drill` and its training processes tell one another. Imports no torch.

A job has a directory. The drill publishes a `Strike` there, the ranks say in files of their own who
they are, how far they have come, and when they were struck.
"""

from pathlib import Path

import msgspec

DDP, FSDP2, HSDP, PIPELINE = "ddp", "fsdp2", "hsdp", "pipeline"
STRIKE = "strike.json"


class Setup(msgspec.Struct, frozen=True):
    """A job that is to be started."""

    job: str
    kind: str
    """DDP, FSDP2, HSDP (two replicas of a sharded model), or PIPELINE (two stages)."""
    sockets: tuple[str, ...]
    """The agent's, of each rank."""
    directory: str
    step_s: float
    """How long a step takes, nearly all of it asleep, or how much of a processor if it computes."""
    timing: bool
    """Every collective is timed."""
    payload_bytes: int = 1 << 16
    """About so much goes from rank to rank in each step."""
    namespaces: tuple[str, ...] = ()
    """The network namespace of each rank; empty: the one that there is."""
    device: str = ""
    """The network device in them."""
    oddity: str = ""
    """What a healthy job does that looks odd."""
    loader: bool = False
    """Data comes from a worker process."""
    computes: bool = False
    """Steps are not asleep."""


class End(msgspec.Struct, frozen=True, tag=True):
    """Kill what is left of a job."""

    job: str


class Start(msgspec.Struct, frozen=True, tag=True):
    """Start a job."""

    setup: Setup


class Strike(msgspec.Struct, frozen=True):
    """A fault that a rank brings upon itself, from its next step on."""

    what: str
    rank: int
    seconds: float = 0.0
    """How long it lasts, where it does not last for ever."""
    factor: float = 0.0
    """How much longer each of its steps takes."""


def pid_path(directory: Path, rank: int) -> Path:
    """The number of a rank's process."""
    return directory / f"{rank}.pid"


def struck_path(directory: Path, rank: int) -> Path:
    """When a rank was struck, in seconds since the epoch."""
    return directory / f"{rank}.struck"


def ended_path(directory: Path, rank: int) -> Path:
    """When a rank's process ended, in seconds since the epoch."""
    return directory / f"{rank}.ended"


def log_path(directory: Path, rank: int) -> Path:
    return directory / f"{rank}.log"


def steps_path(directory: Path) -> Path:
    """When each step ended on rank 0, a line each."""
    return directory / "steps"


def write(path: Path, text: str | bytes) -> None:
    """So that nobody reads a part of it."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(text.encode() if isinstance(text, str) else text)
    fresh.rename(path)
