"""Settings from the environment: the one file that reads it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ckptd.errors import ConfigError
from ckptd.ids import check_job_id

ENV_JOB = "CKPTD_JOB"
ENV_AGENT = "CKPTD_AGENT"
ENV_COORDINATOR = "CKPTD_COORDINATOR"
ENV_RENDEZVOUS = "CKPTD_RENDEZVOUS"


@dataclass(frozen=True, slots=True)
class TrainerConfig:
    """What a Checkpointer needs to know besides its arguments."""

    job: str
    """Job id; the same after every restart."""
    agent: str
    """Path of the Unix socket of this node's agent."""


def trainer_config(
    job: str | None, agent: str | None, environ: Mapping[str, str] = os.environ
) -> TrainerConfig:
    """Arguments over environment. Raises ConfigError for what is missing or unusable.

    The job id is looked for in `CKPTD_JOB`, then torchrun's `--rdzv-id`, then Slurm's job id.
    """
    found = job
    for variable in (ENV_JOB, "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        if found is None:
            found = environ.get(variable)
    if agent is None:
        agent = environ.get(ENV_AGENT)
    if not agent:
        raise ConfigError(
            "no agent is configured: start one on this node with `ckptd agent --socket PATH ...`, "
            f"then set {ENV_AGENT}=PATH, or pass Checkpointer(agent=PATH)"
        )
    return TrainerConfig(check_job_id(found or ""), agent)
