"""Asks a trainer's worker server, over its Unix socket, with a deadline and a limit."""

import asyncio
import contextlib
import os
import socket
import struct
from pathlib import Path

from ckptd.errors import Gone, ProtocolError

ENTRIES = "fr_trace_json"
ENTRIES_OF_NCCL = "dump_nccl_trace_json"
"""There if PyTorch was built with NCCL; the other one has nothing of it."""
STACKS = "dump_traceback"
NATIVE_STACKS = "pyspy_dump"
ANSWER_LIMIT_BYTES = 16 << 20
"""A recorder of 2,000 entries, torch's default, answers about 1 MB."""

_HEAD_LIMIT_BYTES = 16 << 10
_PEERCRED = struct.Struct("3i")


async def ask(path: Path, handler: str, timeout_s: float) -> bytes:
    """What the handler answers.

    Raises TimeoutError when the answer is not there in time (a stopped process, or one that is
    very busy), Gone when nobody listens any more, ProtocolError when the answer is none.
    """
    async with asyncio.timeout(timeout_s):
        # Connecting blocks once a process that accepts nothing has a few who wait.
        sock = await _connect(path)
        try:
            reader, writer = await asyncio.open_unix_connection(sock=sock, limit=_HEAD_LIMIT_BYTES)
        except BaseException:
            sock.close()
            raise
        try:
            writer.write(
                f"POST /handler/{handler} HTTP/1.1\r\nHost: trainer\r\nContent-Length: 0\r\n"
                "Connection: close\r\n\r\n".encode()
            )
            return await _answer(reader, handler)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise Gone(f"the trainer hung up: {error}") from error
        finally:
            writer.transport.abort()


async def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.setblocking(False)
    try:
        while True:
            try:
                sock.connect(str(path))
                break
            except BlockingIOError:
                await asyncio.sleep(0.05)
        _, uid, _ = _PEERCRED.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        )
        if uid not in (0, os.getuid()):
            raise Gone(f"{path} belongs to user {uid}")
    except OSError as error:
        sock.close()
        raise Gone(f"nobody listens at {path}: {error}") from error
    except BaseException:
        sock.close()
        raise
    return sock


async def _answer(reader: asyncio.StreamReader, handler: str) -> bytes:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError as error:
        raise ProtocolError(
            f"{handler}: a header of more than {_HEAD_LIMIT_BYTES} bytes"
        ) from error
    status, *lines = head.decode("latin-1").split("\r\n")
    fields = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    length = fields.get("content-length", "")
    if not length.isdecimal() or int(length) > ANSWER_LIMIT_BYTES:
        raise ProtocolError(f"{handler}: content-length is {length[:40]!r}")
    body = await reader.readexactly(int(length))
    if status.split()[1:2] != ["200"]:
        text = body[:200].decode(errors="replace")
        raise ProtocolError(f"{handler}: the trainer answers {status[:60]!r}: {text.strip()}")
    return body


async def stacks(path: Path, timeout_s: float) -> str:
    """Python stacks of all threads; with the native ones, if py-spy is there. Raises as `ask`."""
    text = (await ask(path, STACKS, timeout_s)).decode(errors="replace")
    with contextlib.suppress(TimeoutError, Gone, ProtocolError):
        native = await ask(path, NATIVE_STACKS, timeout_s)
        text += "\n-- py-spy --\n" + native.decode(errors="replace")
    return text
