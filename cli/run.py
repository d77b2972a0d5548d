"""`ckptd run`."""

import contextlib
import socket as sockets
from collections.abc import Sequence

import click

from ckptd.cli import options
from ckptd.config import ENV_JOB, ENV_RENDEZVOUS, ENV_TIMING
from ckptd.errors import AgentUnreachable, ConfigError
from ckptd.ids import check_job_id
from ckptd.wire import AgentToLauncher, Decoder, Here, Message, WaitForWork, WhereAmI, Work, encode


@click.command(
    cls=options.Command,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option(
    "--job",
    envvar=ENV_JOB,
    show_envvar=True,
    required=True,
    help="The job's name; the same whenever it is started again.",
)
@options.socket
@click.option(
    "--rendezvous",
    envvar=ENV_RENDEZVOUS,
    show_envvar=True,
    help="HOST:PORT of `ckptd rendezvous`. Without it, rendezvous is as torchrun's arguments say.",
)
@click.option(
    "--spare",
    is_flag=True,
    help="Wait, with everything loaded, until the coordinator calls this node to replace one.",
)
@click.option(
    "--timing",
    is_flag=True,
    envvar=ENV_TIMING,
    show_envvar=True,
    help="Time each collective, so that slow ranks and links are found (docs/diagnosis.md).",
)
@click.option(
    "--standby/--no-standby",
    "with_standby",
    default=True,
    show_default=True,
    help="Keep one process that has imported PyTorch, and start ranks by forking it.",
)
@click.option(
    "--standby-import",
    "modules",
    multiple=True,
    metavar="MODULE",
    help="What the standby process imports besides, like transformers. May be given several times.",
)
@click.argument("torchrun", nargs=-1, type=click.UNPROCESSED, required=True)
def command(
    job: str,
    agent: str | None,
    rendezvous: str | None,
    spare: bool,
    timing: bool,
    with_standby: bool,
    modules: tuple[str, ...],
    torchrun: tuple[str, ...],
) -> None:
    """Start PyTorch's own elastic launcher with what makes restarts work.

    Everything after `--` goes to torchrun as it is:

    \b
        ckptd run --job lm-7b -- --nnodes=4 --nproc-per-node=8 train.py

    It adds what is missing: restarts that work with gloo, up to 100 of them (--max-restarts), a
    rendezvous that gives up a dead node in seconds, this node's address, and the job's name for
    the trainers.
    """
    check_job_id(job)
    if modules and not with_standby:
        raise ConfigError("--standby-import: with --no-standby there is no process to import it")
    if not agent and (spare or rendezvous or _spans_machines(torchrun)):
        raise ConfigError(
            "no agent is given, and only a job on one machine does without: start one on this node "
            "with `ckptd agent --socket PATH --coordinator ADDRESS ...`, then pass --agent PATH or "
            "set CKPTD_AGENT"
        )
    from ckptd.trainer import environment, standby  # and not yet what imports torch

    environment.prepare(job, agent, timing)
    address = _address(agent) if agent else None
    warming = standby.Standby(modules, torchrun, _say) if with_standby else None
    with contextlib.closing(warming) if warming else contextlib.nullcontext():
        from ckptd.trainer import launch

        if agent and spare:
            _wait_for_work(agent, job)
        arguments = launch.watched(launch.complete_arguments(torchrun, job, rendezvous, address))
        if warming:
            launch.use(warming, arguments)
        launch.launch(arguments)


def _address(agent: str) -> str | None:
    """This node's, as its agent knows it. Raises AgentUnreachable."""
    with connect(agent) as conn:
        here = ask(conn, WhereAmI())
    return here.address if isinstance(here, Here) else None


def _wait_for_work(agent: str, job: str) -> None:
    """Until the coordinator calls this node. Raises AgentUnreachable."""
    with connect(agent) as conn:
        _say(f"spare for {job!r}, waiting to be called")
        conn.settimeout(None)
        if not isinstance(ask(conn, WaitForWork(job)), Work):
            raise AgentUnreachable(f"the agent at {agent} did not call this spare")
        _say(f"called for {job!r}")


def _say(text: str) -> None:
    click.echo(f"ckptd run: {text}", err=True)


def _spans_machines(torchrun: Sequence[str]) -> bool:
    """Whether torchrun's --nnodes, N or MIN:MAX, allows more than one."""
    for flag, following in zip(torchrun, [*torchrun[1:], ""], strict=True):
        name, equals, value = flag.partition("=")
        if name == "--nnodes":
            return (value if equals else following).rpartition(":")[2] != "1"
        if name.endswith(".py"):
            break  # what follows is the script's
    return False


def connect(path: str) -> sockets.socket:
    """To the agent of this node. Raises AgentUnreachable."""
    conn = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
    conn.settimeout(10.0)
    try:
        conn.connect(path)
    except OSError as error:
        conn.close()
        raise AgentUnreachable(
            f"no agent answers at {path}: {error}; start one with `ckptd agent --socket {path}`"
        ) from error
    return conn


def ask(conn: sockets.socket, question: Message) -> AgentToLauncher:
    """Its answer. Raises AgentUnreachable."""
    try:
        conn.send(encode(question))
        frame = conn.recv(1 << 16)
    except OSError as error:
        raise AgentUnreachable(f"the agent does not answer: {error}") from error
    if not frame:
        raise AgentUnreachable("the agent has gone away; start it again, and then this launcher")
    return Decoder[AgentToLauncher](AgentToLauncher).decode(frame)
