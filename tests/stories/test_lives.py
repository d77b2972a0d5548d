"""What is lost, and what comes back: stories with real processes, memory and sockets."""

import os
import signal

import pytest

from ckptd.segment import parse_header

from .town import JOB

pytestmark = pytest.mark.timeout(300)


def test_a_killed_trainer_goes_on_from_its_newest_sealed_snapshot(town):
    here = town(1)
    first = here.train()
    assert here.wait_for_start(first) == 0
    here.wait_for_snapshot("sealed", after=5)
    here.kill_trainers(first)
    newest = here.wait_for_snapshot("sealed")
    second = here.train()
    start = here.wait_for_start(second)
    assert start >= newest
    assert here.event(second[0], "start")["life"] == 2
    here.wait_for_snapshot("sealed", after=start + 3)
    assert here.check_equal([first, second]) > start


def test_the_memory_is_given_back_when_the_job_is_finished(town):
    here = town(2)
    names = here.train("--steps", "30", "--finish")
    here.wait("the end", lambda: here.event(names[0], "end"), 60)
    here.wait("the job to be forgotten", lambda: not here.job(JOB))
    memory = [here.memory_of(node) for node in here.nodes]
    here.wait("the slots to go", lambda: not [f for m in memory for f in m.glob("*/*")])
    again = here.train("--steps", "5")
    assert here.wait_for_start(again) == 0


def test_leaving_without_finishing_keeps_the_newest_snapshot(town):
    here = town(1)
    names = here.train("--steps", "20")
    here.wait("the end", lambda: here.event(names[0], "end"), 60)
    newest = here.wait_for_snapshot("sealed")
    assert here.wait_for_start(here.train()) == newest


@pytest.mark.parametrize("victims", [(0,), (1, 3)])
def test_up_to_two_of_four_nodes_burn_and_the_job_goes_on(town, victims):
    here = town(4)
    first = here.train()
    here.wait_for_start(first)
    committed = here.wait_for_snapshot("protected", after=3)
    for victim in victims:
        here.destroy_node(here.nodes[victim])
    here.kill_trainers(first)
    # The spares come in at the end, so the survivors' ranks change.
    spares = [f"s{victim}" for victim in victims]
    for spare in spares:
        here.start_agent(spare, "--spare")
    survivors = [node for i, node in enumerate(here.nodes) if i not in victims]
    here.wait_for_nodes(4)
    second = here.train(nodes=survivors + spares)
    start = here.wait_for_start(second)
    assert start >= committed
    here.wait_for_snapshot("protected", after=start + 2)
    assert here.check_equal([first, second]) >= 4 * start
    rebuilt = [e for e in here.status()["events"] if e["kind"] == "segment_ready"]
    assert sum(e["rebuilt_cells"] for e in rebuilt) > 0
    here.kill_trainers(second)


def test_a_newcomer_gets_the_parity_too_and_then_two_more_nodes_may_burn(town):
    here = town(4)
    first = here.train()
    here.wait_for_start(first)
    here.wait_for_snapshot("protected", after=3)
    here.destroy_node("n1")
    here.kill_trainers(first)
    here.start_agent("g")
    here.wait_for_nodes(4)
    # It loads and leaves, so that no newer snapshot makes this one needless.
    second = here.train("--steps", "1", nodes=["n0", "g", "n2", "n3"])
    start = here.wait_for_start(second)

    again = "protected_again"
    (event,) = here.wait("the parity to be made anew", lambda: events(here, again), 60)
    assert (event["step"], event["seconds"] > 0) == (start, True)
    snapshot = here.snapshot("protected")
    assert (snapshot["step"], snapshot["may_lose"]) == (start, 2)
    assert snapshot["parity_on"] == ["g", "n0", "n2", "n3"]
    for node in ("n0", "n2"):
        here.destroy_node(node)
    for node in ("s0", "s2"):
        here.start_agent(node)
    here.wait("the lost nodes to be missed", lambda: here.snapshot("protected")["may_lose"] == 0)
    third = here.train(nodes=["s0", "g", "s2", "n3"])
    assert here.wait_for_start(third) == start
    here.wait_for_snapshot("protected", after=start + 2)
    assert here.check_equal([first, second, third]) >= 4 * start


def test_what_nobody_comes_for_is_rebuilt_on_a_survivor_and_found_there(town):
    here = town(4, coordinator_flags=("--rebuild-after", "1"))
    first = here.train()
    here.wait_for_start(first)
    here.wait_for_snapshot("protected", after=3)
    here.destroy_node("n1")
    here.kill_trainers(first)
    (event,) = here.wait("the segment to be rebuilt", lambda: events(here, "rebuilt"), 60)
    assert event["rank"] == 1
    held = here.wait("it to be held", lambda: here.snapshot("protected")["ranks_on"].get("1"))
    assert held == [event["node"]]
    assert event["node"] in ("n0", "n2", "n3")
    here.start_agent("g")
    here.wait_for_nodes(4)
    second = here.train(nodes=["n0", "g", "n2", "n3"])
    start = here.wait_for_start(second)
    here.wait_for_snapshot("protected", after=start + 2)
    assert here.check_equal([first, second]) >= 4 * start
    assert sum(each["rebuilt_cells"] for each in events(here, "segment_ready")) == 0


