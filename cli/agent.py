"""`ckptd agent`."""

import os
import socket as sockets
from pathlib import Path

import click
import psutil

from ckptd.agent.config import AgentConfig
from ckptd.agent.shell import run_agent
from ckptd.cli import options
from ckptd.ids import check_node_id
from ckptd.logs import set_up_logs


def _default_socket() -> str:
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/ckptd-{os.getuid()}"
    return f"{base}/ckptd/agent.sock"


@click.command(cls=options.Command)
@click.option(
    "--node",
    default=lambda: sockets.gethostname(),
    show_default="the host name",
    help="Node id; must stay the same when the agent is restarted.",
)
@options.cluster
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    default=_default_socket,
    show_default="in $XDG_RUNTIME_DIR, or in /tmp",
    help="Unix socket for this node's trainers; its directory is for this user alone.",
)
@click.option(
    "--memory-dir",
    type=click.Path(path_type=Path),
    default=lambda: f"/dev/shm/ckptd-{os.getuid()}",
    show_default="/dev/shm/ckptd-<uid>",
    help="Directory on tmpfs for segments and parity. A restarted agent adopts what it holds.",
)
@click.option(
    "--memory-limit",
    type=options.Size(),
    help="Most bytes in segments and parity. Default: what is there, and 60 % of what is free.",
)
@click.option(
    "--spare-memory",
    type=options.Size(),
    envvar="CKPTD_SPARE_MEMORY",
    show_envvar=True,
    help="How much of the limit may hold segments of lost nodes. Default: all that is free.",
)
@click.option(
    "--listen",
    default="127.0.0.1",
    show_default=True,
    help="Address of this node for the other agents. Wider than loopback needs --key-file.",
)
@click.option(
    "--port", default=0, type=click.IntRange(0, 65535), help="Port for cells. Default: any."
)
@click.option(
    "--domain",
    default="",
    help="Failure domain: what dies together, as rack7 or row3/rack7. Groups are spread over them.",
)
@click.option("--spare", is_flag=True, help="Show this node as a spare until it has ranks.")
@click.option(
    "--wipe-on-exit",
    is_flag=True,
    help="Delete the memory directory on a clean stop (SIGTERM, SIGINT).",
)
@click.option(
    "--scrub-rate",
    type=options.Size(),
    default="32MiB",
    show_default=True,
    help="Bytes per second of cells at rest that are verified in idle time, and mended; 0: none.",
)
@click.option(
    "--send-rate",
    type=options.Rate(),
    help="Send cells to other agents no faster, as 10Gbit/s: leaves the network to the training. "
    "Not for a snapshot whose node is suspect.",
)
@options.key_file
@options.log_options
def command(
    node: str,
    coordinator: str,
    socket: Path,
    memory_dir: Path,
    memory_limit: int | None,
    spare_memory: int | None,
    listen: str,
    port: int,
    domain: str,
    spare: bool,
    wipe_on_exit: bool,
    scrub_rate: int,
    send_rate: float | None,
    key_file: Path | None,
    log_level: str,
    log_json: bool,
) -> None:
    """Run this node's daemon.

    It owns the memory in which snapshots live, so that they outlive the trainers; it encodes them
    across the nodes of its group, serves them to other agents, and brings lost ones back.
    """
    set_up_logs(log_level, log_json)
    if memory_limit is None:
        memory_limit = default_memory_limit(memory_dir)
    run_agent(
        AgentConfig(
            node=check_node_id(node),
            coordinator=coordinator,
            socket=socket.absolute(),
            memory_dir=memory_dir.absolute(),
            memory_limit_bytes=memory_limit,
            listen=listen,
            port=port,
            domain=domain,
            spare=spare,
            key_file=key_file,
            wipe_on_exit=wipe_on_exit,
            scrub_bytes_per_s=scrub_rate,
            send_bytes_per_s=send_rate,
            spare_memory_bytes=spare_memory,
        )
    )


def default_memory_limit(memory_dir: Path) -> int:
    """Most of what is free, both on the file system and in memory, and what it holds already."""
    existing = memory_dir
    while not existing.exists():
        existing = existing.parent
    there = sum(path.stat().st_size for path in memory_dir.rglob("*") if path.is_file())
    free = os.statvfs(existing)
    free_bytes = min(free.f_bavail * free.f_frsize, psutil.virtual_memory().available)
    return int(0.6 * free_bytes) + there
