"""What really is, seen from outside of all processes, and what must hold of it at every moment."""

from typing import TYPE_CHECKING

from ckptd.agent.state import Use
from ckptd.coordinator.choice import live_holdings
from ckptd.coordinator.decider import Coordinator, Send
from ckptd.coordinator.recovery import has_all_parity
from ckptd.coordinator.state import State as Phase
from ckptd.ids import SnapshotId
from ckptd.manifest import JobManifest, JobRecord
from ckptd.wire import AgentMessage, Commit, Drop, Grant, Granted, Hello, Holds, Record

from . import transfers
from .disk import Disk, File, State
from .kernel import Violation

if TYPE_CHECKING:
    from .agents import Machine
    from .control import CoordinatorProcess
    from .runs import Run, TrainingJob
    from .trainers import Trainer
    from .world import World

MOST_SLOTS_EXTRA = 3
MOST_PARITIES = 4
MOST_MANIFESTS = 10


class Truth:
    """The oracle. It raises Violation, from within the event that broke a rule."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.promises: dict[str, SnapshotId] = {}
        """The newest snapshot of each job that was protected: it must stay restorable."""
        self.sealed: dict[str, set[SnapshotId]] = {}
        """Snapshots of each job that a coordinator has seen sealed by all ranks."""
        self.commits: dict[str, int] = {}
        self._safe: dict[str, set[SnapshotId]] = {}
        """Of each job, what was committed as protected, and is not retired."""
        self.trained: dict[str, int] = {}
        """The newest life of each job whose ranks have all loaded."""
        self._encoded: set[tuple[SnapshotId, str]] = set()
        self._given_up: dict[str, list[tuple[SnapshotId, int]]] = {}
        """Of each job: a snapshot to which it went back, and the life that began there."""
        self._complete: dict[str, set[SnapshotId]] = {}
        """Snapshots of each job that all nodes have encoded, committed or not."""
        self._covered: set[tuple[SnapshotId, str]] = set()
        """Snapshots, and nodes of groups that have encoded them, whatever other groups have."""
        self._captured: set[tuple[SnapshotId, int]] = set()
        self._lives: dict[tuple[str, int], tuple[str, SnapshotId | None]] = {}
        """(job, life) to the round that it was granted to, and the snapshot."""
        self._terms: dict[tuple[str, int], int] = {}
        """(job, life) to the term in which it was granted."""
        self._heard: list[tuple[JobRecord, Disk]] = []
        """Which agents were told of which lives, by the memory that they had then."""
        self._owners: dict[tuple[str, int], Run] = {}
        self._paths: dict[tuple[str, int, int], str] = {}
        """(job, life, step) to the course of training until then."""

    # Training.

    def is_granted(self, grant: Grant) -> bool:
        """Whether some agent has heard of this grant of its life, and of no other since."""
        return self._lives.get((grant.job, grant.life)) == (grant.round, grant.id)

    def granted(self, run: "Run", grant: Granted) -> None:
        """Rank 0 has its life."""
        key = (run.job.name, grant.life)
        if self._owners.setdefault(key, run) is not run:
            raise Violation(f"life {grant.life} of {key[0]} was granted to two runs")
        if grant.id is not None and grant.id in run.rejected:
            raise Violation(f"{grant.id} was granted again to {run.round}, which cannot load it")

    def training_begins(self, run: "Run") -> str:
        """The course of training so far, which all ranks must agree on."""
        paths = {trainer.memory.path for trainer in run.trainers if trainer.memory is not None}
        if len(paths) != 1:
            raise Violation(f"{run.job.name} {run.round}: ranks resume from {sorted(paths)}")
        job = run.job.name
        self.trained[job] = max(run.life, self.trained.get(job, 0))
        self._world.people.trains(job, run.life)
        return paths.pop()

    def step(self, run: "Run") -> str:
        """No two runs of a step need give the same bits, so each life takes a course of its own."""
        path = f"{run.origin}/{run.life}+{run.step}"
        self._paths[run.job.name, run.life, run.step] = path
        return path

    def capture_begins(self, trainer: "Trainer", id: SnapshotId, file: File) -> None:
        if file.header is not None:
            raise Violation(f"{trainer.name} was given a file for {id} that holds {file.header}")
        writer = file.writer
        if writer is not None and writer is not trainer and writer.alive:  # type: ignore[attr-defined]
            raise Violation(f"{trainer.name} and {writer.name} write to one file")  # type: ignore[attr-defined]
        if (id, trainer.rank) in self._captured:
            raise Violation(f"{trainer.name} captures {id} twice")
        self._captured.add((id, trainer.rank))

    def loaded(self, trainer: "Trainer", id: SnapshotId, rank: int, file: File | None) -> None:
        """A rank reads a segment: it must be what was captured, bit for bit."""
        path = self._paths.get((id.job, id.life, id.step))
        want = State(id.job, rank, id.step, path or "?")
        if file is None or file.header != (id, rank) or file.data != want:
            found = None if file is None else (file.header, file.data)
            raise Violation(f"{trainer.name} loads rank {rank} of {id}: {found}, not {want}")

    def refused(self, run: "Run", reason: str) -> None:
        """The job is told that it cannot go on: never, as long as a promise can be kept."""
        promise = self.promises.get(run.job.name)
        if promise is not None and not run.rejected:
            raise Violation(f"{run.job.name} was refused, though {promise} is there: {reason}")
        run.job.refusals.append(reason)

    # The coordinator.

    def coordinator_learnt(self, office: "CoordinatorProcess", message: AgentMessage) -> None:
        """Note which snapshots it knows to be sealed by all."""
        match message:
            case Holds(holding):
                names = {holding.id.job}
            case Hello():
                names = {holding.id.job for holding in message.holdings}
            case _:
                return
        decider = office.decider
        assert decider is not None
        for name in names & decider.jobs.keys():
            for id, snapshot in decider.jobs[name].snapshots.items():
                if snapshot.state in (Phase.SEALED, Phase.PROTECTED):
                    if id not in self.sealed.setdefault(name, set()):
                        self._all_sealed(id, snapshot.world_size)
                    self.sealed[name].add(id)

    def _all_sealed(self, id: SnapshotId, world_size: int) -> None:
        lacking = [rank for rank in range(world_size) if (id, rank) not in self._captured]
        if lacking:
            raise Violation(f"{id} counts as sealed, and ranks {lacking} never captured it")

    def coordinator_says(self, office: "CoordinatorProcess", send: Send) -> None:
        assert office.decider is not None
        match send.message:
            case Grant() as grant:
                self._grants(office, grant)
                self._world.people.check(office, grant)
            case Commit(id, retire):
                self._commits(office.decider, id, retire)
            case Drop(id):
                self._drops(id)
            case Record(record):
                if (record.job, record.life) in self._lives:
                    _, start = self._lives[record.job, record.life]
                    began = record.ancestors[-1] if record.ancestors else None
                    if (start is None) != (began is None):
                        raise Violation(f"the record of life {record.life} says another start")

    def granted_to(self, grant: Grant) -> None:
        """An agent has heard of a life: once rank 0 has, there is no other of that number."""
        key, answer = (grant.job, grant.life), (grant.round, grant.id)
        known = self._lives.get(key)
        if known is not None and known != answer and key in self._owners:
            if self._is_known(grant):
                raise Violation(f"life {grant.life} of {grant.job} is {known}, and {answer}")
            del self._owners[key]
        if known != answer:
            self._went_back(grant)
        self._lives[key], self._terms[key] = answer, grant.record.term

    def heard(self, record: JobRecord, disk: Disk) -> None:
        """An agent was told of a life, and should have stored that."""
        self._heard.append((record, disk))

    def _is_known(self, grant: Grant) -> bool:
        """Whether anybody is left who had heard of another grant of this life, or of a later one.

        Else the node of its rank 0 was rebooted, and no other node had heard of that life, so none
        can have anything of it.
        """
        disks = [machine.disk for machine in self._world.machines.values() if machine.alive]
        term = self._terms[grant.job, grant.life]
        return term == grant.record.term or any(
            (record.life, record.term) == (grant.life, term) or record.life > grant.life
            for record, where in self._heard
            if record.job == grant.job and any(disk is where for disk in disks)
        )

    def _grants(self, office: "CoordinatorProcess", grant: Grant) -> None:
        if self.is_granted(grant):
            return  # said again
        if any(job == grant.job and life > grant.life for job, life in self._lives):
            raise Violation(f"life {grant.life} of {grant.job} is granted after a later one")
        if grant.id is None and self.sealed.get(grant.job):
            raise Violation(
                f"{grant.job} starts from nothing, though {max(self.sealed[grant.job])} was sealed"
            )
        people = self._world.people
        if people.wish(office, grant) is not None or people.have_chosen(grant):
            return
        promise = self.promises.get(grant.job)
        run = self._world.jobs[grant.job].run
        if promise is None or (run is not None and promise in run.rejected):
            return
        if grant.id is None or (grant.id < promise and self._is_heard(office, promise)):
            raise Violation(f"{grant.id} is granted, though {promise} was protected")

    def _is_heard(self, office: "CoordinatorProcess", id: SnapshotId) -> bool:
        """Whether all that is needed is on nodes that were heard within the lease.

        A node that was silent for so long is lost, as far as a coordinator can know. More of them
        than there is parity for may be away at a time, though each fault by itself is bearable.
        """
        decider, now = office.decider, self._world.clock.now
        assert decider is not None
        lost_at = now - self._world.plan.settings.lease_s

        def is_lost(name: str) -> bool:
            node = decider.nodes.get(name)
            since = decider.started_at if node is None else node.last_seen
            return since <= lost_at and (node is None or not node.live)

        machines = self._world.machines.values()
        disks = [m.disk for m in machines if m.alive and not is_lost(m.name)]
        return transfers.restorable(id, self._world.jobs[id.job].ranks, disks)

    def _commits(
        self, decider: Coordinator, id: SnapshotId, retire: tuple[SnapshotId, ...]
    ) -> None:
        for other in retire:
            may_go = self._is_ancestor(other, id) or self.given_up(other)
            if not may_go and not self._is_passed_over(other, id):
                raise Violation(f"{id} retires {other}, which is none of its ancestors")
        self._must_keep(decider, id, set(retire))
        job = decider.jobs.get(id.job)
        snapshot = job.snapshots.get(id) if job is not None else None
        manifest = snapshot.manifest if snapshot is not None else None
        if snapshot is None or manifest is None:
            return
        alone = not any(group.parity_shards for group in manifest.groups)
        complete = id in self._complete.get(id.job, ())
        if snapshot.state is not Phase.PROTECTED and not alone and not complete:
            # Permission to free what it replaces, though it was never protected.
            promise = self.promises.get(id.job)
            newer = promise is not None and id > promise and not self.given_up(id)
            if promise is not None and newer and self._as_safe(id, promise):
                self.promises[id.job] = id
            return
        lacking = [
            member.node
            for group in manifest.groups
            if group.parity_shards
            for member in group.members
            if (id, member.node) not in self._encoded
        ]
        if lacking and not complete:  # else a newcomer has taken the place of one that had
            raise Violation(f"{id} was committed, and {', '.join(lacking)} never encoded it")
        promise, safe = self.promises.get(id.job), self._safe.setdefault(id.job, set())
        if id in safe or self.given_up(id) or (promise is not None and id < promise):
            return
        if not self.restorable(id):
            return  # what was reported is gone again; nothing is freed for it by the agents
        self.promises[id.job] = id
        safe.add(id)
        self.commits[id.job] = self.commits.get(id.job, 0) + 1

    def _drops(self, id: SnapshotId) -> None:
        """What was promised may go for a newer one that is there, and is as safe."""
        if id != self.promises.get(id.job):
            return
        known = self.sealed.get(id.job, set())
        newer = [other for other in known if other > id and not self.given_up(other)]
        newer = [other for other in newer if self._as_safe(other, id)]
        if newer:
            self.promises[id.job] = max(newer)

    def _must_keep(self, decider: Coordinator, newest: SnapshotId, retire: set[SnapshotId]) -> None:
        """As many as the job keeps are left, if all that hold them have been heard."""
        job = newest.job
        safe = self._safe.get(job, set())
        if self._world.plan.keep == 1 or not safe & retire:
            return
        retired = [id for id in safe & retire if self._is_whole(id) and not self.given_up(id)]
        retired = [id for id in retired if _is_told(decider, id)]
        safe -= retire
        on_purpose = any(event.kind == "kept_fewer" for event in list(decider.events)[-3:])
        heard = {name for name, node in decider.nodes.items() if node.live}
        there = {name for name, machine in self._world.machines.items() if machine.alive}
        if on_purpose or there - heard or not retired:
            return
        # Some were protected after a newer one was, or by a coordinator that ended then, and so
        # never committed; or copies protect them.
        known = decider.jobs[job].snapshots.keys() if job in decider.jobs else set()
        complete = self._complete.get(job, set())
        left = safe | {id for id in known if id in complete or self._survives_a_loss(id)}
        left = {id for id in left if self.restorable(id) and not self.given_up(id)}
        if len(left | {newest}) < self._world.plan.keep:
            raise Violation(f"{job} keeps {self._world.plan.keep}, and {retire} are retired")

    def _survives_a_loss(self, id: SnapshotId) -> bool:
        machines = [machine for machine in self._world.machines.values() if machine.alive]
        return all(self.restorable(id, machine) for machine in machines)

    def _is_whole(self, id: SnapshotId) -> bool:
        """Whether all segments are there, and all parity at its places."""
        disks = {name: m.disk for name, m in self._world.machines.items() if m.alive}
        ranks = range(self._world.jobs[id.job].ranks)
        if not all(any(disk.segment(id, r) for disk in disks.values()) for r in ranks):
            return False
        manifests = (disk.manifests[id] for disk in disks.values() if id in disk.manifests)
        return any(
            all(name in disks and disks[name].parity(id) for name in manifest.nodes)
            for manifest in manifests
        )

    def _as_safe(self, id: SnapshotId, as_: SnapshotId) -> bool:
        """Whether a snapshot is there, and survives any one node if another does."""
        return self.restorable(id) and (self._survives_a_loss(id) or not self._survives_a_loss(as_))

    def _is_ancestor(self, id: SnapshotId, of: SnapshotId) -> bool:
        """Whether training really went through `id` on its way to `of`."""
        while id.life < of.life:
            start = self._lives.get((of.job, of.life), ("", None))[1]
            if start is None:
                return False
            if start == id:
                return True
            of = start
        return id.life == of.life and id.step < of.step

    def _is_passed_over(self, id: SnapshotId, by: SnapshotId) -> bool:
        """Whether a later life began before it, and has had what is safe."""
        complete = by in self._complete.get(by.job, ())
        safe = complete or self._world.jobs[by.job].nodes == 1 or self._survives_a_loss(by)
        return id.life < by.life and safe

    def _went_back(self, grant: Grant) -> None:
        """Somebody chose where this life begins: what is newer is given up."""
        wish = self._world.people.fulfils(grant)
        if wish is not None:
            self._given_up.setdefault(grant.job, []).append((wish, grant.life))
            self.promises[grant.job] = wish

    def given_up(self, id: SnapshotId) -> bool:
        """Whether somebody had the job go back past it, and it never came there again."""
        lives = [life for job, life in self._lives if job == id.job]
        start = self._lives[id.job, max(lives)][1] if lives else None
        if start is not None and self._is_on_path(id, start):
            return False
        gone = False
        for wish, before in self._given_up.get(id.job, ()):
            if self._is_on_path(id, wish):
                gone = False  # taken back, whether or not it can be loaded there
            elif id.life < before and id > wish:
                gone = True
        return gone

    def _is_on_path(self, id: SnapshotId, to: SnapshotId) -> bool:
        return id == to or self._is_ancestor(id, to)

    # Memory.

    def encoded(self, id: SnapshotId, node: str, manifest: JobManifest) -> None:
        """A node has all its parity of a snapshot."""
        self._encoded.add((id, node))
        groups = [[m.node for m in g.members] for g in manifest.groups if g.parity_shards]
        done = [group for group in groups if all((id, name) in self._encoded for name in group)]
        self._covered.update((id, name) for group in done for name in group)
        if done == groups:
            self._complete.setdefault(id.job, set()).add(id)

    def freed(self, id: SnapshotId) -> None:
        """An agent has destroyed something of a snapshot."""
        if id in self._world.people.promised(id.job) and not self.restorable(id):
            raise Violation(f"{id}, to which somebody wants to go back, was freed")
        promise = self.promises.get(id.job)
        if promise is not None:
            if promise == id and not self.restorable(id):
                newer = [other for other in self.at_stake(id.job) if other > id]
                newer = newer or self._without_a_group(id)
                if not newer:
                    raise Violation(f"{id}, the newest protected snapshot, was freed")
                self.promises[id.job] = newer[-1]
            return
        known = self.sealed.get(id.job, set())
        there = known | self._complete.get(id.job, set())  # the latter by an old coordinator
        if id in known and not any(self.restorable(other) for other in sorted(there)):
            raise Violation(f"{id} was freed, and was all that {id.job} had")

    def _without_a_group(self, id: SnapshotId) -> list[SnapshotId]:
        """Newer ones of a job on one node, which nobody encodes: an old coordinator may free by."""
        if self._world.jobs[id.job].nodes > 1:
            return []
        ids = {other for other, _ in self._captured if other.job == id.job and other > id}
        return sorted(other for other in ids if self.restorable(other))

    def restorable(self, id: SnapshotId, without: "Machine | None" = None) -> bool:
        machines = self._world.machines.values()
        disks = [m.disk for m in machines if m.alive and m is not without]
        return transfers.restorable(id, self._world.jobs[id.job].ranks, disks)

    def survives(self, machine: "Machine") -> bool:
        """Whether nothing that is protected, or is about to be, is lost with this node."""
        for job in self._world.jobs.values():
            if job.name not in self.promises:
                if job.name in machine.disk.records or machine in job.pool:
                    return False  # nothing was promised yet
                continue
            at_stake = self.at_stake(job.name, machine)
            lost = any(not self.restorable(id, machine) for id in at_stake)
            if lost or not self._stays_known(job, machine):
                return False
        return True

    def _stays_known(self, job: "TrainingJob", machine: "Machine") -> bool:
        """Whether a new coordinator hears of a job without this node, if one more is not heard.

        Else all its ranks may come to nodes that were rebooted, and nobody can know better.
        """
        others = [m for m in self._world.machines.values() if m.alive and m is not machine]
        knowing = sum(job.name in other.disk.records for other in others)
        return knowing > 1 or 1 + len(others) - knowing < job.nodes

    def at_stake(self, job: str, machine: "Machine | None" = None) -> list[SnapshotId]:
        """What a fault by itself, of `machine` if it is given, must leave restorable.

        Also what only other groups are still to protect: when they have, it is committed, though
        nobody may know yet of what happened in the group of this one.
        """
        promise = self.promises.get(job)
        if promise is None:
            return []
        ids = set(self._complete.get(job, ()))
        if machine is not None:
            ids.update(id for id, name in self._covered if name == machine.name and id.job == job)
        newer = {id for id in ids if id > promise and not self.given_up(id)}
        ids = {promise, *newer, *self._world.people.wanted(job)}
        return [id for id in sorted(ids) if self.restorable(id)]

    # At all times, and at the end.

    def check_bounds(self) -> None:
        """Nothing grows without limit."""
        world = self._world
        for machine in world.machines.values():
            agent = machine.agent if machine.alive else None
            if agent is None:
                continue
            here = agent.lifecycle
            for what, count in (
                ("manifests", len(here.manifests)),
                ("sizes", len(here._world_sizes)),
                ("parity files", sum(slot.parity for slot in here.slots.values())),
            ):
                if count > MOST_MANIFESTS * len(world.jobs):
                    raise Violation(f"{machine.name} has {count} {what}")
            ranks = len(agent.locals) + 2 * world.plan.ranks_per_node
            segments = sum(not slot.parity for slot in here.slots.values())
            most = (world.plan.slots + MOST_SLOTS_EXTRA) * max(ranks, 1) * len(world.jobs)
            if segments > most + MOST_MANIFESTS:
                raise Violation(f"{machine.name} has {segments} segment files for {ranks} ranks")
        decider = world.coordinator.decider
        if decider is not None:
            for job in decider.jobs.values():
                if len(job.snapshots) > 4 * world.plan.slots + 8:
                    raise Violation(f"{job.name} has {len(job.snapshots)} snapshots")
                if len(job.attachments) > 8 * max(1, world.jobs[job.name].ranks):
                    raise Violation(f"{job.name} has {len(job.attachments)} attachments")

    def check_rest(self) -> None:
        """When all is quiet, memory is what the running lives need, and no more."""
        for machine in self._world.machines.values():
            if not machine.alive or machine.agent is None:
                continue
            for job in self._world.jobs.values():
                here = machine.agent.lifecycle
                slots = [s for s in here.slots.values() if s.job == job.name]
                run = job.run
                ranks = sum(t.machine is machine for t in run.trainers) if run is not None else 0
                # A process of a run before, that is hard to kill, has its slots until it is dead.
                ranks = max(ranks, sum(t.job == job.name for t in here.trainers.values()))
                # Free ones are kept where the job was, for its next life there.
                segments = [s for s in slots if not s.parity and (ranks or s.use is not Use.FREE)]
                parities = [s for s in slots if s.parity and s.use is not Use.FREE]
                if len(segments) > ranks * (self._world.plan.slots + 1) + (1 if ranks else 0):
                    raise Violation(
                        f"{machine.name} has {len(segments)} segment files of {job.name} "
                        f"for {ranks} ranks: {segments}"
                    )
                if len(parities) > (self._world.plan.slots + 1 if ranks else 0):
                    raise Violation(f"{machine.name} has {len(parities)} parities of {job.name}")


def _is_told(decider: Coordinator, id: SnapshotId) -> bool:
    """Whether the coordinator has heard of all parity: a report may still be on its way."""
    holdings = live_holdings(decider.nodes, id)
    manifests = [holding.manifest for holding in holdings.values() if holding.manifest is not None]
    return any(has_all_parity(manifest, holdings) for manifest in manifests)