def test_too_little_spare_memory_is_said_with_its_numbers(town):
    here = town(
        4,
        coordinator_flags=("--rebuild-after", "1"),
        agent_flags=("--spare-memory", "5000"),
    )
    first = here.train()
    here.wait_for_start(first)
    here.wait_for_snapshot("protected", after=3)
    here.destroy_node("n1")
    here.kill_trainers(first)
    (text,) = here.wait("it to be said", lambda: here.job(JOB)["no_room"], 60)
    assert "rank 1 of story/1." in text
    assert "spare are n0 5000, n2 5000, n3 5000" in text
    assert "--memory-limit" in text
    assert not events(here, "rebuilt")


def events(here, kind):
    return [event for event in here.status()["events"] if event["kind"] == kind]


def test_three_of_four_nodes_burn_and_the_job_says_so_and_never_starts_from_nothing(town):
    here = town(4)
    first = here.train()
    here.wait_for_start(first)
    here.wait_for_snapshot("protected", after=3)
    for node in here.nodes[:3]:
        here.destroy_node(node)
    here.kill_trainers(first)
    for spare in ("s1", "s2", "s3"):
        here.start_agent(spare)
    here.wait_for_nodes(4)
    second = here.train("--timeout", "6", nodes=["n3", "s1", "s2", "s3"])
    refused = here.wait("the refusal", lambda: here.event(second[0], "refused"), 60)
    assert refused["kind"] == "ResumeImpossible"
    assert "ckptd rm story" in refused["text"]
    assert all(node in refused["text"] for node in here.nodes[:3])
    others = [here.wait("all to stop", lambda n=n: here.event(n, "refused")) for n in second[1:]]
    assert {each["kind"] for each in others} == {"ResumeImpossible"}


def test_an_agent_dies_and_training_does_not_notice(town):
    here = town(2)
    names = here.train()
    here.wait_for_start(names)
    here.wait_for_snapshot("protected", after=2)
    here.kill("agent-n1")
    before = max(here.steps(names[1]))
    here.wait("ten more steps", lambda: max(here.steps(names[1])) > before + 10)
    here.start_agent("n1")
    reached = max(here.steps(names[1]))
    here.wait_for_snapshot("protected", after=reached)
    assert "is back" in here.log(names[1])
    here.kill_trainers(names)
    second = here.train()
    start = here.wait_for_start(second)
    assert start > reached
    assert here.check_equal([names, second]) > start


def test_the_coordinator_dies_and_nothing_is_forgotten(town):
    here = town(2)
    names = here.train()
    here.wait_for_start(names)
    here.wait_for_snapshot("protected", after=2)
    here.kill("coordinator")
    before = max(here.steps(names[0]))
    here.wait("ten more steps", lambda: max(here.steps(names[0])) > before + 10)
    here.start_coordinator()
    here.wait_for_nodes(2)
    reached = max(here.steps(names[0]), default=0)
    here.wait_for_snapshot("protected", after=reached)
    here.kill_trainers(names)
    assert here.wait_for_start(here.train()) > reached


def test_everything_dies_but_the_memory_and_comes_back(town):
    here = town(2)
    names = here.train()
    here.wait_for_start(names)
    committed = here.wait_for_snapshot("protected", after=4)
    for name in (*names, "agent-n0", "agent-n1", "coordinator"):
        here.kill(name)
    here.start_coordinator()
    for node in here.nodes:
        here.start_agent(node)
    second = here.train()
    assert here.wait_for_start(second) >= committed
    here.wait_for_snapshot("protected", after=committed + 3)
    assert here.check_equal([names, second]) > committed


def test_a_stopped_trainer_that_wakes_up_harms_nobody(town):
    here = town(1)
    first = here.train()
    here.wait_for_start(first)
    here.wait_for_snapshot("sealed", after=2)
    here.kill(first[0], signal.SIGSTOP)
    second = here.train()
    start = here.wait_for_start(second)
    here.wait_for_snapshot("sealed", after=start + 2)
    here.kill(first[0], signal.SIGCONT)
    slept_at = max(here.steps(first[0]))
    here.wait("the sleeper to train on", lambda: max(here.steps(first[0])) > slept_at + 5)
    after = here.wait_for_snapshot("sealed", after=max(here.steps(second[0])))
    assert here.snapshot("sealed")["life"] == 2
    here.kill_trainers(second)
    third = here.train()
    assert here.wait_for_start(third) >= after
    here.wait_for_snapshot("sealed", after=after + 3)
    assert here.check_equal([second, third]) >= after


