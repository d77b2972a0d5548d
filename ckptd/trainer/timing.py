"""The opt-in source that times every collective and point-to-point call (`CKPTD_TIMING=1`).

All calls on all process groups, from Python, from DDP's reducer and from functional collectives,
pass PyTorch's dispatcher as operators of `c10d`. A kernel at the dispatch key BackendSelect, which
comes before the device's and at which these operators have none, notes the time and passes on. So
no process group is replaced and no kernel is overridden: `get_backend()` and everything else stay
as they are. (A process group of our own, delegating, would change what programs see of their
backend; a subclass, or a kernel called by `call_boxed`, hangs under load with the lock of the
interpreter held.)

An end is the completion of the operation's future; where gloo has none (reduce_scatter, send,
recv), the return of `wait()`, if that had to wait: else how long it took is not known. On CUDA it
is an event on the stream, looked at by a small thread.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from ckptd.config import ENV_TIMING
from ckptd.ring import CAPACITY, OPS, Record, RingWriter
from ckptd.trainer.cuda_timing import CudaTimes, mark
from ckptd.trainer.worker_server import Shown, dump_recorder

_NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "barrier": "barrier",
    "monitored_barrier_": "barrier",
    "send": "send",
    "recv_": "recv",
    "recv_any_source_": "recv",
}
_UNWAITED_LIMIT = 1024
_AT_ONCE_NS = 200_000
_AT_ONCE_SHARE = 0.1
"""Of the time before `wait()`: on a busy machine waiting for nothing takes milliseconds, too."""

log = logging.getLogger("ckptd")


class Timing:
    """Times the calls of this process into a ring, from construction until `stop()`."""

    def __init__(self, shown: Shown, capacity: int = CAPACITY) -> None:
        """Raises OSError if there is no place for the ring, RuntimeError for another PyTorch."""
        from torch._C import DispatchKey, _dispatch_keyset_full_after

        self._shown, self._pid = shown, os.getpid()
        self._rest = _dispatch_keyset_full_after(DispatchKey.BackendSelect)
        self._ring = RingWriter(shown.ring_path(), capacity)
        self._mutex = threading.Lock()
        self._groups: dict[str, _Group] = {}
        self._unwaited: dict[int, tuple[Any, _Started]] = {}
        """Operations without a future, by the id of the work that is held here."""
        self._told = ""
        self._cuda = CudaTimes(self._ring.end)
        library: Any = torch.library.Library
        self._library = library("c10d", "IMPL")
        for name, op in _NAMES.items():
            packet = getattr(torch.ops.c10d, name, None)
            if packet is not None:
                kernel = self._kernel(packet.default, op)
                self._library.impl(name, kernel, "BackendSelect", with_keyset=True)
        self._wait = dist.Work.wait
        dist.Work.wait = self._waiting()  # type: ignore[method-assign]

    def stop(self) -> None:
        """Time no more; the calls go where they went before."""
        dist.Work.wait = self._wait  # type: ignore[method-assign]
        self._library._destroy()
        self._cuda.close()
        self._shown.ring_path().unlink(missing_ok=True)

    def _kernel(self, target: Any, op: str) -> Callable[..., Any]:
        call = _Call(target._schema)
        number = OPS.index(op)

        def timed(keys: Any, *arguments: Any) -> Any:
            started = None
            try:
                if os.getpid() == self._pid and not _is_capturing(call.tensors(arguments)):
                    began_ns = time.time_ns(), time.perf_counter_ns()
                    record = self._enter(call, number, arguments, began_ns[0])
                    started = _Started(record, began_ns[1], mark(call.tensors(arguments)))
            except Exception as error:  # whatever it is, the operation itself goes on
                self._tell(error)
            answer = target.redispatch(keys & self._rest, *arguments)
            if started is not None:
                try:
                    self._follow(started, answer, call)
                except Exception as error:
                    self._tell(error)
            return answer

        return timed

    def _enter(self, call: "_Call", op: int, arguments: Sequence[Any], now_ns: int) -> Record:
        group_of = dist.ProcessGroup.unbox(arguments[call.group])
        group = self._group(group_of)
        peer = call.peer(arguments)
        if call.is_p2p:
            seq = group.count_pair(call.sends, peer)
            peer = group.ranks[peer] if 0 <= peer < len(group.ranks) else -1
        else:
            seq = group.count(group_of)
            peer = -1
        size = sum(each.nbytes for each in call.tensors(arguments))
        return self._ring.enter(seq, size, now_ns, peer, group.number, op)

    def _group(self, group_of: Any) -> "_Group":
        name = group_of.group_name
        group = self._groups.get(name)
        if group is not None and not group.begun_anew(group_of):
            return group
        with self._mutex:
            listed = self._shown.publish_groups()
            for number, info in reversed(list(enumerate(listed))):
                if info.group == name:
                    self._groups[name] = made = _Group(number, info.ranks, _seq_so_far(group_of))
                    return made
        raise LookupError(f"process group {name!r} is not listed yet")

    def _follow(self, started: "_Started", answer: Any, call: "_Call") -> None:
        """Have the end of the operation written down when it comes."""
        if call.blocks:
            self._end(started)
            return
        boxed = answer[-1] if isinstance(answer, tuple | list) else answer
        if boxed is None:  # part of a coalesced operation, whose end is seen there
            return
        work = dist.Work.unbox(boxed)

        def ended(_: Any) -> None:
            if started.event is not None:
                self._cuda.follow(started.record, started.event)
            else:
                self._end(started)

        try:
            work.get_future().add_done_callback(ended)
        except RuntimeError:
            with self._mutex:
                self._unwaited[id(work)] = (work, started)
                if len(self._unwaited) > _UNWAITED_LIMIT:
                    del self._unwaited[next(iter(self._unwaited))]

    def _end(self, started: "_Started") -> None:
        self._ring.end(started.record, time.perf_counter_ns() - started.began_ns)

    def _end_waited(self, started: "_Started", called_ns: int) -> None:
        """The end of an operation that has no future. If there was nothing to wait for any more, it
        came at some time before: its duration would have the program's own time in it."""
        blocked_ns = time.perf_counter_ns() - called_ns
        before_ns = called_ns - started.began_ns
        if before_ns >= _AT_ONCE_NS and blocked_ns < max(_AT_ONCE_NS, _AT_ONCE_SHARE * before_ns):
            self._ring.end(started.record, -1)
        else:
            self._end(started)

    def _waiting(self) -> Callable[..., bool]:
        original, unwaited, mutex = self._wait, self._unwaited, self._mutex

        def wait(work: Any, *arguments: Any, **named: Any) -> bool:
            found = None
            if unwaited:
                with mutex:
                    found = unwaited.pop(id(work), None)
            called_ns = time.perf_counter_ns()
            done: bool = original(work, *arguments, **named)
            if found is not None:
                self._end_waited(found[1], called_ns)
            return done

        return wait

    def _tell(self, error: Exception) -> None:
        if str(error) != self._told:
            self._told = str(error)
            log.info("ckptd: a collective was not timed: %s", error)


