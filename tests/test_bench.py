"""`ckptd bench`: its arithmetic, and one small run of each command with all its processes."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import uuid
from collections import Counter

import psutil
import pytest

from ckptd.cli.bench_numbers import Snapshot, Spread, order_of_turn, paired, snapshots
from ckptd.cli.bench_report import report_of
from ckptd.cli.bench_restart import _restart
from ckptd.cli.bench_runner import Measured, Samples, measure
from ckptd.cli.local_cluster import wait_until
from ckptd.cli.plot import plot_capture, plot_overhead
from ckptd.errors import CkptdError
from ckptd.trainer.bench_messages import Counts, Done, Method, Ready, Step

NAMES = ["a", "b", "c", "d", "e"]
PLAIN, CKPTD, COPY = Method("plain"), Method("ckptd"), Method("copy")


def step(step_s, gate_s=0.0, save_s=0.0, captured=True, audits=0):
    return Step(step_s, gate_s, save_s, captured, audits)


# The arithmetic.


def test_quartiles_lie_within_the_samples():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0)


def test_two_methods_take_turns_so_that_a_steady_drift_hits_both_alike():
    order = [name for turn in range(4) for name in order_of_turn(["A", "B"], turn)]
    assert "".join(order) == "ABBABAAB"
    assert statistics.mean(i for i, name in enumerate(order) if name == "A") == statistics.mean(
        i for i, name in enumerate(order) if name == "B"
    )


def test_every_method_runs_once_a_turn_and_in_every_place_in_the_end():
    turns = [order_of_turn(NAMES, turn) for turn in range(2 * len(NAMES))]
    assert all(sorted(turn) == NAMES for turn in turns)
    for place in range(len(NAMES)):
        assert set(Counter(turn[place] for turn in turns).values()) == {2}
    before_c = {turn[turn.index("c") - 1] for turn in turns if turn[0] != "c"}
    assert before_c == {"b", "d"}


def test_a_snapshot_blocks_in_its_save_and_at_the_next_steps_gate():
    steps = [
        step(1.0, gate_s=9.0, save_s=0.25),
        step(1.0, gate_s=0.5, save_s=0.125, captured=False),
        step(1.0, gate_s=8.0, save_s=1.0),
        step(1.0, gate_s=2.0, save_s=7.0, audits=1),
    ]
    assert snapshots(steps) == [Snapshot(0.75, audited=False), Snapshot(3.0, audited=True)]
    assert snapshots(steps[:1]) == []


def test_ratios_are_taken_within_a_turn():
    assert paired({0: 2.0, 1: 30.0}, {0: 1.0, 1: 10.0, 2: 5.0}) == Spread(2.5, 2.25, 2.75)
    assert paired({3: 2.0}, {0: 1.0}) is None


# Who measures, and what is made of it, with a trainer that answers at once.


class FakeTrainer:
    """Steps of 1 s, 2 s with ckptd, whose first three captures are audited."""

    def __init__(self, broken=()):
        self.broken, self.asked, self.counts = broken, [], {}

    def run(self, method, steps):
        self.asked.append((method.kind, steps))
        if method.kind in self.broken:
            return Done(error="no such thing")
        seen = self.counts.get(method.kind, Counts())
        done = []
        audits = min(3, seen.captures)
        for number in range(steps):
            seconds = 2.0 if method.kind == "ckptd" else 1.0
            done.append(step(seconds, 0.25, 0.5, method.kind != "plain", audits))
            audits = min(3, seen.captures + number + 1)
        rate = 4 if method.kind == "copy" else 2
        seen = Counts(
            captures=seen.captures + steps,
            sealed=seen.sealed + steps,
            copied_bytes=seen.copied_bytes + rate * steps,
            copy_s=seen.copy_s + steps,
        )
        self.counts[method.kind] = seen
        return Done(tuple(done), seen if method.kind != "plain" else Counts())


def test_methods_warm_up_take_turns_and_are_compared_with_plain_training():
    trainer, told = FakeTrainer(), []
    methods = {"plain": PLAIN, "ckptd": CKPTD, "copy": COPY}
    measured = measure(trainer, methods, repeats=4, steps=3, tell=told.append)
    assert len(told) == len(trainer.asked) == 3 * (1 + 4)
    assert all(steps == 1 + 3 for _, steps in trainer.asked[3:])
    report = report_of(Ready(device="cpu"), "ext4", 4, 3, measured)
    plain, ckptd, copy = (report.outcomes[name] for name in methods)
    assert plain.ratio == Spread(1.0, 1.0, 1.0)
    assert plain.blocked_s is None
    assert ckptd.ratio == Spread(2.0, 2.0, 2.0)
    assert ckptd.ratios == (2.0,) * 4
    assert ckptd.blocked_s == Spread(0.75, 0.75, 0.75)
    assert ckptd.rate_ratio == Spread(0.5, 0.5, 0.5)
    assert (ckptd.captured, ckptd.trained, ckptd.snapshots) == (12, 12, 8)
    assert copy.copy_bytes_per_s == Spread(4.0, 4.0, 4.0)
    assert report.audits == 3
    json.dumps(report.as_json())


def test_audits_are_told_apart_wherever_they_happen():
    samples = {"plain": Samples(), "ckptd": Samples()}
    for each in samples.values():
        each.steps[0] = 1.0
    samples["ckptd"].snapshots = [Snapshot(1.0, False), Snapshot(50.0, True), Snapshot(3.0, False)]
    report = report_of(Ready(), "", 1, 3, Measured(samples, audited_s=[60.0]))
    assert report.outcomes["ckptd"].blocked_s == Spread(2.0, 1.5, 2.5)
    assert (report.audits, report.audit_blocked_s) == (2, Spread(55.0, 52.5, 57.5))


def test_what_does_not_work_is_said_and_the_others_go_on():
    methods = {"plain": PLAIN, "ckptd": CKPTD, "async": Method("async_save")}
    trainer = FakeTrainer(["async_save"])
    report = report_of(Ready(), "", 2, 2, measure(trainer, methods, 2, 2, lambda text: None))
    assert Counter(kind for kind, _ in trainer.asked)["async_save"] == 1
    assert report.outcomes["async"].error == "no such thing"
    assert report.outcomes["async"].step_s is None
    assert report.outcomes["ckptd"].trained == 4


def test_without_ckptd_there_is_nothing_to_report():
    measured = measure(FakeTrainer(["ckptd"]), {"plain": PLAIN, "ckptd": CKPTD}, 2, 2, str)
    with pytest.raises(CkptdError, match="ckptd did not work: no such thing"):
        report_of(Ready(), "", 2, 2, measured)


def test_the_pictures_are_drawn_without_a_display(tmp_path):
    methods = {"plain": PLAIN, "ckptd": CKPTD, "async": Method("async_save"), "copy": COPY}
    measured = measure(FakeTrainer(["async_save"]), methods, 2, 3, lambda text: None)
    report = report_of(Ready(device="cpu"), "", 2, 3, measured)
    for draw in (plot_capture, plot_overhead):
        picture = tmp_path / "picture.png"
        draw(report, picture)
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()


# With all processes.


def bench(*flags):
    return [sys.executable, "-m", "ckptd.cli", "bench", *flags]


def of_this_test(mark):
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("BENCH_TEST") == mark:
                found.append(process)
    return found


@pytest.mark.slow
def test_every_method_is_measured_on_a_small_model(tmp_path):
    flags = ["--state", "4MiB", "--step-seconds", "0", "--repeats", "1", "--steps", "2"]
    done = subprocess.run(
        bench("capture", *flags, "--disk", str(tmp_path), "--json"),
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    report = json.loads(done.stdout)
    assert report["training"]["state_bytes"] > 2**21
    outcomes = report["outcomes"]
    modes = [f"async-{m}-{w}" for m in ("thread", "process", "staged") for w in ("tmpfs", "disk")]
    assert list(outcomes) == ["plain", "ckptd", *modes, "torch-save-tmpfs", "copy"]
    for name, outcome in outcomes.items():
        assert outcome["error"] == "", name
        assert outcome["trained"] == 2
        for spread in (outcome["step_s"], outcome["ratio"]):
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        if name not in ("plain", "ckptd"):  # ckptd may have had no ticket
            assert outcome["captured"] == 2
            assert outcome["snapshots"] == 1
            assert outcome["blocked_s"]["median"] > 0
    assert outcomes["copy"]["copy_bytes_per_s"]["median"] > 0
    assert report["sealed"] > 0
    assert report["torn"] == report["failed"] == 0
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    mark = uuid.uuid4().hex
    with (tmp_path / "out").open("wb") as out:
        running = subprocess.Popen(
            bench("overhead", "--state", "4MiB", "--step-seconds", "0.02", "--repeats", "10000"),
            stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            env={**os.environ, "BENCH_TEST": mark, "TMPDIR": str(tmp_path)},
        )  # fmt: skip
    memory = set()

    def a_segment_is_there():
        for process in of_this_test(mark):
            with contextlib.suppress(psutil.Error):
                if cluster := process.environ().get("CKPTD_LOCAL_CLUSTER"):
                    memory.add(f"/dev/shm/ckptd-{cluster}")
        return any(
            name.startswith("segment") for m in memory for _, _, f in os.walk(m) for name in f
        )

    wait_until("a snapshot", a_segment_is_there, 90)
    running.send_signal(signal.SIGINT)
    running.wait(60)
    assert running.returncode == 130, (tmp_path / "out").read_text()
    assert of_this_test(mark) == []
    assert memory
    assert not any(os.path.exists(path) for path in memory)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_timing_with_all_its_processes():
    words = ["timing", "--width", "16", "--layers", "2", "--repeats", "2", "--steps", "3", "--json"]
    command = [sys.executable, "-m", "ckptd.cli", "bench", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["collectives_per_step"] >= 1
    sources = found["sources"]
    assert sources["unwatched"]["records"] == 0
    assert sources["recorder"]["records"] > sources["recorder"]["timed"] == 0
    for source in sources.values():
        assert source["step_s"]["median"] > 0
        assert source["ratio"]["median"] > 0


def test_the_parts_of_a_restart_add_up():
    one = {
        "process_began_at": 10.2, "imported_at": 11.0, "grouped_at": 11.2, "restored_at": 11.3,
        "at": 11.4, "step": 21,
    }  # fmt: skip
    other = {**one, "process_began_at": 10.1, "grouped_at": 11.25}
    restart = _restart(10.0, [one, other], reached=24, noticed=0.1)
    assert restart.launcher == pytest.approx(0.2)
    assert restart.group == pytest.approx(0.25)
    parts = (restart.launcher, restart.imports, restart.group, restart.restore, restart.step)
    assert sum(parts) == pytest.approx(restart.total) == 1.4
    assert restart.steps_lost == 4
