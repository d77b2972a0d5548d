"""Everything that the coordinator decides, without IO, clock or randomness.

`handle(peer, message, now)` and `tick(now)` return actions, which the shell carries out in order.
Order contract: actions of one call are sent in the order given, and messages to one node arrive in
the order sent; an order that follows from a report is never sent before the report was taken in.
All times are monotonic seconds.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from ckptd.coordinator import again, choice, keeping, orders, recovery, spare, worth
from ckptd.coordinator.claim import Claim, Stop, judge
from ckptd.coordinator.diagnosis.finding import Culprit, Scope
from ckptd.coordinator.diagnosis.shared import (
    DiagnosisSettings,
    Life,
    Note,
    Remember,
    Run,
    Shared,
    Tell,
)
from ckptd.coordinator.diagnosis.supervisors import Supervisors
from ckptd.coordinator.inventory import Inventory
from ckptd.coordinator.pacer import Pacer
from ckptd.coordinator.replication import Messages, Replication
from ckptd.coordinator.rhythm import least_s
from ckptd.coordinator.state import (
    ENDED,
    Attachment,
    Event,
    Job,
    Node,
    PendingResume,
    Snapshot,
    State,
)
from ckptd.erasure import ZfecCodec, form_groups, parity_of_group
from ckptd.errors import InternalError
from ckptd.ids import SnapshotId
from ckptd.journal import Body, Entry, Journal, Rollback
from ckptd.manifest import (
    Ancestor,
    Extent,
    GivenUp,
    Group,
    JobManifest,
    JobRecord,
    Member,
    is_ancestor,
)
from ckptd.terms import Obeyed
from ckptd.wire import (
    Activate,
    AgentMessage,
    AskResumeFor,
    Beat,
    ClientOrder,
    Clock,
    Collected,
    Commit,
    CoordinatorMessage,
    Counted,
    Dismiss,
    Drop,
    Entries,
    Forget,
    Grant,
    Hasten,
    Hello,
    Holding,
    Holds,
    Kept,
    LauncherWaiting,
    LifeResumed,
    Looked,
    Outdated,
    Present,
    Probed,
    Protect,
    RankLeft,
    RankReport,
    RankState,
    Rebuild,
    RebuildFailed,
    Record,
    RemoveJob,
    ResumeWaits,
    SegmentReady,
    Sketched,
    SnapshotFailed,
    TakeSnapshot,
    Transferred,
    Undivide,
    Welcome,
    WhoAreYou,
)

_REPEAT_WAITING_S = 2.0
_DIAGNOSE_EVERY_S = 0.2
_LONG_STEP_S = 15.0  # of a life that another coordinator has granted, and whose pace is unknown
_DISAGREE_S = 1.0  # ranks that change together report within moments of each other


@dataclass(frozen=True, slots=True)
class Settings:
    """What the cluster is told at start."""

    cell_bytes: int = 4 << 20
    """Size of a cell, the unit of coding and transfer, in bytes."""
    parity_shards: int | None = None
    """Parity shards of each group; None: 2 from four nodes on, 1 for two or three."""
    group_nodes: int = 8
    """Largest size of a group, in nodes."""
    beat_s: float = 0.5
    """How often an agent says that it is alive, in seconds."""
    lease_s: float = 4.0
    """A node that was silent for so long is lost, in seconds. It is suspect within three beats."""
    rebuild_after_s: float = 30.0
    """Segments of a node that is lost for so long, in seconds, and whose place nobody takes, are
    rebuilt on others' spare memory; 0: never."""
    settle_s: float | None = None
    """How long after the start there may be nodes yet unheard, in seconds; None: the lease."""
    job_quota_bytes: int | None = None
    """Most memory of one job on each node, in bytes, unless it has a quota of its own."""
    diagnosis: DiagnosisSettings = field(default_factory=DiagnosisSettings)
    """Who is slow, who hangs, and what is done about it."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` to the agent behind `peer`."""

    peer: bytes
    message: CoordinatorMessage


