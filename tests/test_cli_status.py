"""`ckptd status` and `ckptd ls`: what a person is told, and what a pipe gets."""

import contextlib
import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console, RenderableType

from ckptd.cli import ls, show, status
from ckptd.cli.local_cluster import LocalCluster
from ckptd.cli.main import main
from ckptd.client import ask_status
from ckptd.config import ENV_COORDINATOR, erasure_engine
from ckptd.erasure import engine_in_use
from ckptd.errors import Refused

MIB = 1 << 20


def node(name: str, **changed: Any) -> dict[str, Any]:
    return {
        "node": name,
        "state": "live",
        "spare": False,
        "address": "10.0.0.1",
        "cells": "10.0.0.1:9000",
        "domain": "rack-7",
        "codec": "zfec",
        "engine": "isa-l 2.32.0 (pyeclib)",
        "engine_reason": "",
        "memory_used_bytes": 384 * MIB,
        "memory_limit_bytes": 512 * MIB,
        "spare_bytes": 128 * MIB,
        "ranks": [],
        "waiting_launchers": [],
        "damaged_cells": 0,
        "mended_cells": 0,
        "sent_damaged_cells": {},
        "bad_messages": 0,
        "seen_s_ago": 0.2,
        "isolated": None,
        "draining": None,
        "reasons": [],
        **changed,
    }


def snapshot(step: int, state: str, **changed: Any) -> dict[str, Any]:
    return {
        "id": f"lm/2.{step}",
        "life": 2,
        "step": step,
        "state": state,
        "age_s": 1000.0 - step,
        "size_bytes": 77 * MIB,
        "ranks": 10,
        "restorable": False,
        "tiers": [],
        "ranks_on": {},
        "parity_on": [],
        "protected_again": None,
        "reason": "",
        **changed,
    }


def ended(step: int, state: str, reason: str) -> dict[str, Any]:
    kept = ("id", "life", "step", "state", "age_s")
    return {"reason": reason, **{key: snapshot(step, state)[key] for key in kept}}


def of_lm(ranks: range) -> list[dict[str, Any]]:
    return [{"job": "lm", "rank": rank} for rank in ranks]


LOST = "lost: silent for 31 s"
PROBLEM = (
    "2.890.seg cannot be used and was set aside: its sidecar says another layout than its header"
)
NO_ISAL = "isa-l (pyeclib): pyeclib is not installed: pip install pyeclib"
WAITS = "ranks [4, 5] of 10 to attach to their agents"
UNRESTORABLE = "group 0 needs 2 of 3 nodes, and the cells of node-b, node-c are not all there"
REBUILT = "ranks 4, 5, 6, 7 can be rebuilt from parity"
NO_ROOM = "rank 4 of lm/2.890 is lost and cannot be rebuilt: it needs 900 bytes"
TORN = "node-c: rank 9 changed a parameter while it was being captured"
AGAIN = (
    "4 of 6 nodes hold parity: is being protected again on node-d, 43%, 12 s left; on node-e, 0%"
)

DOCUMENT: dict[str, Any] = {
    "coordinator": {
        "id": "9f86d081884c7d65",
        "address": "tcp://10.0.0.9:7070",
        "term": 3,
        "log_entries": 12,
        "up_s": 7500.0,
        "cell_bytes": 4 * MIB,
        "beat_s": 0.5,
        "lease_s": 4.0,
        "bad_messages": 3,
    },
    "nodes": [
        node("node-a", ranks=of_lm(range(4)), reasons=[PROBLEM]),
        node("node-b", state="lost", seen_s_ago=31.0, reasons=[LOST]),
        node("node-c", ranks=[*of_lm(range(8, 10)), {"job": "other", "rank": 0}]),
        node(
            "node-d",
            spare=True,
            waiting_launchers=["lm"],
            engine="zfec 1.6.0.0",
            engine_reason=NO_ISAL,
        ),
    ],
    "jobs": [
        {
            "job": "lm",
            "life": 3,
            "world_size": 10,
            "attached_ranks": 6,
            "step": 903,
            "training": False,
            "step_s": 0.125,
            "resumed_from": "lm/2.890",
            "waiting_for": WAITS,
            "keep": 3,
            "rollback": "lm/2.850",
            "quota_bytes": 4 << 30,
            "suspect_nodes": [],
            "restoring": [
                {
                    "node": "node-d",
                    "id": "lm/2.890",
                    "rank": 4,
                    "done": 0.25,
                    "bytes_per_s": 210.0 * MIB,
                    "left_s": 31.0,
                }
            ],
            "at_risk": {"process_steps": 13, "process_s": 75.0, "node_steps": None, "node_s": None},
            "groups": [
                {
                    "group": 0,
                    "nodes": ["node-a", "node-b", "node-c"],
                    "data_shards": 2,
                    "parity_shards": 1,
                    "codec": "zfec",
                    "may_lose": 0,
                    "reasons": ["lost: node-b"],
                }
            ],
            "vacancies": {"node-b": "node-d"},
            "no_room": [NO_ROOM],
            "snapshots": [
                snapshot(903, "capturing", size_bytes=0),
                snapshot(895, "sealed", reason=UNRESTORABLE),
                snapshot(
                    890,
                    "protected",
                    restorable=True,
                    tiers=["group"],
                    ranks_on={str(r): ["node-a" if r < 4 else "node-c"] for r in (0, 1, 2, 3, 8)},
                    parity_on=["node-a", "node-c"],
                    reason=REBUILT,
                    protected_again={
                        "without": ["node-d", "node-e"],
                        "nodes": 6,
                        "making": [
                            {"node": "node-d", "done": 0.43, "left_s": 12.0},
                            {"node": "node-e", "done": 0.0, "left_s": None},
                        ],
                        "hindrances": [],
                    },
                ),
            ],
            "ended": [ended(901, "torn", TORN), ended(889, "retired", "")],
        },
        {
            "job": "other",
            "life": 1,
            "world_size": 1,
            "attached_ranks": 1,
            "step": 5,
            "training": True,
            "step_s": 0.125,
            "resumed_from": None,
            "waiting_for": "",
            "keep": 1,
            "rollback": None,
            "quota_bytes": None,
            "suspect_nodes": ["node-a"],
            "restoring": [],
            "at_risk": {"process_steps": 1, "process_s": 0.4, "node_steps": 2, "node_s": 0.5},
            "groups": [],
            "vacancies": {},
            "no_room": [],
            "snapshots": [],
            "ended": [],
        },
    ],
    "events": [],
}


