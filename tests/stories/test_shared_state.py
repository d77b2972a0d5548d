"""State that ranks hold alike: each keeps a part of it, and all of it comes back."""

import pytest

from ckptd.segment import Header, parse_header

from .town import JOB, Town

pytestmark = pytest.mark.timeout(300)
DDP = ("--ddp", "--width", "512")


def check_against_calm(here: Town, runs: list[list[str]]) -> None:
    """The same training without ckptd gives the same state after every step, on every rank."""
    last = max(step for names in runs for name in names for step in here.steps(name))
    calm = here.train(*DDP, "--without", "--steps", str(last), "--step-s", "0", nodes=["n0", "n0"])
    for name in calm:
        here.wait(f"{name} to end", lambda name=name: here.event(name, "end"), 100)
    expected = here.steps(calm[0])
    for names in runs:
        for name in names:
            for step, digest in here.steps(name).items():
                assert digest == expected[step], f"{name}, step {step} differs"


def stored(here: Town) -> list[Header]:
    """Headers of the newest snapshot that is whole."""
    files = [f for n in here.nodes for f in here.memory_of(n).glob("*/segment-*.safetensors")]
    raw = [file.read_bytes() for file in files]
    found = [parse_header(data, "a segment") for data in raw if any(data[:8])]
    ids = sorted({header.id for header in found})
    whole = [id for id in ids if sum(header.id == id for header in found) == 2]
    return [header for header in found if header.id == whole[-1]]


def test_a_process_and_then_a_node_is_lost_and_every_rank_gets_the_whole_state_back(town):
    here = town(2)
    first = here.train(*DDP)
    here.wait_for_start(first)
    here.wait_for_snapshot("protected", after=4)
    here.kill_trainers(first)
    headers = stored(here)
    assert [header.shares for header in headers] == [((0, 1),), ((0, 1),)]
    weights = [p for h in headers for p in h.tensors.values() if p.spec.name == "model.0.weight"]
    assert sum(placed.spec.size_bytes for placed in weights) == 4 * 512 * 16  # once
    sizes = [sum(p.spec.size_bytes for p in h.tensors.values()) for h in headers]
    assert max(sizes) < 1.2 * min(sizes)

    second = here.train(*DDP)
    start = here.wait_for_start(second)
    assert start > 4
    here.wait_for_snapshot("protected", after=start + 3)
    here.destroy_node("n1")
    here.kill_trainers(second)
    here.start_agent("s1", "--spare")
    here.wait_for_nodes(2)
    third = here.train(*DDP, nodes=["n0", "s1"])
    again = here.wait_for_start(third)
    assert again >= start + 3
    here.wait_for_snapshot("protected", after=again + 2)
    here.kill_trainers(third)
    check_against_calm(here, [first, second, third])


def test_a_layer_unfrozen_on_one_rank_only_is_kept_though_the_ranks_no_longer_agree(town):
    here = town(2)
    flags = (*DDP, "--unfreeze", "12")
    names = here.train(*flags)
    here.wait_for_start(names)
    here.wait_for_snapshot("protected", after=13)
    assert "every rank saves all that it has" in here.log(names[0])
    assert any(event["kind"] == "undivided" for event in here.status()["events"])
    here.kill_trainers(names)
    again = here.train(*flags)
    start = here.wait_for_start(again)
    assert start > 13
    assert here.job(JOB)["life"] == 2
    here.wait_for_snapshot("protected", after=start + 2)
    here.kill_trainers(again)
    first, second = here.steps(names[1]), here.steps(again[1])
    overlap = first.keys() & second.keys()
    assert all(first[step] == second[step] for step in overlap)