def test_one_machine_adopts_its_snapshot_after_its_agent_was_killed(town):
    here = town(1)
    first = here.train()
    here.wait_for_start(first)
    newest = here.wait_for_snapshot("sealed", after=3)
    here.kill_trainers(first)
    here.kill("agent-n0")
    here.start_agent("n0")
    second = here.train()
    start = here.wait_for_start(second)
    assert start >= newest
    here.wait_for_snapshot("sealed", after=start + 2)
    assert here.check_equal([first, second]) > start


def test_a_job_that_is_started_twice_goes_on_in_the_first_run(town):
    here = town(1)
    first = here.train()
    here.wait_for_start(first)
    here.wait_for_snapshot("sealed", after=2)
    second = here.train("--timeout", "10")
    said = here.wait("the refusal", lambda: here.event(second[0], "refused"), 60)
    assert "life 1, whose ranks are all there, to end or to stand still" in said["text"]
    here.wait_for_snapshot("sealed", after=here.wait_for_snapshot("sealed"))
    assert here.job(JOB)["life"] == 1


def test_a_run_that_stands_still_hears_that_its_job_was_started_again(town):
    here = town(1)
    first = here.train()
    here.wait_for_start(first)
    here.wait_for_snapshot("sealed", after=2)
    here.processes[first[0]].send_signal(signal.SIGSTOP)
    second = here.train()
    here.wait_for_start(second)
    here.processes[first[0]].send_signal(signal.SIGCONT)
    here.wait("the first to be told", lambda: "was started again: life 2" in here.log(first[0]))


def test_a_bit_that_flips_in_memory_is_found_and_repaired(town):
    here = town(3)
    first = here.train()
    here.wait_for_start(first)
    here.wait_for_snapshot("protected", after=3)
    here.kill_trainers(first)
    here.wait("the trainers to be missed", lambda: not here.job(JOB)["attached_ranks"])
    newest = here.wait_for_snapshot("protected")
    for segment in here.memory_of("n1").glob(f"{JOB}/*.safetensors"):
        with segment.open("r+b") as file:
            file.seek(-5000, 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 0x10]))
    second = here.train()
    start = here.wait_for_start(second)
    assert start >= newest
    here.wait_for_snapshot("protected", after=start + 2)
    assert here.check_equal([first, second]) > start
    status = here.status()
    ready = [e for e in status["events"] if e["kind"] == "segment_ready"]
    scrubbed = sum(node["mended_cells"] for node in status["nodes"])  # where that was sooner
    assert scrubbed + sum(e["rebuilt_cells"] for e in ready) >= 1


def test_a_resume_outlives_the_restart_of_its_agent(town):
    here = town(2)
    terms = [here.memory_of(node) / ".term" for node in here.nodes]
    here.wait("agents to obey", lambda: all(term.exists() for term in terms))
    here.kill("coordinator")
    names = here.train("--timeout", "90")
    waiting = "waiting for the coordinator to grant a life"
    here.wait("rank 0 to wait", lambda: waiting in here.log(names[0]), 60)
    here.kill("agent-n0")
    here.start_agent("n0")
    here.start_coordinator()
    assert here.wait_for_start(names) == 0
    here.wait_for_snapshot("protected", after=2)


def test_a_snapshot_that_had_to_be_given_up_does_not_make_the_job_start_from_nothing(town):
    here = town(1)
    names = here.train()
    here.wait_for_start(names)
    here.wait_for_snapshot("sealed", after=3)
    here.kill_trainers(names)
    for name in ("agent-n0", "coordinator"):
        here.kill(name)
    for segment in here.memory_of("n0").glob(f"{JOB}/*.safetensors"):
        os.truncate(segment, 100)
    here.start_coordinator()
    here.start_agent("n0")
    second = here.train("--timeout", "30")
    said = here.wait("the refusal", lambda: here.event(second[0], "refused"), 60)
    assert said["kind"] == "ResumeImpossible"
    assert "ckptd rm story" in said["text"]
    problems = here.status()["nodes"][0]["reasons"]
    assert any("cannot be used" in problem for problem in problems)


def test_a_bit_that_flips_at_rest_is_found_and_mended(town):
    here = town(3)
    names = here.train()
    here.wait_for_start(names)
    here.wait_for_snapshot("protected", after=3)
    here.kill_trainers(names)
    at_rest = here.wait_for_snapshot("protected")
    flipped = []
    for path in here.memory_of("n1").glob(f"{JOB}/*.safetensors"):
        raw = path.read_bytes()
        if raw[:8] != bytes(8) and parse_header(memoryview(raw), path.name).id.step == at_rest:
            with path.open("r+b") as file:
                file.seek(len(raw) // 2)
                file.write(bytes([raw[len(raw) // 2] ^ 1]))
            flipped.append((path, raw))
    assert flipped

    def mended():
        node = next(node for node in here.status()["nodes"] if node["node"] == "n1")
        return node if node["mended_cells"] else None

    node = here.wait("it to be mended", mended, 60)
    assert any("was damaged, and has been mended" in reason for reason in node["reasons"])
    assert all(path.read_bytes() == raw for path, raw in flipped)
