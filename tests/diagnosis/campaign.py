"""Many simulated jobs with known faults: is each one found, and nothing else?

`python -m tests.diagnosis.campaign --help`. Prints a table of what was and what was said. Healthy
jobs are run for many simulated hours to count restarts that nobody needed.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from msgspec import structs

from ckptd.coordinator.diagnosis import Detector, Finding, Kind, Scope
from ckptd.coordinator.diagnosis.matrix import DelayMatrix, narrow, probes
from ckptd.coordinator.diagnosis.policy import Do, Policy
from ckptd.coordinator.diagnosis.score import NOTHING, Confusion, Expected, Said, spread
from ckptd.coordinator.diagnosis.witness import Judgement, Verdict, judge
from ckptd.sketches import Sketch
from ckptd.wire import Look

from .simulation import Fault, Job, Shape, node_name, play

REPLICAS = Shape(data=32, pipeline=1, tensor=1, microbatches=1, layers=2)
TENSOR = Shape(data=8, pipeline=1, tensor=8, microbatches=2)
PIPELINE = Shape(data=4, pipeline=4, tensor=8, microbatches=4)
EXPERTS = Shape(data=16, pipeline=2, tensor=4, expert=4)
LARGE = Shape(data=32, pipeline=8, tensor=8, microbatches=8, layers=1)
SHAPES = {"replicas": REPLICAS, "tensor": TENSOR, "pipeline": PIPELINE, "experts": EXPERTS}
LARGE_SHAPES = {"large": LARGE}
FAULT_STEP = 130
END_STEP = 230
HEALTHY = NOTHING


@dataclass(frozen=True)
class Case:
    """A job, a fault or none, and what is to be said about it."""

    name: str
    shape: Shape
    source: str
    seed: int
    fault: Fault | None
    expected: str
    """Kind and culprit, as `said` would put them."""
    declared: bool = False
    """The program says that it evaluates."""


@dataclass
class Outcome:
    """What was said about a case in the end."""

    said: list[Said] = field(default_factory=list)
    """Each finding in its last form: slow ones, and hangs that the second witness confirmed."""
    restarts: int = 0
    suspicions: int = 0
    """Hangs that were suspected, confirmed or not."""
    found_after_s: float = float("inf")
    findings: list[Finding] = field(default_factory=list)


def said(finding: Finding, after_s: float, after_steps: float) -> Said:
    """A finding, short enough for a table."""
    culprit = finding.culprit
    who = {
        Scope.RANK: f"rank {','.join(map(str, culprit.ranks))}",
        Scope.RANKS: f"ranks {','.join(map(str, culprit.ranks))}",
        Scope.JOB: "job",
    }.get(culprit.scope, f"{culprit.scope.value} {','.join(culprit.nodes)}")
    names = culprit.ranks, culprit.nodes
    return Said(finding.kind.value, who, *names, finding.confidence, after_s, after_steps)


class Witness:
    """What the processes of a simulated job would show."""

    def __init__(self, case: Case) -> None:
        self.fault = case.fault

    def judge(self, finding: Finding, now: float) -> Judgement:
        samples = {rank: self._samples(rank, finding, now) for rank in finding.suspects}
        return judge(finding, samples, now)

    def _samples(self, rank: int, finding: Finding, now: float) -> tuple[Look, Look]:
        fault = self.fault
        is_here = fault is not None and rank in fault.ranks
        first = Look(now - 1.5, "S", 10.0, 100, "main\n  all_reduce\n  wait")
        if is_here and fault is not None and fault.kind == "hang":
            state = "T" if fault.step % 2 else "S"
            first = structs.replace(first, state=state, stack="main\n  next_batch\n  read")
        elif finding.kind is Kind.NON_COMMUNICATION_HANG and not self._waits(rank):
            # Late, or evaluating: it is somewhere else each time, and computes.
            return first, structs.replace(first, at=now, stack="main\n  forward", cpu_s=11.0)
        return first, structs.replace(first, at=now)

    def _waits(self, rank: int) -> bool:
        """Whether a suspect is one only because what it waits in is not timed."""
        fault = self.fault
        return fault is not None and fault.kind == "hang" and rank not in fault.ranks


def run(case: Case, poll_steps: float = 0.5, end_step: int = END_STEP) -> Outcome:
    """Run a case to its end, or to a confirmed hang."""
    job = Job(case.shape, case.seed, case.fault, case.source)
    detector, witness, policy, outcome = Detector(), Witness(case), Policy(), Outcome()
    last: dict[int, Finding] = {}
    nodes = [node_name(node) for node in range(case.shape.nodes)]

    def observe(at: float, sketches: list[Sketch]) -> bool:
        for sketch in sketches:
            assert detector.observe(sketch, at)
        _declare(case, job, detector, at)
        for finding in detector.findings(at):
            outcome.findings.append(finding)
            outcome.suspicions += finding.kind.is_hang and not finding.over
            if not finding.kind.is_hang and not finding.over:
                last[finding.number] = finding
                outcome.found_after_s = min(outcome.found_after_s, at - job.fault_at)
        for finding in list(detector.open.values()):
            if not finding.kind.is_hang:
                continue
            judgement = witness.judge(finding, at)
            if judgement.verdict is Verdict.HANGS:
                outcome.found_after_s = min(outcome.found_after_s, finding.found_at - job.fault_at)
                finding = detector.confirmed(finding, judgement.culprits)
                last[finding.number] = finding
                decision = policy.decide(finding, judgement, job.step, at)
                outcome.restarts += decision.do is not Do.OBSERVE
                return True
        return False

    steps_s = case.shape.step_s
    play(job, poll_steps * steps_s, 1.4 * end_step * steps_s, observe)
    after = outcome.found_after_s, outcome.found_after_s / steps_s
    outcome.said = [said(_probed(job, finding, nodes), *after) for finding in last.values()]
    return outcome


def _declare(case: Case, job: Job, detector: Detector, at: float) -> None:
    """`ckpt.pause("evaluation")`, and its end."""
    fault = case.fault
    if not case.declared or fault is None:
        return
    evaluates = job.fault_at <= at < job.fault_at + fault.seconds + job.shape.step_s
    if evaluates:
        detector.pause({0: "evaluation"}, at)
    else:
        detector.pause({}, at)


def _probed(job: Job, finding: Finding, nodes: list[str]) -> Finding:
    """After agents have measured the pairs that the finding leaves open."""
    candidates = finding.culprit.nodes
    if finding.culprit.scope is not Scope.NODES:
        return finding
    matrix = DelayMatrix()
    for source, destination in probes(candidates, nodes):
        seconds = 0.01 * job.probe(nodes.index(source), nodes.index(destination))
        for _ in range(3):
            noise = 1 + 0.1 * abs(float(job.random.standard_normal()))
            matrix.observe(source, destination, 4 << 20, seconds * noise)
    return narrow(finding, matrix, nodes)


def cases(seed: int, rounds: int, shapes: Mapping[str, Shape] = SHAPES) -> Iterator[Case]:
    """Every sort of fault for every layout and source that can show it, `rounds` times."""
    random = np.random.default_rng(seed)
    for number in range(rounds):
        for name, shape in shapes.items():
            for source in ("durations", "entries", "gpu"):
                yield from _faults(name, shape, source, 1000 * number + seed, random)


def _faults(
    name: str, shape: Shape, source: str, seed: int, random: np.random.Generator
) -> Iterator[Case]:
    rank = int(random.integers(shape.ranks))
    node = int(random.integers(shape.nodes))
    link = (node, (node + 1) % shape.nodes)
    if shape.pipeline > 1 and shape.tensor == 8:
        # Neighbours in one pipeline: others exchange nothing.
        link = (node, node + 1) if (node + 1) % shape.pipeline else (node - 1, node)
    on_node = tuple(range(node * shape.ranks_per_node, (node + 1) * shape.ranks_per_node))
    step = FAULT_STEP + int(random.integers(10))
    where = node_name(node)
    ends = ",".join(sorted(map(node_name, link)))
    broken, slower = float("inf"), float(random.uniform(2.5, 5))

    def case(what: str, fault: Fault | None, expected: str, declared: bool = False) -> Case:
        nonlocal seed
        seed += 1
        warm = replace(shape, compile_s=float(random.choice([0, 15, 60])))
        if what == "uneven":
            warm = replace(warm, uneven=0.1)
        return Case(f"{what} {name} {source}", warm, source, seed, fault, expected, declared)

    def fault(kind: str, **more: object) -> Fault:
        return replace(Fault(kind, step), **more)  # type: ignore[arg-type]

    hang, silent = Kind.NON_COMMUNICATION_HANG.value, Kind.COMMUNICATION_HANG.value
    slow, slow_net = Kind.NON_COMMUNICATION_SLOW.value, Kind.COMMUNICATION_SLOW.value
    yield case("healthy", None, HEALTHY)
    yield case("uneven", None, HEALTHY)
    rank_zero = fault("evaluate", ranks=(0,), seconds=40.0, until=step + 1)
    yield case("evaluation", rank_zero, HEALTHY)
    yield case("declared", rank_zero, HEALTHY, declared=True)
    yield case("hang", fault("hang", ranks=(rank,)), f"{hang} | rank {rank}")
    if not (source == "entries" and shape.pipeline > 1):
        # Without the waits for other stages the victims of a slow stage look like it.
        for factor in (1.2, 1.5, 3.0):
            yield case(
                f"slow {factor:g}",
                fault("slow", ranks=(rank,), factor=factor),
                f"{slow} | rank {rank}",
            )
        late = fault("loader", ranks=(rank,), seconds=0.3 * shape.step_s)
        yield case("loader", late, f"{slow} | rank {rank}")
        yield case("slow node", fault("slow", ranks=on_node, factor=1.5), f"{slow} | node {where}")
    yield case("all slow", fault("all_slow", factor=1.7), f"{slow} | job")
    if source == "gpu" and shape.tensor > 1:
        # In the first stage: others first wait for what the stage before sends, and so does it.
        first = rank - rank % (shape.pipeline * shape.tensor) + rank % shape.tensor
        device = f"{silent} | device {where_of(shape, first)}"
        yield case("kernel", fault("kernel", ranks=(first,)), device)
    if source == "entries" and shape.pipeline > 1:
        return  # what hangs first is between stages, and is not seen
    yield case(
        "node network hang",
        fault("node_hang", nodes=(node,), factor=broken),
        f"{silent} | node {where}",
    )
    yield case(
        "link hang", fault("link_hang", nodes=link, factor=broken), f"{silent} | link {ends}"
    )
    if source != "entries":  # which tell nothing of how long transfers take
        yield case(
            "node network slow",
            fault("node_slow_net", nodes=(node,), factor=slower),
            f"{slow_net} | node {where}",
        )
        yield case(
            "link slow", fault("link_slow", nodes=link, factor=slower), f"{slow_net} | link {ends}"
        )


def where_of(shape: Shape, rank: int) -> str:
    """The node of a rank."""
    return node_name(rank // shape.ranks_per_node)


@dataclass
class Score(Confusion):
    """How often it was right."""

    restarts: int = 0
    """That nobody needed."""
    wrong: list[str] = field(default_factory=list)

    def count(self, case: Case, outcome: Outcome) -> None:
        """One more case."""
        kind, _, culprit = case.expected.partition(" | ")
        is_healthy = case.expected == HEALTHY
        expected = Expected() if is_healthy else Expected((kind,), (culprit,))
        is_right = self.add(case.name.rsplit(" ", 2)[0], expected, outcome.said)
        self.restarts += outcome.restarts if is_healthy else 0
        if not is_right or len(outcome.said) > 1:
            texts = [f"{each.kind} | {each.culprit}" for each in outcome.said]
            self.wrong.append(f"{case.name} seed {case.seed}: {case.expected} -> {texts}")

    def __str__(self) -> str:
        lines = [f"{'fault':<20}{'said':<60}{'right':>8}   found after, steps"]
        for sort, row in sorted(self.rows.items()):
            found = ", ".join(f"{kind} {count}" for kind, count in row.found.most_common())
            share = f"{row.right}/{row.runs}"
            lines.append(f"{sort:<20}{found:<60}{share:>8}   {spread(row.after_steps)}")
        lines.append(f"precision {self.precision:.4f}  recall {self.recall:.4f}")
        return "\n".join([*lines, *self.wrong])


def score(chosen: Iterable[Case]) -> Score:
    """Run cases and count."""
    total = Score()
    for case in chosen:
        total.count(case, run(case))
    return total


def healthy_hours(hours: float, seed: int) -> tuple[float, int, int, int]:
    """Hours simulated, needless restarts, suspicions, and findings of slowness in healthy jobs.

    Jobs of up to 64 ranks with steps of 2 to 20 s, noise, hiccups, and now and then a long pause
    of rank 0, polled about once a step.
    """
    random = np.random.default_rng(seed)
    done = restarts = suspicions = slow = 0.0
    while done < hours:
        step_s = float(random.uniform(2, 20))
        shape = Shape(
            data=int(random.choice([4, 8, 16])),
            pipeline=int(random.choice([1, 2])),
            tensor=int(random.choice([1, 2])),
            microbatches=1,
            layers=1,
            buckets=1,
            step_s=step_s,
            noise=float(random.uniform(0.01, 0.1)),
            hiccups=3e-4,
            uneven=float(random.choice([0, 0.05])),
            compile_s=30.0,
        )
        part = min(20.0, hours - done)
        at = int(random.integers(50, 500))
        pause = Fault("evaluate", at, at + 1, (0,), seconds=float(random.uniform(30, 900)))
        source = str(random.choice(["durations", "entries", "gpu"]))
        case = Case("hours", shape, source, int(random.integers(1 << 30)), pause, HEALTHY)
        outcome = run(case, poll_steps=0.9, end_step=int(part * 3600 / step_s / 1.4))
        done += part
        restarts += outcome.restarts
        suspicions += outcome.suspicions
        slow += len(outcome.said) - outcome.restarts
    return done, int(restarts), int(suspicions), int(slow)


def _announced(chosen: list[Case]) -> Iterator[Case]:
    for number, case in enumerate(chosen, 1):
        print(f"{number} of {len(chosen)}: {case.name}", file=sys.stderr, flush=True)
        yield case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--hours", type=float, default=100.0)
    parser.add_argument("--large", action="store_true", help="jobs of 2,048 ranks instead")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    options = parser.parse_args()
    began = time.process_time()
    print(f"seed {options.seed}")
    shapes = LARGE_SHAPES if options.large else SHAPES
    chosen = [c for c in cases(options.seed, options.rounds, shapes) if options.only in c.name]
    print(score(_announced(chosen)), flush=True)
    done, restarts, suspicions, slow = healthy_hours(options.hours, options.seed)
    print(
        f"{done:.0f} healthy job-hours: {restarts} restarts, {slow} findings of slowness, "
        f"{suspicions} suspicions of a hang that the second witness did not confirm"
    )
    print(f"{time.process_time() - began:.0f} s of CPU")


if __name__ == "__main__":
    main()
