"""`ckptd embedded`: agent and coordinator in one process, for one machine."""

import asyncio
import contextlib
import json
import os
import signal
import socket as sockets
import sys
from pathlib import Path
from time import monotonic

import click
import structlog

from ckptd import __version__
from ckptd.agent.config import AgentConfig
from ckptd.agent.shell import Agent
from ckptd.cli import options
from ckptd.cli.agent import default_memory_limit
from ckptd.coordinator.decider import Settings
from ckptd.coordinator.diagnosis.shared import RESTART, DiagnosisSettings
from ckptd.coordinator.shell import CoordinatorConfig, CoordinatorProcess
from ckptd.errors import ConfigError
from ckptd.ids import check_node_id
from ckptd.logs import set_up_logs
from ckptd.trainer.embedded import Places, places

_LOCK_S = 2.0  # who only looks whether the lock is held, holds it for a moment
_LOOK_S = 1.0
_LOG_LIMIT_BYTES = 1 << 20

log = structlog.get_logger()


@click.command(cls=options.Command)
@click.option(
    "--memory-dir",
    type=click.Path(path_type=Path),
    envvar=options.ENV_MEMORY_DIR,
    show_envvar=True,
    default=lambda: f"/dev/shm/ckptd-{os.getuid()}",
    show_default="/dev/shm/ckptd-<uid>",
    help="Directory on tmpfs for segments. The next one adopts what it holds.",
)
@click.option(
    "--memory-limit",
    type=options.Size(),
    envvar=options.ENV_MEMORY_LIMIT,
    show_envvar=True,
    help="Most bytes in segments. Default: what is there, and 60 % of what is free.",
)
@click.option(
    "--idle",
    "idle_s",
    type=click.FloatRange(0.1),
    envvar="CKPTD_IDLE",
    show_envvar=True,
    default=60.0,
    show_default=True,
    help="Seconds without trainers, and without any job's snapshot, after which it ends.",
)
@click.option("--handed", nargs=2, type=int, hidden=True, help="Detach; a pipe, and the lock.")
@options.log_options
def command(
    memory_dir: Path,
    memory_limit: int | None,
    idle_s: float,
    handed: tuple[int, int] | None,
    log_level: str,
    log_json: bool,
) -> None:
    """Run agent and coordinator of this machine in one process.

    A Checkpointer for which no agent is configured starts this by itself, in the background, once
    for the user and machine; start it yourself only to watch it. It ends when it is idle, and with
    `ckptd stop`. Its socket, locks and log are in $XDG_RUNTIME_DIR/ckptd, or in /tmp/ckptd-<uid>.
    """
    where = places()
    where.claim()
    with contextlib.ExitStack() as stack:
        if handed is None:
            ready, lock = None, stack.enter_context(where.held(_LOCK_S))
            if lock is None:
                raise ConfigError(f"one runs already: it holds {where.lock}; `ckptd stop` stops it")
        else:
            ready, lock = handed
            _detach()
        set_up_logs(log_level, log_json)
        described = {"pid": os.getpid(), "version": __version__, "memory_dir": str(memory_dir)}
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(described).encode() + b"\n", 0)
        config = AgentConfig(
            node=check_node_id(sockets.gethostname()),
            coordinator=where.coordinator,
            socket=where.socket,
            memory_dir=memory_dir.absolute(),
            memory_limit_bytes=memory_limit or default_memory_limit(memory_dir),
            alone=True,
        )
        asyncio.run(_serve(config, where, lock, idle_s, ready))


def _detach() -> None:
    """Become nobody's child: who ends all of a trainer's descendants must not end this one."""
    sys.stdout.flush()
    if os.fork():
        os._exit(0)
    os.umask(0o077)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


async def _serve(
    config: AgentConfig, where: Places, lock: int, idle_s: float, ready: int | None
) -> None:
    # Its one agent passes all questions on: nobody is left to wait for.
    settings = Settings(settle_s=0.0, diagnosis=DiagnosisSettings(policy=RESTART))
    coordinator = CoordinatorProcess(CoordinatorConfig(where.coordinator, settings))
    agent = Agent(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, agent.stop)
    coordinating = asyncio.create_task(coordinator.run(signals=()))
    serving = asyncio.create_task(agent.run(signals=()))
    watching = asyncio.create_task(_watch(agent, where, lock, idle_s, ready))
    done, _ = await asyncio.wait(
        {coordinating, serving, watching}, return_when=asyncio.FIRST_COMPLETED
    )
    agent.stop()
    await asyncio.wait({serving})
    watching.cancel()
    coordinator.stop()
    await asyncio.wait({coordinating, watching})
    for task in {serving, coordinating, *done}:
        task.result()


async def _watch(agent: Agent, where: Places, lock: int, idle_s: float, ready: int | None) -> None:
    """Return when the agent should end by itself."""
    await agent.ready.wait()
    if ready is not None:
        with contextlib.suppress(OSError):  # who started it has gone
            os.write(ready, b"+")
        os.close(ready)
    seen, busy_at = 0, monotonic()
    while True:
        there, ever = agent.local_connections
        if there or ever > seen or agent.holds_snapshot:
            seen, busy_at = ever, monotonic()
        elif monotonic() - busy_at >= idle_s:
            log.info("idle", seconds=idle_s)
            return
        if not there and not _is_at(lock, where.lock):
            log.warning("nobody can find this agent any more", missing=str(where.lock))
            return  # the memory stays, for the next one
        _bound_log(where.log)
        await asyncio.sleep(min(_LOOK_S, idle_s / 4))


def _is_at(fd: int, path: Path) -> bool:
    """Whether the open file is the one at `path`: runtime directories are deleted at logout."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


def _bound_log(path: Path) -> None:
    """Keep the newer half of the log, if that is where standard error goes."""
    size_bytes = os.fstat(2).st_size
    if size_bytes > _LOG_LIMIT_BYTES and _is_at(2, path):
        with path.open("r+b") as file:
            file.seek(size_bytes - _LOG_LIMIT_BYTES // 2)
            kept = file.read()
            file.seek(0)
            file.truncate()
            file.write(kept)
