"""What an agent is started with."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Settings of one agent, from the flags of `ckptd agent`."""

    node: str
    """Node id; survives restarts."""
    coordinator: str
    """ZeroMQ address of the coordinator, such as tcp://127.0.0.1:7070."""
    socket: Path
    """Unix socket for this node's trainers."""
    memory_dir: Path
    """Directory on tmpfs that holds segments and parity."""
    memory_limit_bytes: int
    """Most bytes in slots and parity."""
    listen: str = "127.0.0.1"
    """Address that peers reach this agent at; binds the cell server."""
    port: int = 0
    """Port of the cell server; 0: any."""
    domain: str = ""
    """Failure domain label: what dies together, such as a rack."""
    spare: bool = False
    """Show this node as a spare until it has ranks."""
    key_file: Path | None = None
    """Cluster key; needed as soon as anything leaves loopback."""
    wipe_on_exit: bool = False
    """Delete the memory directory on a clean stop (SIGTERM, SIGINT)."""
    scrub_bytes_per_s: float = 32 << 20
    """How fast cells at rest are verified; 0: not at all."""
    send_bytes_per_s: float | None = None
    """How fast cells are sent to other agents at most; None: as fast as the network lets them."""
    spare_memory_bytes: int | None = None
    """How many bytes of the limit may hold lost nodes' segments; None: all that are free."""
    alone: bool = False
    """Embedded: serves no peers, and on a clean stop leaves nothing that no job needs."""
