"""How a decision is carried out: by killing trainers, by a scheduler, or by a user's command.

Trainers that a launcher starts anew (torchrun) are killed by their agents, and that is all. A
scheduler is asked where that is not enough: to take a node out, or to start anew what no launcher
does. Pure functions; the shell runs what is planned.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ckptd.errors import ConfigError
from ckptd.watching import Place

TORCHRUN, COMMAND, KUBERNETES, SLURM = "torchrun", "command", "kubernetes", "slurm"
ACTUATORS = (TORCHRUN, COMMAND, KUBERNETES, SLURM)
_BINARIES = {KUBERNETES: "kubectl", SLURM: "scontrol"}
_NAME = re.compile(r"(?!(?i:all)\Z)[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
"""One node, pod, namespace or job, and no flag, list or range, nor all of them."""
_SLURM_JOB = re.compile(r"[1-9][0-9]{0,9}")
_TEXT_MAX = 400


@dataclass(frozen=True, slots=True)
class Actuator:
    """Which one is used, and how."""

    name: str = TORCHRUN
    """One of ACTUATORS."""
    command: tuple[str, ...] = ()
    """The program to run and its arguments, for COMMAND."""
    timeout_s: float = 60.0
    """How long one program may run, in seconds."""

    @property
    def starts_anew(self) -> bool:
        """Whether it can start a job again that has no launcher to do so."""
        return self.name != TORCHRUN

    @property
    def replaces_nodes(self) -> bool:
        """Whether it may find another node where no spare waits."""
        return self.name != TORCHRUN


@dataclass(frozen=True, slots=True)
class Fault:
    """What was decided, and all that whoever carries it out may want to know."""

    incident: int
    job: str
    life: int
    step: int
    kind: str
    culprit: str
    text: str
    ranks: tuple[int, ...]
    """At fault."""
    nodes: tuple[str, ...]
    """At fault."""
    isolate: tuple[str, ...]
    """Of these, the nodes that are to be taken out."""
    members: Mapping[int, str] = field(default_factory=dict)
    """Rank to node, of the whole life."""
    places: Mapping[int, Place] = field(default_factory=dict)
    """Rank to where its scheduler has put it, as far as it is known."""
    elastic: bool = True
    """The job's launcher starts it anew."""
    spares: int = 0
    """Nodes that wait to join the job."""

    @property
    def action(self) -> str:
        return "isolate" if self.isolate else "restart"


@dataclass(frozen=True, slots=True)
class Program:
    """One to run."""

    argv: tuple[str, ...]
    stdin: bytes = b""
    environ: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join(self.argv)


@dataclass(frozen=True, slots=True)
class Plan:
    """What follows from a decision."""

    kills: bool
    """Agents kill the trainers of the life."""
    stops_launchers: bool = False
    """And, on isolated nodes, what would start them anew."""
    programs: tuple[Program, ...] = ()
    """To run, in this order; when one fails the rest is not run."""
    problem: str = ""
    """What cannot be done, and why. Then no node is taken out, unless its launcher is ended."""


def check(actuator: Actuator) -> None:
    """Raise ConfigError if what it needs is not on this machine."""
    needed = actuator.command[0] if actuator.command else _BINARIES.get(actuator.name, "")
    if needed and shutil.which(needed) is None:
        raise ConfigError(
            f"--actuator {actuator.name} needs {needed}, which cannot be run here: install it on "
            "the coordinator's machine, put it on PATH, or choose another --actuator"
        )


def plan(actuator: Actuator, fault: Fault) -> Plan:
    """What carries out a decision."""
    match actuator.name:
        case "command":
            return _by_command(actuator, fault)
        case "kubernetes":
            return _by_kubernetes(fault)
        case "slurm":
            return _by_slurm(fault)
    return Plan(kills=True, stops_launchers=True)


def _by_command(actuator: Actuator, fault: Fault) -> Plan:
    facts = {
        "action": fault.action,
        "incident": fault.incident,
        "job": fault.job,
        "life": fault.life,
        "step": fault.step,
        "kind": fault.kind,
        "culprit": fault.culprit,
        "text": fault.text,
    }
    environ = {f"CKPTD_{name.upper()}": _plain(value) for name, value in facts.items()}
    environ["CKPTD_NODES"] = ",".join(fault.nodes)
    environ["CKPTD_ISOLATE"] = ",".join(fault.isolate)
    more = {
        "ranks": fault.ranks,
        "nodes": fault.nodes,
        "isolate": fault.isolate,
        "members": {str(rank): node for rank, node in sorted(fault.members.items())},
        "places": {str(rank): place.told for rank, place in sorted(fault.places.items())},
    }
    body = json.dumps({**facts, **more}).encode()
    program = Program(actuator.command, body, environ)
    by_spares = fault.elastic and fault.spares >= len(fault.isolate)
    return Plan(fault.elastic, by_spares, (program,))


