"""A thousand messages that make no sense at each socket: counted, dropped, and nobody is harmed.

And some that make sense, but are of another life, another term, or of things that are not there.
The job that runs meanwhile goes on, in its first life, and its snapshots are protected.
"""

import random
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import zmq

from ckptd.ids import SnapshotId
from ckptd.keys import ClusterKey
from ckptd.manifest import Extent
from ckptd.terms import Obeyed
from ckptd.wire import (
    TRAINER_FRAME_LIMIT_BYTES,
    AgentMessage,
    Attach,
    ClientMessage,
    Commit,
    Decoder,
    Drop,
    Forget,
    GetCell,
    GetDecoded,
    GetEncoded,
    GetManifest,
    GetParity,
    GetRecoded,
    Hello,
    Holding,
    Holds,
    KillWorkers,
    LauncherMessage,
    LifeResumed,
    NotHere,
    OpenLayout,
    Order,
    PeerReply,
    PeerRequest,
    Progress,
    RankLeft,
    RankReport,
    RankState,
    Rejected,
    Restore,
    Resumed,
    Sealed,
    SegmentReady,
    SnapshotFailed,
    TrainerMessage,
    encode,
)

from ..nodes import connect, framed, read_exactly, shake_hands
from ..test_wire import MESSAGES
from .between import Overheard
from .fleet import JOB
from .garbage import nonsense

COUNT = 1000
HUGE = (1 << 62) - 1
ELSEWHERE = SnapshotId(JOB, 9, 5)
"""Of a life that was never granted."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Garbled(Overheard):
    """Two nodes that train."""

    def node(self, name: str) -> dict[str, Any]:
        return next(node for node in self.status()["nodes"] if node["node"] == name)

    def dropped(self, node: str = "") -> int:
        """By the coordinator, or by an agent."""
        where = self.node(node) if node else self.status()["coordinator"]
        count: int = where["bad_messages"]
        return count

    def reports(self) -> list[RankReport]:
        """Some that the agents have made."""
        decoder: Decoder[object] = Decoder(AgentMessage | ClientMessage)
        said = [decoder.decode(frame) for frame in list(self.between.said)]
        reports = [message for message in said if isinstance(message, RankReport)]
        return [report for report in reports if report.state.job == JOB]

    @contextmanager
    def drops(self, count: int, node: str = "") -> Iterator[None]:
        """So many messages, no more and no less; and the job goes on as if they had not come."""
        known = self.dropped(node)
        yield
        self.wait(f"{count} to be dropped", lambda: self.dropped(node) >= known + count)
        after = self.wait_for_protected(self.wait_for_protected(self.protected()))
        assert after.life == 1
        assert self.dropped(node) == known + count
        self.wait("both nodes to be live", self._are_live)
        assert self.job(JOB)["attached_ranks"] == len(self.places)
        for name, process in self.processes.items():
            assert process.poll() is None, self.log(name)
            assert "Traceback" not in self.log(name)

    def _are_live(self) -> bool:
        return {self.node(name)["state"] for name in self.places} == {"live"}


@pytest.fixture(scope="module")
def here() -> Iterator[Garbled]:
    fleet = Garbled(2)
    try:
        yield fleet.open()
    finally:
        fleet.close()


@pytest.fixture
def numbers() -> random.Random:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


def frames_of(*unions: object) -> list[bytes]:
    return [encode(message) for union, message in MESSAGES if union in unions]


@contextmanager
def stranger(here: Garbled) -> Iterator[Any]:
    """A client of the coordinator that nobody knows."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 10_000
        dealer.connect(here.direct)
        yield dealer


def test_at_the_coordinator(here: Garbled, numbers: random.Random) -> None:
    decoder: Decoder[object] = Decoder(AgentMessage | ClientMessage)
    frames = [*here.between.said, *frames_of(AgentMessage, ClientMessage)]
    with stranger(here) as dealer, here.drops(COUNT):
        for frame in nonsense(frames, decoder, numbers, COUNT):
            dealer.send(frame)
    assert 0 < here.log("coordinator").count("message dropped") <= 100


def test_of_another_life_at_the_coordinator(here: Garbled) -> None:
    """Said by a node of the cluster, which is told to be silent by nobody."""
    hello = Hello(
        "odd", "i", "t", "127.0.0.1", "127.0.0.1:9", "", True, "zfec", "", "", 1, 0, (), (), (),
        (), (), 0, Obeyed(),
    )  # fmt: skip
    (round_,) = {report.state.round for report in here.reports()}
    state = RankState(JOB, "another", 9, 0, 2, 1, 2, HUGE, HUGE)
    impossible = [
        RankReport(state),
        RankReport(RankState(JOB, round_, HUGE, 0, 2, 1, 2, HUGE, HUGE)),
        Holds(Holding(ELSEWHERE, 2, (Extent(0, HUGE), Extent(1, HUGE)), True)),
        Holds(Holding(SnapshotId(JOB, HUGE, HUGE), 2, (Extent(0, 1),))),
    ]
    without_effect = [
        RankLeft(JOB, "another", 9, 0, "it is said", True),
        RankLeft(JOB, round_, 1, 0, "of a rank that another node has", True),
        RankLeft("nobody", round_, 1, 0, "of a job that is none", True),
        LifeResumed(JOB, 9, HUGE),
        SnapshotFailed(ELSEWHERE, "torn", "it is said"),
        SegmentReady(JOB, 9, HUGE & 0xFFFF, ELSEWHERE, 1, 1),
    ]
    with stranger(here) as dealer, here.drops(len(impossible)):
        dealer.send(encode(hello))
        for message in [*impossible, *without_effect]:
            dealer.send(encode(message))


