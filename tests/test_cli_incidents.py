"""`ckptd incidents`, `ckptd matrix`, and what diagnosis adds to `ckptd status`."""

import io
from dataclasses import replace
from typing import Any

from rich.console import Console, RenderableType

from ckptd.cli import incidents, matrix, plot
from ckptd.cli.status import _health
from ckptd.coordinator.diagnosis.incidents import IncidentRecord, from_journal

RECORD = IncidentRecord(
    number=3,
    job="lm",
    life=2,
    step=70,
    at=1_700_000_000.0,
    kind="non-communication hang",
    culprit="rank 1 on node a",
    text="rank 1 on node a has not entered operation 9",
    witness="rank 1: stopped",
    doing={"1": "stopped"},
    stacks={"1": "main\nlocked"},
    folders={"a": "/run/a.incidents/x"},
    decision="restart",
    reason="it hangs",
    lost_work_s=1.0,
    detection_s=2.0,
    diagnosis_s=1.5,
    restart_s=7.5,
    timeline=[(1_700_000_000.0, "last progress of the culprit")],
)


def printed(what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined] # a StringIO


def test_a_report_has_all_that_a_ticket_needs() -> None:
    report = incidents.report(RECORD.as_json())
    for part in (
        "ckptd incident 3: non-communication hang of job lm",
        "2023-11-14 22:13:20 UTC, life 2, step 70",
        "rank 1 on node a",
        "rank 1: stopped",
        "locked",
        "/run/a.incidents/x",
        "restart: 7.5 s",
        "work lost since the snapshot: 1.0 s",
        "in all: 12.0 s",
        "last progress of the culprit",
    ):
        assert part in report
    assert incidents.downtime_s(RECORD.as_json()) == 12.0


def test_what_only_the_journal_knows_is_reported_as_far_as_it_goes() -> None:
    slow = replace(RECORD, detection_s=None, lost_work_s=None, diagnosis_s=None, restart_s=None)
    known = from_journal(slow.entry()).as_json()
    report = incidents.report(known)
    assert "restart: not known" in report
    assert "timeline" not in report
    assert incidents.downtime_s(known) is None


def test_the_four_parts_are_added_up_for_each_kind() -> None:
    dead = replace(RECORD, kind="dead process", detection_s=0.5, diagnosis_s=0.0)
    known = [one.as_json() for one in (RECORD, RECORD, dead, replace(dead, lost_work_s=None))]
    rows = [
        " ".join(line.split()) for line in printed(incidents.downtime_table(known)).splitlines()
    ]
    assert rows == [
        "downtime incidents work lost detection diagnosis restart in all",
        "dead process 2 1.0 s 1.0 s 0.0 s 15.0 s 17.0 s",
        "non-communication hang 2 2.0 s 4.0 s 3.0 s 15.0 s 24.0 s",
        "all 4 3.0 s 5.0 s 3.0 s 30.0 s 41.0 s",
    ]


def pair(source: str, destination: str, delay: float) -> dict[str, Any]:
    return {"source": source, "destination": destination, "s_per_gib": delay}


FOUND = {"pairs": [pair("a", "b", 1.0), pair("b", "a", 1.1), pair("a", "c", 5.0)], "hot": []}


def test_the_matrix_has_a_cell_for_each_pair(tmp_path) -> None:
    nodes, rows = matrix.as_rows(FOUND)
    assert nodes == ["a", "b", "c"]
    assert rows == [[None, 1.0, 5.0], [1.1, None, None], [None, None, None]]
    assert "1.1" in printed(matrix.render(FOUND))
    assert [matrix._cell(delay, 1.0).style for delay in (1.0, 1.7, 5.0)] == [
        "green",
        "yellow",
        "bold red",
    ]
    plot.plot_matrix(nodes, rows, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")


def health(**changed: Any) -> str:
    job = {
        "quiet_because": "",
        "unseen_ranks": [],
        "restarts_stopped": "",
        "pauses": [],
        "findings": [],
        **changed,
    }
    lines = _health({"policy": "restart", "jobs": {"lm": job}}, "lm", training=True)
    return "\n".join(line.plain for line in lines)


def test_status_says_what_is_found_or_why_nothing_is() -> None:
    assert "no rank hangs or is slow · policy restart" in health()
    assert "learning what is usual" in health(quiet_because="learning what is usual in this job")
    assert "not seen" in health(unseen_ranks=[1], quiet_because="collectives are not seen")
    text = "restarts are stopped: why. Once that is mended: ckptd rearm lm"
    assert text in health(restarts_stopped="restarts are stopped: why")
    pause = {"rank": 3, "what": "evaluation", "for_s": 4000.0, "at_most_s": 3600.0, "over": True}
    text = "rank 3 is paused for 67 min by now, and said 60 min at most: evaluation"
    assert text in health(pauses=[pause])
    finding = {
        "kind": "communication hang",
        "is_hang": True,
        "culprit": "rank 1",
        "text": "all have entered",
        "confidence": 0.5,
        "for_s": 3.0,
        "witness": "rank 1: stopped",
    }
    text = health(findings=[finding])
    assert "communication hang for 3.0 s: all have entered" in text
    assert "second witness: rank 1: stopped" in text
