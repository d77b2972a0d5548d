"""Frames: what goes out comes back, and what did not come from us is named and refused."""

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd import wire
from ckptd.errors import ProtocolError
from ckptd.ids import SnapshotId
from ckptd.journal import Entry, Isolated, LogSummary, Rollback
from ckptd.manifest import Ancestor, Extent, GivenUp, Group, JobManifest, JobRecord, Member
from ckptd.terms import Obeyed, Term
from ckptd.watching import Place
from ckptd.wire import Attach, Decoder, Message, Progress, TrainerMessage, encode

ID = SnapshotId("job", 2, 70)
EXTENTS = (Extent(0, 100), Extent(1, 2**30))
MANIFEST = JobManifest(
    ID, 2, (Group((Member("a", EXTENTS), Member("b", ())), 1),), "zfec", 4096, (Ancestor(1, 60),)
)
RECORD = JobRecord("job", 2, {"a": "token"}, (Ancestor(1, 60),), 3, (GivenUp(1, 60, 2),))
RANK = wire.RankState("job", "round", 2, 0, 2, 1, 1, 60, 61)
HOLDING = wire.Holding(ID, 2, EXTENTS, True, MANIFEST)
OBEYED = Obeyed(Term(3, "c", "tcp://h:1", 4.0), float("inf"), None)
ENTRIES = (Entry(2, 1, Isolated("a", True, "why")), Entry(3, 2, Rollback("job", ID)))
SOURCE = wire.Source(MANIFEST, {0: ("a",)}, {0: 100}, ("b",), {"a": "127.0.0.1:1"})

MESSAGES: list[tuple[object, Message]] = [
    (wire.TrainerMessage, Attach("job", "round", 0, 2, 1, 2)),
    (wire.TrainerMessage, wire.AskResume((ID,))),
    (wire.TrainerMessage, wire.CaptureFailed(ID, "torn", "why")),
    (wire.TrainerMessage, wire.Detach(True)),
    (wire.AgentToTrainer, wire.Granted(3, None, "nothing yet")),
    (wire.AgentToTrainer, wire.Ticket(ID, "/dev/shm/x")),
    (wire.AgentMessage, wire.Hello("a", "i", "t", "h", "c", "d", False, "zfec", "isa-l", "", 1, 0,
                                   (HOLDING,), (RANK,), (RECORD,), ("job",), ("problem",),
                                   7, OBEYED, LogSummary(1, (2, 3), 2**64 - 1))),
    (wire.AgentMessage, wire.Outdated(OBEYED)),
    (wire.AgentMessage, wire.Entries(ENTRIES)),
    (wire.AgentMessage, wire.Kept(LogSummary(1, (2, 3), 4))),
    (wire.AgentMessage, wire.SegmentReady("job", 2, 1, ID, 3, 4)),
    (wire.CoordinatorMessage, wire.Grant("job", "r", 2, ID, "why", RECORD, SOURCE, 0.5)),
    (wire.CoordinatorMessage, wire.Protect(MANIFEST, {"a": "127.0.0.1:1"})),
    (wire.CoordinatorMessage, wire.KeepEntries(ENTRIES)),
    (wire.Order, wire.Order(3, "c", wire.Welcome(0.5, 4096, "tcp://h:1", 4.0))),
    (wire.ClientMessage, wire.RemoveJob("job")),
    (wire.ClientMessage, wire.RollBack("job", 70, 2)),
    (wire.ClientMessage, wire.DrainNode("a", True)),
    (wire.ClientMessage, wire.IsolateNode("a", True, "why")),
    (wire.ClientMessage, wire.SetQuota("job", None)),
    (wire.ClientMessage, wire.Rearm("job")),
    (wire.LauncherMessage, wire.WaitForWork("job")),
    (wire.AgentToLauncher, wire.Here("a", "127.0.0.1")),
    (wire.PeerRequest, wire.GetEncoded(ID, 0, 2**40, 1)),
    (wire.PeerReply, wire.Payload(4096, 2**64 - 1)),
    (wire.AgentMessage, wire.Counted("job", 2, 3, (1,), (), "why")),
    (wire.AgentMessage, wire.Collected("job", 2, 1, "/x", "", {0: Place("77", "node-1")})),
    (wire.AgentMessage, wire.Probed("job", 2, 3, (wire.Transfer("a", 1, 9, float("inf")),))),
    (wire.CoordinatorMessage, wire.Hasten(ID)),
    (wire.PeerRequest, wire.GetBytes(wire.PROBE_LIMIT_BYTES)),
]  # fmt: skip


