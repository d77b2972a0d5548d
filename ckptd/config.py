"""Settings from the environment: the one file that reads it."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from socket import gethostname

from ckptd.erasure import AUTO, ENGINE_CHOICES
from ckptd.errors import ConfigError
from ckptd.ids import check_job_id
from ckptd.watching import Place

ENV_JOB = "CKPTD_JOB"
ENV_AGENT = "CKPTD_AGENT"
ENV_COORDINATOR = "CKPTD_COORDINATOR"
ENV_KEEP = "CKPTD_KEEP"
ENV_RENDEZVOUS = "CKPTD_RENDEZVOUS"
ENV_ERASURE_ENGINE = "CKPTD_ERASURE_ENGINE"
ENV_TIMING = "CKPTD_TIMING"
ENV_WATCH = "CKPTD_WATCH"
ENV_INSPECTOR_INTERVAL = "NCCL_INSPECTOR_DUMP_THREAD_INTERVAL_MICROSECONDS"
INSPECTOR_INTERVAL_US = 1000
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
FLIGHT_RECORDER_SIZES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
"""PyTorch's names for the size of its recorder, in operations; the first one wins."""
FLIGHT_RECORDER_ENTRIES = 256
"""What a poll costs the trainer grows with it: 1 ms with 64, 7 with 256, 50 with torch's 2,000."""


@dataclass(frozen=True, slots=True)
class TrainerConfig:
    """What a Checkpointer needs to know besides its arguments."""

    job: str
    """Job id; the same after every restart."""
    agent: str
    """Path of the Unix socket of this node's agent; "" for the embedded one."""
    keep: int = 1
    """How many protected snapshots are kept."""
    elastic: bool = False
    """Whether a launcher starts this process anew when it ends: torchrun with restarts."""


