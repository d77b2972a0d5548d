"""NCCL's RAS, as its source has it answer (src/ras/client_support.cc): no GPU takes part."""

import asyncio
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptd.agent import ras
from ckptd.agent.cells import Peers
from ckptd.agent.diagnosis import Diagnosis
from ckptd.agent.reports import Reports
from ckptd.collectives import GroupInfo
from ckptd.config import watch_config
from ckptd.errors import Gone, ProtocolError
from ckptd.keys import ClusterKey
from ckptd.watching import Introduction, Observed, publish, started_ticks, trainers_dir
from ckptd.wire import AgentMessage, Counted, LookAt, Looked

OPS = ("Broadcast", "Reduce", "AllGather", "ReduceScatter", "AllReduce")
HOSTS = ("10.0.0.1", "10.0.0.2")


def member(rank: int, all_reduces: int = 42, **changed: Any) -> dict[str, Any]:
    """Of four processes on two hosts, whose numbers are the same on both, as in containers."""
    return {
        "rank": rank,
        "host": HOSTS[rank // 2],
        "pid": 100 + rank % 2,
        "cuda_dev": rank % 2,
        "nvml_dev": rank % 2,
        "status": {
            "init_state": 0,
            "async_error": 0,
            "finalize_called": False,
            "destroy_flag": False,
            "abort_flag": False,
        },
        "collective_counts": dict.fromkeys(OPS, 0) | {"AllReduce": all_reduces},
        **changed,
    }


def missing(rank: int, **changed: Any) -> dict[str, Any]:
    gone = member(rank) | {"status": {"unresponsive": True, "considered_dead": False}} | changed
    del gone["collective_counts"]
    return gone


def communicator(*ranks: dict[str, Any], hash: str = "0x27a079b8", **changed: Any) -> Any:
    lost = [each for each in ranks if "collective_counts" not in each]
    there = [each for each in ranks if each not in lost]
    return {
        "hash": hash,
        "secondary_hash": "0x1:0x2",
        "size": len(ranks),
        "ranks_count": len(there),
        "missing_ranks_count": len(lost),
        "ranks": there,
        "missing_ranks": lost,
        **changed,
    }


def answer(*communicators: Any, **changed: Any) -> bytes:
    whole = {
        "nccl_version": "2.28.9",
        "cuda_runtime_version": 13000,
        "cuda_driver_version": 13000,
        "timestamp": "2026-06-01 12:00:00",
        "communicators_count": len(communicators),
        "communicators": communicators,
        "ras": {"collection_time_sec": 0.003, "timeouts_count": 0},
        **changed,
    }
    return json.dumps(whole, indent=2).encode() + b"\n"


TRAINERS = {100: 2, 101: 3}
"""Of the second host."""


def read(*communicators: Any, **changed: Any) -> ras.Counts:
    return ras.read(answer(*communicators, **changed), TRAINERS, 4)


def test_who_lags_is_named_by_its_rank_of_the_job() -> None:
    counts = read(communicator(member(0), member(1), member(2), member(3, 41)))
    assert (counts.behind, counts.silent) == ((3,), ())
    assert counts.text == (
        "rank 3 launched AllReduce 41 times, others 42, in communicator 0x27a079b8 of 4 ranks"
    )


def test_who_lags_only_for_waiting_itself_is_not_the_cause() -> None:
    world = communicator(member(0), member(1), member(2), member(3))
    stuck = communicator(member(2, 8) | {"rank": 0}, member(3, 7) | {"rank": 1}, hash="0xb")
    victim = communicator(member(0, 6) | {"rank": 0}, member(2, 5) | {"rank": 1}, hash="0xc")
    counts = read(world, stuck, victim)
    assert counts.behind == (3,)
    assert "rank 2 launched AllReduce 5 times, others 6, in communicator 0xc" in counts.text


def test_who_does_not_answer_is_named_and_equal_counts_are_said() -> None:
    counts = read(communicator(member(0), member(1), member(2), missing(3)))
    assert (counts.behind, counts.silent) == ((), (3,))
    assert counts.text == (
        "all that answer have launched the same operations; rank 3 did not answer"
    )
    lost = missing(1, host="unknown", pid=-1)
    assert read(communicator(member(0), lost, member(2), member(3))).silent == (1,)
    starting = missing(1, status={"unresponsive": False, "considered_dead": False})
    assert read(communicator(member(0), starting, member(2), member(3))).silent == ()


def test_errors_are_said() -> None:
    bad = member(1, status={"async_error": 6})
    text = read(communicator(member(0), bad, member(2), member(3, status={"async_error": 7}))).text
    assert text == "rank 1 reported an error in communicator 0x27a079b8 of 4 ranks"


def test_without_a_communicator_of_all_only_ranks_of_this_node_are_known() -> None:
    pair = communicator(member(2) | {"rank": 0}, member(3, 41) | {"rank": 1})
    assert read(pair).behind == (3,)
    across = communicator(member(1, 41) | {"rank": 0}, member(3) | {"rank": 1})
    with pytest.raises(Gone, match="cannot tell which processes are here"):
        read(across)


def test_another_job_of_this_node_is_not_taken_for_ours() -> None:
    with pytest.raises(Gone, match="another job"):
        ras.read(answer(communicator(member(0), member(1))), {7000: 0, 7001: 1}, 2)
    swapped = communicator(*(member(rank) for rank in range(4)))
    with pytest.raises(Gone, match="another job"):
        ras.read(answer(swapped), {100: 1, 101: 0}, 4)


def test_another_version_degrades_and_says_so() -> None:
    bare = [{"rank": n, "host": "10.0.0.2", "pid": 98 + n} for n in range(4)]
    counts = read({"size": 4, "ranks": bare}, nccl_version="2.40.1")
    assert counts.behind == ()
    assert counts.text == "NCCL 2.40.1 does not tell how much each rank has launched"
    new = {"AllReduce": 3, "AllToAll": 9}
    members = [member(n, collective_counts=new | {"AllToAll": 9 - (n == 2)}) for n in range(4)]
    assert read(communicator(*members), more=[1, {}]).behind == (2,)


def test_answers_of_any_shape_are_refused_or_read() -> None:
    dice = random.Random(3)
    whole = answer(communicator(member(0), member(1), member(2, 41), missing(3)))
    scraps = [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"communicators": 3}', b"\xff" * 100]
    scraps.append(answer(communicator(member(0, 1 << 80))))
    scraps.append(answer(communicator(member(0, host="x" * 1000), hash="y" * 1000)))
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 8)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        scraps.append(bytes(damaged[: dice.randint(1, len(damaged) * 2)]))
    understood = 0
    for scrap in scraps:
        try:
            counts = ras.read(scrap, TRAINERS, 4)
        except (Gone, ProtocolError):
            continue
        understood += 1
        assert len(counts.text) <= 600
    assert understood