def words(page: RenderableType, width: int) -> str:
    """What the page says, without its line breaks; no line is wider than the terminal."""
    console = Console(width=width, file=io.StringIO(), highlight=False)
    with console.capture() as capture:
        console.print(page)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    return " ".join(" ".join(lines).split())


@pytest.mark.parametrize("width", [80, 160])
def test_status_hides_no_reason_and_no_number(width: int) -> None:
    said = words(status.render(DOCUMENT, "tcp://10.0.0.9:7070"), width)
    for expected in (
        "coordinator tcp://10.0.0.9:7070 · 9f86d081884c7d65 · term 3 · log of 12 entries",
        "up 2.1 h · cells of 4 MiB",
        "· 3 messages that made no sense dropped",
        "3 live, 1 lost",
        "node-a live rack-7 isa-l 2.32.0 lm 0-3 384 MiB / 512 MiB 75% 0.2 s ago",
        f"! {PROBLEM}",
        f"! {LOST}",
        f"! parity by zfec 1.6.0.0: {NO_ISAL}",
        "lm 8-9; other 0",
        "spare; waits for lm",
        "job lm waits · life 3 · resumed from 2.890 · keeps 3 snapshots · at most 4 GiB on a node",
        "! resumes next from 2.850, as `ckptd rollback` asked for",
        "! no tickets until node-a is heard",
        f"! waits for {WAITS}",
        f"! {NO_ROOM}",
        "! 6 of 10 ranks attached",
        "rank 4 of 2.890 comes to node-d: 25%, 210 MiB/s, 31 s left",
        "! node-d was called in place of node-b",
        "at risk 13 steps, 75 s if a process is lost · everything if a node is lost",
        "0 2+1 zfec 0 nodes node-a, node-b, node-c ! lost: node-b",
        "2.903 capturing 903 – 97 s no",
        f"2.895 sealed 895 77 MiB 105 s no ! {UNRESTORABLE}",
        f"2.890 protected 890 77 MiB 110 s group ! {REBUILT} {AGAIN}",
        f"2.901 torn 901 – 99 s no ! {TORN}",
        "job other training · life 1 · step 5 · 0.125 s a step",
        "at risk 1 step, 0.4 s if a process is lost · 2 steps, 0.5 s if a node is lost",
        "! no snapshot yet",
    ):
        assert expected in said
    assert "retired" not in said


@pytest.mark.parametrize("width", [80, 160])
def test_ls_says_where_each_snapshot_lies(width: int) -> None:
    said = words(ls.render(ls.select(DOCUMENT, None, ended=True)), width)
    assert (
        "lm 2.890 protected 890 77 MiB 110 s group segments on node-a (0-3), node-c (8) "
        f"parity on node-a, node-c ! {REBUILT} {AGAIN}" in said
    )
    assert f"lm 2.901 torn 901 – 99 s no ! {TORN}" in said
    assert said.index("2.903") < said.index("2.901") < said.index("2.890") < said.index("2.889")
    assert "2.901" not in words(ls.render(ls.select(DOCUMENT, "lm", ended=False)), width)


def test_names_longer_than_the_terminal_are_wrapped_and_not_cut() -> None:
    name = "ip-10-0-113-207.compute.eu-central-1.internal-" + "x" * 60
    document = {**DOCUMENT, "nodes": [node(name)], "jobs": []}
    said = words(status.render(document, "tcp://10.0.0.9:7070"), 80)
    assert name in said.replace(" ", "")
    assert "384 MiB / 512 MiB 75% 0.2 s ago" in said


