"""What `ckptd run` sets in the environment, before anything imports torch."""

import os

from ckptd.config import (
    ENV_AGENT,
    ENV_INSPECTOR_INTERVAL,
    ENV_JOB,
    ENV_TIMING,
    FLIGHT_RECORDER_ENTRIES,
    FLIGHT_RECORDER_SIZES,
    INSPECTOR_INTERVAL_US,
)

# Measured: with torchrun's defaults the restarted workers of a gloo job reuse the launcher's store
# with stale addresses and never come up; with stores of their own they do.
_DEFAULTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
# What NVIDIA's Inspector, if it is NCCL's profiler plugin, needs so that the agent can follow it.
_INSPECTOR = {
    "NCCL_INSPECTOR_ENABLE": "1",
    ENV_INSPECTOR_INTERVAL: str(INSPECTOR_INTERVAL_US),
    "NCCL_INSPECTOR_DUMP_MIN_SIZE_BYTES": "0",
}


def prepare(job: str, agent: str | None, timing: bool = False) -> None:
    """Set what trainers and torchrun need; what the user has set stays."""
    if not any(name in os.environ for name in FLIGHT_RECORDER_SIZES):
        os.environ[FLIGHT_RECORDER_SIZES[0]] = str(FLIGHT_RECORDER_ENTRIES)
    if timing:
        os.environ[ENV_TIMING] = "1"
    chosen = dict(_DEFAULTS)
    if "inspector" in os.environ.get("NCCL_PROFILER_PLUGIN", "").lower():
        chosen |= _INSPECTOR
    for name, value in chosen.items():
        os.environ.setdefault(name, value)
    os.environ[ENV_JOB] = job
    if agent:
        os.environ[ENV_AGENT] = agent
