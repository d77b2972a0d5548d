"""The embedded agent: one process for this user and machine, for those who configure no agent.

It is `ckptd embedded` (`cli/embedded.py`), an agent with a coordinator of its own, and outlives the
trainer that starts it. This file is how it is found and started; `ckptd stop`, `status`, `ls` and
`rm` find it here, too.

It holds a lock for as long as it lives, so that nothing that a dead one left behind is taken for a
live one. It inherits that lock, locked, from who starts it: so only one can be starting, too, and
when its starter dies in the middle, the others still wait for it.
"""

import contextlib
import fcntl
import logging
import os
import select
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from ckptd.config import runtime_dir
from ckptd.errors import AgentUnreachable, ConfigError, ProtocolError
from ckptd.wire import AgentToLauncher, Decoder, WhereAmI, encode

_PATH_LIMIT_BYTES = 107  # a Unix socket's, without the final zero
_POLL_S = 0.05
_ANSWER_S = 30.0
_SAY_S = 2.0
_LOG_LINES = 6
_LOG_END_BYTES = 4096
_PEERCRED = struct.Struct("3i")
_WAY_OUT = (
    "set XDG_RUNTIME_DIR to a directory of your own, or start an agent with `ckptd agent` and set "
    "CKPTD_AGENT to its socket"
)

log = logging.getLogger("ckptd")


@dataclass(frozen=True, slots=True)
class Places:
    """The files of the embedded agent, in its runtime directory."""

    directory: Path

    @property
    def socket(self) -> Path:
        """Unix socket for trainers."""
        return self.directory / "embedded.sock"

    @property
    def coordinator(self) -> str:
        """ZeroMQ address of the coordinator inside."""
        return f"ipc://{self.directory}/embedded.control"

    @property
    def lock(self) -> Path:
        """Held by the agent while it lives; says, for people and `ckptd stop`, who it is."""
        return self.directory / "embedded.lock"

    @property
    def log(self) -> Path:
        return self.directory / "embedded.log"

    def claim(self) -> None:
        """Make the directory. Raises ConfigError if it cannot be this user's alone."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.directory.lstat()
            if self._wrong(found):
                raise ConfigError(
                    f"the runtime directory {self.directory} {self._wrong(found)}; {_WAY_OUT}"
                )
            if found.st_mode & 0o077:
                self.directory.chmod(0o700)
        except OSError as error:
            raise ConfigError(
                f"cannot use the runtime directory {self.directory}: {error.strerror}; {_WAY_OUT}"
            ) from error
        if len(os.fsencode(self.coordinator)) > _PATH_LIMIT_BYTES:
            raise ConfigError(
                f"the runtime directory {self.directory} is too long for a socket in it; {_WAY_OUT}"
            )

    def _wrong(self, found: os.stat_result) -> str:
        if not stat.S_ISDIR(found.st_mode):
            return "is not a directory"
        if found.st_uid != os.getuid():
            return f"belongs to user {found.st_uid}, and you are {os.getuid()}"
        if found.st_mode & 0o022:
            return f"can be written by others: chmod 700 {self.directory}"
        return ""

    def running(self) -> bool:
        """Whether an embedded agent lives; it may be one that does not listen yet, or no more."""
        try:
            if self._wrong(self.directory.lstat()):
                return False
            fd = os.open(self.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            return not _lock(fd, fcntl.LOCK_SH)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def held(self, timeout_s: float = 0.0) -> Iterator[int | None]:
        """Hold the lock: gives its descriptor, or None if somebody else keeps holding it."""
        fd = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        deadline = monotonic() + timeout_s
        try:
            while not (mine := _lock(fd, fcntl.LOCK_EX)) and monotonic() < deadline:
                sleep(_POLL_S)
            yield fd if mine else None
        finally:
            os.close(fd)


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def places() -> Places:
    """Where this user's embedded agent is, or would be."""
    return Places(runtime_dir())


