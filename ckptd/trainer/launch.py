"""PyTorch's own elastic launcher, started with what makes restarts work."""

import os
from collections.abc import Callable, Sequence

from torch.distributed import run as torchrun

from ckptd.config import (
    ENV_AGENT,
    ENV_INSPECTOR_INTERVAL,
    ENV_JOB,
    ENV_TIMING,
    FLIGHT_RECORDER_ENTRIES,
    FLIGHT_RECORDER_SIZES,
    INSPECTOR_INTERVAL_US,
)
from ckptd.errors import ConfigError
from ckptd.trainer import standby

# Measured: with torchrun's defaults the restarted workers of a gloo job reuse the launcher's store
# with stale addresses and never come up; with stores of their own they do.
_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
# What NVIDIA's Inspector, if it is NCCL's profiler plugin, needs so that the agent can follow it.
_INSPECTOR = {
    "NCCL_INSPECTOR_ENABLE": "1",
    ENV_INSPECTOR_INTERVAL: str(INSPECTOR_INTERVAL_US),
    "NCCL_INSPECTOR_DUMP_MIN_SIZE_BYTES": "0",
}
# A dead node is given up after about 2 s instead of 15, and late nodes are not waited for.
_RENDEZVOUS_CONF = {
    "is_host": "0",
    "keep_alive_interval": "1",
    "keep_alive_max_attempt": "2",
    "last_call_timeout": "1",
}
MAX_RESTARTS = 100


def prepare_environment(job: str, agent: str | None, timing: bool = False) -> None:
    """Set what trainers and torchrun need; what the user has set stays."""
    if not any(name in os.environ for name in FLIGHT_RECORDER_SIZES):
        os.environ[FLIGHT_RECORDER_SIZES[0]] = str(FLIGHT_RECORDER_ENTRIES)
    if timing:
        os.environ[ENV_TIMING] = "1"
    chosen = dict(_ENVIRONMENT)
    if "inspector" in os.environ.get("NCCL_PROFILER_PLUGIN", "").lower():
        chosen |= _INSPECTOR
    for name, value in chosen.items():
        os.environ.setdefault(name, value)
    os.environ[ENV_JOB] = job
    if agent:
        os.environ[ENV_AGENT] = agent


def complete_arguments(
    arguments: Sequence[str], job: str, rendezvous: str | None, address: str | None
) -> list[str]:
    """torchrun's arguments with the missing ones put in front; the user's own win.

    `rendezvous`: `host:port` of a `ckptd rendezvous`; None leaves rendezvous to the user.
    `address`: this node's own, as its agent knows it.
    """
    parsed = torchrun.parse_args(list(arguments))  # type: ignore[no-untyped-call] # torch's
    script_arguments = parsed.training_script_args
    own = arguments[: len(arguments) - len(script_arguments) - 1]
    given = {_flag(argument) for argument in own if argument.startswith("--")}
    added: list[str] = []
    if "max-restarts" not in given:
        added.append(f"--max-restarts={MAX_RESTARTS}")
    if "standalone" in given:
        return [*added, *arguments]
    if "rdzv-id" not in given:
        added.append(f"--rdzv-id={job}")
    if rendezvous is not None and "rdzv-endpoint" not in given:
        added += ["--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}"]
        if "rdzv-conf" not in given:
            added.append("--rdzv-conf=" + ",".join(f"{k}={v}" for k, v in _RENDEZVOUS_CONF.items()))
    if address and "local-addr" not in given:
        added.append(f"--local-addr={address}")
    return [*added, *arguments]


def watched(arguments: Sequence[str]) -> list[str]:
    """torchrun's arguments with the script run by `ckptd.trainer.script`, which shows it first.

    A program that is no Python script, or that torchrun runs in a way of its own, stays as it is:
    it is seen once it has made its Checkpointer.
    """
    parsed = torchrun.parse_args(list(arguments))  # type: ignore[no-untyped-call] # torch's
    if parsed.no_python or parsed.run_path:
        return list(arguments)
    split = len(arguments) - len(parsed.training_script_args) - 1
    own, script = list(arguments[:split]), list(arguments[split:])
    if not parsed.module:
        return [*own, "-m", "ckptd.trainer.script", *script]
    return [*own, "ckptd.trainer.script", "--module", *script]


def keep_standbys(
    arguments: Sequence[str], modules: Sequence[str], at_once: bool, tell: Callable[[str], None]
) -> None:
    """Have a standby process for each rank of this node; `arguments` as `watched` made them.

    `at_once`: nobody else needs the processors now. `tell` hears when they are ready. Raises
    ConfigError if torchrun would not start its workers in a way that allows it.
    """
    parsed = torchrun.parse_args(list(arguments))  # type: ignore[no-untyped-call] # torch's
    if parsed.training_script != "ckptd.trainer.script":
        raise ConfigError(
            "--standby needs a Python script or module; leave it out with torchrun's --no-python "
            "and --run-path"
        )
    count = torchrun.determine_local_world_size(parsed.nproc_per_node)
    standbys = standby.Standbys(count, modules, parsed.training_script_args, tell)
    if not standby.install(standbys):
        raise ConfigError(
            "--standby does not know the launcher of this version of PyTorch; start without it"
        )
    standbys.keep(at_once)


def launch(arguments: Sequence[str]) -> None:
    """Hand over to torchrun; returns, or raises, as it does."""
    torchrun.main(list(arguments))


def _flag(argument: str) -> str:
    """torchrun takes --rdzv-id and --rdzv_id alike."""
    return argument[2:].partition("=")[0].replace("_", "-")
