"""Cells in order over one busy connection, and whose turn it is where many want some."""

import itertools
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ckptd.agent.cells import CellServer, Peers
from ckptd.agent.lanes import Lane, Wanted
from ckptd.agent.store import Store
from ckptd.agent.turns import Pace, Turns
from ckptd.agent.windows import Windows
from ckptd.cli.local_cluster import wait_until
from ckptd.digest import digest
from ckptd.errors import Gone
from ckptd.ids import SnapshotId
from ckptd.keys import NONCE_BYTES, ClusterKey
from ckptd.wire import GetEncoded, PeerRequest, encode

DEADLINE_S = 30.0
KEY = ClusterKey(bytes(range(32)))
ID = SnapshotId("job", 1, 1)
ROW_BYTES = 1 << 20  # more than fits into the kernel's buffers


def row_of(number: int) -> bytes:
    return random.Random(number).randbytes(ROW_BYTES)


def request(number: int) -> GetEncoded:
    return GetEncoded(ID, 0, number, 1)


class Serving:
    """A cell server that has every row but those in `gone`, and remembers what it was asked."""

    def __init__(self, root: Path) -> None:
        self.asked: list[int] = []
        self.gone: set[int] = set()
        self.wrong: set[int] = set()
        self.store = Store(root)
        self.server = CellServer("127.0.0.1", 0, "a", self.store, KEY, self._row, self._none)

    def _row(self, request: GetEncoded) -> bytes:
        self.asked.append(request.stripe)
        if request.stripe in self.gone:
            raise Gone("not here")
        return row_of(request.stripe + (1000 if request.stripe in self.wrong else 0))

    def _none(self, request: PeerRequest) -> bytes:
        raise Gone("nothing is decoded here")

    def close(self) -> None:
        self.server.close()
        self.store.close()


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    served = Serving(tmp_path)
    yield served
    served.close()


class Asking:
    """A lane, and what became of all that was put into it."""

    def __init__(self, address: Callable[[], str]) -> None:
        self.came: list[int] = []
        self.did_not: list[int] = []
        self.stop = threading.Event()
        self.peers = Peers(KEY)
        self.lane = Lane(self.peers, address, self.stop)

    def put(self, number: int) -> None:
        into = memoryview(bytearray(ROW_BYTES))

        def take(length: int, _: int) -> bool:
            right = length == ROW_BYTES and digest(into) == digest(row_of(number))
            if right:
                self.came.append(number)
            return right

        self.lane.put(Wanted(request(number), into, take, lambda: self.did_not.append(number)))

    def close(self) -> None:
        self.lane.close()
        self.peers.close()


def test_all_come_in_order_over_one_connection(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, connect = [], socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda *args, **more: made.append(1) or connect(*args, **more)
    )
    asking = Asking(lambda: serving.server.address)
    for number in range(20):
        asking.put(number)
    asking.close()
    assert asking.came == serving.asked == list(range(20))
    assert asking.did_not == []
    assert len(made) == 1


def test_what_is_not_there_or_wrong_is_given_back_and_the_others_come(serving: Serving) -> None:
    serving.gone, serving.wrong = {2, 3}, {5, 9}
    asking = Asking(lambda: serving.server.address)
    for number in range(10):
        asking.put(number)
    asking.close()
    assert asking.came == [0, 1, 4, 6, 7, 8]
    assert asking.did_not == [2, 3, 5, 9]


def test_a_peer_that_is_away_is_looked_for_again(serving: Serving) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = ["{}:{}".format(*nobody.getsockname())]
    asking = Asking(lambda: address[0])
    asking.put(0)
    wait_until("the one that cannot come", lambda: asking.did_not == [0], DEADLINE_S)
    address[0] = serving.server.address
    asking.put(1)
    asking.close()
    assert asking.came == [1]


def test_after_stop_nothing_is_asked_for(serving: Serving) -> None:
    asking = Asking(lambda: serving.server.address)
    asking.stop.set()
    for number in range(5):
        asking.put(number)
    asking.close()
    assert asking.did_not == list(range(5))
    assert serving.asked == []


def test_the_lowest_order_has_the_next_turn() -> None:
    turns, went = Turns(1), []
    threads: list[threading.Thread] = []

    def wait_for(order: int) -> None:
        with turns.one(order):
            went.append(order)

    with turns.one(100):
        for order in (5, 1, 3, 1):
            threads.append(threading.Thread(target=wait_for, args=(order,)))
            threads[-1].start()
            wait_until("it waits", lambda: turns.waiting == len(threads), DEADLINE_S)
    for thread in threads:
        thread.join(DEADLINE_S)
    assert went == [1, 1, 3, 5]
    with turns.one(0):
        pass