def ensure(deadline: float) -> None:
    """Return once the embedded agent answers; start it if there is none.

    Raises ConfigError for an unusable runtime directory, ProtocolError if an agent of another
    version runs, and AgentUnreachable if none can be started, or answers, before `deadline`
    (monotonic).
    """
    where = places()
    where.claim()
    say_at = monotonic() + _SAY_S
    while not _answers(where, deadline):
        now = monotonic()
        if now >= deadline:
            raise AgentUnreachable(
                f"the embedded agent holds {where.lock} and does not listen; see {where.log}, and "
                "stop it with `ckptd stop`"
            )
        try:
            with where.held() as lock:
                if lock is not None:
                    _start(where, lock, deadline)
                    return
        except OSError as error:
            raise AgentUnreachable(
                f"cannot start the embedded agent in {where.directory}: {error}; {_WAY_OUT}"
            ) from error
        if now >= say_at:
            log.warning("ckptd: waiting for the embedded agent; see %s", where.log)
            say_at = deadline
        sleep(_POLL_S)


def _answers(where: Places, deadline: float) -> bool:
    """Whether the embedded agent takes trainers; False if it is not there (any more, or yet)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as conn:
        conn.settimeout(max(_POLL_S, min(_ANSWER_S, deadline - monotonic())))
        try:
            conn.connect(str(where.socket))
            conn.send(encode(WhereAmI()))
            frame = conn.recv(1 << 16)
        except TimeoutError:
            raise AgentUnreachable(
                f"the embedded agent at {where.socket} (process {peer(conn)}) does not answer; "
                "stop it with `ckptd stop`"
            ) from None
        except (FileNotFoundError, ConnectionError, BlockingIOError):
            return False
        except OSError as error:
            raise AgentUnreachable(
                f"the embedded agent at {where.socket} cannot be reached: {error}; {_WAY_OUT}"
            ) from error
    if not frame:
        return False
    try:
        Decoder[AgentToLauncher](AgentToLauncher).decode(frame)
    except ProtocolError as error:
        raise ProtocolError(
            f"the embedded agent at {where.socket} was started by another version of ckptd: "
            f"{error}; stop it with `ckptd stop`, and the next run starts its own"
        ) from error
    return True


def peer(conn: socket.socket) -> int:
    """The process at the other end, as this process would name it; 0 if it cannot."""
    creds = conn.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid: int = _PEERCRED.unpack(creds)[0]
    return pid


def _start(where: Places, lock: int, deadline: float) -> None:
    """Start it and wait until it is ready; it ends the pipe by saying so, or by dying."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.ExitStack() as stack:
        output = os.open(where.log, flags, 0o600)
        stack.callback(os.close, output)
        before = os.fstat(output).st_size
        ready, told = os.pipe()
        stack.callback(os.close, ready)
        try:
            _spawn((told, lock), output, deadline)
        finally:
            os.close(told)
        if not _is_ready(ready, deadline):
            raise AgentUnreachable(
                f"the embedded agent did not start: {_end_of_log(output, before)}\n"
                f"(its log is {where.log}; to use an agent that you start with `ckptd agent`, set "
                "CKPTD_AGENT to its socket)"
            )
    log.warning(
        "ckptd: no agent is configured: started one for this machine; it ends when it is no longer "
        "needed, or with `ckptd stop` (log: %s)",
        where.log,
    )


def _spawn(handed: tuple[int, int], output: int, deadline: float) -> None:
    """Run the command that leaves the agent behind; `handed` is all that it inherits."""
    # -P: what lies in the working directory is never taken for a module.
    command = [sys.executable, "-P", "-m", "ckptd.cli", "embedded", "--handed", *map(str, handed)]
    with contextlib.suppress(subprocess.TimeoutExpired):  # the pipe will tell
        subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=handed,
            cwd="/",
            start_new_session=True,
            timeout=max(1.0, deadline - monotonic()),
            check=False,
        )


def _is_ready(pipe: int, deadline: float) -> bool:
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    left_ms = max(0, int(1000 * (deadline - monotonic())))
    return bool(poll.poll(left_ms)) and os.read(pipe, 1) != b""


def _end_of_log(log_fd: int, begin: int) -> str:
    """The last lines of what was said since the log had `begin` bytes."""
    begin = max(begin, os.fstat(log_fd).st_size - _LOG_END_BYTES)
    text = os.pread(log_fd, _LOG_END_BYTES, begin).decode(errors="replace")
    return "\n".join(text.strip().splitlines()[-_LOG_LINES:]) or "it said nothing"
