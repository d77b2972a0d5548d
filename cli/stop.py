"""`ckptd stop`."""

import contextlib
import json
import os
import select
import signal
import socket as sockets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ckptd.agent.store import Store
from ckptd.cli import options, show
from ckptd.client import ask_status
from ckptd.errors import AgentUnreachable, CoordinatorUnreachable, ProtocolError, Refused
from ckptd.keys import ClusterKey
from ckptd.trainer.embedded import Places, peer, places

_END_S = 15.0


@click.command(cls=options.Command)
@click.option("--force", is_flag=True, help="Even if jobs need it; gives up all their snapshots.")
def command(force: bool) -> None:
    """Stop the agent that was started for this machine because none was configured.

    It refuses while a trainer is attached, or while the agent holds the newest snapshot of a job
    that has not finished. An agent that you started with `ckptd agent` is stopped with `kill`.
    """
    where = places()
    where.claim()
    memory = _memory_of(where)
    running = where.running()
    if running:
        if not force:
            _refuse_if_needed(where, memory)
        _end(where, force)
    if force and memory is not None and memory.is_dir():
        _wipe(where, memory)
    if running:
        click.echo("the embedded agent is stopped")
    else:
        click.echo(f"no embedded agent is running (looked in {where.directory})")


def _wipe(where: Places, memory: Path) -> None:
    with where.held(_END_S) as lock:
        if lock is None:
            raise Refused("a trainer has started another embedded agent meanwhile; stop that first")
        Store(memory).destroy()
    click.echo(f"{memory}: wiped", err=True)


def _memory_of(where: Places) -> Path | None:
    """The memory directory of the embedded agent that runs, or ran last."""
    try:
        return Path(json.loads(where.lock.read_bytes())["memory_dir"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_if_needed(where: Places, memory: Path | None) -> None:
    """Raise Refused, with what would be lost."""
    try:
        document = ask_status(where.coordinator, ClusterKey())
        needed = [reason for job in document["jobs"] if (reason := _need(job))]
    except ProtocolError:
        # It is of another version. That jobs have records is all that can be known.
        records = sorted(memory.glob("*/record")) if memory is not None else []
        needed = [f"it has a record of the job {path.parent.name!r}" for path in records]
    except CoordinatorUnreachable as error:
        raise Refused(
            f"the embedded agent does not say what it holds ({error}); to stop it all the same, "
            "and give up what it may hold: ckptd stop --force"
        ) from error
    if needed:
        raise Refused(
            f"the embedded agent is needed: {'; '.join(needed)}. Let the job finish, or give it up "
            "with `ckptd rm JOB`; `ckptd stop --force` gives up everything"
        )


def _need(job: Mapping[str, Any]) -> str:
    """Why a job needs the agent; "" if it does not."""
    reasons = []
    newest = next((snapshot for snapshot in job["snapshots"] if snapshot["restorable"]), None)
    if newest is not None:
        reasons.append(f"has its newest snapshot here, of step {newest['step']}")
    if job["attached_ranks"]:
        reasons.append(f"has {show.count(job['attached_ranks'], 'trainer')} attached")
    return f"the job {job['job']!r} {' and '.join(reasons)}" if reasons else ""


def _end(where: Places, force: bool) -> None:
    """Ask it to end, and wait for that. With `force`, kill it if it does not."""
    with contextlib.ExitStack() as stack:
        pidfd = _open_process(where)
        stack.callback(os.close, pidfd)
        for number in (signal.SIGTERM, *([signal.SIGKILL] if force else [])):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if poll.poll(int(1000 * _END_S)):
                return
    raise AgentUnreachable(
        f"the embedded agent did not end within {_END_S:g} s; see {where.log}, and try again, or "
        "kill it, and give up what it holds: ckptd stop --force"
    )


def _open_process(where: Places) -> int:
    """A pidfd of the agent: of who listens on its socket."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET) as conn:
        try:
            conn.connect(str(where.socket))
            return os.pidfd_open(peer(conn))
        except OSError as error:
            raise AgentUnreachable(
                f"the embedded agent holds {where.lock} and cannot be reached at {where.socket} "
                f"({error}): it is starting or ending; see {where.log}, and try again"
            ) from error
