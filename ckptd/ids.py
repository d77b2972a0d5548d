"""Names of things: jobs, nodes, snapshots."""

import re
from typing import Annotated

import msgspec

from ckptd.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Names become file names, so what comes off the wire or out of a file is checked as it is decoded.
_CHECKED = msgspec.Meta(pattern=rf"^{_NAME.pattern}\Z")
JobId = Annotated[str, _CHECKED]
NodeId = Annotated[str, _CHECKED]
# Whoever adds to a number must still be able to say it in 64 bits, and loops over ranks must end.
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
RANKS_LIMIT = 1 << 20
Rank = Annotated[int, msgspec.Meta(ge=0, lt=RANKS_LIMIT)]
WorldSize = Annotated[int, msgspec.Meta(ge=0, le=RANKS_LIMIT)]
_RANDOM = re.compile(r"[0-9a-fA-F]{8}-?([0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}")


class SnapshotId(msgspec.Struct, frozen=True, order=True, array_like=True):
    """The state of `job` after `step` of `life`. Within a job, ordered by (life, step)."""

    job: JobId
    life: Count
    step: Count

    def __str__(self) -> str:
        return f"{self.job}/{self.life}.{self.step}"


def check_job_id(job: str) -> str:
    """`job` itself, if it can name a job across restarts.

    Raises ConfigError for an empty or malformed id, for torchrun's default `none`, and for
    anything that looks like a random id, because a restarted job would not find its snapshots.
    """
    way_out = (
        "give the job a name that stays the same when it is restarted: "
        "Checkpointer(job=...), CKPTD_JOB=..., or `ckptd run --job NAME`"
    )
    if job.lower() in ("", "none"):
        raise ConfigError(f"the job id is {job!r}, which does not name a job; {way_out}")
    if _RANDOM.fullmatch(job):
        raise ConfigError(
            f"the job id {job!r} looks random, so a restarted job would not find its snapshots; "
            f"{way_out}"
        )
    return _check_name("job id", job)


def check_node_id(node: str) -> str:
    """`node` itself, if it can name a node. Raises ConfigError otherwise."""
    return _check_name("node id", node)


def _check_name(what: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"the {what} {name!r} is not usable: 1 to 128 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        )
    return name