def test_of_the_coordinator_at_an_agent(here: Garbled, numbers: random.Random) -> None:
    frames = list(here.between.ordered)
    with here.drops(COUNT, "n0"):
        sent = nonsense(frames, Decoder(Order), numbers, COUNT)
        for agent in here.between.agents:
            here.between.slip(agent, sent)


def test_of_another_term_at_an_agent(here: Garbled) -> None:
    coordinator = here.status()["coordinator"]
    newest = here.wait_for_protected()
    orders = [Forget(JOB, "it is said"), Drop(newest, "it is said"), Commit(newest, (newest,))]
    orders.append(KillWorkers(JOB, 1, "it is said"))
    with here.drops(0, "n0"):
        for agent in here.between.agents:
            for order in orders:
                whose = [
                    (0, coordinator["id"]),
                    (coordinator["term"], "another"),
                    (HUGE, "another"),
                ]
                here.between.slip(agent, [encode(Order(*who, order)) for who in whose])
        here.wait("them to be refused", lambda: any(
            "orders of term 0 are refused" in reason for reason in here.node("n0")["reasons"]
        ))  # fmt: skip
    assert here.status()["coordinator"]["term"] == coordinator["term"]


def test_at_the_cells(here: Garbled, numbers: random.Random) -> None:
    """What makes no sense ends its connection; what is not there is answered."""
    id, address = here.wait_for_protected(), here.node("n0")["cells"]
    asked = [GetCell(id, 0, 3), GetParity(id, 0, 1, 0), GetEncoded(id, 0, 0, 0)]
    frames = [encode(each) for each in [*asked, GetManifest(id, "n1")]]
    with here.drops(COUNT, "n0"):
        for frame in nonsense(frames, Decoder(PeerRequest), numbers, COUNT):
            with connect(address) as conn:
                shake_hands(conn, ClusterKey(), b"client")
                conn.sendall(struct.pack("!I", len(frame)) + frame)
                assert conn.recv(1) == b""
        with connect(address) as conn:
            shake_hands(conn, ClusterKey(), b"client")
            for absent in (
                GetCell(ELSEWHERE, 0, 0),
                GetCell(ELSEWHERE, 0, HUGE),
                GetParity(ELSEWHERE, HUGE, HUGE, HUGE),
                GetEncoded(ELSEWHERE, HUGE, HUGE, HUGE),
                GetManifest(ELSEWHERE, "nobody"),
                GetDecoded(ELSEWHERE, 0, HUGE, {0: ("nobody",)}, ("n1",), {"n1": "nowhere"}),
                GetRecoded(ELSEWHERE, HUGE, HUGE, HUGE, {}, {}),
            ):
                conn.sendall(framed(absent))
                (length,) = struct.unpack("!I", read_exactly(conn, 4))
                reply = Decoder[PeerReply](PeerReply).decode(read_exactly(conn, length))
                assert isinstance(reply, NotHere)


def test_at_the_socket_for_trainers(here: Garbled, numbers: random.Random) -> None:
    decoder: Decoder[object] = Decoder(TrainerMessage | LauncherMessage, TRAINER_FRAME_LIMIT_BYTES)
    frames = frames_of(TrainerMessage, LauncherMessage)
    rejections: Decoder[Rejected] = Decoder(Rejected)
    # An empty one would be the end of the connection.
    sent = [frame or b"?" for frame in nonsense(frames, decoder, numbers, COUNT - 1)]
    sent.append(encode(Attach("odd", "r", 0, 1, 1, HUGE)))  # more files than there can be
    local = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    local.settimeout(30)
    with here.drops(COUNT, "n0"), local:
        local.connect(str(here.socket("n0")))
        for frame in sent:
            local.send(frame)
            assert rejections.decode(local.recv(1 << 16)).kind == "ProtocolError"
        # A process of another job, which talks of what is not its own.
        local.send(encode(Attach("odd", "r", 0, 1, 1, 2)))
        local.recv(1 << 16)
        for unanswered in (Restore(9, ELSEWHERE, 0), Resumed(9, HUGE), Progress(HUGE)):
            local.send(encode(unanswered))
        local.send(encode(Sealed(ELSEWHERE)))
        local.send(encode(OpenLayout(0, HUGE)))
        assert rejections.decode(local.recv(1 << 16)).kind == "MemoryTooSmall"