def test_one_job_is_shown_alone_and_an_unknown_one_is_refused_with_the_known_names() -> None:
    said = words(status.render(DOCUMENT, "tcp://10.0.0.9:7070", "other"), 80)
    assert "job other" in said
    assert "job lm" not in said
    with pytest.raises(Refused, match="no job 'ml'; it knows lm, other"):
        ls.select(DOCUMENT, "ml", ended=False)


def test_an_empty_cluster_says_what_to_do_next() -> None:
    empty = {**DOCUMENT, "nodes": [], "jobs": []}
    said = words(status.render(empty, "tcp://10.0.0.9:7070"), 80)
    assert "ckptd agent --coordinator tcp://10.0.0.9:7070" in said
    assert "ckptd run --job NAME" in said


@pytest.mark.parametrize(
    ("size_bytes", "said"),
    [(0, "0 MiB"), (None, "–"), (999, "999 B"), (1000, "0.977 KiB"), (3 << 40, "3 TiB")],
)
def test_sizes_have_three_digits_and_a_unit(size_bytes: int | None, said: str) -> None:
    assert show.size(size_bytes) == said


def test_without_a_coordinator_the_error_names_the_address_and_the_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(status, "ask_status", partial(ask_status, timeout_s=0.5))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        result = CliRunner().invoke(main, ["status", "--coordinator", address])
    assert result.exit_code == 1
    assert address in result.output
    assert "--coordinator" in result.output


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(
        coordinator_flags=["--lease", "1", "--beat", "0.2"], agent_flags=["--memory-limit", "8MiB"]
    ) as cluster:
        cluster.start_coordinator()
        cluster.start_agent("node-a", "--domain", "row3/rack7")
        cluster.start_agent("node-b")
        cluster.wait_for_nodes(2)
        yield cluster


def ckptd(cluster: LocalCluster, *arguments: str) -> str:
    """What the command prints, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "ckptd.cli", *arguments, "--coordinator", cluster.endpoint],
        stdout=subprocess.PIPE,
        text=True,
        timeout=30,
        check=True,
        env={**os.environ, "COLUMNS": "80"},
    ).stdout


def test_a_real_cluster_is_shown_to_people_and_to_pipes(cluster: LocalCluster) -> None:
    said = ckptd(cluster, "status")
    assert " live" in said
    assert "node-a" in said
    assert "node-b" in said
    assert "ckptd run --job NAME" in said
    document = json.loads(ckptd(cluster, "status", "--json"))
    assert [one["node"] for one in document["nodes"]][:2] == ["node-a", "node-b"]
    assert document["nodes"][0]["memory_limit_bytes"] == 8 * MIB
    assert [one["domain"] for one in document["nodes"]][:2] == ["row3/rack7", ""]
    shown = document["nodes"][0]
    assert (shown["engine"], shown["engine_reason"]) == engine_in_use(erasure_engine())
    assert json.loads(ckptd(cluster, "ls", "--json")) == []
    unknown = CliRunner().invoke(main, ["ls", "lm", "--coordinator", cluster.endpoint])
    assert unknown.exit_code == 1
    assert "no job 'lm'; it knows none yet" in unknown.output


def test_a_killed_agent_is_lost_with_the_reason(cluster: LocalCluster) -> None:
    cluster.start_agent("node-c")
    cluster.wait_for_nodes(3)
    cluster.kill("agent-node-c")

    def lost() -> str:
        result = CliRunner().invoke(main, ["status", "--coordinator", cluster.endpoint])
        return result.output if "2 live, 1 lost" in result.output else ""

    said = cluster.wait("status to say that node-c is lost", lost)
    assert "! lost: silent for" in said


def test_watch_refreshes_and_ends_cleanly_on_ctrl_c(cluster: LocalCluster) -> None:
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptd.cli", "status", "--watch"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={
            **os.environ,
            ENV_COORDINATOR: cluster.endpoint,
            "TERM": "xterm",
            "COLUMNS": "80",
            "LINES": "24",
        },
    )
    os.close(theirs)
    said = ""

    def seen(text: str, times: int) -> bool:
        nonlocal said
        # Nothing now, or, once the process has ended, never again.
        with contextlib.suppress(OSError):
            said += os.read(ours, 1 << 16).decode(errors="replace")
        return said.count(text) >= times

    try:
        cluster.wait("two pages", lambda: seen("node-b", 2))
        process.send_signal(signal.SIGINT)
        cluster.wait("the last page, left on the terminal", lambda: seen("node-b", 3))
        cluster.wait("the end", lambda: [process.poll()] if process.poll() is not None else None)
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)
    assert process.returncode == 0
    assert "Traceback" not in said


def test_watch_needs_a_terminal() -> None:
    result = CliRunner().invoke(main, ["status", "--watch"])
    assert result.exit_code == 2
    assert "--json" in result.output


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("tcp://10.0.0.9:7070", "on each of its nodes: ckptd run --job NAME --agent SOCKET -- "),
        ("ipc:///run/user/0/ckptd/x", "Start one: ckptd run --job NAME -- --standalone "),
    ],
)
def test_without_a_job_status_says_how_to_start_one(address: str, hint: str) -> None:
    assert hint in words(status.render({**DOCUMENT, "jobs": []}, address), 120)
