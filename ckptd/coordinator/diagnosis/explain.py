"""From what the rules have found to findings: who is named, how surely, in what words."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from ckptd.coordinator.diagnosis.finding import (
    SUSPECTS_MAX,
    Culprit,
    Finding,
    Kind,
    Scope,
    listed,
)
from ckptd.coordinator.diagnosis.hangs import Stall
from ckptd.coordinator.diagnosis.locate import Location, locate
from ckptd.coordinator.diagnosis.slowness import Verdicts
from ckptd.coordinator.diagnosis.table import Ints, Table
from ckptd.coordinator.diagnosis.thresholds import Thresholds

SURE = 0.99
_TIMING_ALONE = 0.75
"""Nothing that timing alone says of a hang is surer than this, nor what entering times alone say of
a slow rank: one whose transfers are slow is late, too."""


def stall(table: Table, found: Stall, timeout_s: float, limits: Thresholds, now: float) -> Finding:
    """The finding for a stall; its number is given by who keeps findings."""
    if len(found.roots):
        return _root_stall(table, found, timeout_s, limits, now)
    if len(found.silent_groups):
        return _silent_stall(table, found, timeout_s, limits, now)
    culprit = culprit_of(table, found.circle, limits)
    sentence = (
        f"ranks wait for one another in a circle: {culprit} stopped first; either it hangs, or "
        "the program calls its collectives in different orders"
    )
    confidence = 0.5 * _surety(found, timeout_s, now)
    return _hang(table, found, Kind.NON_COMMUNICATION_HANG, culprit, confidence, sentence, now)


def _root_stall(
    table: Table, found: Stall, timeout_s: float, limits: Thresholds, now: float
) -> Finding:
    culprit = culprit_of(table, found.roots, limits)
    where = _group_words(table, found.group)
    are = ("have", "they wait") if culprit.scope is Scope.RANKS else ("has", "it waits")
    sentence = (
        f"{culprit} {are[0]} not entered operation {found.seq} of {where} for "
        f"{now - found.since:.1f} s; {len(found.waiting)} ranks wait, directly or through other "
        f"groups, and {are[1]} in none"
    )
    confidence = _surety(found, timeout_s, now)
    return _hang(table, found, Kind.NON_COMMUNICATION_HANG, culprit, confidence, sentence, now)


def _silent_stall(
    table: Table, found: Stall, timeout_s: float, limits: Thresholds, now: float
) -> Finding:
    for group in found.silent_groups:
        if (odd := _odd_ones(table, int(group))) is not None:
            return _mismatch(table, found, int(group), *odd, limits, now)
    ranks = table.ranks_of(found.group)
    bad = [_nodes_in_order(table, table.ranks_of(int(group))) for group in found.silent_groups]
    # That others went on for longer proves little: only what comes first in the program is stuck.
    location = _with_ranks(locate(bad, [], limits.coverage), table, ranks)
    where = _group_words(table, found.group)
    sentence = (
        f"all {len(ranks)} ranks of {where} have entered operation {found.seq}, and none has left "
        f"it for {now - found.since:.1f} s; what its {len(found.silent_groups)} stuck groups have "
        f"in common is {location.culprit}"
    )
    if any(table.group_parts[int(group)].enqueued for group in found.silent_groups):
        sentence += " (on a GPU a stuck kernel of one of these ranks looks the same)"
    confidence = _surety(found, timeout_s, now) * location.certainty
    kind = Kind.COMMUNICATION_HANG
    finding = _hang(table, found, kind, location.culprit, confidence, sentence, now)
    # Any rank may have been stopped within the operation: so all of them are looked at.
    there = [rank for rank in ranks.tolist() if table.node_name(rank) in location.culprit.nodes]
    return replace(finding, suspects=_stopped_first(table, tuple(there)))


def _odd_ones(table: Table, group: int) -> tuple[Ints, str, str] | None:
    """Ranks that wait in another operation than most of their group, theirs, and the others'.

    None if that is not so, or not known. Where there are not more of the others, all are odd.
    """
    if table.group_parts[group].pair is not None:
        return None  # one sends, and one receives
    slots = table.slots_of(group)
    kinds = table.open_kind[slots]
    if (kinds < 0).any() or len(set(table.ended[slots].tolist())) > 1:
        return None
    ops = np.array([table.kinds[kind][0] for kind in kinds])
    names, counts = np.unique(ops, return_counts=True)
    if len(names) < 2:
        return None
    usual = names[np.argmax(counts)]
    odd = table.rank[slots][ops != usual]
    if 2 * counts.max() <= len(ops):
        odd = table.rank[slots]
    return np.sort(odd), str(ops[ops != usual][0]), str(usual)


def _mismatch(
    table: Table,
    found: Stall,
    group: int,
    odd: Ints,
    called: str,
    usual: str,
    limits: Thresholds,
    now: float,
) -> Finding:
    culprit = culprit_of(table, odd, limits)
    seq = int(table.ended[table.slots_of(group)][0]) + 1
    sentence = (
        f"as operation {seq} of {_group_words(table, group)} not all ranks have called the same: "
        f"{culprit} has called {called}, others {usual}; the program takes another way there"
    )
    return _hang(table, found, Kind.COMMUNICATION_HANG, culprit, SURE, sentence, now)


def _hang(
    table: Table,
    found: Stall,
    kind: Kind,
    culprit: Culprit,
    confidence: float,
    sentence: str,
    now: float,
) -> Finding:
    group = table.group_names[found.group]
    return Finding(
        number=0,
        kind=kind,
        culprit=culprit,
        since=found.since,
        found_at=now,
        confidence=confidence,
        sentence=sentence,
        evidence={
            "group": group,
            "operation": found.seq,
            "absent": found.absent,
            "waiting": len(found.waiting),
            "stuck_groups": len(found.silent_groups),
        },
        suspects=_stopped_first(table, culprit.ranks),
        victims=len(np.setdiff1d(found.waiting, culprit.ranks)),
    )


def narrowed(table: Table, finding: Finding, ranks: Sequence[int], limits: Thresholds) -> Finding:
    """A hang of `ranks`, when the second witness has seen the other suspects wait."""
    if set(ranks) == set(finding.culprit.ranks):
        return finding
    culprit = culprit_of(table, np.array(sorted(ranks)), limits)
    sentence = f"{finding.sentence}; by the second witness it is {culprit}"
    return replace(finding, culprit=culprit, sentence=sentence)


def unseen(table: Table, finding: Finding, ranks: Sequence[int]) -> Finding:
    """What it is when none is left to wait for: `ranks` are all in operations that are not seen."""
    nodes = table.node_names(list(ranks))
    scope = Scope.NODES if len(nodes) > 1 else Scope.NODE
    several = "s" if len(ranks) > 1 else ""
    return replace(
        finding,
        kind=Kind.COMMUNICATION_HANG,
        culprit=Culprit(scope, tuple(ranks), nodes),
        confidence=_TIMING_ALONE / (len(nodes) + 1),
        sentence=(
            f"{finding.sentence}; but the process{'es' if several else ''} of rank{several} "
            f"{listed(ranks)} wait{'' if several else 's'} in communication that is not recorded, "
            "such as a send or receive, and no rank is elsewhere: so that is what is stuck"
        ),
        suspects=tuple(ranks),
        peers_unknown=True,
    )


def idle(table: Table, idle_s: float, now: float) -> Finding:
    """All ranks stopped, and none waits for another."""
    since = float(table.rank_progress_at[: table.ranks].max())
    return Finding(
        number=0,
        kind=Kind.NON_COMMUNICATION_HANG,
        culprit=Culprit(Scope.JOB),
        since=since,
        found_at=now,
        confidence=0.3,
        sentence=(
            f"no rank has called a collective for {now - since:.0f} s, and none waits for another: "
            "data, storage, a long evaluation, or the end of training"
        ),
        evidence={"limit_s": idle_s},
        suspects=(0,),
    )


def slow(
    table: Table,
    verdicts: Verdicts,
    limits: Thresholds,
    now: float,
    since: float,
    blamed: Collection[str] = (),
) -> dict[str, Finding]:
    """Findings of slowness, by what they are about. `blamed`: nodes that findings are open on."""
    findings = _slow_ranks(table, verdicts, limits, now, since, blamed)
    if verdicts.groups:
        findings["communication"] = _slow_transfers(table, verdicts, limits, now, since)
    if verdicts.job > 1 and not findings:
        findings["job"] = _slow_job(verdicts, now, since)
    return findings


def _slow_ranks(
    table: Table,
    verdicts: Verdicts,
    limits: Thresholds,
    now: float,
    since: float,
    blamed: Collection[str],
) -> dict[str, Finding]:
    findings = {}
    for culprit in _culprits(table, verdicts.ranks, limits, blamed):
        strength = max(verdicts.ranks[rank] for rank in culprit.ranks)
        share = max(float(verdicts.excess[rank]) for rank in culprit.ranks)
        is_timed = any(table.has_durations(rank) for rank in culprit.ranks)
        or_else = "" if is_timed else "; or its communication, which is not timed, is slow"
        findings[f"slow {culprit}"] = Finding(
            number=0,
            kind=Kind.NON_COMMUNICATION_SLOW,
            culprit=culprit,
            since=since,
            found_at=now,
            confidence=min(SURE if is_timed else _TIMING_ALONE, _strength(strength)),
            sentence=(
                f"{culprit} arrives last: it waits {share:.0%} of the time less than the ranks "
                f"that do the same work, which usually differ by {verdicts.deviation:.1%}{or_else}"
            ),
            evidence={
                "excess_share": round(share, 4),
                "usual_deviation": round(verdicts.deviation, 4),
                "strength": round(strength, 2),
            },
            suspects=culprit.ranks[:SUSPECTS_MAX],
        )
    return findings


def _culprits(
    table: Table, slow_ranks: Collection[int], limits: Thresholds, blamed: Collection[str]
) -> list[Culprit]:
    """Nodes where they are to blame, or were and still have a slow rank; else ranks, each alone."""
    by_node: dict[int, list[int]] = {}
    for rank in sorted(slow_ranks):
        by_node.setdefault(int(table.rank_node[rank]), []).append(rank)
    culprits: list[Culprit] = []
    for node, ranks in by_node.items():
        name = table.nodes[node]
        if name in blamed or _is_node(table, node, len(ranks), limits):
            culprits.append(Culprit(Scope.NODE, tuple(ranks), (name,)))
        else:
            culprits.extend(Culprit(Scope.RANK, (rank,), (name,)) for rank in ranks)
    return culprits


def _slow_transfers(
    table: Table, verdicts: Verdicts, limits: Thresholds, now: float, since: float
) -> Finding:
    groups = list(verdicts.groups)
    bad = [_nodes_in_order(table, table.ranks_of(group)) for group in groups]
    good = [_nodes_in_order(table, table.ranks_of(int(g))) for g in verdicts.healthy_groups]
    location = locate(bad, good, limits.coverage)
    kind, seconds, base_s = verdicts.slowest
    op, size = table.kinds[kind]
    ratio = max(verdicts.groups.values())
    return Finding(
        number=0,
        kind=Kind.COMMUNICATION_SLOW,
        culprit=location.culprit,
        since=since,
        found_at=now,
        confidence=location.certainty * _strength(1 + (ratio - 1) / limits.transfer_ratio),
        sentence=(
            f"even the shortest {op} of up to {1 << size} bytes takes {_ms(seconds)} instead of "
            f"{_ms(base_s)} in {_group_words(table, groups[-1])}; what the {len(groups)} slow "
            f"groups have in common is {location.culprit}"
        ),
        evidence={
            "operation": op,
            "ratio": round(ratio, 3),
            "seconds": seconds,
            "baseline_s": base_s,
            "slow_groups": len(groups),
            "healthy_groups": len(verdicts.healthy_groups),
        },
    )


def _slow_job(verdicts: Verdicts, now: float, since: float) -> Finding:
    return Finding(
        number=0,
        kind=Kind.NON_COMMUNICATION_SLOW,
        culprit=Culprit(Scope.JOB),
        since=since,
        found_at=now,
        confidence=_strength(verdicts.job),
        sentence=(
            f"everything takes {verdicts.pace:.2f} times as long as before, and no rank or timed "
            "transfer stands out: data, storage, power, or a change in the work itself"
        ),
        evidence={"pace_ratio": round(verdicts.pace, 3)},
    )


def culprit_of(table: Table, ranks: Ints, limits: Thresholds) -> Culprit:
    """One rank, a node if that explains them all, or the ranks."""
    numbers = tuple(int(rank) for rank in ranks)
    nodes = table.node_names(ranks)
    if len(numbers) == 1:
        return Culprit(Scope.RANK, numbers, nodes)
    if len(nodes) == 1 and _is_node(table, int(table.rank_node[numbers[0]]), len(numbers), limits):
        return Culprit(Scope.NODE, numbers, nodes)
    return Culprit(Scope.RANKS, numbers, nodes)


def _stopped_first(table: Table, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """As many suspects as are looked at, those that stopped first before others."""
    order = sorted(ranks, key=lambda rank: float(table.rank_progress_at[rank]))
    return tuple(order[:SUSPECTS_MAX])


def _is_node(table: Table, node: int, ranks: int, limits: Thresholds) -> bool:
    there = int(np.count_nonzero(table.rank_node[: table.ranks] == node))
    return ranks >= 2 and ranks >= limits.node_share * there


def _with_ranks(location: Location, table: Table, ranks: Ints) -> Location:
    """A rank of the group on each of the nodes, for the second witness to look at."""
    culprit = location.culprit
    names = {table.node_name(int(rank)): int(rank) for rank in ranks[::-1]}
    chosen = tuple(sorted(names[node] for node in culprit.nodes if node in names))
    return Location(Culprit(culprit.scope, chosen, culprit.nodes), location.certainty)


def _nodes_in_order(table: Table, ranks: Ints) -> tuple[str, ...]:
    return tuple(table.node_name(int(rank)) for rank in np.sort(ranks))


def _group_words(table: Table, group: int) -> str:
    part = table.group_parts[group]
    called = f" ({part.description})" if part.description else ""
    return f"group {part.group}{called} of ranks {listed(np.sort(table.ranks_of(group)).tolist())}"


def _surety(found: Stall, timeout_s: float, now: float) -> float:
    """A half when the time-out has just run out, and more the longer it lasts."""
    return min(_TIMING_ALONE, 1 - timeout_s / (2 * max(now - found.since, timeout_s)))


def _strength(strength: float) -> float:
    """A half for what is just enough for a finding, and more the stronger it is."""
    return min(SURE, 1 - 0.5 / max(strength, 0.5))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