@dataclass(frozen=True, slots=True)
class _Started:
    """An operation that is under way."""

    record: Record
    began_ns: int
    """On the clock that only goes forward."""
    event: torch.cuda.Event | None


class _Call:
    """Where the arguments of an operator are, by its schema."""

    def __init__(self, schema: Any) -> None:
        names = [argument.name for argument in schema.arguments]
        self.group = names.index("process_group")
        self.sends = "dst" in names
        self._peer = names.index("dst") if self.sends else -1
        if "src" in names:
            self._peer = names.index("src")
        self.is_p2p = "tag" in names
        self.blocks = not schema.returns
        """Whether it is over when it returns: a monitored barrier."""
        inputs = ("tensors", "input_tensors", "input", "input_tensor", "inputs", "tensor")
        self._tensors = next((names.index(name) for name in inputs if name in names), -1)

    def peer(self, arguments: Sequence[Any]) -> int:
        """The other rank in the group; -1: none, or any."""
        return int(arguments[self._peer]) if self.is_p2p and self._peer >= 0 else -1

    def tensors(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        """What goes in."""
        if self._tensors < 0:
            return []
        given = arguments[self._tensors]
        if isinstance(given, torch.Tensor):
            return [given]
        flat = [each if isinstance(each, list) else [each] for each in given]
        return [tensor for each in flat for tensor in each]


class _Group:
    """Counts the operations of one process group, alike on all of its ranks."""

    def __init__(self, number: int, ranks: tuple[int, ...], seq: int) -> None:
        self.number, self.ranks, self._seq = number, ranks, seq
        self._native = 0
        self._pairs: dict[tuple[bool, int], int] = {}
        self._mutex = threading.Lock()

    def begun_anew(self, group_of: Any) -> bool:
        """Whether another group has this name by now: its own counter has gone back."""
        native = group_of._get_sequence_number_for_group()
        gone_back, self._native = native < self._native, native
        return bool(gone_back)

    def count(self, group_of: Any) -> int:
        """The number of a collective."""
        with self._mutex:
            self._seq += 1
            return self._seq

    def count_pair(self, sends: bool, peer: int) -> int:
        """The number of a message between this rank and `peer`, which counts alike."""
        with self._mutex:
            self._pairs[sends, peer] = seq = self._pairs.get((sends, peer), 0) + 1
            return seq


def _is_capturing(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether this goes into a CUDA graph, to run later, unseen."""
    return bool(tensors) and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()


def _seq_so_far(group_of: Any) -> int:
    """How many collectives a group has had before it was timed, as the recorder numbers them.

    The group's own number counts sends and receives too on gloo, of which ranks have not as many.
    """
    native = int(group_of._get_sequence_number_for_group())
    if native == 0:
        return 0
    entries = msgspec.json.decode(dump_recorder(entries=True)).get("entries", [])
    found = [
        int(each["collective_seq_id"])
        for each in entries
        if each["process_group"][0] == group_of.group_name and not each.get("is_p2p")
    ]
    return max(found, default=native)


_timing: Timing | None = None


def start(shown: Shown) -> Timing | None:
    """Time the calls of this process, once. Never raises: without it, training goes on."""
    global _timing
    if _timing is not None:
        return _timing
    try:
        _timing = Timing(shown)
    except Exception as error:  # a PyTorch that is built otherwise, or no memory
        shown.add_problem(
            f"collectives are not timed, though {ENV_TIMING} is set: {error}; their entries are "
            "still seen through the Flight Recorder"
        )
        return None
    shown.introduce(ring=str(shown.ring_path()))
    return _timing
