"""Runs the programs of an actuator: bounded in time and output, and tried again."""

import asyncio
import contextlib
import os
import signal
import tempfile

import structlog

from ckptd.coordinator.diagnosis.actuators import Program

TRIES = 3
_PAUSE_S = 2.0
_OUTPUT_BYTES = 1000

log = structlog.get_logger()


async def run_program(program: Program, timeout_s: float) -> str:
    """Run it, again if it fails; returns "" or why it has failed, with the end of its output."""
    failure = ""
    for attempt in range(TRIES):
        if attempt:
            await asyncio.sleep(_PAUSE_S)
        failure = await _run_once(program, timeout_s)
        if not failure:
            return ""
        log.warning("actuator", program=str(program), attempt=attempt + 1, failure=failure)
    return f"{failure} ({TRIES} times)"


async def _run_once(program: Program, timeout_s: float) -> str:
    # Into a file: a program may leave something behind that holds a pipe open.
    with tempfile.TemporaryFile() as output:
        try:
            process = await asyncio.create_subprocess_exec(
                *program.argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **program.environ},
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return f"cannot be run: {error}"
        try:
            async with asyncio.timeout(timeout_s):
                await process.communicate(program.stdin)
            failure = f"exit status {process.returncode}" if process.returncode else ""
        except TimeoutError:
            failure = f"killed after {timeout_s:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()
        size_bytes = output.seek(0, os.SEEK_END)
        output.seek(max(0, size_bytes - _OUTPUT_BYTES))
        said = " ".join(output.read().decode(errors="replace").split())
    return f"{failure}: {said}" if failure and said else failure
