"""A process or a node that dies is an incident, once the job runs again, with its four parts."""

import pytest

from ckptd.coordinator.diagnosis.incidents import IncidentRecord

from .fakes import JOB, Cluster
from .test_coordinator import trained


def elastic(cluster: Cluster, seconds: float = 2.0) -> None:
    """A launcher starts the ranks again; the coordinator has had time to note it."""
    for rank in range(cluster.world_size):
        cluster.update(rank, elastic=True)
    cluster.pass_time(seconds)


def incidents(cluster: Cluster) -> list[IncidentRecord]:
    return list(cluster.coordinator.supervisors.shared.records.values())


def test_a_dead_process_and_what_it_cost():
    cluster = trained("a", "b")
    snapshot = cluster.make_protected()
    elastic(cluster)
    stopped = cluster.coordinator.jobs[JOB].pacer.progress_at
    cluster.pass_time(1.0)
    found = cluster.now
    cluster.leave(1, "its process has ended")
    cluster.pass_time(0.5)
    cluster.leave(0, "its process has ended")
    assert incidents(cluster) == []
    cluster.pass_time(3.0)
    cluster.start("a", "b", round_="r2")

    (incident,) = incidents(cluster)
    assert (incident.kind, incident.culprit) == ("dead process", "rank 1 on node b")
    assert incident.text == "rank 1 on node b: its process has ended"
    assert incident.detection_s == pytest.approx(found - stopped)
    assert incident.diagnosis_s == pytest.approx(0.5)
    assert incident.restart_s == pytest.approx(3.0)
    taken = cluster.coordinator.jobs[JOB].snapshots[snapshot].created
    assert incident.lost_work_s == pytest.approx(stopped - taken)
    assert [line for _, line in incident.timeline][-1].startswith("life 2 trains again")
    cluster.pass_time(1.0)
    assert cluster.coordinator.journal.next_incident == incident.number + 1


def test_a_lost_node_is_to_blame_though_its_peers_fail_first():
    cluster = trained("a", "b", spares=("c",))
    cluster.make_protected()
    elastic(cluster)
    cluster.leave(0, "its process has ended")
    cluster.destroy("b")
    cluster.start("a", "c", round_="r2")
    (incident,) = incidents(cluster)
    assert (incident.kind, incident.culprit) == ("dead node", "node b")
    assert incident.diagnosis_s is not None
    assert incident.diagnosis_s > 0


def test_who_says_goodbye_or_is_started_by_hand_is_no_incident():
    cluster = trained("a", "b")
    elastic(cluster)
    cluster.leave(0, "detached")
    cluster.leave(1, "detached")
    cluster.start("a", "b", round_="r2")
    cluster.pass_time(2.0)  # nothing starts these again by itself
    cluster.stop_job()
    cluster.start("a", "b", round_="r3")
    assert incidents(cluster) == []
