"""The entry point. Verbs are imported when they are called, so that each starts fast."""

import importlib

import click

from ckptd import __version__

_VERBS = {
    "agent": "Run this node's daemon: it owns the memory in which snapshots live.",
    "bench": "Measure parts of ckptd on this machine.",
    "coordinator": "Run the cluster's one coordinator: it decides, and carries no state.",
    "demo": "Train, lose nodes, go on: the whole of ckptd on this machine, in minutes.",
    "drain": "Let a node leave, once all that it holds can be had without it.",
    "drill": "Inject faults into real jobs, and see who is blamed for them.",
    "embedded": "Run agent and coordinator of one machine; trainers start it by themselves.",
    "incidents": "List what stopped or slowed jobs, or report on one.",
    "isolate": "Let a node have no part in any new life.",
    "keygen": "Make the cluster key that agents and coordinator share.",
    "ls": "List snapshots: state, step, size, age, and where each can be restored from.",
    "matrix": "Show how long transfers take from each node to each other.",
    "plan": "Say what a code costs and what it survives, before anyone starts.",
    "quota": "Limit the memory that a job may have on each node.",
    "readmit": "Let an isolated node take part again.",
    "rearm": "Let a job be restarted by itself again, after too many restarts.",
    "rendezvous": "Run the store through which torchrun's launchers find one another.",
    "rm": "Forget a job and free its memory on every node.",
    "rollback": "Let a job resume next from an older snapshot.",
    "run": "Start torchrun with what makes restarts work.",
    "status": "Show nodes, groups, jobs and snapshots, and the reason for what is not well.",
    "stop": "Stop the agent that trainers started by themselves.",
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(f"ckptd.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_VERBS.items()))


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ckptd")
def main() -> None:
    """Asynchronous checkpointing and in-memory fault tolerance for PyTorch training."""
