"""A guarantee from outside that there is one coordinator: who holds the lease is the one."""

import fcntl
import os
from pathlib import Path
from typing import Protocol

import msgspec

from ckptd.errors import ConfigError, Superseded


class Lease(Protocol):
    """Held from `acquire` to `release`, or to the end of the process."""

    @property
    def exclusive(self) -> bool:
        """Whether its holder is certainly the only one, so that it may take over."""
        ...

    @property
    def lost(self) -> str:
        """Why it is no longer held, or ""."""
        ...

    def acquire(self) -> int:
        """Become the holder; returns the highest term that it has seen.

        Raises Superseded if somebody else is the holder, ConfigError if it cannot be used.
        """
        ...

    def record(self, term: int) -> None:
        """Called before anything is ordered in `term`. Raises ConfigError if it cannot be kept."""
        ...

    def release(self) -> None:
        """Let somebody else hold it."""
        ...


class NoLease:
    """No guarantee: what agents say decides."""

    exclusive = False
    lost = ""

    def acquire(self) -> int:
        return 0

    def record(self, term: int) -> None:
        pass

    def release(self) -> None:
        pass


class _Held(msgspec.Struct):
    """The lease file's content, in JSON."""

    term: int = 0
    host: str = ""
    pid: int = 0


class FileLease:
    """A file on this machine, or on a file system that all machines share and that can lock.

    A stopped process keeps its lock: to replace it, kill it.
    """

    exclusive = True
    lost = ""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._term = 0

    def acquire(self) -> int:
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"cannot use the lease file {self._path}: {error.strerror}; choose another "
                "--lease-file"
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = self._read()
            self.release()
            raise Superseded(
                f"another coordinator, process {held.pid} on {held.host}, holds the lease file "
                f"{self._path}; stop that one first"
            ) from None
        except OSError as error:
            self.release()
            raise ConfigError(
                f"cannot lock the lease file {self._path}: {error.strerror}; choose a file system "
                "with locks for --lease-file"
            ) from error
        held = self._read()
        self._term = held.term
        self._write(held.term)
        return held.term

    def record(self, term: int) -> None:
        if term > self._term:
            self._write(term)
            self._term = term

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> _Held:
        raw = os.pread(self._fd, 4096, 0)
        try:
            return msgspec.json.decode(raw, type=_Held) if raw.strip() else _Held()
        except msgspec.MsgspecError as error:
            self.release()
            raise ConfigError(
                f"the lease file {self._path} is not one of ours: {error}; choose another "
                "--lease-file, or delete it"
            ) from error

    def _write(self, term: int) -> None:
        """In place: a new file would not have the lock. Padded, so that no old digits are left."""
        content = msgspec.json.encode(_Held(term, os.uname().nodename, os.getpid())) + b"\n"
        try:
            os.pwrite(self._fd, content.ljust(512), 0)
            os.fsync(self._fd)
        except OSError as error:
            raise ConfigError(
                f"cannot write the lease file {self._path}: {error.strerror}"
            ) from error
