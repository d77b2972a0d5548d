"""Processes that have imported torch already, and wait to be told which rank they are.

Most of the time between the death of a trainer and the next step goes into imports. Under
`ckptd run --standby` the launcher keeps one process for each of its ranks that has them behind it
(`python -m ckptd.trainer.standby`). When torchrun starts a worker, such a process is handed what a
new one would be started with: arguments, environment, and where its output goes. It is a child of
the launcher and leads a session, as torchrun's own workers are and do, so exit codes and signals
are what torchrun expects.

A standby that is not there, not ready, dead or stopped is not used: then the worker is started as
it always was.
"""

import contextlib
import gc
import importlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

_WORKER = ("-u", "-m", "ckptd.trainer.script")
_MODULES = (
    "torch",
    "torch._dynamo",  # imported by whoever makes an optimizer
    "ckptd.trainer.checkpointer",
    "ckptd.trainer.timing",
)
_READY, _TAKEN = b"r", b"t"
_ANSWER_S = 2.0
_QUIET_S = 10.0
"""So long after workers were started, they have the processors for themselves."""
_LOOK_EVERY_S = 0.2
_FAILURES = 3
_OOM_SCORE = Path("/proc/self/oom_score_adj")

log = logging.getLogger("ckptd")

Start = Callable[[Any, tuple[str, ...], dict[str, str]], "subprocess.Popen[Any]"]


class Standbys:
    """The standby processes of one launcher."""

    def __init__(
        self,
        count: int,
        modules: Sequence[str],
        script: Sequence[str],
        tell: Callable[[str], None] = log.info,
    ) -> None:
        """Keep `count`, which import `modules` besides torch; `script` is only for `ps` to show.

        `tell` hears when all are ready.
        """
        self._count, self._tell = count, tell
        self._modules = [*_MODULES, *modules]
        self._script = list(script)
        self._ready: list[_Standby] = []
        self._warming: _Standby | None = None
        self._quiet_until = monotonic() + _QUIET_S
        self._failures = 0
        self._mutex = threading.Lock()

    def keep(self, at_once: bool) -> None:
        """Have them from now on, until this process ends; `at_once`: nobody needs the time."""
        if at_once:
            self._quiet_until = monotonic()
        threading.Thread(target=self._keep, name="ckptd-standby", daemon=True).start()

    def take(
        self, args: Sequence[str], environ: Mapping[str, str], files: tuple[int | None, int | None]
    ) -> "subprocess.Popen[Any] | None":
        """One that is a worker from now on; None if it has to be started cold.

        `files`: descriptors for its output and errors; None: those of this process.
        """
        begin = len(_WORKER) + 1
        if (*args[:begin],) != (sys.executable, *_WORKER):
            return None
        order = _order(args[begin:], environ, files)
        with self._mutex:
            self._quiet_until = monotonic() + _QUIET_S
            if self._warming is not None:
                self._warming.kill()
                self._warming = None
            while self._ready:
                standby = self._ready.pop(0)
                if standby.hand_over(order, [each for each in files if each is not None]):
                    return standby.process
                standby.kill()
        return None

    def _keep(self) -> None:
        look = threading.Event()
        while self._failures < _FAILURES:
            try:
                with self._mutex:
                    self._look()
            except OSError as error:
                self._failures += 1
                log.warning("ckptd: no standby process could be started: %s", error)
            look.wait(_LOOK_EVERY_S)
        log.warning("ckptd: standby processes do not come up; ranks are started without them")

    def _look(self) -> None:
        """Note what has become ready or has died; start one more if one is missing.

        One at a time: imports take a processor, and the job may need the others.
        """
        self._ready = [each for each in self._ready if each.process.poll() is None]
        warming = self._warming
        if warming is not None:
            if warming.is_ready():
                self._ready.append(warming)
                self._warming, self._failures = None, 0
                if len(self._ready) == self._count:
                    self._tell(f"{self._count} standby processes are ready")
            elif warming.process.poll() is not None:
                self._warming = None
                self._failures += 1
        elif len(self._ready) < self._count and monotonic() >= self._quiet_until:
            self._warming = _Standby(self._modules, self._script)


