"""A process that has imported torch already, and is forked whenever a rank is started.

Most of the time between the death of a trainer and the next step goes into imports. So `ckptd run`
keeps one process that has them behind it (`python -m ckptd.trainer.standby`): a fork server. When
torchrun starts a worker, the standby forks one, which is handed what a new process would be started
with: arguments, environment, and where its output goes. It forks twice, and the process in between
ends at once: the launcher is a *subreaper* meanwhile (prctl(2)) and adopts the worker. So the
worker is the launcher's own child, as torchrun's own are: exit codes and signals are what torchrun
expects, whether the standby lives or not.

A standby that is not there, dead, stopped, or not safe to be forked is not used: then the worker is
started as it always was.
"""

import contextlib
import ctypes
import gc
import importlib
import logging
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from ckptd.watching import STANDBY_NAME

_COMMAND = (sys.executable, "-u", "-m", "ckptd.trainer.script")
"""How torchrun starts a worker; the script and its arguments follow."""
_MODULES = (
    "torch",
    "torch._dynamo",  # imported by whoever makes an optimizer
    "ckptd.trainer.checkpointer",
    "ckptd.trainer.timing",
)
_OWN_VARIABLES = ("RANK", "WORLD_SIZE")
_OWN_PREFIXES = ("GROUP_", "LOCAL_", "MASTER_", "ROLE_", "TORCHELASTIC_", "TORCH_NCCL_")
"""What torchrun gives each rank. Nothing reads it before there is a process group."""
_READY, _ORDER, _GO = b"r", b"o", b"g"
_ANSWER_S, _ADOPTED_EVERY_S = 3.0, 0.001
_PATIENCE_S, _PATIENCE_LIMIT_S = 10.0, 100.0
_FAILURES = 3
_REASON_BYTES = 1000
_BACKENDS = ("torch.cuda", "torch.mtia", "torch.xpu")
_HARMLESS_DEVICES = {1, 4, 5, *range(136, 144)}
"""Major numbers: memory (null, random and so on) and terminals."""
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_COMM, _OOM_SCORE = Path("/proc/self/comm"), Path("/proc/self/oom_score_adj")
_DIRECTORY = "/proc/self/cwd"
_NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"

log = logging.getLogger("ckptd")
_libc = ctypes.CDLL(None, use_errno=True)

Start = Callable[[Any, tuple[str, ...], dict[str, str]], "subprocess.Popen[Any]"]