def _by_slurm(fault: Fault) -> Plan:
    """Drain the node; requeue the job, unless it goes on by itself on what it has, or on spares."""
    by_spares = fault.elastic and fault.spares >= len(fault.isolate)
    drained, problem = _nodes_of(fault, "Slurm node", lambda place: place.slurm_node)
    jobs = _named((place.slurm_job for place in fault.places.values()), _SLURM_JOB)
    if not by_spares and not jobs:
        problem = _unknown("Slurm job", sorted(set(fault.members.values())))
    if problem and fault.isolate and not by_spares:
        return _restart_only(_by_slurm, fault, problem)
    programs = [
        Program(
            (
                "scontrol",
                "update",
                f"NodeName={node}",
                "State=DRAIN",
                f"Reason={_reason(fault)}",
            )
        )
        for node in drained
    ]
    if by_spares:
        return Plan(True, bool(fault.isolate), tuple(programs), problem)
    programs += [Program(("scontrol", "requeue", job)) for job in jobs]
    return Plan(fault.elastic and not jobs, False, tuple(programs), problem)


def _by_kubernetes(fault: Fault) -> Plan:
    """Cordon the node, and delete its pods; their controller makes new ones elsewhere."""
    cordoned, problem = _nodes_of(fault, "Kubernetes node", lambda place: place.kubernetes_node)
    on_isolated = _places_on(fault, fault.isolate)
    pods = _pods(on_isolated if fault.elastic else fault.places.values())
    without = [node for node in fault.isolate if not _pods(_places_on(fault, [node]))]
    if without or not (pods or fault.elastic):
        problem = _unknown("pod", without or sorted(set(fault.members.values())))
    if problem and fault.isolate:
        return _restart_only(_by_kubernetes, fault, problem)
    programs = [Program(("kubectl", "cordon", "--", node)) for node in cordoned]
    programs += [
        Program(("kubectl", "delete", "pod", f"--namespace={space}", "--wait=false", "--", pod))
        for space, pod in pods
    ]
    return Plan(fault.elastic, False, tuple(programs), problem)


def _restart_only(by: Callable[[Fault], Plan], fault: Fault, problem: str) -> Plan:
    """Where a node cannot be taken out, the job starts anew on the nodes there are."""
    return replace(by(replace(fault, isolate=())), problem=problem)


def _nodes_of(fault: Fault, what: str, name_of: Callable[[Place], str]) -> tuple[list[str], str]:
    """The scheduler's names of the nodes to take out, one for each, and what is missing."""
    names = {node: _named(map(name_of, _places_on(fault, [node]))) for node in fault.isolate}
    unknown = [node for node, found in names.items() if len(found) != 1]
    known = sorted({found[0] for found in names.values() if len(found) == 1})
    return known, _unknown(f"{what}, or more than one", unknown) if unknown else ""


def _pods(places: Iterable[Place]) -> list[tuple[str, str]]:
    """Namespace and name of each, once."""
    found = {(place.namespace, place.pod) for place in places}
    return sorted(pod for pod in found if all(map(_NAME.fullmatch, pod)))


def _places_on(fault: Fault, nodes: Iterable[str]) -> list[Place]:
    chosen = set(nodes)
    return [
        place for rank, place in sorted(fault.places.items()) if fault.members.get(rank) in chosen
    ]


def _named(names: Iterable[str], form: re.Pattern[str] = _NAME) -> list[str]:
    """Each once. What is not one plain name could be a flag, or mean many."""
    return sorted({name for name in names if form.fullmatch(name)})


def _unknown(what: str, nodes: Iterable[str]) -> str:
    return (
        f"the trainers on {', '.join(nodes)} have not said their {what}: see docs/diagnosis.md, "
        "Actuators, for the variables that they need"
    )


def _reason(fault: Fault) -> str:
    return _plain(f"ckptd: incident {fault.incident}: {fault.text}")


def _plain(value: object) -> str:
    """One line, for an argument or a variable."""
    return re.sub(r"[\x00-\x1f\x7f]+", " ", str(value))[:_TEXT_MAX]