def test_a_pace_is_kept_by_all_threads_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("ckptd.agent.turns.time.monotonic", lambda: now[0])
    monkeypatch.setattr("ckptd.agent.turns.time.sleep", sleep)
    pace = Pace(1000.0)
    assert pace.most_bytes(1 << 20) == 20
    pace.spend(20)
    pace.spend(20)  # another thread, at the same moment
    now[0] += 10.0
    pace.spend(20)
    assert slept == pytest.approx([0.02, 0.04, 0.02])
    assert Pace(None).most_bytes(1 << 20) == 1 << 20


def test_peers_that_take_nothing_do_not_keep_others_from_their_turn(serving: Serving) -> None:
    with ExitStack() as stack:
        for number in range(12):
            stack.enter_context(_silent_client(serving.server.address, number))
        wait_until("all have asked", lambda: len(serving.asked) == 12, DEADLINE_S)
        asking = Asking(lambda: serving.server.address)
        asking.put(100)
        asking.close()
        assert asking.came == [100]


def _silent_client(address: str, number: int) -> socket.socket:
    """Asks for something larger than what fits into the kernel's buffers, and reads nothing."""
    host, _, port = address.rpartition(":")
    conn = socket.socket()
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    conn.settimeout(DEADLINE_S)
    conn.connect((host, int(port)))
    theirs, ours = conn.recv(NONCE_BYTES, socket.MSG_WAITALL), bytes(NONCE_BYTES)
    conn.sendall(ours + KEY.proof(b"client", ours, theirs))
    conn.recv(32, socket.MSG_WAITALL)
    frame = encode(request(number))
    conn.sendall(struct.pack("!I", len(frame)) + frame)
    return conn


class TestWindows:
    @pytest.fixture
    def conns(self) -> Iterator[list[socket.socket]]:
        with ExitStack() as stack:
            yield [stack.enter_context(socket.socket()) for _ in range(2)]

    @staticmethod
    def buffers(conns: list[socket.socket]) -> list[int]:
        return [conn.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for conn in conns]

    def arrive(self, conns: list[socket.socket], bytes_per_s: float) -> None:
        """For some seconds, from the first of them."""
        times = itertools.count(step=0.1)
        windows = Windows(lambda: next(times))
        with windows.one(conns[0]), windows.one(conns[1]):
            for _ in range(30):
                windows.arrived(int(bytes_per_s / 10))

    def test_connections_get_the_same_window(self, conns: list[socket.socket]) -> None:
        self.arrive(conns, 12.5e6)
        first, second = self.buffers(conns)
        assert first == second
        assert first / 2 == pytest.approx(12.5e6 * 0.012 / 2, rel=0.3)  # the kernel doubles it

    def test_a_link_that_was_slow_may_be_fast_again(self, conns: list[socket.socket]) -> None:
        times = itertools.count(step=0.1)
        windows = Windows(lambda: next(times))
        for bytes_per_s in (100, 1e12):  # the same connections, used again
            with windows.one(conns[0]), windows.one(conns[1]):
                for _ in range(30):
                    windows.arrived(int(bytes_per_s / 10))
        most = int(Path("/proc/sys/net/core/rmem_max").read_text())
        assert self.buffers(conns) == [2 * most] * 2

    def test_after_a_silence_nothing_is_concluded(self, conns: list[socket.socket]) -> None:
        times = iter([0.0, 100.0, 100.1])
        before = self.buffers(conns)
        windows = Windows(lambda: next(times))
        with windows.one(conns[0]):
            windows.arrived(1)
            windows.arrived(1)
        assert self.buffers(conns) == before

    def test_a_trickle_is_not_throttled_further(self, conns: list[socket.socket]) -> None:
        self.arrive(conns, 100)
        assert self.buffers(conns) == [64 << 10] * 2

    def test_a_fast_link_is_left_to_the_kernel(self, conns: list[socket.socket]) -> None:
        before = self.buffers(conns)
        self.arrive(conns, 1e12)
        assert self.buffers(conns) == before

    def test_one_that_is_no_longer_used_has_no_share(self, conns: list[socket.socket]) -> None:
        times = itertools.count(step=0.1)
        windows = Windows(lambda: next(times))
        before = self.buffers(conns)
        with windows.one(conns[0]):
            pass
        with windows.one(conns[1]):
            for _ in range(30):
                windows.arrived(1 << 20)
        idle, used = self.buffers(conns)
        assert idle == before[0]
        assert used != before[1]