class Standby:
    """The standby process of this launcher. One that dies is replaced."""

    def __init__(
        self, modules: Sequence[str], shown: Sequence[str], tell: Callable[[str], None]
    ) -> None:
        """Start it; it imports `modules` besides torch. `shown` is only for `ps` to show.

        `tell` hears, once for each reason, why ranks are started without it.
        """
        self._command = [",".join([*_MODULES, *modules]), *shown]
        self._tell, self._told = tell, set[str]()
        self._environ, self._directory = dict(os.environ), os.readlink(_DIRECTORY)
        self._process: _Process | None = None
        self._ready, self._given_up = False, False
        self._failures = 0  # in a row: without a worker in between
        self._began, self._patience_s = monotonic(), 0.0
        self._changed = threading.Condition()  # its lock may be taken again by who holds it
        threading.Thread(target=self._keep, name="ckptd-standby", daemon=True).start()

    def take(
        self, args: Sequence[str], environ: Mapping[str, str], files: tuple[int | None, int | None]
    ) -> "subprocess.Popen[Any] | None":
        """A worker that was forked from it; None if it has to be started cold.

        `files`: descriptors for its output and errors; None: those of this process.
        """
        if unlike := self._unlike(args, environ):
            self.give_up(unlike)
            return None
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._given_up, self._patience())
            if not self._ready or self._process is None:
                return None
            order = _order(args[len(_COMMAND) :], environ, files)
            try:
                pid = self._process.fork(order, files)
            except OSError as error:
                self._process.popen.kill()  # it may only be stopped
                self._refuse(f"it does not answer: {error}")
                return None
            self._failures = 0
        return _Adopted(args, pid)

    def give_up(self, reason: str) -> None:
        """End it for good, and say why."""
        self._refuse(reason)
        self.close()

    def close(self) -> None:
        """End it for good."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()
            if self._process is not None:
                self._process.popen.kill()

    def _unlike(self, args: Sequence[str], environ: Mapping[str, str]) -> str:
        """What would differ between a fork of the standby and such a worker; "" if nothing does."""
        if (*args[: len(_COMMAND)],) != _COMMAND:
            return f"torchrun starts them by way of {args[0]}"
        if os.readlink(_DIRECTORY) != self._directory:
            return "the launcher has changed its directory"
        if differing := _differing(self._environ, environ):
            return f"since the launcher began there have been changes of {', '.join(differing)}"
        return ""

    def _patience(self) -> float:
        """How long to wait for one that still imports: about as long as a cold start would take.

        This process has imported torch, too, before it first wanted a worker.
        """
        took_s = monotonic() - self._began
        if not self._patience_s:
            self._patience_s = min(max(3 * took_s, _PATIENCE_S), _PATIENCE_LIMIT_S)
        return max(self._patience_s - took_s, 0.0)

    def _keep(self) -> None:
        """The thread that has one ready, until that is given up."""
        while True:
            with self._changed:
                if self._given_up:
                    return
                try:
                    self._process = _Process(self._command, self._environ)
                except OSError as error:
                    self.give_up(f"it cannot be started: {error}")
                    return
                self._began = monotonic()
            unfit = self._process.wait_until_ready()
            with self._changed:
                self._ready = unfit == ""
                self._changed.notify_all()
                if unfit:
                    self.give_up(unfit)
            self._process.popen.wait()
            with self._changed:
                self._ready = False
                self._failures += 1
                if self._failures == _FAILURES:
                    self.give_up(f"{_FAILURES} of them have died")

    def _refuse(self, reason: str) -> None:
        if reason not in self._told and not self._given_up:
            self._told.add(reason)
            self._tell(f"ranks are started without the standby process: {reason}")


class _Process:
    """One standby process, as the launcher sees it."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, "-u", "-m", __name__, str(theirs.fileno()), *command],
                env=environ,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def wait_until_ready(self) -> str | None:
        """Why it must not be forked, "" if it may be; None if it has died."""
        try:
            told = self._sock.recv(_REASON_BYTES)
        except OSError:
            return None
        return "" if told == _READY else told.decode(errors="replace") or None

    def fork(self, order: bytes, files: Sequence[int | None]) -> int:
        """The worker, a child of this process from now on. Raises OSError if there is none."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sheet = os.memfd_create("ckptd-standby")
        with ours, open(sheet, "wb", buffering=0) as file, _adopting():
            file.write(order)
            with theirs:
                own = [each for each in files if each is not None]
                socket.send_fds(self._sock, [_ORDER], [sheet, theirs.fileno(), *own])
            ours.settimeout(_ANSWER_S)
            told = ours.recv(8)
            if not told:
                raise BlockingIOError("it could not fork")
            with contextlib.suppress(BrokenPipeError):  # dead already, as any worker may be
                ours.send(_GO)
            return int.from_bytes(told, "little")


class _Adopted(subprocess.Popen[Any]):
    """A child that another process has forked."""

    def __init__(self, args: Sequence[str], pid: int) -> None:
        self._adopted = pid
        super().__init__(args)

    def _execute_child(self, *_: Any) -> None:
        self.pid = self._adopted
        self._child_created = True


class _Order(msgspec.Struct, array_like=True):
    """What a worker is told. As the kernel has it: bytes, in no encoding."""

    launcher: int
    """The process to become a child of."""
    arguments: list[bytes]
    environ: list[tuple[bytes, bytes]]
    redirected: list[int]
    """Which descriptors are replaced by those that come with the order."""


def _order(
    arguments: Sequence[str], environ: Mapping[str, str], files: Sequence[int | None]
) -> bytes:
    return msgspec.msgpack.encode(
        _Order(
            os.getpid(),
            [os.fsencode(each) for each in arguments],
            [(os.fsencode(name), os.fsencode(value)) for name, value in environ.items()],
            [number for number, file in enumerate(files, 1) if file is not None],
        )
    )


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Variables that imports may have read, and that a worker would find to be others."""
    return sorted(
        name
        for name in {*before, *now}
        if before.get(name) != now.get(name)
        and name not in _OWN_VARIABLES
        and not name.startswith(_OWN_PREFIXES)
    )


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Meanwhile, what children of this process leave behind become its children.

    Not for longer: whatever else is orphaned would stay as a zombie. Raises OSError.
    """
    before = ctypes.c_int()
    _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))
    try:
        yield
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(before.value))


def _prctl(option: int, argument: Any) -> None:
    if _libc.prctl(option, argument, *[ctypes.c_ulong(0)] * 3) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")


def install(standby: Standby) -> bool:
    """Have torchrun, in this process, start its workers from it. False: it cannot be."""
    from torch.distributed.elastic.multiprocessing import SignalException
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
            process = standby.take(args, env, (out, err))
        except SignalException:  # how torchrun is told to end
            raise
        except Exception as error:  # whatever it is, there is the way that torchrun knows
            log.warning("ckptd: the standby process could not be used: %s", error)
        return process or cold(handler, args, env)

    setattr(SubprocessHandler, "_popen", start)  # noqa: B010 # torch's own, and not for us
    return True


def main() -> None:
    """Import, and become a worker at each order; end when the launcher does."""
    name, score = _change(_COMM, STANDBY_NAME), _change(_OOM_SCORE, "1000")  # it is the first to go
    sock = socket.socket(fileno=int(sys.argv[1]))
    unfit = _warm_up(sys.argv[2].split(","))
    with contextlib.suppress(OSError):
        sock.send(unfit.encode()[:_REASON_BYTES] or _READY)
    if unfit:
        return
    order = _become_a_worker(sock)
    _change(_COMM, name)
    _change(_OOM_SCORE, score)
    from ckptd.trainer import script

    script.main([os.fsdecode(each) for each in order.arguments])


def _warm_up(modules: Sequence[str]) -> str:
    """Import them; says why this process must not be forked, "" if it may be."""
    os.environ.setdefault(_NVML_CHECK, "1")  # whoever asks whether there is CUDA initialises none
    gc.disable()  # imports make nothing but what stays
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            return f"importing {name}: {type(error).__name__}: {error}"
        if unfit := _unfit():
            return f"importing {name} has {unfit}"
    gc.freeze()  # what is not looked at stays shared
    gc.enable()
    return ""


def _unfit() -> str:
    child = os.fork()  # threads of OpenBLAS end before a fork, and come back when they are needed
    if child == 0:
        backends = [sys.modules[name] for name in _BACKENDS if name in sys.modules]
        os._exit(any(each._is_in_bad_fork() for each in backends))
    _, status = os.waitpid(child, 0)
    if status:
        return "initialised an accelerator"
    if len(os.listdir("/proc/self/task")) > 1:
        known = [each.name for each in threading.enumerate()[1:]]
        return f"started a thread{' ' if known else ''}{', '.join(known)}"
    for file in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the one that lists them is closed
            found = os.fstat(file)
            if (
                file > 2
                and stat.S_ISCHR(found.st_mode)
                and os.major(found.st_rdev) not in _HARMLESS_DEVICES
            ):
                return f"opened {os.readlink(f'/proc/self/fd/{file}')}"
    return ""


def _become_a_worker(sock: socket.socket) -> _Order:
    """Fork at each order, and return in the worker once it is the launcher's."""
    while True:
        files: list[int] = []
        with contextlib.suppress(OSError):
            _, files, _, _ = socket.recv_fds(sock, len(_ORDER), 4)
        if not files:
            os._exit(0)
        try:
            between = os.fork()
        except OSError as error:  # the launcher sees that nobody comes
            log.warning("ckptd: the standby process cannot fork: %s", error)
        else:
            if between == 0:
                sock.close()
                return _begin(files)
            os.waitpid(between, 0)
        for file in files:
            os.close(file)