def test_a_large_answer_is_summed_up() -> None:
    ranks = [
        member(0, 41 if 100 <= n < 300 else 42)
        | {"host": f"h{n // 8}", "pid": 100 + n % 8, "rank": n}
        for n in range(4096)
    ]
    trainers = {100 + n: 8 + n for n in range(8)}
    counts = ras.read(answer(communicator(*ranks)), trainers, 4096)
    assert counts.behind == tuple(range(100, 164))
    assert "rank 100, rank 101, rank 102, rank 103 and 196 more" in counts.text


class Ras:
    """Listens and answers as a RAS thread does: by lines, and then it closes."""

    def __init__(self, status: bytes, has_json: bool = True, hold: int = 0) -> None:
        """`hold`: so many connections find a process that is stopped."""
        self.status, self.has_json, self.hold = status, has_json, hold
        self.said: list[str] = []
        self._held: list[asyncio.StreamWriter] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.hold:
            self.hold -= 1
            self._held.append(writer)
            return
        while line := await reader.readline():
            command = line.decode().strip()
            self.said.append(command)
            if command == "CLIENT PROTOCOL 2":
                writer.write(b"SERVER PROTOCOL 2\n")
            elif command.lower().startswith("timeout ") or (
                command.lower() == "set format json" and self.has_json
            ):
                writer.write(b"OK\n")
            elif command == "VERBOSE STATUS":
                writer.write(self.status)
                break
            else:
                writer.write(f"ERROR: Unknown command {command}\n".encode())
        writer.close()


async def serving(handler: Any, ask: Callable[[str], Any], host: str = "127.0.0.1") -> Any:
    server = await asyncio.start_server(handler, host)
    try:
        return await ask(f"{host}:{server.sockets[0].getsockname()[1]}")
    finally:
        server.close()


def test_it_is_asked_as_nvidias_own_client_does() -> None:
    told = answer(communicator(*(member(n) for n in range(4))))
    server = Ras(told)
    assert asyncio.run(serving(server, ras.ask)) == told
    assert server.said == ["CLIENT PROTOCOL 2", "TIMEOUT 3", "SET FORMAT json", "VERBOSE STATUS"]


def test_a_stopped_process_that_takes_the_connection_is_passed_by() -> None:
    assert asyncio.run(serving(Ras(b"{}", hold=1), ras.ask)) == b"{}"


def test_nccl_without_json_says_which_has_it() -> None:
    with pytest.raises(ProtocolError, match=r"no JSON yet; NCCL 2\.28\.7"):
        asyncio.run(serving(Ras(b"", has_json=False), ras.ask))


