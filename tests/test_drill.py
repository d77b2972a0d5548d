"""What the drill hears of a job in the coordinator's status."""

import os
import signal
import threading
from math import inf
from typing import Any

import pytest

from ckptd.cli.drill_ear import Ear
from ckptd.cli.drill_job import SLOW_DOWN, Target, struck
from ckptd.coordinator.diagnosis.score import Expected

STRUCK_AT = 1000.0
HANG, DIED = "non-communication hang", "died"


def ear(*kinds: str) -> Ear:
    expected = Expected(kinds, ("rank 2 on node b",), (2,), ("b",)) if kinds else Expected()
    made = Ear("job", expected, lambda since, until: (until - since) / 0.5)
    made.struck_at = STRUCK_AT
    return made


def one(number: int, ranks: list[int], culprit: str, **more: Any) -> dict[str, Any]:
    return {
        "number": number,
        "kind": HANG,
        "is_hang": True,
        "culprit": culprit,
        "ranks": ranks,
        "nodes": ["b"],
        "confidence": 0.7,
        "text": "it waits",
        **more,
    }


def status(
    findings: list[dict[str, Any]], incidents: list[dict[str, Any]], *events: dict[str, Any]
) -> dict[str, Any]:
    return {
        "events": [{"job": "job", "time": STRUCK_AT + 2.0, **event} for event in events],
        "incidents": [{"job": "job", "at": STRUCK_AT, **each} for each in incidents],
        "diagnosis": {"jobs": {"job": {"findings": findings}}},
    }


SUSPECTED = {"kind": "hang_suspected", "finding": 1}
RIGHT = one(1, [2], "rank 2 on node b")


def test_a_finding_counts_from_the_event_and_not_from_when_it_was_heard() -> None:
    heard = ear(HANG)
    for _ in range(2):
        heard.listen(status([RIGHT], [], SUSPECTED))
    (said,) = heard.said
    assert heard.named == said
    assert (said.after_s, said.after_steps, said.confidence) == (2.0, 4.0, 0.7)
    assert heard.confirmed_s == inf


def test_a_culprit_that_changes_is_noted_again_and_the_first_right_one_is_kept() -> None:
    heard = ear(HANG)
    several = one(1, [1, 2], "ranks 1, 2")
    heard.listen(status([several], [], SUSPECTED))
    assert heard.named is None
    heard.listen(status([RIGHT], [], SUSPECTED))
    incident = one(5, [2], "rank 2 on node b", witness="rank 2: stopped")
    heard.listen(status([RIGHT], [incident], SUSPECTED))
    assert [said.culprit for said in heard.said] == ["ranks 1, 2", *2 * ["rank 2 on node b"]]
    assert heard.named == heard.said[1]
    assert heard.confirmed_s < inf


def test_what_was_there_before_is_not_of_this_fault() -> None:
    heard = ear(HANG)
    before = one(3, [2], "rank 2 on node b", at=STRUCK_AT - 60, witness="")
    early = {**SUSPECTED, "time": STRUCK_AT - 60}
    heard.listen(status([RIGHT], [before], early))
    heard.listen(status([], [{**before, "job": "another", "at": STRUCK_AT}]))
    assert heard.said == []


def test_of_a_healthy_job_only_an_incident_is_something_said() -> None:
    heard = ear()
    heard.listen(status([RIGHT], [], SUSPECTED))
    assert (heard.said, heard.suspicions) == ([], 1)
    heard.listen(status([RIGHT], [one(5, [2], "rank 2 on node b", witness="w")], SUSPECTED))
    assert len(heard.said) == 1
    assert heard.named is None


def test_who_died_first_is_the_one() -> None:
    heard = ear(DIED)
    leaves = [{"kind": "rank_left", "rank": rank, "node": "b"} for rank in (2, 0)]
    heard.listen(status([], [], *leaves))
    heard.listen(status([], [], *leaves))
    (said,) = heard.said
    assert (said.kind, said.ranks, said.after_s) == (DIED, (2,), 2.0)


def test_a_rank_goes_on_even_if_the_end_of_its_fault_is_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    main, sent = threading.get_ident(), list[int]()

    def send(target: Target, number: int) -> None:
        if threading.get_ident() == main:
            sent.append(number)

    real_join = threading.Thread.join

    def join(thread: threading.Thread) -> None:
        real_join(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(Target, "signal", send)
    target = Target("job", 0, "a", os.getpid(), 0)
    with pytest.raises(KeyboardInterrupt), struck(SLOW_DOWN, target, 50):
        monkeypatch.setattr(threading.Thread, "join", join)
    assert sent == [signal.SIGCONT]