class Coordinator:
    """Membership, groups, lives, tickets, commit and resume of one cluster."""

    def __init__(self, settings: Settings, now: float, claim: Claim | None = None) -> None:
        self.settings = settings
        self.started_at = now
        self.claim = claim or Claim()
        self.term = 0
        """What every order carries; 0 until an agent has said which terms it knows of."""
        self.ended = ""
        """Why this coordinator gives no orders any more, if so."""
        self.bad_messages = 0
        """What it was told that cannot be true."""
        self.journal = Journal()
        """What `say` has said, and what agents have kept of what earlier coordinators said."""
        self._replication = Replication(self.journal, settings.lease_s)
        self.nodes: dict[str, Node] = {}
        self.jobs: dict[str, Job] = {}
        self._inventory = Inventory()
        self.events: deque[Event] = deque(maxlen=2000)
        """What happened, for status."""
        self.news: deque[Event] = deque(maxlen=2000)
        """The same, for the log, which takes it out."""
        self.runs: deque[Run] = deque()
        """Programs to be run on this machine; the shell takes them out, and answers with `ran`."""
        self._forgotten: dict[str, int] = {}
        """Jobs that were forgotten, and their last life: a node that was away may still hold it."""
        self._peers: dict[bytes, str] = {}
        self._out: list[Send] = []
        self._process_began = self._awake_at = self._caught_up_at = now
        self._ticked_at = now
        self._diagnose_at = now
        shared = Shared(
            settings.diagnosis,
            lambda: self.journal.next_incident,
            self.journal.restarts,
            lambda job: sum(1 for _ in self._spares(job)),
            self._cells_of,
        )
        self.supervisors = Supervisors(shared)
        self._quiet_until = float("inf")
        """Until then no live node can become suspect, or be lost."""

    # The two entries.

    def handle(self, peer: bytes, message: AgentMessage, now: float) -> list[Send]:
        """Take in one message of an agent."""
        self._take_note_of_time(now)
        if isinstance(message, Hello | Outdated):
            self._heed(message.obeyed, now)
        if self.ended:
            return []
        if isinstance(message, Hello):
            self._hello(peer, message, now)
            return self._flush()
        name = self._peers.get(peer)
        if name is None:
            self._out.append(Send(peer, WhoAreYou()))
            return self._flush()
        node = self.nodes[name]
        if node.suspect:
            node.suspect = False
            text = f"{name} is heard again, after {now - node.last_seen:.1f} s"
            self._event(now, "node_heard", "", text, node=name)
            self._quiet_until = min(self._quiet_until, now + self._least_silence_s)
        node.last_seen = now
        if not node.live:
            # It was given up; its word on what it holds must be heard again.
            self._out.append(Send(peer, WhoAreYou()))
            return self._flush()
        match message:
            case Beat():
                node.rhythm.beat(now)
                node.memory_used_bytes = message.memory_used_bytes
                node.problems = message.problems
                node.spare_bytes = message.spare_bytes
                node.fetching, node.recoding = message.fetching, message.recoding
                node.damaged_cells = message.damaged_cells
                node.mended_cells = message.mended_cells
                node.damaged_from = message.damaged_from
                node.bad_messages = message.bad_messages
                if now - node.told_at >= self.settings.lease_s / 2:
                    node.told_at = now
                    self._send(name, Present())
            case Entries():
                self._replicate(self._replication.answered(name, message.entries))
                for job in list(self.jobs.values()):
                    job.changed = True  # another may be wanted
                    self._consider_resume(job, now)
            case Kept():
                self._replication.kept(name, message.log)
            case Holds():
                self._holds(name, message.holding, now)
                self._look_again(message.holding.id.job, now)
            case RankReport():
                self._rank_report(name, message.state, now)
                self._look_again(message.state.job, now)
            case RankLeft():
                self._rank_left(name, message, now)
            case AskResumeFor():
                self._ask_resume(name, message, now)
            case SegmentReady():
                self._event(
                    now,
                    "segment_ready",
                    message.job,
                    f"rank {message.rank}'s segment of {message.id} is on {name}",
                    node=name,
                    rank=message.rank,
                    life=message.life,
                    fetched_cells=message.fetched_cells,
                    rebuilt_cells=message.rebuilt_cells,
                )
            case LifeResumed():
                self._life_resumed(message, now)
            case SnapshotFailed():
                self._snapshot_failed(name, message, now)
            case RebuildFailed():
                self._rebuild_failed(name, message)
            case LauncherWaiting():
                if message.waiting:
                    node.launchers.add(message.job)
                else:
                    node.launchers.discard(message.job)
                if message.job in self.jobs:
                    self._fill_vacancies(self.jobs[message.job], now)
            case (
                Sketched() | Looked() | Counted() | Collected() | Clock() | Transferred() | Probed()
            ):
                self.supervisors.heard(name, message, now)
        return self._flush()

    def tick(self, now: float) -> list[Send]:
        """Let time pass: leases run out, waiting resumes are looked at again."""
        self._take_note_of_time(now)
        if self.ended:
            return []
        self._replicate(self._replication.tick(now))
        self._look_for_silence(now)
        for job in list(self.jobs.values()):
            self._clear_rollback(job, now)
            self._commit_late(job, now)
            self._miss_nodes(job, now)
            if now >= self._settled_at:
                for snapshot in list(job.snapshots.values()):
                    undecided = snapshot.unprotected and not snapshot.reason
                    if undecided and snapshot.state is State.SEALED:
                        self._judge_unprotected(job, snapshot, now)
            self._look_at_parity(job, now)
            self._rebuild_lost(job, now)
            self._make_room(job, now)
            self._tell_life(job, now)
            self._consider_resume(job, now)
        self._diagnose(now)
        return self._flush()

    def next_deadline(self, now: float) -> float:
        """When `tick` must be called at the latest."""
        deadlines = [self._quiet_until]
        if now >= self._quiet_until:
            deadlines = [self._silence_ends_at(n) for n in self.nodes.values() if n.live]
        if any(job.pending for job in self.jobs.values()):
            deadlines.append(now + self.settings.beat_s)
        return min([d for d in deadlines if d < float("inf")], default=now + 1.0)

    def remove_job(self, name: str, now: float) -> str:
        """Forget a job and free its memory everywhere; returns "" or the reason why not."""
        job = self.jobs.get(name)
        if job is None:
            known = ", ".join(sorted(self.jobs)) or "none"
            return f"no job {name!r} is known; known jobs: {known}"
        if job.attachments:
            return f"job {name!r} is running on {', '.join(sorted(self._job_nodes(job)))}; stop it"
        self._forget(job, "removed by hand", now)
        return ""

    def say(self, body: Body, now: float) -> Entry:
        """Put something in the journal, and have all agents keep it."""
        entry = self.journal.put(body)
        if not self.ended:
            self._replicate(self._replication.said([entry]))
        return entry

    def obey(self, order: ClientOrder, now: float) -> str:
        """Do what somebody asks for; returns "" or the reason why not."""
        if isinstance(order, RemoveJob):
            return self.remove_job(order.job, now)
        entry = orders.entry_for(order, self.nodes, self.jobs, self.journal)
        if isinstance(entry, str):
            return entry
        self._note(entry, now)
        for job in list(self.jobs.values()):
            job.changed = True  # another may be wanted
            self._miss_nodes(job, now)
            self._consider_resume(job, now)
        return ""

    def take_actions(self) -> list[Send]:
        """Actions of `remove_job`, `say` and `obey`."""
        return self._flush()

    @property
    def forgetful(self) -> tuple[str, ...]:
        """Live nodes that do not keep all yet that was asked for, and would outlive this.

        If none is live, all that are known: nobody keeps it then.
        """
        if not any(node.live for node in self.nodes.values()):
            return tuple(sorted(self.nodes))
        return self._replication.lacking

    def rollback_of(self, job: Job) -> SnapshotId | None:
        """The snapshot from which somebody wants the job to resume next."""
        wanted = self.journal.rollback(job.name)
        if wanted is None:
            return None
        done = any(id.life > wanted.after for id in job.snapshots)
        return None if done or (job.resumed and job.life > wanted.after) else wanted.id

    def quota_of(self, job: str) -> int | None:
        """Most memory that the job may have on each node, in bytes."""
        own = self.journal.quota(job)
        return self.settings.job_quota_bytes if own is None else own

    def live_holdings(self, id: SnapshotId) -> dict[str, Holding]:
        """What live nodes hold of one snapshot."""
        return self._inventory.of(id).holdings

    @property
    def domains(self) -> dict[str, str]:
        """The failure domain label of each known node that has one; also of lost nodes."""
        return {name: node.hello.domain for name, node in self.nodes.items() if node.hello.domain}

    def check_invariants(self) -> None:
        """Raise InternalError if what must always hold does not. Called by tests."""
        for job in self.jobs.values():
            for snapshot in job.snapshots.values():
                self._inventory.check(snapshot.id, choice.live_holdings(self.nodes, snapshot.id))
                if snapshot.state in ENDED:
                    raise InternalError(f"{snapshot.id} has ended and is still listed")
                if snapshot.state is State.PROTECTED and snapshot.manifest is None:
                    raise InternalError(f"{snapshot.id} is protected without a manifest")
                if snapshot.id.life > job.life:
                    raise InternalError(f"{snapshot.id} is of a life that was not granted")

    # The term.

    def _heed(self, obeyed: Obeyed, now: float) -> None:
        """Begin a higher term than an agent knows of, or end, if it obeys somebody else."""
        up_s = now - self._process_began
        verdict = judge(self.claim, self.term, obeyed, up_s, now >= self._settled_at)
        if isinstance(verdict, Stop):
            self.ended = verdict.reason
            self._event(now, "superseded", "", verdict.reason)
        elif verdict is not None:
            self.term = verdict.term
            again = self.journal.begin(self.term)
            self._event(now, "term_begun", "", f"term {self.term} begins", term=self.term)
            for job in self.jobs.values():
                job.pending = None  # asked in an earlier term
            for name in self.nodes:
                self._welcome(name)
            self._replicate(self._replication.said(again) if again else [])

    def _welcome(self, node: str) -> None:
        pace = self.settings
        address = self.claim.address
        self._send(node, Welcome(pace.beat_s, pace.cell_bytes, address, pace.lease_s))

    def _replicate(self, messages: Messages) -> None:
        for node, message in messages:
            self._send(node, message)

    # Membership.

    def _take_note_of_time(self, now: float) -> None:
        """If this process was stopped for long, no node was silent: nobody could be heard."""
        away_s, self._awake_at = now - self._awake_at, now
        if away_s < self.settings.lease_s / 2:
            return
        self.started_at += away_s
        self._caught_up_at = now + self.settings.beat_s  # what was said meanwhile is still to come
        for node in self.nodes.values():
            node.last_seen = min(now, node.last_seen + away_s)

    def _hello(self, peer: bytes, hello: Hello, now: float) -> None:
        old = self.nodes.get(hello.node)
        if (
            old is not None
            and old.live
            and old.peer != peer
            and old.hello.memory_token != hello.memory_token
            and now - old.last_seen < self.settings.lease_s
        ):
            # Either two nodes have one id, or the node came back with empty memory. If the old
            # agent is heard again, it is the former; if not, its lease runs out. Until then the
            # new one gets no answer, and says Hello again.
            if old.rival_since is None:
                old.rival_since = now
            elif old.last_seen > old.rival_since:
                reason = (
                    f"node id {hello.node!r} is in use by the agent at {old.hello.address}; "
                    "give this agent another --node"
                )
                self._out.append(Send(peer, Dismiss(reason)))
            return
        if old is not None:
            self._peers.pop(old.peer, None)
            self._inventory.lose(hello.node, old.holdings)
        # A restarted agent starts anew; the same one saying hello again goes on.
        fresh = old is None or old.hello.incarnation != hello.incarnation
        node = Node(hello, peer, now, since=now, told_at=now, launchers=set(hello.launchers))
        if old is not None and not fresh:
            node.rhythm = old.rhythm
        node.memory_used_bytes, node.problems = hello.memory_used_bytes, hello.problems
        node.spare_bytes = hello.spare_bytes
        self.nodes[hello.node] = node
        self._quiet_until = min(self._quiet_until, now + self._least_silence_s)
        self._peers[peer] = hello.node
        self._welcome(hello.node)
        self._replicate(self._replication.hello(hello.node, hello.log, now))
        if fresh:
            self._event(now, "node_joined", "", f"{hello.node} joined", node=hello.node)
        for record in hello.records:
            if record.life <= self._forgotten.get(record.job, 0):
                self._send(hello.node, Forget(record.job, "it was forgotten while you were away"))
                continue
            job = self._job(record.job)
            if record.is_later(job.record):
                self._adopt_record(job, record, now)
        for job in self.jobs.values():
            if job.record is not None:
                self._send(hello.node, Record(job.record))
            self._forget_attachments(job, hello.node)
        # All that it holds is taken in before anything is decided from it.
        for holding in hello.holdings:
            self._holds(hello.node, holding, now, is_back=True)
        for job in list(self.jobs.values()):
            job.changed = True
            self._resend_orders(job, hello, now)
        for state in hello.ranks:
            self._rank_report(hello.node, state, now)
        for job in list(self.jobs.values()):
            self._fill_vacancies(job, now)
            self._tell_life(job, now)
            self._consider_resume(job, now)

    def _adopt_record(self, job: Job, record: JobRecord, now: float) -> None:
        """Learn of a life that this coordinator did not grant."""
        job.record = record
        wanted = self.journal.rollback(job.name)
        asked_here = wanted is not None and self.journal.term_of(wanted) == self.term
        if wanted is not None and asked_here and record.term < self.term:
            # It may have been granted before that was asked for, and did not begin for its sake.
            after = max(wanted.after, record.life)
            self.say(Rollback(job.name, wanted.id, after), now)
        if record.life < job.life:
            return
        job.life, job.round, job.world_size = record.life, "", 0
        job.resumed, job.members = False, {}
        job.vacancies, job.finished, job.left = {}, set(), set()
        job.resumed_from = choice.origin(record)

    def _resend_orders(self, job: Job, hello: Hello, now: float) -> None:
        """Orders are idempotent: give the node those that it may have missed.

        A capture that it has neither sealed nor under way will never end: its ticket was lost, or
        the news that it had failed, or the agent was restarted.
        """
        node, under_way = hello.node, set(hello.capturing)
        held = {holding.id for holding in hello.holdings}
        for snapshot in list(job.snapshots.values()):
            for rank in [r for r, where in snapshot.rebuilding.items() if where == node]:
                del snapshot.rebuilding[rank]
            snapshot.unbuilt.clear()  # with this node others may succeed, too
            if snapshot.state in (State.TICKETED, State.CAPTURING):
                ranks = [rank for rank, where in job.members.items() if where == node]
                lost = [
                    rank
                    for rank in ranks
                    if (snapshot.id, rank) not in under_way
                    and not self._holds_rank(snapshot.id, rank)
                ]
                if snapshot.id.life == job.life and lost:
                    self._end(job, snapshot, State.DROPPED, f"the agent on {node} was away", now)
            elif snapshot.state is State.SEALED and snapshot.manifest is not None:
                if snapshot.manifest.place_of(node) is not None:
                    # Others may have given up on this node: everybody looks again.
                    self._order_protect(job, snapshot, now)
            elif snapshot.state is State.PROTECTED and snapshot.manifest is not None:
                place = snapshot.manifest.place_of(node)
                if place is not None:
                    snapshot.ordered.pop(place[0], None)
                whole = self._inventory.of(snapshot.id).is_protected(snapshot.manifest)
                if whole and snapshot.id in held:
                    self._send(node, Commit(snapshot.id, ()))

    def _look_for_silence(self, now: float) -> None:
        """Take note of who is lost, and who is silent for longer than usual."""
        late_s, self._ticked_at = now - self._ticked_at, now
        if now < self._quiet_until:
            return
        for name, node in self.nodes.items():
            if node.live and now - node.last_seen >= self.settings.lease_s:
                self._node_lost(name, now)
        if late_s <= 1.5 * self.settings.beat_s:
            self._suspect(now)
        # Else this process was held up: what the nodes said meanwhile is still to be read.
        lease_s, least_s = self.settings.lease_s, self._least_silence_s
        ends = (
            node.last_seen + (lease_s if node.suspect else least_s)
            for node in self.nodes.values()
            if node.live
        )
        self._quiet_until = min(ends, default=float("inf"))

    @property
    def _least_silence_s(self) -> float:
        """No live node that is not suspect becomes it sooner, since it was heard last."""
        return least_s(self.settings.beat_s, self.settings.lease_s)

    def _suspect(self, now: float) -> None:
        found = False
        for name, node in self.nodes.items():
            if node.live and not node.suspect and now >= self._silence_ends_at(node):
                node.suspect = found = True
                text = f"{name} is suspect: silent for {now - node.last_seen:.1f} s"
                self._event(now, "node_suspect", "", text, node=name)
        if found:
            for job in self.jobs.values():
                self._hasten(job, now)

    def _silence_ends_at(self, node: Node) -> float:
        """When a live node that is still silent becomes suspect, or lost if it is suspect."""
        beat_s, lease_s = self.settings.beat_s, self.settings.lease_s
        bound_s = lease_s if node.suspect else node.rhythm.bound_s(beat_s, lease_s)
        return node.last_seen + bound_s

    def _node_lost(self, name: str, now: float) -> None:
        node = self.nodes[name]
        node.live = node.suspect = False
        silent_s = now - node.last_seen
        self._event(now, "node_lost", "", f"{name} is lost: silent for {silent_s:.1f} s", node=name)
        self._inventory.lose(name, node.holdings)
        node.held = frozenset(node.holdings)
        node.holdings, node.fetching, node.recoding = {}, (), ()
        self._replicate(self._replication.lost(name, now))
        for job in self.jobs.values():
            job.changed = True
            if job.resumed and name in job.members.values():
                who = Culprit(Scope.NODE, nodes=(name,))
                said, at = f"silent for {silent_s:.1f} s", job.pacer.progress_at
                self.supervisors.ended(job.name, job.life, who, said, at, now)
            self._forget_attachments(job, name)
            self._miss_nodes(job, now)

    def _miss_nodes(self, job: Job, now: float) -> None:
        """Note which nodes of the life are lost, to a coordinator before this one perhaps."""
        record = job.record
        left = job.world_size and len(job.left) == job.world_size
        if record is None or record.life != job.life or left:
            return
        for name, token in sorted(record.nodes.items()):
            node = self.nodes.get(name)
            if node is None:
                lost = now >= self._settled_at
            else:  # one that came back with empty memory has lost its ranks, too
                lost = not node.live or node.hello.memory_token != token
                if self.journal.is_isolated(name) and name not in self._job_nodes(job):
                    lost = True  # and one whose ranks have left may not have them again
            if lost:
                job.vacancies.setdefault(name, "")
        self._fill_vacancies(job, now)

    def _forget_attachments(self, job: Job, node: str) -> None:
        for key in [key for key, held in job.attachments.items() if held.node == node]:
            del job.attachments[key]
        if job.pending is not None:
            job.pending.there = 0

    def _is_back(self, job: Job, name: str) -> bool:
        """Whether a lost node has come back to its ranks; not as a spare, for any place."""
        node = self.nodes.get(name)
        if node is None or not node.live or job.name in node.launchers:
            return False
        if self.journal.is_isolated(name):
            return False
        token = job.record.nodes.get(name) if job.record is not None else None
        return node.hello.memory_token == token or name in self._job_nodes(job)

    def _fill_vacancies(self, job: Job, now: float) -> None:
        """Call a waiting spare for each lost node of the job's life."""
        for lost, called in job.vacancies.items():
            if called and self.nodes[called].live:
                if job.name in self.nodes[called].launchers:
                    # It still waits, so it has not heard the call.
                    self.nodes[called].launchers.discard(job.name)
                    self._send(called, Activate(job.name))
                continue
            if self._is_back(job, lost):
                continue
            name = next(self._spares(job.name), "")
            if name:
                self.nodes[name].launchers.discard(job.name)
                job.vacancies[lost] = name
                self._send(name, Activate(job.name))
                text = f"{name} takes the place of {lost}"
                self._event(now, "spare_called", job.name, text, node=name, lost=lost)

    def _spares(self, job: str) -> Iterator[str]:
        """Nodes that wait to join the job, and may."""
        for name, node in sorted(self.nodes.items()):
            leaves = self.journal.is_draining(name) or self.journal.is_isolated(name)
            if node.live and not leaves and job in node.launchers:
                yield name

    # Trainers.

    def _rank_report(self, node: str, state: RankState, now: float) -> None:
        job = self._job(state.job)
        if self._disbelieves(job, state.life):
            return
        key = (state.round, state.rank)
        new = key not in job.attachments
        job.see(state.round)
        job.keeps.add(state.keep)
        if state.life and state.life == job.life and not job.round:
            self._recognise(job, state)
        if job.round and job.round != state.round and 0 < state.life < job.life:
            return  # an old life that woke up: nothing of it counts
        before = job.attachments.get(key)
        job.attachments[key] = Attachment(node, state, now if before is None else before.since)
        if before is not None and before.state.shares != state.shares and state.life == job.life:
            # What it captures from now on does not fit to what others captured with it before.
            self._end_open(job, f"rank {state.rank} has a new layout", now)
        if new:
            job.pacer.every = max(1, state.every)
            if state.round != job.round and len(job.left) == job.world_size:
                job.left = set()  # it was stopped on purpose, and is now started again
        if job.round == state.round:
            idle = not state.free_slots and not state.step
            if state.life < job.life or (new and idle):
                job.untold.add(node)  # its agent may not know what the round was granted
            if state.life == job.life:
                job.members[state.rank] = node
                if not job.resumed and (state.free_slots or state.step):
                    # It trains, or has memory to capture into, and that comes after loading.
                    job.resumed = True
                    job.pacer.start(state.step, now)
        if state.life == job.life and state.life:
            if before is not None and before.state != state:
                job.moved_at = now
            job.pacer.observe(state.step, now)
            if before is not None and before.state.seen_step < state.seen_step:
                job.pacer.arrived(state.seen_step, state.step)
            self._try_ticket(job, now)
        if new:
            self._event(
                now,
                "rank_attached",
                job.name,
                f"rank {state.rank} attached on {node}",
                node=node,
                rank=state.rank,
            )

    def _disbelieves(self, job: Job, life: int) -> bool:
        """Whether there is no such life: another one runs, and nobody else grants any."""
        if not job.round or life <= job.life:
            return False
        self.bad_messages += 1
        return True

    def _is_answered(self, job: Job, round_: str, rejected: tuple[SnapshotId, ...]) -> bool:
        """Whether the life that runs is the answer to this question."""
        return bool(job.life) and job.round == round_ and job.resumed_from not in rejected

    def _recognise(self, job: Job, state: RankState) -> None:
        """A life went on while there was no coordinator; this is its round."""
        job.round, job.world_size = state.round, state.world_size
        pending = job.pending
        if pending is not None and self._is_answered(job, pending.round, pending.rejected):
            job.untold.add(pending.node)
            job.pending = None
        for (round_, rank), held in list(job.attachments.items()):
            if round_ == job.round:
                if held.state.life < job.life:
                    job.untold.add(held.node)
            elif 0 < held.state.life < job.life:
                del job.attachments[round_, rank]

    def _look_again(self, name: str, now: float) -> None:
        """Something has changed for a job; perhaps its resume can be answered now."""
        if name in self.jobs:
            self._tell_life(self.jobs[name], now)
            self._consider_resume(self.jobs[name], now)

    def _rank_left(self, node: str, message: RankLeft, now: float) -> None:
        job = self.jobs.get(message.job)
        if job is None:
            return
        held = job.attachments.get((message.round, message.rank))
        if held is None or held.node != node:
            return
        del job.attachments[(message.round, message.rank)]
        if job.pending is not None:
            job.pending.there = 0
        self._event(
            now,
            "rank_left",
            job.name,
            f"rank {message.rank} on {node} left: {message.reason}",
            node=node,
            rank=message.rank,
            reason=message.reason,
        )
        if job.pending is not None and job.pending.round == message.round and message.rank == 0:
            job.pending = None
        if message.round != job.round:
            return
        if message.reason == "detached":
            job.left.add(message.rank)
        elif job.resumed and message.life == job.life:
            who = Culprit(Scope.RANK, (message.rank,), (node,))
            at = job.pacer.progress_at
            self.supervisors.ended(job.name, job.life, who, message.reason, at, now)
        if message.finished:
            job.finished.add(message.rank)
            if len(job.finished) == job.world_size:
                self._forget(job, "finished", now)
                return
        for snapshot in list(job.snapshots.values()):
            partial = snapshot.state in (State.TICKETED, State.CAPTURING)
            ours = snapshot.id.life == job.life
            if partial and ours and not self._holds_rank(snapshot.id, message.rank):
                self._end(job, snapshot, State.DROPPED, f"rank {message.rank} left", now)

    def _life_resumed(self, message: LifeResumed, now: float) -> None:
        job = self.jobs.get(message.job)
        if job is None:
            return
        if message.life != job.life:
            return
        job.resumed = job.changed = True
        job.pacer.start(message.step, now)
        self._event(
            now,
            "life_resumed",
            job.name,
            f"life {message.life} trains from step {message.step}",
            life=message.life,
            step=message.step,
        )
        saved = job.snapshots.get(job.resumed_from) if job.resumed_from is not None else None
        saved_at = saved.created if saved is not None else None
        self.supervisors.resumed(job.name, message.life, message.step, saved_at, now)
        self._try_ticket(job, now)

    # Diagnosis.

    def _diagnose(self, now: float) -> None:
        """Have all jobs looked at, now and then, and do what follows."""
        if now < self._diagnose_at:
            return
        self._diagnose_at = now + _DIAGNOSE_EVERY_S
        self.supervisors.tick([self._life(job) for job in self.jobs.values()], now)
        for action in self.supervisors.shared.take_actions():
            match action:
                case Tell():
                    self._send(action.node, action.message)
                case Note():
                    self._event(now, action.kind, action.job, action.text, **action.fields)
                    if action.kind == "hang_suspected" and action.job in self.jobs:
                        self._hasten(self.jobs[action.job], now)
                case Remember():
                    self.say(action.body, now)
                case Run():
                    self.runs.append(action)

    def _life(self, job: Job) -> Life:
        here = {rank: held for (r, rank), held in job.attachments.items() if r == job.round}
        states = [held.state for held in here.values() if held.state.life == job.life]
        whole = job.resumed and len(states) == job.world_size > 0
        step = max((state.step for state in states), default=0)
        trains = whole and not job.left and not job.finished
        step_s = job.pacer.step_s or 0.0
        elastic = bool(states) and all(state.elastic for state in states)
        return Life(job.name, job.life, dict(job.members), step, step_s, trains, elastic)

    def _cells_of(self, name: str) -> str:
        node = self.nodes.get(name)
        return node.hello.cells if node is not None and node.live else ""

    def ran(self, incident: int, program: str, failure: str, now: float) -> None:
        """One of `runs` has ended; `failure`: why it has not done its work, "" if it has."""
        self.supervisors.ran(incident, program, failure, now)

    # Tickets and commit.

    def _try_ticket(self, job: Job, now: float) -> None:
        """Issue a ticket when every rank of the life has a free slot."""
        if not job.resumed or len(job.members) != job.world_size or job.finished or job.left:
            return
        ours = [snapshot for snapshot in job.snapshots.values() if snapshot.id.life == job.life]
        if any(one.learned and one.state in (State.TICKETED, State.CAPTURING) for one in ours):
            if not all(self._is_there(job, rank) for rank in range(job.world_size)):
                return
            self._drop_orphans(job, min(state.seen_step for state in self._states(job)), now)
            ours = [one for one in ours if one.state not in ENDED]
        if self._waits_for_a_rank(job, ours, now):
            return
        ranks = self._states(job)
        if not self._agree(job, ranks, now):
            return
        # The coordinator before this one may have issued tickets, too.
        used = max([state.seen_step for state in ranks] + [s.id.step for s in ours])
        id = SnapshotId(job.name, job.life, job.pacer.next_step(now, used))
        job.snapshots[id] = Snapshot(id, job.world_size, State.TICKETED, now, now)
        job.tickets.append((id, now))
        for node in sorted(self._job_nodes(job)):
            self._send(node, TakeSnapshot(id))

    def _states(self, job: Job) -> list[RankState]:
        """Of all ranks of the life, which are there."""
        return [job.attachments[job.round, rank].state for rank in range(job.world_size)]

    def _is_there(self, job: Job, rank: int) -> bool:
        """Whether a rank has the life, on a node that is heard."""
        held = job.attachments.get((job.round, rank))
        if held is None or held.state.life != job.life:
            return False
        return self.nodes[held.node].live and not self.nodes[held.node].suspect

    def _waits_for_a_rank(self, job: Job, ours: list[Snapshot], now: float) -> bool:
        """Whether some rank is not there, or has no free slot.

        The one that was found last is looked at first: for most reports that is all.
        """
        open_steps = {s.id.step for s in ours if s.state in (State.TICKETED, State.CAPTURING)}
        # A rank that has not yet heard of a ticket will take a slot for it, dropped or not.
        dropped = [
            (id.step, at)
            for id, at in job.tickets
            if id.life == job.life
            and id.step not in open_steps
            and now - at < self.settings.lease_s
        ]
        first = job.waits_for % job.world_size
        for rank in chain(range(first, job.world_size), range(first)):
            job.waits_for = rank
            if not self._is_there(job, rank):
                return True
            held = job.attachments[job.round, rank]
            seen = held.state.seen_step
            unseen = sum(step > seen for step in open_steps)
            unseen += sum(step > seen and at >= held.since for step, at in dropped)
            if held.state.free_slots - unseen < 1:
                return True
        return False

    def _agree(self, job: Job, ranks: list[RankState], now: float) -> bool:
        """Whether all ranks divide alike what they share; if not for long, none shall divide."""
        found = Counter(share for state in ranks for share in state.shares)
        odd = next((share for share, count in found.items() if count != share.ranks), None)
        if odd is None:
            job.disagree_since = None
            return True
        if job.disagree_since is None:
            job.disagree_since = now
        elif now - job.disagree_since >= _DISAGREE_S:
            job.disagree_since = now
            reason = f"only {found[odd]} of {odd.ranks} ranks that should hold the same tensors do"
            self._event(now, "undivided", job.name, f"{job.name}: every rank saves all: {reason}")
            for node in sorted(self._job_nodes(job)):
                self._send(node, Undivide(job.name, job.life, reason))
        return False

    def _end_open(self, job: Job, reason: str, now: float) -> None:
        """Drop what the life that runs has not sealed yet."""
        for snapshot in list(job.snapshots.values()):
            if snapshot.state in (State.TICKETED, State.CAPTURING) and snapshot.id.life == job.life:
                self._end(job, snapshot, State.DROPPED, reason, now)

    def _drop_orphans(self, job: Job, seen_step: int, now: float) -> None:
        """Give up captures that nobody will complete; all ranks have seen tickets to `seen_step`.

        Their tickets are from the coordinator before this one, which may have died before all
        ranks had them, or with the news that one had failed.
        """
        for snapshot in list(job.snapshots.values()):
            if (
                snapshot.learned
                and snapshot.id.life == job.life
                and snapshot.state in (State.TICKETED, State.CAPTURING)
                and (snapshot.id.step > seen_step or now - snapshot.created > self.settings.lease_s)
            ):
                reason = "the coordinator that gave its ticket is gone"
                self._end(job, snapshot, State.DROPPED, reason, now)

    def _snapshot_failed(self, node: str, message: SnapshotFailed, now: float) -> None:
        job = self.jobs.get(message.id.job)
        if job is None:
            return
        snapshot = job.snapshots.get(message.id)
        if snapshot is None or snapshot.state in ENDED:
            return
        if snapshot.state is State.PROTECTED or snapshot.lost_at is not None:
            snapshot.unable[node] = message.reason
            return
        if message.outcome == "skipped":
            job.pacer.missed()
        state = State(message.outcome)
        if snapshot.state is State.SEALED:
            snapshot.damaged |= message.damaged
            self._give_up(job, snapshot, f"{node}: {message.reason}", now)
        else:
            self._end(job, snapshot, state, f"{node}: {message.reason}", now)

    def _give_up(self, job: Job, snapshot: Snapshot, reason: str, now: float) -> None:
        """A snapshot that all ranks have sealed will not be protected, for all that is known."""
        snapshot.unprotected, snapshot.unprotected_at = reason, now
        self._judge_unprotected(job, snapshot, now)

    def _judge_unprotected(self, job: Job, snapshot: Snapshot, now: float) -> None:
        """Is it worth its memory? If that is not certain yet, `tick` looks again.

        It may have been protected before, and its nodes may be needed to restore it. So it goes
        only for a better one, or when it is certain that it cannot be restored. Nor do others go
        for it, or it for older ones, as long as no room is needed: what is lost may be back.
        """
        if now < self._settled_at or self._replication.awaited:
            return  # too few nodes have been heard; or somebody may want to go back to it
        self._look_at_parity(job, now)  # a node that is back may have its place again
        reason, holdings = snapshot.unprotected, self.live_holdings(snapshot.id)
        verdict = recovery.judge(snapshot.manifest, snapshot.world_size, holdings)
        nodes = choice.expected_nodes(job) | choice.origins_of(snapshot.manifest)
        wanted = snapshot.id == self.rollback_of(job)
        chain = self._chain(job, snapshot.id)
        better = None if wanted else worth.better(job, snapshot, chain, self.live_holdings)
        if (
            better is not None
            and better < snapshot.id
            and worth.may_stay(job, snapshot, verdict, holdings, self.rollback_of(job))
        ):
            return  # it is kept beside the older one
        # A node that has just died may be why it failed, and is still thought to hold its part; and
        # the report of parity that makes up for what is lost may be on its way.
        sure_at = snapshot.unprotected_at + self.settings.beat_s
        heard = {name for name, node in self.nodes.items() if node.last_seen >= sure_at}
        no_room = worth.waits_for_room(job, snapshot.id, self.live_holdings)
        if better is not None:
            kept = keeping.kept(job, job.snapshots[better], None, self.nodes)
            if better > snapshot.id and snapshot.id in kept:
                return  # one of those that the job keeps beside the newer one
            if better > snapshot.id or (no_room and snapshot.id.life == job.life):
                self._end(job, snapshot, State.DROPPED, reason, now)
        elif verdict.restorable:
            if no_room and holdings.keys() <= heard:
                snapshot.reason = f"not protected: {reason}"
                self._commit(job, snapshot, now)
        elif all(name in heard and self.nodes[name].live for name in nodes) and not any(
            snapshot.id in node.held for node in self.nodes.values()
        ):
            # Lost, not dropped: the job has had a snapshot, and must not start from nothing.
            self._end(job, snapshot, State.LOST, f"{reason}; {verdict.reason}", now)

    def _holds(self, node: str, holding: Holding, now: float, is_back: bool = False) -> None:
        """Take in what a node holds; `is_back`: as it says Hello.

        What was lost may be there again with a node that was away. Others were told to drop theirs:
        what they say of it was on its way then.
        """
        held = self.nodes[node].holdings
        if holding.id.job in self.jobs:
            self.jobs[holding.id.job].changed = True
        if not holding.extents and not holding.parity:
            held.pop(holding.id, None)
            self._inventory.remove(node, holding.id)
            return
        if holding.id.life <= self._forgotten.get(holding.id.job, 0):
            self._send(node, Drop(holding.id, "its job was forgotten"))
            return
        job = self._job(holding.id.job)
        if self._disbelieves(job, holding.id.life):
            return
        ended = next((past for past in job.ended if past.id == holding.id), None)
        if ended is not None and not (is_back and ended.state is State.LOST):
            self._send(node, Drop(holding.id, ended.reason or ended.state.value))
            return
        held[holding.id] = holding
        self._inventory.put(node, holding)
        snapshot = job.snapshots.get(holding.id)
        if snapshot is None:
            if ended is not None:
                job.ended.remove(ended)
            snapshot = Snapshot(
                holding.id,
                holding.world_size,
                State.TICKETED,
                now,
                now,
                manifest=holding.manifest,
                learned=True,
            )
            job.snapshots[holding.id] = snapshot
            job.life = max(job.life, holding.id.life)
        if _is_newer(holding.manifest, snapshot.manifest):
            snapshot.manifest = holding.manifest
        if snapshot.id.life == job.life and snapshot.state in (State.TICKETED, State.CAPTURING):
            job.moved_at = now
        self._advance(job, snapshot, now)

    def _advance(self, job: Job, snapshot: Snapshot, now: float) -> None:
        """Move a snapshot on as far as the reported cells allow."""
        held = self._inventory.of(snapshot.id)
        if snapshot.state in (State.TICKETED, State.CAPTURING):
            # A manifest is made only once every rank has sealed, whoever is here to tell.
            if len(held.ranks) == snapshot.world_size or snapshot.manifest is not None:
                snapshot.move(State.SEALED, now)
                if snapshot.id.life == job.life:
                    job.pacer.met(snapshot.id.step)
            elif snapshot.state is State.TICKETED:
                snapshot.move(State.CAPTURING, now)
        if snapshot.state is not State.SEALED:
            return
        if snapshot.manifest is None and self._goes_on(job, snapshot.id):
            try:
                snapshot.manifest = self._build_manifest(job, snapshot, held.holdings)
            except ValueError as error:  # what agents report makes more cells than are possible
                self._end(job, snapshot, State.DROPPED, str(error), now)
                return
            if any(group.parity_shards for group in snapshot.manifest.groups):
                self._order_protect(job, snapshot, now)
                self._hasten(job, now)
        if snapshot.state is not State.SEALED or snapshot.manifest is None:
            return
        alone = not any(group.parity_shards for group in snapshot.manifest.groups)
        if alone:
            snapshot.reason = "one node: there is no group to protect it"
            self._commit(job, snapshot, now)
        elif held.is_protected(snapshot.manifest):
            snapshot.move(State.PROTECTED, now)
            self._commit(job, snapshot, now)

    def _find_incomplete(self, job: Job, now: float) -> None:
        """Note since when the snapshot that a resume would choose has lost segments."""
        wanted = self.rollback_of(job)
        for id in sorted(job.snapshots, reverse=True):
            snapshot = job.snapshots[id]
            if job.has_given_up(id) if wanted is None else id != wanted:
                continue
            if snapshot.state not in (State.SEALED, State.PROTECTED) or snapshot.unloadable:
                continue
            held = self._inventory.of(id)
            if len(held.ranks) == snapshot.world_size:
                break  # every segment is there
            if not recovery.judge(snapshot.manifest, snapshot.world_size, held.holdings).restorable:
                continue
            if job.incomplete is None or job.incomplete[0] != id:
                job.incomplete = id, now
            return
        job.incomplete = None

    def _rebuild_lost(self, job: Job, now: float) -> None:
        """Have segments that were lost for long rebuilt on spare memory, if nobody comes for them.

        Whoever comes to resume fetches them, so as long as somebody may, that is waited for.
        """
        for one in job.snapshots.values():
            if one.rebuilding or one.no_room:
                self._look_at_rebuilt(job, one, now)
        if job.incomplete is None or not self.settings.rebuild_after_s:
            return
        id, since = job.incomplete
        snapshot = job.snapshots.get(id)
        states = [held.state for held in job.attachments.values()]
        coming = any(state.round != job.round or not job.resumed for state in states)
        if job.pending is not None or coming:
            job.incomplete = id, now
        elif snapshot is not None and now - since >= self.settings.rebuild_after_s:
            self._order_rebuild(job, snapshot, now)

    def _order_rebuild(self, job: Job, snapshot: Snapshot, now: float) -> None:
        manifest, holdings = snapshot.manifest, self.live_holdings(snapshot.id)
        if manifest is None:
            return
        there = {*recovery.rank_holders(holdings), *snapshot.rebuilding}
        lost = [rank for rank in range(snapshot.world_size) if rank not in there]
        live = {name: node for name, node in self.nodes.items() if node.live}
        spares = self._rooms()
        if not lost or snapshot.rebuilding:
            return  # what is under way may not be in the numbers yet
        found = spare.place(manifest, holdings, lost, spares, snapshot.unbuilt)
        cells = {name: node.hello.cells for name, node in live.items()}
        source = recovery.source(manifest, holdings, cells)
        for rank, node in found.nodes.items():
            snapshot.rebuilding[rank] = node
            self._send(node, Rebuild(snapshot.id, rank, source))
            text = f"nobody has come for rank {rank} of {snapshot.id}: it is rebuilt on {node}"
            self._event(now, "rebuild_ordered", job.name, text, node=node, rank=rank)
        if found.left and not snapshot.no_room:
            text = self._no_room(snapshot, found.left[0].rank, found.left[0].size_bytes)
            self._event(now, "no_room_to_rebuild", job.name, text, rank=found.left[0].rank)
            snapshot.no_room = text

    def _rooms(self) -> dict[str, int]:
        """Spare memory, in bytes, of live nodes that are to stay."""
        return {
            name: node.spare_bytes
            for name, node in self.nodes.items()
            if node.live
            and not self.journal.is_draining(name)
            and not self.journal.is_isolated(name)
        }

    def _no_room(self, snapshot: Snapshot, rank: int, size_bytes: int) -> str:
        """Why a lost segment is not rebuilt, and what would help."""
        live = {name: node for name, node in self.nodes.items() if node.live}
        spares = ", ".join(f"{name} {node.spare_bytes}" for name, node in sorted(live.items()))
        failed = [why for (of, _), why in sorted(snapshot.unbuilt.items()) if of == rank]
        best = max(live, key=lambda name: (live[name].spare_bytes, name))
        more = max(0, size_bytes - live[best].spare_bytes)
        return (
            f"rank {rank} of {snapshot.id} is lost and cannot be rebuilt: it needs {size_bytes} "
            f"bytes, and spare are {spares}"
            + (f" ({'; '.join(failed)})" if failed else "")
            + f"; start the agent on {best} with --memory-limit "
            f"{live[best].hello.memory_limit_bytes + more} or more (and as much more "
            "--spare-memory, if it has that), or bring a node"
        )

    def _look_at_rebuilt(self, job: Job, snapshot: Snapshot, now: float) -> None:
        """Note what has been rebuilt, and by whom it no longer will be."""
        held = recovery.rank_holders(self.live_holdings(snapshot.id))
        if len(held) == snapshot.world_size:
            snapshot.no_room = ""
        for rank, node in list(snapshot.rebuilding.items()):
            done = node in held.get(rank, ())
            if done:
                text = f"rank {rank} of {snapshot.id} has been rebuilt on {node}"
                self._event(now, "rebuilt", job.name, text, node=node, rank=rank)
            if done or not self.nodes[node].live:
                del snapshot.rebuilding[rank]

    def _rebuild_failed(self, node: str, message: RebuildFailed) -> None:
        job = self.jobs.get(message.id.job)
        snapshot = job.snapshots.get(message.id) if job is not None else None
        if snapshot is not None and snapshot.rebuilding.get(message.rank) == node:
            del snapshot.rebuilding[message.rank]
            snapshot.unbuilt[message.rank, node] = message.reason

    def _goes_on(self, job: Job, id: SnapshotId) -> bool:
        return id.life == job.life or id == job.resumed_from

    def _build_manifest(
        self, job: Job, snapshot: Snapshot, holdings: dict[str, Holding]
    ) -> JobManifest:
        """The geometry of a snapshot that every rank has sealed: groups over the nodes it is on."""
        extents: dict[str, list[Extent]] = {}
        for rank, nodes in recovery.rank_holders(holdings).items():
            size = next(e.size_bytes for e in holdings[nodes[0]].extents if e.rank == rank)
            extents.setdefault(nodes[0], []).append(Extent(rank, size))
        groups = []
        for names, parity_shards in self._form_groups(extents):
            members = tuple(
                Member(name, tuple(sorted(extents[name], key=lambda e: e.rank))) for name in names
            )
            groups.append(Group(members, parity_shards))
        return JobManifest(
            id=snapshot.id,
            world_size=snapshot.world_size,
            groups=tuple(groups),
            codec=ZfecCodec.name,
            cell_bytes=self.settings.cell_bytes,
            ancestors=self._chain(job, snapshot.id),
        )

    def _form_groups(self, nodes: Iterable[str]) -> Iterator[tuple[tuple[str, ...], int]]:
        """(members, parity shards) of each group that these nodes form."""
        wanted, known = self.settings.parity_shards, self.domains
        for names in form_groups(sorted(nodes), wanted, self.settings.group_nodes, known):
            yield names, parity_of_group(len(names), wanted)

    def _order_protect(self, job: Job, snapshot: Snapshot, now: float) -> None:
        """Order it if every member has its segments: it needs them all."""
        manifest = snapshot.manifest
        if manifest is None:
            return
        holdings = self.live_holdings(snapshot.id)
        members = [member for group in manifest.groups for member in group.members]
        lacking = [
            member.node
            for member in members
            if member.node not in holdings
            or not set(member.extents) <= set(holdings[member.node].extents)
        ]
        for name in lacking:
            if name in self.nodes and self.nodes[name].live:
                reason = f"{name} no longer holds its segments"
                self._give_up(job, snapshot, reason, now)
                return
        if lacking:
            return
        snapshot.ordered.clear()
        held = recovery.rank_holders(holdings)
        for number, group in enumerate(manifest.groups):
            if group.parity_shards:
                self._order_group(snapshot, manifest, number, holdings, held)

    def _order_group(
        self,
        snapshot: Snapshot,
        manifest: JobManifest,
        number: int,
        holdings: dict[str, Holding],
        held: dict[int, tuple[str, ...]],
    ) -> None:
        """Order a group's nodes to protect it, unless they have this order."""
        group = manifest.groups[number]
        ranks = {
            extent.rank: held[extent.rank]
            for member in group.members
            for extent in member.extents
            if extent.rank in held
        }
        lacking = [m.node for m in group.members if not again.has_parity(m, holdings)]
        at_home = all(again.is_at_home(m, m.node, holdings) for m in group.members)
        never = snapshot.state is State.SEALED and snapshot.lost_at is None  # as far as is known
        if (never and at_home) or len(lacking) > group.parity_shards:
            ranks = {}  # the first time: all encode together, and say so if they cannot
        nodes = {member.node for member in group.members}
        nodes.update(*ranks.values())
        there = {n: self.nodes[n].hello for n in nodes if n in self.nodes and self.nodes[n].live}
        order = (manifest.edition, {name: hello.incarnation for name, hello in there.items()})
        if snapshot.ordered.get(number) == order:
            return
        snapshot.ordered[number] = order
        cells = {name: hello.cells for name, hello in there.items()}
        for member in group.members:
            self._send(member.node, Protect(manifest, cells, ranks))

    def _hasten(self, job: Job, now: float) -> None:
        """Have the newest snapshot that is not protected yet, and is in danger, protected first."""
        unsafe = [s for s in job.snapshots.values() if s.state is State.SEALED and s.manifest]
        if not unsafe:
            return
        newest = max(unsafe, key=lambda snapshot: snapshot.id)
        if newest.hastened or newest.manifest is None:
            return
        doubtful = {name for name, node in self.nodes.items() if node.live and node.suspect}
        doubtful |= self.supervisors.suspects_of(job.name)
        for group in newest.manifest.groups:
            names = [member.node for member in group.members]
            if group.parity_shards and doubtful.intersection(names):
                newest.hastened = True
                for name in names:
                    self._send(name, Hasten(newest.id))
        if newest.hastened:
            text = f"{newest.id} is protected first: {', '.join(sorted(doubtful))} may be lost"
            self._event(now, "protected_first", job.name, text, step=newest.id.step)

    def _look_at_parity(self, job: Job, now: float) -> None:
        """Have parity that is lost made anew, of snapshots that no newer one will replace.

        None replaces the one that somebody wants to go back to, and none does that was given up.
        Only if something has changed, and once all nodes have been heard that are there.
        """
        if not job.changed or now < self._settled_at:
            return
        job.changed = False
        self._find_incomplete(job, now)
        wanted = self.rollback_of(job)
        for snapshot in list(job.snapshots.values()):
            counts = snapshot.state in (State.SEALED, State.PROTECTED) and not snapshot.unloadable
            coded = snapshot.manifest is not None and any(
                group.parity_shards for group in snapshot.manifest.groups
            )
            newer = any(
                other.id > snapshot.id
                and other.state is State.PROTECTED
                and not other.unloadable
                and not job.has_given_up(other.id)
                for other in job.snapshots.values()
            )
            if counts and coded and (snapshot.id == wanted or not newer):
                self._protect_again(job, snapshot, now)

    def _protect_again(self, job: Job, snapshot: Snapshot, now: float) -> None:
        manifest = snapshot.manifest
        if manifest is None:
            return
        holdings = self.live_holdings(snapshot.id)
        if self._inventory.of(snapshot.id).is_protected(manifest):
            if snapshot.lost_at is not None:
                self._protected_again(job, snapshot, now)
            return
        plan = again.plan(manifest, holdings)
        before = snapshot.state is State.PROTECTED or manifest.edition or plan.taken
        if before and snapshot.lost_at is None:
            snapshot.lost_at = now
        snapshot.hindrances = plan.hindrances
        edition = manifest.with_nodes(plan.taken) if plan.taken else manifest
        snapshot.manifest = edition
        for (group, place), node in plan.taken.items():
            lost = manifest.groups[group].members[place].node
            text = f"{node} takes the place of {lost} in {snapshot.id}"
            self._event(now, "place_taken", job.name, text, node=node, lost=lost)
        held = recovery.rank_holders(holdings)
        for number in plan.groups:
            self._order_group(snapshot, edition, number, holdings, held)
        self._bring_home(job, snapshot, plan.homeless, now)

    def _bring_home(
        self, job: Job, snapshot: Snapshot, homeless: Iterable[Member], now: float
    ) -> None:
        """Have the segments of a lost node copied to one that can take its place.

        Ranks that were numbered anew have brought them to survivors. Not while ranks load: these
        need the memory first.
        """
        manifest, holdings = snapshot.manifest, self.live_holdings(snapshot.id)
        if manifest is None or job.pending is not None or (job.attachments and not job.resumed):
            return
        live = {name: node for name, node in self.nodes.items() if node.live}
        rooms = self._rooms()
        cells = {name: node.hello.cells for name, node in live.items()}
        for member in homeless:
            if any(extent.rank in snapshot.rebuilding for extent in member.extents):
                continue
            heir = spare.outsider(manifest, holdings, member.extents, rooms, snapshot.unbuilt)
            if heir is None:
                continue
            del rooms[heir]  # one place for each
            source = recovery.source(manifest, holdings, cells)
            for extent in member.extents:
                if heir in source.ranks[extent.rank]:
                    continue
                snapshot.rebuilding[extent.rank] = heir
                self._send(heir, Rebuild(snapshot.id, extent.rank, source))
                text = f"rank {extent.rank} of {snapshot.id} is copied to {heir}, a new home"
                self._event(now, "rebuild_ordered", job.name, text, node=heir, rank=extent.rank)

    def _protected_again(self, job: Job, snapshot: Snapshot, now: float) -> None:
        seconds = now - (snapshot.lost_at if snapshot.lost_at is not None else now)
        snapshot.lost_at, snapshot.hindrances, snapshot.unable = None, (), {}
        self._event(
            now,
            "protected_again",
            job.name,
            f"{snapshot.id} is protected again, {seconds:.1f} s after it had lost parity",
            life=snapshot.id.life,
            step=snapshot.id.step,
            seconds=seconds,
        )
        for node in self.nodes:
            self._send(node, Commit(snapshot.id, ()))

    def _commit(self, job: Job, snapshot: Snapshot, now: float) -> None:
        """Give permission to free what the snapshot replaces: its ancestors, and dead branches.

        Of its ancestors, as many protected ones stay as the job keeps. What a rollback gave up, or
        the life that runs has passed over, as it could not be loaded or its nodes were away, goes
        once there is a snapshot after it that is safe: nobody would ever go on from it.
        """
        manifest = snapshot.manifest
        if manifest is None or job.has_given_up(snapshot.id):
            return
        if not self._may_retire(job, snapshot.id):
            job.uncommitted.add(snapshot.id)
            return
        if any(
            other.state is State.PROTECTED
            and other.id > snapshot.id
            and not job.has_given_up(other.id)
            for other in job.snapshots.values()
        ):
            return
        retire = []
        kept = keeping.kept(job, snapshot, self.rollback_of(job), self.nodes)
        safe = keeping.is_safe(snapshot, self.nodes)
        for other in list(job.snapshots.values()):
            if other.id in kept:
                continue
            under_way = other.state in (State.TICKETED, State.CAPTURING)
            if is_ancestor(other.id, snapshot.id, manifest.ancestors):
                retire.append(other.id)
                if under_way:
                    self._end(job, other, State.DROPPED, f"{snapshot.id} is newer", now)
                else:
                    self._end(job, other, State.RETIRED, "", now, tell=False)
            elif other.id.life < snapshot.id.life and under_way:
                # Of a coordinator before, that has not heard of its end: those trainers are gone.
                self._end(job, other, State.DROPPED, f"{snapshot.id} is of a later life", now)
            elif other.id.life < snapshot.id.life and safe and job.has_given_up(other.id):
                retire.append(other.id)
                self._end(job, other, State.RETIRED, "given up by a rollback", now, tell=False)
            elif other.id.life < snapshot.id.life:
                verdict = recovery.judge(
                    other.manifest, other.world_size, self.live_holdings(other.id)
                )
                if not verdict.restorable:
                    self._end(job, other, State.LOST, verdict.reason, now)
                elif safe and snapshot.id.life == job.life:
                    retire.append(other.id)
                    reason = f"life {job.life} began before it"
                    self._end(job, other, State.RETIRED, reason, now, tell=False)
        for node in self.nodes:
            self._send(node, Commit(snapshot.id, tuple(retire)))

    def _may_retire(self, job: Job, id: SnapshotId) -> bool:
        """Whether a commit of `id` may retire others already.

        Not as long as entries of the log are awaited: somebody may want to go back to one of them.
        Nor as long as a life is still to load `id`: ranks before may have tried that in vain.
        """
        return not self._replication.awaited and (job.resumed or id != job.resumed_from)

    def _commit_late(self, job: Job, now: float) -> None:
        """Commit what had to wait."""
        for id in sorted(id for id in job.uncommitted if self._may_retire(job, id)):
            job.uncommitted.discard(id)
            snapshot = job.snapshots.get(id)
            if snapshot is not None:
                self._commit(job, snapshot, now)

    def _make_room(self, job: Job, now: float) -> None:
        """Retire the oldest snapshot that is kept if there is no memory for new ones.

        New ones are worth more, and what a rollback gave up is worth least. A node may have less
        room than it had: it holds segments of ranks that have moved, for one.
        """
        if job.keep < 2:
            return
        states = job.states
        busy = any(
            snapshot.id.life == job.life and not keeping.is_safe(snapshot, self.nodes)
            for snapshot in job.snapshots.values()
        )
        if busy or not job.runs or all(s.free_slots for s in states):
            job.full_since = None
            return
        step = min(state.step for state in states)
        since, at_step = job.full_since = job.full_since or (now, step)
        if now - since < self.settings.lease_s or step <= at_step:
            return  # it may still be laying out its memory
        wanted = self.rollback_of(job)
        safe = [s for _, s in sorted(job.snapshots.items()) if keeping.is_safe(s, self.nodes)]
        given_up = [snapshot for snapshot in safe if job.has_given_up(snapshot.id)]
        path = [snapshot for snapshot in safe if snapshot not in given_up]
        able = [snapshot for snapshot in (*given_up, *path[:-1]) if snapshot.id != wanted]
        if not able or not path:
            return
        oldest = able[0]
        job.full_since = None
        reason = "retired early: there was no free slot for a new snapshot"
        self._event(now, "kept_fewer", job.name, f"{oldest.id} {reason}", step=oldest.id.step)
        self._end(job, oldest, State.RETIRED, reason, now, tell=False)
        for node in self.nodes:
            self._send(node, Commit(path[-1].id, (oldest.id,)))

    def _clear_rollback(self, job: Job, now: float) -> None:
        """Once a life trains from where somebody wanted to go back to, the wish is fulfilled.

        Not before all wishes are known: there may be a later one.
        """
        if now < self._settled_at or self._replication.awaited:
            return
        if self.journal.rollback(job.name) is not None and self.rollback_of(job) is None:
            self._note(Rollback(job.name, None), now)

    def _note(self, body: Body, now: float) -> None:
        """Put what shall outlive this coordinator into the journal."""
        self.say(body, now)
        kind, text = orders.describe(body)
        self._event(now, kind, getattr(body, "job", ""), text)

    def _end(
        self, job: Job, snapshot: Snapshot, state: State, reason: str, now: float, tell: bool = True
    ) -> None:
        snapshot.move(state, now, reason)
        del job.snapshots[snapshot.id]
        job.ended.append(snapshot)
        if state is not State.RETIRED:
            self._event(
                now,
                "snapshot_" + state.value,
                job.name,
                f"{snapshot.id} {state.value}: {reason}",
                life=snapshot.id.life,
                step=snapshot.id.step,
            )
        if tell:
            with_ranks = self._job_nodes(job)
            for name, node in self.nodes.items():
                holds = name in with_ranks or snapshot.id in node.holdings
                # Once there is a manifest, any may be about to make parity of it, or a copy.
                if holds or snapshot.manifest is not None:
                    self._send(name, Drop(snapshot.id, reason))

    # Resume.

    def _ask_resume(self, node: str, ask: AskResumeFor, now: float) -> None:
        if ask.term != self.term:
            return  # another coordinator may have answered since; Welcome makes its agent ask again
        job = self._job(ask.job)
        if job.is_older(ask.round):
            reason = f"nothing: this run was started before the one that has life {job.life}"
            self._send(node, ResumeWaits(job.name, ask.round, reason, final=True))
            return
        if self._is_answered(job, ask.round, ask.rejected):
            # The same question again: the answer was on its way, or was lost.
            job.untold.add(node)
            self._tell_life(job, now)
            return
        job.pending = PendingResume(ask.round, node, ask.rejected)
        self._consider_resume(job, now)

    def _consider_resume(self, job: Job, now: float) -> None:
        """Answer rank 0 of a pending resume, or tell it what is missing."""
        pending = job.pending
        if pending is None:
            return
        self._look_at_parity(job, now)  # a node that is back may have its place again
        verdict = (
            self._unfit_ranks(job, pending)
            or self._missing_ranks(job, pending)
            or self._still_runs(job, pending, now)
            or self._missing_entries()
            or self._catching_up(now)
            or choice.choose(
                job,
                pending,
                self.nodes,
                self._settled_at,
                3 * self.settings.beat_s,
                now,
                self.rollback_of(job),
            )
        )
        if isinstance(verdict, choice.Start):
            self._grant(job, pending, verdict.id, verdict.reason, now)
            return
        if verdict.reason != pending.said or now - pending.said_at >= _REPEAT_WAITING_S:
            pending.said, pending.said_at = verdict.reason, now
            waits = ResumeWaits(job.name, pending.round, verdict.reason, verdict.final)
            self._send(pending.node, waits)
        if verdict.final:
            job.pending = None

    def _unfit_ranks(self, job: Job, pending: PendingResume) -> choice.Wait | None:
        """Ranks where none may be, or that do not fit to each other."""
        if len(job.keeps) < 2 and not self.journal.isolates:
            return None  # as nearly always
        here = {
            rank: held
            for (round_, rank), held in sorted(job.attachments.items())
            if round_ == pending.round
        }
        for name in sorted({held.node for held in here.values()}):
            isolated = self.journal.is_isolated(name)
            if isolated is not None:
                ranks = recovery.name_ranks([r for r, held in here.items() if held.node == name])
                return choice.Wait(
                    f"{ranks} on {name}, which is isolated ({isolated.reason}), to be started on "
                    f"another node; or, to let it take part again: ckptd readmit {name}"
                )
        keeps = {held.state.keep: rank for rank, held in reversed(here.items())}
        if len(keeps) > 1:
            found = ", ".join(f"rank {rank} says {keep}" for keep, rank in sorted(keeps.items()))
            return choice.Wait(
                f"all ranks to keep as many snapshots ({found}): give each the same "
                "Checkpointer(keep=...), or CKPTD_KEEP",
                final=True,
            )
        return None

    def _missing_ranks(self, job: Job, pending: PendingResume) -> choice.Wait | None:
        def is_here(rank: int) -> bool:
            held = job.attachments.get((pending.round, rank))
            return held is not None and self.nodes[held.node].live

        if not is_here(0):
            return choice.Wait("rank 0 is no longer attached to a live agent")
        world_size = job.attachments[pending.round, 0].state.world_size
        absent = (rank for rank in range(pending.there, world_size) if not is_here(rank))
        missing = list(islice(absent, recovery.RANKS_NAMED + 1))
        if not missing:
            return None
        pending.there = missing[0]
        ranks = recovery.name_ranks(missing)
        return choice.Wait(f"{ranks} of {world_size} to attach to their agents")

    def _still_runs(self, job: Job, pending: PendingResume, now: float) -> choice.Wait | None:
        """Whether the life that runs may be of a later run than the one that asks.

        Processes that were stopped may wake up and ask when another run has long had a life, maybe
        from another coordinator. All ranks of that are there then, and train; or come back to an
        agent that was restarted.
        """
        here = {
            rank: h.since for (round_, rank), h in job.attachments.items() if round_ == job.round
        }
        coming = [
            rank
            for rank, name in job.members.items()
            if rank not in here and now - self.nodes[name].since < self.settings.lease_s
        ]
        if pending.round == job.round or not here or len(here) + len(coming) < job.world_size:
            return None
        still_s, step_s = now - max(job.moved_at, *here.values()), job.pacer.slowest_s
        if step_s is None:
            step_s = 0.0 if job.grants else _LONG_STEP_S
        if still_s >= max(self.settings.lease_s, 2 * step_s):
            return None
        return choice.Wait(f"life {job.life}, whose ranks are all there, to end or to stand still")

    def _missing_entries(self) -> choice.Wait | None:
        awaited = self._replication.awaited
        return choice.Wait(f"the log that {', '.join(awaited)} kept") if awaited else None

    def _catching_up(self, now: float) -> choice.Wait | None:
        if now >= self._caught_up_at:
            return None
        return choice.Wait("what agents said while the coordinator was stopped")

    def _grant(
        self,
        job: Job,
        pending: PendingResume,
        start: SnapshotId | None,
        reason: str,
        now: float,
    ) -> None:
        members = {
            rank: held.node
            for (round_, rank), held in sorted(job.attachments.items())
            if round_ == pending.round
        }
        chain: tuple[Ancestor, ...] = ()
        if start is not None:
            chain = (*self._chain(job, start), Ancestor(start.life, start.step))
        life = 1 + max(
            job.life,
            job.record.life if job.record else 0,
            self._forgotten.get(job.name, 0),
            *(id.life for id in job.snapshots),
            *(held.state.life for held in job.attachments.values()),
        )
        for key in [k for k in job.attachments if k[0] != pending.round]:
            del job.attachments[key]
        for snapshot in list(job.snapshots.values()):
            snapshot.unloadable = snapshot.unloadable or snapshot.id in pending.rejected
            if snapshot.state in (State.TICKETED, State.CAPTURING):
                self._end(job, snapshot, State.DROPPED, f"life {snapshot.id.life} is over", now)
        nodes = {
            name: self.nodes[name].hello.memory_token for name in sorted(set(members.values()))
        }
        keep = max(
            held.state.keep
            for (round_, _), held in job.attachments.items()
            if round_ == pending.round
        )
        given_up = job.record.given_up if job.record is not None else ()
        if start is not None and start == self.rollback_of(job):
            older = dict.fromkeys(left for each in given_up for left in each.without(chain))
            given_up = (*older, GivenUp(start.life, start.step, life))
        others = self.live_holdings(start).keys() - nodes.keys() if start is not None else ()
        holders = tuple(sorted(others))
        job.record = JobRecord(job.name, life, nodes, chain, keep, given_up, holders, self.term)
        job.keeps = {keep}
        job.life, job.round, job.members = life, pending.round, members
        job.grants += 1
        job.world_size = len(members)
        job.resumed, job.resumed_from, job.pending = False, start, None
        job.granted_because = reason
        job.vacancies, job.finished, job.left, job.untold = {}, set(), set(), set()
        job.disagree_since = None
        # Everybody keeps the record before any rank can learn of the life.
        for node in self.nodes:
            self._send(node, Record(job.record))
        grant = self._life_of(job, job.record)
        for node in sorted(nodes):
            self._send(node, grant)
        self._event(
            now,
            "life_granted",
            job.name,
            f"life {life} from {start or 'nothing'}: {reason}",
            life=life,
            step=start.step if start else 0,
        )

    def _tell_life(self, job: Job, now: float) -> None:
        """Repeat the grant of the life that runs to nodes that may have missed it."""
        record = job.record
        if not job.untold or record is None or record.life != job.life or not job.round:
            return
        if now < self._settled_at and choice.expected_nodes(job) - self.nodes.keys():
            return  # where its snapshot is must be known first
        grant = self._life_of(job, record)
        for node in sorted(job.untold):
            self._send(node, grant)
        job.untold = set()

    def _life_of(self, job: Job, record: JobRecord) -> Grant:
        """The grant of the life that runs, with the places where its snapshot is now."""
        id, source = job.resumed_from, None
        if id in job.snapshots:
            cells = {name: node.hello.cells for name, node in self.nodes.items() if node.live}
            source = recovery.source(job.snapshots[id].manifest, self.live_holdings(id), cells)
        fraction = max(
            parity_shards / (len(names) - parity_shards)
            for names, parity_shards in self._form_groups(record.nodes)
        )
        return Grant(
            job.name,
            job.round,
            job.life,
            id,
            job.granted_because,
            record,
            source,
            fraction,
            self.quota_of(job.name),
        )

    def _chain(self, job: Job, id: SnapshotId) -> tuple[Ancestor, ...]:
        """Ancestors of `id` in earlier lives."""
        snapshot = job.snapshots.get(id)
        if snapshot is not None and snapshot.manifest is not None:
            return snapshot.manifest.ancestors
        if job.record is None:
            return ()
        return tuple(past for past in job.record.ancestors if past.life < id.life)

    def _forget(self, job: Job, why: str, now: float) -> None:
        for node in self.nodes:
            self._send(node, Forget(job.name, why))
            for id in [id for id in self.nodes[node].holdings if id.job == job.name]:
                del self.nodes[node].holdings[id]
                self._inventory.remove(node, id)
        del self.jobs[job.name]
        if self.journal.rollback(job.name) is not None:
            self._note(Rollback(job.name, None), now)
        if job.life:
            self._forgotten[job.name] = job.life
        self._event(now, "job_forgotten", job.name, f"{job.name}: {why}; its memory is given back")

    # Small helpers.

    @property
    def _settled_at(self) -> float:
        """From then on, a node that has not been heard of is lost."""
        settle_s = self.settings.settle_s
        settled_at = self.started_at + (self.settings.lease_s if settle_s is None else settle_s)
        return max(settled_at, self._caught_up_at)

    def _job(self, name: str) -> Job:
        if name not in self.jobs:
            self.jobs[name] = Job(name, Pacer(every=1))
        return self.jobs[name]

    def _job_nodes(self, job: Job) -> set[str]:
        return {held.node for held in job.attachments.values()}

    def _holds_rank(self, id: SnapshotId, rank: int) -> bool:
        return rank in self._inventory.of(id).ranks

    def _send(self, node: str, message: CoordinatorMessage) -> None:
        known = self.nodes.get(node)
        if known is not None and known.live:
            self._out.append(Send(known.peer, message))

    def _event(
        self, now: float, kind: str, job: str, text: str, **fields: str | int | float
    ) -> None:
        event = Event(now, kind, job, text, fields)
        self.events.append(event)
        self.news.append(event)

    def _flush(self) -> list[Send]:
        out, self._out = self._out, []
        return out


def _is_newer(found: JobManifest | None, known: JobManifest | None) -> bool:
    """Whether a manifest that was reported says more than the one that is known."""
    return found is not None and (known is None or found.edition > known.edition)
