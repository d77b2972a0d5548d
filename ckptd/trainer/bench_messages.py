"""What `ckptd bench` and the training process that it starts say to one another, as JSON lines.

Without torch, so that the command line can import it.
"""

from typing import Literal

import msgspec

Mode = Literal["thread", "process", "staged"]


class Method(msgspec.Struct, frozen=True):
    """One way to keep the state safe at every step."""

    kind: Literal["plain", "ckptd", "async_save", "torch.save", "copy"]
    folder: str = ""
    """Where it writes; emptied after every block."""
    mode: Mode = "thread"
    """async_save's. `staged`: thread mode, and the copy to host memory is asynchronous, too."""


class Setup(msgspec.Struct, frozen=True):
    """The first message to the trainer: what to train. It answers Ready."""

    state_bytes: int
    """Parameters and Adam state together; the model comes near to it."""
    step_s: float
    """The batch is chosen so that a step takes at least about so long."""
    device: Literal["auto", "cpu", "cuda"]
    agent: str
    """Unix socket of ckptd's agent."""


class Ready(msgspec.Struct, frozen=True):
    """The model is built and the batch is chosen; or `error` says why not."""

    device: str = ""
    torch: str = ""
    threads: int = 0
    parameters: int = 0
    state_bytes: int = 0
    batch: int = 0
    step_s: float = 0.0
    error: str = ""


class Block(msgspec.Struct, frozen=True):
    """Train so many steps with this method, then wait for its background work. Answer: Done."""

    method: Method
    steps: int


class Step(msgspec.Struct, frozen=True):
    """One training step. `gate_s` belongs to the snapshot of the step before."""

    step_s: float
    gate_s: float
    save_s: float
    captured: bool
    """The save at the end of this step began a snapshot."""
    audits: int = 0
    """Full audits that ckptd had made, by the time that this step's gate was open."""


class Counts(msgspec.Struct, frozen=True):
    """What ckptd says of its captures so far, and the copies of ckptd or of the plain copy."""

    captures: int = 0
    sealed: int = 0
    torn: int = 0
    failed: int = 0
    copied_bytes: int = 0
    copy_s: float = 0.0
    eager_because: str = ""
    """Why ckptd copies everything before `step` returns, if it does."""


class Done(msgspec.Struct, frozen=True):
    """The steps of a block; `error` says why the method does not work here."""

    steps: tuple[Step, ...] = ()
    counts: Counts = Counts()
    error: str = ""
