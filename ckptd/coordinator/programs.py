"""Runs the programs of an actuator: bounded in time, whatever they say, and tried again."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator

import structlog

from ckptd.coordinator.diagnosis.actuators import Program

TRIES = 3
_PAUSE_S = 2.0
_OUTPUT_BYTES = 1000
_PIPE_BYTES = 1 << 20
"""More than a pipe holds."""

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
    output = bytearray()
    try:
        with _heard(output) as said:
            failure = await _run_to_its_end(program, timeout_s, said)
    except (OSError, ValueError) as error:
        return f"cannot be run: {error}"
    text = " ".join(output.decode(errors="replace").split())
    return f"{failure}: {text}" if failure and text else failure


async def _run_to_its_end(program: Program, timeout_s: float, output: int) -> str:
    process = await asyncio.create_subprocess_exec(
        *program.argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=output,
        stderr=output,
        env={**os.environ, **program.environ},
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(timeout_s):
            await process.communicate(program.stdin)
        return f"exit status {process.returncode}" if process.returncode else ""
    except TimeoutError:
        return f"killed after {timeout_s:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()


@contextlib.contextmanager
def _heard(tail: bytearray) -> Iterator[int]:
    """A pipe for a program to write to, of which the last bytes come to be in `tail`.

    Nobody waits for its end: a program may leave something behind that holds it open.
    """
    reading, writing = os.pipe()
    loop = asyncio.get_running_loop()

    def read() -> None:
        with contextlib.suppress(BlockingIOError):
            tail.extend(os.read(reading, _PIPE_BYTES))
            del tail[:-_OUTPUT_BYTES]

    try:
        os.set_blocking(reading, False)
        loop.add_reader(reading, read)
        try:
            yield writing
        finally:
            loop.remove_reader(reading)
        read()
    finally:
        os.close(reading)
        os.close(writing)
