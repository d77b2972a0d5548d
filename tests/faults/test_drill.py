"""The drill itself: real jobs, struck, and the right one is blamed. `make drill` has the rest."""

from collections.abc import Iterator

import psutil
import pytest
from click.testing import CliRunner

from ckptd.cli.drill_faults import FAULTS
from ckptd.cli.drill_run import NODES, Drill, Range
from ckptd.cli.main import main
from ckptd.coordinator.diagnosis.score import Who
from ckptd.trainer.drill_messages import DDP, Setup, pid_path, steps_path

pytestmark = pytest.mark.timeout(300)

JOB = "own"


@pytest.fixture(scope="module")
def place() -> Iterator[Range]:
    with Range(network=False) as made:
        yield made


@pytest.mark.parametrize("name", ["mismatch", "exception"])
def test_who_is_struck_is_blamed(place: Range, name: str) -> None:
    fault = next(fault for fault in FAULTS if fault.name == name)
    drill = Drill(place, fault, 0, timing=True, step_s=0.3)
    run = drill.hold()
    assert not run.problem, run.problem
    (said,) = run.final
    assert said.kind in fault.kinds
    assert drill.expected.who(said) is Who.RIGHT


def test_a_rank_of_ones_own_job_is_stopped_slowed_and_killed_and_named_each_time(
    place: Range,
) -> None:
    directory = place.cluster.directory / JOB
    directory.mkdir()
    sockets = tuple(str(place.cluster.socket(node)) for node in NODES)
    place.start(Setup(JOB, DDP, sockets, str(directory), 0.3, timing=False))

    def knows_the_job() -> bool:
        found = place.cluster.status()["diagnosis"]["jobs"].get(JOB, {})
        return bool(found.get("life")) and found["hang_timeout_s"] < 100

    place.cluster.wait("the diagnosis to know the job", knows_the_job, 100)
    flags = ["--job", JOB, "--coordinator", place.cluster.endpoint, "--yes"]
    flags += ["--agent", sockets[1], "--key-file", str(place.key_file)]
    stop = ["drill", *flags, "--fault", "stop"]
    elsewhere = CliRunner().invoke(main, [*stop, "--rank", "3"])
    assert elsewhere.exit_code == 1
    assert "rank 3 of job 'own' does not run here: of its ranks 1 run" in elsewhere.output
    result = CliRunner().invoke(main, [*stop, "--rank", "1"])
    assert result.exit_code == 0, result.output
    assert "right: rank 1 on node n2 was named" in result.output
    process = psutil.Process(int(pid_path(directory, 1).read_text()))
    assert process.status() != psutil.STATUS_STOPPED
    made = steps_path(directory).read_text().count("\n")
    place.cluster.wait(
        "training to go on", lambda: steps_path(directory).read_text().count("\n") > made + 3, 60
    )
    for fault in (["slow", "--percent", "200"], ["kill"]):
        result = CliRunner().invoke(main, ["drill", *flags, "--rank", "1", "--fault", *fault])
        assert result.exit_code == 0, result.output
        assert "right: rank 1 on node n2 was named" in result.output
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    place.end(JOB)


def test_what_belongs_to_the_other_way_is_refused() -> None:
    for flags, text in ((["--job", "x"], "--job needs"), (["--fault", "stop"], "are for --job")):
        result = CliRunner().invoke(main, ["drill", *flags])
        assert result.exit_code == 2
        assert text in result.output