def trainer_config(
    job: str | None,
    agent: str | None,
    environ: Mapping[str, str] = os.environ,
    keep: int | None = None,
) -> TrainerConfig:
    """Arguments over environment. Raises ConfigError for what is missing or unusable.

    The job id is looked for in `CKPTD_JOB`, then torchrun's `--rdzv-id`, then Slurm's job id. A job
    on one machine needs no agent: it gets the embedded one.
    """
    found = job
    for variable in (ENV_JOB, "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        if found is None:
            found = environ.get(variable)
    if agent is None:
        agent = environ.get(ENV_AGENT)
    if not agent:
        _check_one_machine(environ)
    elastic = environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0")
    return TrainerConfig(check_job_id(found or ""), agent or "", _keep(keep, environ), elastic)


def _keep(keep: int | None, environ: Mapping[str, str]) -> int:
    """Raises ConfigError for less than one, or what is no number."""
    value = environ.get(ENV_KEEP) or "1" if keep is None else str(keep)
    if not value.isdecimal() or not int(value):
        where = ENV_KEEP + "=" if keep is None else "keep="
        raise ConfigError(f"{where}{value}: so many protected snapshots are kept: 1 or more")
    return int(value)


def runtime_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the embedded agent of this user and machine has its socket, locks and log."""
    base = environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "ckptd" if base else Path(f"/tmp/ckptd-{os.getuid()}")


def erasure_engine(environ: Mapping[str, str] = os.environ) -> str:
    """The engine for parity that `CKPTD_ERASURE_ENGINE` asks for; "auto" if it is not set.

    Raises ConfigError for a name that is none of an engine. Whether it works is not looked at.
    """
    choice = environ.get(ENV_ERASURE_ENGINE) or AUTO
    if choice not in ENGINE_CHOICES:
        raise ConfigError(
            f"{ENV_ERASURE_ENGINE} is {choice!r}; it must be one of {', '.join(ENGINE_CHOICES)}"
        )
    return choice


@dataclass(frozen=True, slots=True)
class WatchConfig:
    """What of a trainer is shown to its agent, for diagnosis."""

    agent: str
    """Path of the agent's Unix socket; "" for the embedded one."""
    job: str
    rank: int
    """As the launcher says; -1 if it does not."""
    world_size: int
    watch: bool
    """Off with CKPTD_WATCH=0."""
    timing: bool
    """On with CKPTD_TIMING=1: each collective is timed."""
    recorder_entries: int
    """Size of PyTorch's Flight Recorder, as it is set; 0: off, -1: not set."""
    place: Place = field(default_factory=Place)
    """Where the scheduler runs it, as far as it says."""
    ras: str = ""
    """Where NCCL's RAS listens, as NCCL_RAS_ADDR says; "": NCCL_RAS_ENABLE is 0."""
    inspector: str = ""
    """Where NCCL's Inspector writes its file; "": NCCL_INSPECTOR_ENABLE is not 1."""
    inspector_problem: str = ""
    """Why it will not write there in time, and the way out."""


def watch_config(environ: Mapping[str, str] = os.environ) -> WatchConfig:
    """What the environment says; never raises, for what is missing is only not shown."""
    entries = environ.get(FLIGHT_RECORDER_SIZES[0], environ.get(FLIGHT_RECORDER_SIZES[1], "-1"))
    return WatchConfig(
        agent=environ.get(ENV_AGENT, ""),
        job=environ.get(ENV_JOB) or environ.get("TORCHELASTIC_RUN_ID", ""),
        rank=_number(environ, "RANK") if environ.get("RANK", "").isdecimal() else -1,
        world_size=_number(environ, "WORLD_SIZE"),
        watch=environ.get(ENV_WATCH, "1") not in ("0", "false", "no"),
        timing=environ.get(ENV_TIMING, "0") in ("1", "true", "yes"),
        recorder_entries=int(entries) if entries.lstrip("-").isdecimal() else -1,
        place=_place(environ),
        ras=_ras(environ),
        inspector=(inspector := _inspector(environ)),
        inspector_problem=_inspector_problem(environ) if inspector else "",
    )


def _inspector(environ: Mapping[str, str]) -> str:
    """As the plugin itself makes it up (inspector.cc)."""
    if environ.get("NCCL_INSPECTOR_ENABLE", "0") in ("", "0"):
        return ""
    job = environ.get("SLURM_JOBID", "")
    folder = environ.get("NCCL_INSPECTOR_DUMP_DIR") or (
        f"nccl-inspector-{job if job.isdecimal() else 'unknown-jobid'}"
    )
    with contextlib.suppress(OSError):  # the working directory may be gone
        return str(Path(folder).absolute() / f"{gethostname()}-pid{os.getpid()}.log")
    return ""


def _inspector_problem(environ: Mapping[str, str]) -> str:
    if environ.get("NCCL_INSPECTOR_PROM_DUMP", "0") not in ("", "0"):
        return (
            "NCCL's Inspector is not read: unset NCCL_INSPECTOR_PROM_DUMP, so that it writes JSON"
        )
    interval = environ.get(ENV_INSPECTOR_INTERVAL, "")
    if not interval.isdecimal() or int(interval) == 0:
        return (
            "NCCL's Inspector writes only when a communicator ends: set "
            f"{ENV_INSPECTOR_INTERVAL}={INSPECTOR_INTERVAL_US}, or start the job with `ckptd run`"
        )
    return ""


def _ras(environ: Mapping[str, str]) -> str:
    """NCCL's own variables, with NCCL's defaults."""
    if environ.get("NCCL_RAS_ENABLE", "1") == "0":
        return ""
    return environ.get("NCCL_RAS_ADDR", "localhost:28028")[:256]


def _place(environ: Mapping[str, str]) -> Place:
    """Slurm tells its own; of Kubernetes a pod knows its name, and the rest if it is told."""
    pod = environ.get("POD_NAME", "")
    namespace = environ.get("POD_NAMESPACE", "")
    if "KUBERNETES_SERVICE_HOST" in environ:
        pod = pod or environ.get("HOSTNAME", "")
        with contextlib.suppress(OSError, UnicodeDecodeError):
            namespace = namespace or _NAMESPACE.read_text().strip()
    return Place(
        slurm_job=environ.get("SLURM_JOB_ID", ""),
        slurm_node=environ.get("SLURMD_NODENAME", ""),
        namespace=namespace,
        pod=pod,
        kubernetes_node=environ.get("NODE_NAME", ""),
    )


def _check_one_machine(environ: Mapping[str, str]) -> None:
    """Raise ConfigError if the launcher says that the job spans several machines.

    Each of them would start an embedded agent that knows nothing of the others.
    """
    machines = _number(environ, "GROUP_WORLD_SIZE") or _number(environ, "SLURM_STEP_NUM_NODES")
    ranks, here = _number(environ, "WORLD_SIZE"), _number(environ, "LOCAL_WORLD_SIZE")
    if machines > 1 or 0 < here < ranks:
        seen = f"{machines} machines" if machines > 1 else f"{here} of {ranks} ranks on this one"
        raise ConfigError(
            f"no agent is configured, and the job spans several machines ({seen}): start "
            "`ckptd agent --socket PATH --coordinator ADDRESS ...` on each of them, then set "
            f"{ENV_AGENT}=PATH, or pass Checkpointer(agent=PATH)"
        )


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    return int(value) if value.isdecimal() else 0