@pytest.mark.parametrize("says", [b"", b"SSH-2.0-x\n", b"a" * 200_000, b"\xff\n", b"SERVER PROT"])
def test_what_is_no_ras_is_left_alone(says: bytes) -> None:
    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        writer.close()

    with pytest.raises((Gone, ProtocolError, TimeoutError)):
        asyncio.run(serving(stranger, lambda at: ras.ask(at, timeout_s=5.0)))


def test_an_endless_answer_and_a_slow_one_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ras, "ANSWER_LIMIT_BYTES", 100_000)
    with pytest.raises(ProtocolError, match="more than 100000 bytes"):
        asyncio.run(serving(Ras(b" " * 200_000), ras.ask))

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if b"STATUS" not in line:
                writer.write(b"SERVER PROTOCOL 2\n" if b"CLIENT" in line else b"OK\n")

    with pytest.raises(TimeoutError):
        asyncio.run(serving(slow, lambda at: ras.ask(at, timeout_s=1.5)))


@pytest.mark.parametrize("address", ["", "localhost", "host:port", "127.0.0.1:1", "192.0.2.1:80"])
def test_only_an_address_of_this_machine_is_asked(address: str) -> None:
    with pytest.raises((Gone, ProtocolError)):
        asyncio.run(ras.ask(address, timeout_s=5.0))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_agent_asks_for_jobs_that_use_nccl_and_tells_when_nothing_answers(
    tmp_path: Path, host: str
) -> None:
    told: list[str] = []
    diagnosis = Diagnosis("n1", tmp_path / "agent", lambda seen: None, told.append)
    trainers = [Introduction(pid, 1, "job", rank, 4) for pid, rank in TRAINERS.items()]

    def shown(address: str) -> list[Introduction]:
        return [Introduction(t.pid, 1, "job", t.rank, 4, ras=address) for t in trainers]

    async def ask(address: str) -> ras.Counts | None:
        address = address.replace("127.0.0.1", host)
        assert await diagnosis.counts("job", shown(address)) is None  # it has no group of NCCL
        groups = (GroupInfo("0", (0, 1, 2, 3), "nccl"),)
        diagnosis._observed(Observed("job", 2, 1, "recorder", 1.0, groups=groups))
        assert await diagnosis.counts("job", shown("")) is None  # it is switched off
        assert not told
        return await diagnosis.counts("job", shown(address))

    status = answer(communicator(member(0), member(1), member(2, 41), member(3)))
    counts = asyncio.run(serving(Ras(status), ask))
    assert counts is not None
    assert counts.behind == (2,)
    assert asyncio.run(diagnosis.counts("job", shown("127.0.0.1:1"))) is None
    (problem,) = told
    assert "NCCL's own counts (RAS, at 127.0.0.1:1) are not seen: nobody listens" in problem


def test_the_coordinator_is_told_what_it_has_asked_for(tmp_path: Path) -> None:
    directory = trainers_dir(tmp_path / "agent")
    directory.mkdir(mode=0o700)
    pid = os.getpid()
    members = [member(rank, pid=pid + rank) for rank in range(3)]
    status = answer(communicator(*members, member(3, 41, pid=pid + 3)))
    sent: list[AgentMessage] = []

    async def story(address: str) -> None:
        told = Introduction(pid, started_ticks(pid), "job", 0, 4, 7, ras=address)
        publish(directory / "me.groups", [GroupInfo("0", (0, 1, 2, 3), "nccl")])
        publish(directory / "me.json", told)
        peers = Peers(ClusterKey.read(None))
        reports = Reports("n0", tmp_path / "agent", sent.append, print, lambda job, life: [], peers)
        running = asyncio.create_task(reports.run())
        async with asyncio.timeout(60):
            while not reports.diagnosis._groups:
                await asyncio.sleep(0.02)
            reports.order(LookAt("job", 7, 5, (0,), 0.5))
            while not any(isinstance(each, Looked) for each in sent):
                await asyncio.sleep(0.02)
            assert not any(isinstance(each, Counted) for each in sent)  # nobody had asked
            reports.order(LookAt("job", 7, 5, (0,), 0.5, counts=True))
            while not any(isinstance(each, Counted) for each in sent):
                await asyncio.sleep(0.02)
        running.cancel()

    asyncio.run(serving(Ras(status), story))
    (counted,) = [each for each in sent if isinstance(each, Counted)]
    assert (counted.job, counted.life, counted.finding) == ("job", 7, 5)
    assert (counted.behind, counted.silent) == ((3,), ())
    assert "rank 3 launched AllReduce 41 times, others 42" in counted.text


def test_the_trainer_tells_where_it_listens() -> None:
    assert watch_config({}).ras == "localhost:28028"
    assert watch_config({"NCCL_RAS_ADDR": "10.0.0.1:29000"}).ras == "10.0.0.1:29000"
    assert watch_config({"NCCL_RAS_ENABLE": "0"}).ras == ""
