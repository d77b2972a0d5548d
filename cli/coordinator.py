"""`ckptd coordinator`."""

import shlex
from pathlib import Path

import click

from ckptd.cli import options
from ckptd.coordinator.decider import Settings
from ckptd.coordinator.diagnosis import Thresholds
from ckptd.coordinator.diagnosis.actuators import ACTUATORS, COMMAND, TORCHRUN, Actuator
from ckptd.coordinator.diagnosis.shared import OBSERVE, POLICIES, DiagnosisSettings
from ckptd.coordinator.shell import CoordinatorConfig, run_coordinator
from ckptd.logs import set_up_logs


@click.command(cls=options.Command)
@click.option(
    "--listen",
    default="tcp://127.0.0.1:7070",
    show_default=True,
    help="Address for agents and the CLI. Wider than loopback needs --key-file.",
)
@click.option(
    "--parity-shards",
    type=click.IntRange(0, options.MAX_PARITY_SHARDS),
    help="Nodes of each group that may be lost at once. Default: 2 from four nodes on, else 1.",
)
@click.option(
    "--group-nodes",
    type=click.IntRange(2, options.MAX_GROUP_NODES),
    default=8,
    show_default=True,
    help="Largest number of nodes that protect one another.",
)
@click.option(
    "--cell-size",
    type=options.Size(),
    default="4MiB",
    show_default=True,
    help="Unit of coding, transfer and repair.",
)
@click.option(
    "--beat",
    type=click.FloatRange(0.05, 60),
    default=0.5,
    show_default=True,
    help="Seconds between an agent's signs of life.",
)
@click.option(
    "--lease",
    type=click.FloatRange(0.2, 600),
    default=4.0,
    show_default=True,
    help="A node that is silent for so many seconds is lost; it is suspect within three beats.",
)
@click.option(
    "--job-quota",
    type=options.Size(),
    help="Most memory of one job on each node. Default: none; `ckptd quota` sets that of one job.",
)
@click.option(
    "--rebuild-after",
    type=click.FloatRange(0, 86400),
    default=30.0,
    show_default=True,
    help="Segments of a node that is lost for so many seconds, and whose place nobody takes, are "
    "rebuilt on other nodes' spare memory. 0: never.",
)
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    default=OBSERVE,
    show_default=True,
    help="What is done about a job that hangs: only said, its trainers killed for their launchers "
    "to start them anew, or also a node taken out that is at fault twice.",
)
@click.option(
    "--actuator",
    type=click.Choice(ACTUATORS),
    default=TORCHRUN,
    show_default=True,
    help="What carries out a restart: only the job's own launchers, or also a command, `kubectl` "
    "or `scontrol`, run on this machine (docs/diagnosis.md).",
)
@click.option(
    "--actuator-command",
    metavar="COMMAND",
    help="For --actuator command: a program and its arguments. It gets the facts in its "
    "environment, and as JSON on its standard input.",
)
@click.option(
    "--actuator-timeout",
    type=click.FloatRange(1, 3600),
    default=Actuator().timeout_s,
    show_default=True,
    help="How long one such program may run, in seconds; it is tried three times.",
)
@click.option(
    "--window",
    type=click.FloatRange(0.1, 600),
    default=Thresholds().window_min_s,
    show_default=True,
    help="Shortest time over which ranks are compared, in seconds.",
)
@click.option(
    "--announce",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the bound address to this file, for scripts that listen on port 0 (tcp://…:*).",
)
@click.option(
    "--take-over",
    is_flag=True,
    help="Begin a new term although agents obey another coordinator, which may be alive. For once, "
    "by hand: not for a unit file.",
)
@click.option(
    "--lease-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Lock this file: its holder is the one coordinator, and needs no --take-over. For hosts "
    "that share it, on a file system with locks.",
)
@click.option(
    "--kubernetes-lease",
    metavar="[NAMESPACE/]NAME",
    help="Hold this Lease of a Kubernetes cluster, made if it is not there, through kubectl: its "
    "holder is the one coordinator. While another holds it, wait.",
)
@options.key_file
@options.log_options
def command(
    listen: str,
    parity_shards: int | None,
    group_nodes: int,
    cell_size: int,
    beat: float,
    lease: float,
    job_quota: int | None,
    rebuild_after: float,
    policy: str,
    actuator: str,
    actuator_command: str | None,
    actuator_timeout: float,
    window: float,
    announce: Path | None,
    take_over: bool,
    lease_file: Path | None,
    kubernetes_lease: str | None,
    key_file: Path | None,
    log_level: str,
    log_json: bool,
) -> None:
    """Run the cluster's one coordinator.

    It keeps the list of nodes, forms groups, issues tickets for snapshots, runs the commit, and
    grants lives at resume. It never carries a byte of training state, and all that it knows it can
    learn again from the agents: its death stops no training.

    Start it again at the same address, and it goes on in a new term. At another address it refuses
    to while agents obey the old one; --take-over makes it go on, and the old one is obeyed no more.
    """
    if lease < 3 * beat:
        raise click.UsageError(f"--lease {lease} must be at least three times --beat {beat}")
    if cell_size < 4096:
        raise click.UsageError(f"--cell-size {cell_size}: at least 4096 bytes")
    if parity_shards is not None and parity_shards >= group_nodes:
        raise click.UsageError(
            f"--parity-shards {parity_shards} must be fewer than --group-nodes {group_nodes}"
        )
    if (actuator == COMMAND) != bool(actuator_command):
        raise click.UsageError("--actuator command and --actuator-command COMMAND go together")
    try:
        program = tuple(shlex.split(actuator_command or ""))
    except ValueError as error:
        raise click.UsageError(f"--actuator-command {actuator_command}: {error}") from error
    set_up_logs(log_level, log_json)
    settings = Settings(
        cell_size,
        parity_shards,
        group_nodes,
        beat,
        lease,
        rebuild_after_s=rebuild_after,
        job_quota_bytes=job_quota,
        diagnosis=DiagnosisSettings(
            policy,
            Thresholds(window_min_s=window),
            actuator=Actuator(actuator, program, actuator_timeout),
        ),
    )
    if lease_file is not None and kubernetes_lease is not None:
        raise click.UsageError("--lease-file and --kubernetes-lease: one lease is enough")
    run_coordinator(
        CoordinatorConfig(
            listen,
            settings,
            key_file,
            announce,
            take_over,
            lease_file,
            kubernetes_lease or "",
        )
    )