@pytest.mark.parametrize(("union", "message"), MESSAGES)
def test_round_trip(union: object, message: Message) -> None:
    decoder: Decoder[Message] = Decoder(union)
    assert decoder.decode(encode(message)) == message


@pytest.fixture
def decoder() -> Decoder[Message]:
    return Decoder(TrainerMessage)


def test_another_protocol_version_is_named(decoder: Decoder[Message]) -> None:
    """Before anything else: the rest of the frame may mean something else by then."""
    with pytest.raises(ProtocolError, match="speaks protocol version 9, this ckptd speaks 4"):
        decoder.decode(b"ck\x09whatever")


def test_not_ours(decoder: Decoder[Message]) -> None:
    for frame in (b"", b"c", b"ck", b"GET / HTTP/1.1\r\n"):
        with pytest.raises(ProtocolError, match="not a ckptd message"):
            decoder.decode(frame)


def test_too_large() -> None:
    decoder: Decoder[Message] = Decoder(TrainerMessage, limit_bytes=20)
    with pytest.raises(ProtocolError, match="of 21 bytes is over the limit of 20"):
        decoder.decode(b"ck\x04".ljust(21))


def test_a_message_of_another_conversation(decoder: Decoder[Message]) -> None:
    with pytest.raises(ProtocolError, match="Invalid value 'Payload'"):
        decoder.decode(encode(wire.Payload(1, 1)))


def test_an_unknown_field_is_refused(decoder: Decoder[Message]) -> None:
    body = msgspec.msgpack.encode({"type": "Progress", "step": 1, "more": 2})
    with pytest.raises(ProtocolError, match="more"):
        decoder.decode(b"ck\x04" + body)


def test_text_that_is_not_utf_8(decoder: Decoder[Message]) -> None:
    frame = encode(Attach("jo", "round", 0, 2, 1, 2)).replace(b"\xa2jo", b"\xa2\xff\xfe")
    with pytest.raises(ProtocolError, match="malformed message"):
        decoder.decode(frame)


def test_nested_without_end() -> None:
    """In a place where unknown values are skipped."""
    decoder: Decoder[Message] = Decoder(wire.CoordinatorMessage)
    good = encode(wire.TakeSnapshot(ID))
    place = good.index(b"\x93\xa3job")
    frame = good[:place] + b"\x94" + good[place + 1 :] + b"\x91" * 100_000
    with pytest.raises(ProtocolError, match="malformed message"):
        decoder.decode(frame)


@settings(max_examples=150)
@given(st.binary(max_size=80))
def test_garbage(body: bytes) -> None:
    decoder: Decoder[Message] = Decoder(TrainerMessage)
    for frame in (body, b"ck\x04" + body):
        with suppress(ProtocolError):
            decoder.decode(frame)


@settings(max_examples=150)
@given(st.data())
def test_damaged_messages(data: st.DataObject) -> None:
    """Flipped bytes give another message of ours, or ProtocolError."""
    union, message = data.draw(st.sampled_from(MESSAGES))
    decoder: Decoder[Message] = Decoder(union)
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    del frame[data.draw(st.integers(0, len(frame))) :]
    with suppress(ProtocolError):
        assert isinstance(decoder.decode(bytes(frame)), Message)


def test_a_frame_says_which_message_it_is() -> None:
    assert encode(Progress(3)) == b"ck\x04" + msgspec.msgpack.encode(
        {"type": "Progress", "step": 3}
    )