def _begin(files: list[int]) -> _Order:
    """Leave the process in between behind, and take what comes with the order."""
    if os.fork():
        os._exit(0)
    os.setsid()
    sheet, launcher, *own = files
    with open(sheet, "rb") as file:
        file.seek(0)
        order = msgspec.msgpack.decode(file.read(), type=_Order)
    with socket.socket(fileno=launcher) as answer:
        answer.settimeout(_ADOPTED_EVERY_S)
        while os.getppid() != order.launcher:
            with contextlib.suppress(TimeoutError):
                answer.recv(1)
                os._exit(1)  # it waits no longer
        answer.settimeout(None)
        answer.send(os.getpid().to_bytes(8, "little"))
        if answer.recv(1) != _GO:
            os._exit(1)
    for number, file_number in zip(order.redirected, own, strict=True):
        os.dup2(file_number, number)
        os.close(file_number)
    os.environb.clear()
    os.environb.update(order.environ)
    _begin_random_numbers_anew()
    return order


def _begin_random_numbers_anew() -> None:
    """As in a fresh process, each worker has its own; Python's do so in a fork by themselves."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()


def _change(file: Path, text: str) -> str:
    """What was there before; "" if it cannot be changed."""
    before = ""
    with contextlib.suppress(OSError):
        before = file.read_text().rstrip()
        if text:
            file.write_text(text)
    return before


if __name__ == "__main__":
    main()