class _Standby:
    """One of them, as the launcher sees it."""

    def __init__(self, modules: Sequence[str], script: Sequence[str]) -> None:
        self._sock, theirs = socket.socketpair()
        with theirs:
            told = (str(theirs.fileno()), ",".join(modules), *script)
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", __name__, *told],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._sock.setblocking(False)

    def is_ready(self) -> bool:
        try:
            return self._sock.recv(1) == _READY
        except OSError:
            return False

    def hand_over(self, order: bytes, files: list[int]) -> bool:
        """Whether it has taken the order."""
        sheet = os.memfd_create("ckptd-standby")
        try:
            os.pwrite(sheet, order, 0)
            self._sock.settimeout(_ANSWER_S)
            socket.send_fds(self._sock, [_TAKEN], [sheet, *files])
            return self._sock.recv(1) == _TAKEN
        except OSError:
            return False
        finally:
            os.close(sheet)
            self._sock.close()

    def kill(self) -> None:
        self.process.kill()
        self._sock.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)


class _Order(msgspec.Struct, array_like=True):
    """What a standby is told. As the kernel has it: bytes, in no encoding."""

    arguments: list[bytes]
    environ: list[tuple[bytes, bytes]]
    redirected: list[int]
    """Which descriptors are replaced by those that come with the order."""


def _order(
    arguments: Sequence[str], environ: Mapping[str, str], files: Sequence[int | None]
) -> bytes:
    return msgspec.msgpack.encode(
        _Order(
            [os.fsencode(each) for each in arguments],
            [(os.fsencode(name), os.fsencode(value)) for name, value in environ.items()],
            [number for number, file in enumerate(files, 1) if file is not None],
        )
    )


def install(standbys: Standbys) -> bool:
    """Have torchrun, in this process, start its workers from `standbys`. False: it cannot be."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    cold: Start | None = getattr(SubprocessHandler, "_popen", None)
    if cold is None:
        return False

    def start(handler: Any, args: tuple[str, ...], env: dict[str, str]) -> Any:
        process = None
        try:
            out, err = (
                file.fileno() if file else None for file in (handler._stdout, handler._stderr)
            )
            process = standbys.take(args, env, (out, err))
        except Exception as error:  # whatever it is, there is the way that torchrun knows
            log.warning("ckptd: a standby process could not be used: %s", error)
        return process or cold(handler, args, env)

    setattr(SubprocessHandler, "_popen", start)  # noqa: B010 # torch's own, and not for us
    return True


def main() -> None:
    """Import, wait, and become a worker; end when the launcher does."""
    score = _be_first_to_go()
    sock = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()  # imports make nothing but what stays
    for name in sys.argv[2].split(","):
        importlib.import_module(name)
    gc.enable()
    from ckptd.trainer import script

    try:
        sock.send(_READY)
        _, files, _, _ = socket.recv_fds(sock, 1, 3)
        if not files:
            os._exit(0)
        sock.send(_TAKEN)
    except OSError:
        os._exit(0)
    sock.close()
    _be_as_before(score)
    with open(files[0], "rb") as sheet:
        order = msgspec.msgpack.decode(sheet.read(), type=_Order)
    for number, file in zip(order.redirected, files[1:], strict=True):
        os.dup2(file, number)
        os.close(file)
    os.environb.clear()
    os.environb.update(order.environ)
    script.main([os.fsdecode(each) for each in order.arguments])


def _be_first_to_go() -> str:
    """When memory runs out, a standby ends before anything that is needed."""
    try:
        score = _OOM_SCORE.read_text()
        _OOM_SCORE.write_text("1000")
    except OSError:
        return ""
    return score


def _be_as_before(score: str) -> None:
    if score:
        with contextlib.suppress(OSError):
            _OOM_SCORE.write_text(score)


if __name__ == "__main__":
    main()
