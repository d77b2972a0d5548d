"""The agent's snapshot lifecycle: which slot holds what, and what to do next. No IO, no clock.

`handle(event, now)` returns actions in the order in which the shell must carry them out (see
`ckptd.agent.events`). Times are monotonic seconds.
"""

import itertools

from ckptd.agent import events as ev
from ckptd.agent.room import Room
from ckptd.agent.state import Identity, Slot, Trainer, Use
from ckptd.errors import InternalError
from ckptd.ids import SnapshotId
from ckptd.journal import Journal
from ckptd.manifest import Extent, JobManifest, JobRecord
from ckptd.terms import KeptTerm, Obeyed, Term
from ckptd.wire import (
    Activate,
    AgentMessage,
    AgentToLauncher,
    AgentToTrainer,
    AskClock,
    AskEntries,
    AskResume,
    AskResumeFor,
    Attach,
    Attached,
    Beat,
    CaptureFailed,
    Collect,
    Commit,
    Detach,
    Detached,
    Dismiss,
    Drop,
    Entries,
    Fetching,
    Forget,
    Grant,
    Granted,
    Hasten,
    Hello,
    Here,
    Holding,
    Holds,
    KeepEntries,
    Kept,
    KillWorkers,
    LauncherWaiting,
    LayoutOpened,
    LifeResumed,
    LookAt,
    OpenLayout,
    Outcome,
    Outdated,
    Probe,
    Progress,
    Protect,
    RankLeft,
    RankReport,
    RankState,
    Rebuild,
    RebuildFailed,
    Recoding,
    Record,
    Rejected,
    Restore,
    Restored,
    Resumed,
    ResumeWaits,
    Revoked,
    SaveAll,
    Sealed,
    SegmentReady,
    SnapshotFailed,
    Source,
    TakeSnapshot,
    TellAll,
    Ticket,
    Undivide,
    WaitForWork,
    Waiting,
    Welcome,
    WhereAmI,
    WhoAreYou,
    Work,
)

PROGRESS_INTERVAL_S = 0.02
_WAITING_INTERVAL_S = 2.0
_PROBLEMS_KEPT = 20
_WAITS_KEPT = 64
_NO_LIFE = 0  # for which a segment is fetched that no trainer has asked for


class Lifecycle:
    """Slots, trainers and snapshots of one node."""

    def __init__(self, identity: Identity, adopted: ev.Adopted, now: float) -> None:
        self.identity = identity
        self.connected = False
        self.cell_bytes = 0
        self.beat_s = 0.5
        self.slots: dict[str, Slot] = {}
        self.trainers: dict[int, Trainer] = {}
        self._room = Room(self.slots, self.trainers)
        self.launchers: dict[int, str] = {}
        self.manifests: dict[SnapshotId, JobManifest] = {m.id: m for m in adopted.manifests}
        self._manifest_before: JobManifest | None = None
        """What the manifest that was to be stored last has replaced."""
        self.records: dict[str, JobRecord] = {r.job: r for r in adopted.records}
        self.grants: dict[str, Grant] = {}
        self.problems: list[str] = list(adopted.problems)
        self.dismissed = ""
        kept = adopted.term or KeptTerm(Term(), now)
        self.term = kept.term
        """The one that is obeyed."""
        # Monotonic time begins anew at boot: then the term is older than anything that runs.
        self._term_since = kept.since if kept.since <= now else float("-inf")
        self._term_before = (self.term, self._term_since)
        self._obeyed_at: float | None = None
        """When the last order came, if one came at all."""
        self._hello_due = False
        """An order came whose Welcome was lost: say Hello with the next heartbeat."""
        self.journal = Journal()
        """What this agent keeps of what the coordinators have said."""
        self.journal.merge(adopted.entries)
        self._stored = self.journal.summary
        """Of the journal when all of it was stored last."""
        self._beat_at = now
        self._waiting_at = now
        self._numbers = itertools.count(1)
        self._restoring: dict[str, set[int]] = {}
        """Slot name to the trainers that wait for its segment."""
        self._fetches: dict[str, int] = {}
        """Slot name to the life for which a Fetch into it, or a check of it, is under way."""
        self._fetching: dict[str, Fetching] = {}
        """Slot name to how far its Fetch has come."""
        self._recoding: dict[SnapshotId, Recoding] = {}
        """How far parity has come that is made anew."""
        self._scrubbed = (0, 0)
        """Cells that scrubbing has found damaged, and mended."""
        self._repaired = 0
        """Cells that were found damaged, and mended, when their segment was wanted."""
        self._damaged_from: dict[str, int] = {}
        """Damaged cells that came from each peer."""
        self._bad_messages = 0
        self._bereft: set[str] = set()
        """Jobs that have lost a trainer whose slots the next life will claim."""
        self._out: list[ev.Action] = []
        for name, sidecar in adopted.segments:
            self.slots[name] = Slot(
                name,
                sidecar.id.job,
                sidecar.size_bytes,
                Use.SEALED,
                id=sidecar.id,
                rank=sidecar.rank,
            )
        for name, size_bytes, parity in adopted.parities:
            self.slots[name] = Slot(
                name,
                parity.id.job,
                size_bytes,
                Use.PARITY,
                parity=True,
                id=parity.id,
                place=(parity.group, parity.member),
            )
        self._world_sizes = {s.id: s.world_size for _, s in adopted.segments}
        for _, sidecar in adopted.segments:
            self.cell_bytes = sidecar.cell_bytes

    # The two entries.

    def handle(self, event: ev.Event, now: float) -> list[ev.Action]:
        """Take in one event."""
        match event:
            case ev.Connected():
                self.connected = True
                self._hello(now)
            case ev.Disconnected():
                self.connected = False
            case ev.FromCoordinator():
                if self._obeys(event, now):
                    self._from_coordinator(event, now)
            case ev.TermNotKept():
                self.term, self._term_since = self._term_before
                self._problem(f"orders are not obeyed: the term cannot be stored: {event.reason}")
            case ev.EntriesKept():
                self._stored = self.journal.summary
                self._report(Kept(self._stored))
            case ev.ManifestNotKept():
                self._restore_manifest(event.id)
                self._encode_failed(ev.EncodeFailed(event.id, event.reason))
            case ev.FromLocal():
                self._from_local(event, now)
            case ev.LocalGone():
                self._local_gone(event, now)
            case ev.ProcessEnded():
                self._disown(event.conn)
            case ev.Allocated():
                self._allocated(event.name, now)
            case ev.AllocationFailed():
                self._allocation_failed(event)
            case ev.SegmentChecked():
                self._segment_checked(event, now)
            case ev.Released():
                self._released(event.name, now)
            case ev.Encoded():
                self._encoded(event.id)
            case ev.EncodeFailed():
                self._encode_failed(event)
            case ev.Trouble():
                self._problem(event.reason)
            case ev.Scrubbed():
                self._scrubbed = (event.damaged_cells, event.mended_cells)
                self._problem(event.text)
            case ev.RecodeMoved():
                self._recode_moved(event)
            case ev.Damaged():
                known = self._damaged_from.get(event.node, 0)
                self._damaged_from[event.node] = max(known, event.cells)
            case ev.BadMessages():
                self._bad_messages = event.count
            case ev.FetchMoved():
                self._fetch_moved(event)
            case ev.Fetched():
                self._fetched(event)
            case ev.FetchFailed():
                self._fetch_failed(event)
        return self._flush()

    def tick(self, now: float) -> list[ev.Action]:
        """Let time pass: heartbeats, and a word to those who wait."""
        if now >= self._beat_at:
            self._beat_at = now + self.beat_s
            if self.connected and self._hello_due:
                self._hello(now)
            elif self.connected:
                damaged, mended = self._scrubbed
                self._report(
                    Beat(
                        self.identity.node,
                        self.identity.incarnation,
                        self.used_bytes,
                        tuple(self.problems),
                        tuple(self._fetching.values()),
                        damaged + self._repaired,
                        mended + self._repaired,
                        tuple(self._recoding.values()),
                        self.spare_bytes,
                        dict(self._damaged_from),
                        self._bad_messages,
                    )
                )
        if now >= self._waiting_at:
            self._waiting_at = now + _WAITING_INTERVAL_S
            if not self.connected:
                self._tell_waiting()
        return self._flush()

    def next_deadline(self) -> float:
        """When `tick` must be called at the latest."""
        return min(self._beat_at, self._waiting_at)

    @property
    def used_bytes(self) -> int:
        """Memory in slot and parity files, in bytes; not in what was given up to make room."""
        return sum(
            slot.size_bytes
            for slot in self.slots.values()
            if not (slot.guest and slot.use is Use.RELEASING)
        )

    @property
    def spare_bytes(self) -> int:
        """How much more may be held for other nodes, in bytes."""
        free = self.identity.memory_limit_bytes - self.used_bytes
        if self.identity.spare_memory_bytes is not None:
            guests = sum(slot.size_bytes for slot in self.slots.values() if slot.guest)
            free = min(free, self.identity.spare_memory_bytes - guests)
        return max(0, free)

    def check_invariants(self) -> None:
        """Raise InternalError if what must always hold does not. Called by tests."""
        for slot in self.slots.values():
            holds = slot.use not in (Use.ALLOCATING, Use.FREE)
            if holds != (slot.id is not None):
                raise InternalError(f"{slot.name} is {slot.use.value} and holds {slot.id}")
            if slot.use is Use.CAPTURING and slot.owner is None:
                raise InternalError(f"{slot.name} is captured into by nobody")
        held = [(s.id, s.rank) for s in self.slots.values() if s.use is Use.SEALED and not s.doomed]
        if len(held) != len(set(held)):
            raise InternalError("two slots hold the same segment")

    # The coordinator's orders.

    def _obeys(self, event: ev.FromCoordinator, now: float) -> bool:
        """Whether this message counts: one of the term that is obeyed, or that begins a higher."""
        message = event.message
        if isinstance(message, WhoAreYou):
            return True
        if (event.term, event.coordinator) == (self.term.number, self.term.coordinator):
            self._obeyed_at = now
            return True
        if event.term <= self.term.number:
            self._problem(
                f"orders of term {event.term} are refused: the coordinator at "
                f"{self.term.address} has begun term {self.term.number}"
            )
            self._report(Outdated(self._obeyed(now)))
            return False
        if isinstance(message, Dismiss):
            return True  # instead of a Welcome: this agent will not be of that term
        if not isinstance(message, Welcome):
            self._hello_due = True
            return False
        self._term_before = (self.term, self._term_since)
        self.term = Term(event.term, event.coordinator, message.address, message.lease_s)
        self._term_since = self._obeyed_at = now
        self._do(ev.KeepTerm(KeptTerm(self.term, now)))
        return True

    def _obeyed(self, now: float) -> Obeyed:
        silent_s = None if self._obeyed_at is None else now - self._obeyed_at
        return Obeyed(self.term, now - self._term_since, silent_s)

    def _from_coordinator(self, event: ev.FromCoordinator, now: float) -> None:
        match event.message:
            case Welcome() as message:
                self.beat_s = message.beat_s
                if self.cell_bytes not in (0, message.cell_bytes):
                    self._problem(
                        f"the coordinator now has --cell-size {message.cell_bytes}, and what is "
                        f"here has {self.cell_bytes}: start it again with the old size"
                    )
                else:
                    self.cell_bytes = message.cell_bytes
                for trainer in self.trainers.values():
                    self._answer_attach(trainer)
                    self._repeat_ask(trainer)
            case WhoAreYou():
                self._hello(now)
            case AskEntries():
                self._report(Entries(self.journal.entries))
            case KeepEntries() as message:
                news = self.journal.merge(message.entries)
                if news:
                    self._do(ev.KeepEntries(tuple(news)))
                else:
                    self._report(Kept(self._stored))
            case Dismiss() as message:
                self.dismissed = message.reason
                self._problem(f"refused by the coordinator: {message.reason}")
            case Record() as message:
                self._keep(message.record)
            case Grant() as message:
                self._granted(message, now)
            case ResumeWaits() as message:
                self._resume_waits(message)
            case TakeSnapshot() as message:
                self._take(message.id)
            case Undivide() as message:
                for trainer in self.trainers.values():
                    if (trainer.job, trainer.life) == (message.job, message.life):
                        self._tell(trainer.conn, SaveAll(message.reason))
            case Protect() as message:
                self._protect(message)
            case Rebuild() as message:
                self._rebuild(message)
            case Commit() as message:
                self._do(ev.StopEncode(message.id))
                for id in message.retire:
                    self._free_snapshot(id)
            case Drop() as message:
                self._free_snapshot(message.id)
            case Forget() as message:
                self._forget(message.job)
            case TellAll() | LookAt() | Collect() | KillWorkers() as message:
                self._do(ev.Diagnose(message))
            case AskClock() | Probe() | Hasten() as message:
                self._do(ev.Diagnose(message))
            case Activate() as message:
                for conn, job in list(self.launchers.items()):
                    if job == message.job:
                        del self.launchers[conn]
                        self._tell(conn, Work(job))
                        break

    def _hello(self, now: float) -> None:
        self._hello_due = False
        held = {slot.id for slot in self.slots.values() if slot.id is not None}
        mine = self.identity
        self._report(
            Hello(
                node=mine.node,
                incarnation=mine.incarnation,
                memory_token=mine.memory_token,
                address=mine.address,
                cells=mine.cells,
                domain=mine.domain,
                spare=mine.spare,
                codec=mine.codec,
                engine=mine.engine,
                engine_reason=mine.engine_reason,
                memory_limit_bytes=mine.memory_limit_bytes,
                memory_used_bytes=self.used_bytes,
                holdings=tuple(
                    holding
                    for id in sorted(held)
                    if (holding := self._holding(id)).extents or holding.parity
                ),
                ranks=tuple(self._rank_state(t) for t in self.trainers.values() if t.answered),
                records=tuple(self.records.values()),
                launchers=tuple(self.launchers.values()),
                problems=tuple(self.problems),
                spare_bytes=self.spare_bytes,
                obeyed=self._obeyed(now),
                log=self._stored,
                capturing=tuple(
                    (slot.id, slot.rank)
                    for slot in self.slots.values()
                    if slot.use in (Use.CAPTURING, Use.CHECKING) and slot.id is not None
                ),
            )
        )

    def _keep(self, record: JobRecord) -> None:
        if record.is_later(self.records.get(record.job)):
            self.records[record.job] = record
            self._do(ev.KeepRecord(record))
            self._trim(record.job)

    def _granted(self, grant: Grant, now: float) -> None:
        self._keep(grant.record)
        self.grants[grant.job] = grant
        if grant.source is not None and grant.source.manifest is not None:
            self._keep_manifest(grant.source.manifest)
        for trainer in list(self.trainers.values()):
            if trainer.job != grant.job:
                continue
            if trainer.round != grant.round:
                if 0 < trainer.life < grant.life:
                    reason = (
                        f"job {grant.job!r} was started again: life {grant.life} runs, and life "
                        f"{trainer.life}, which is this process's, gets no more snapshots"
                    )
                    self._tell(trainer.conn, Rejected("Refused", reason))
                continue
            if trainer.life != grant.life:
                trainer.life, trainer.seen_step = grant.life, 0
            if trainer.ask is not None and grant.id not in trainer.ask.rejected:
                # Else it is the answer to an older question, said again.
                trainer.ask = None
                self._tell(trainer.conn, Granted(grant.life, grant.id, grant.reason))
            waits, trainer.waits = trainer.waits, []
            for request in waits:
                self._of_life(trainer, request, now)

    def _resume_waits(self, message: ResumeWaits) -> None:
        for trainer in self.trainers.values():
            if trainer.job == message.job and trainer.round == message.round and trainer.ask:
                if message.final:
                    trainer.ask = None
                    self._tell(trainer.conn, Rejected("ResumeImpossible", message.reason))
                else:
                    self._tell(trainer.conn, Waiting(message.reason))

    def _take(self, id: SnapshotId) -> None:
        """A ticket: give each trainer of the life a free slot for it."""
        for trainer in self.trainers.values():
            if trainer.job != id.job or trainer.life != id.life or id.step <= trainer.seen_step:
                continue
            trainer.seen_step = id.step
            slot = next(iter(self._free_slots(trainer)), None)
            if slot is None:
                self._fail(id, "dropped", f"rank {trainer.rank} has no free slot")
                continue
            slot.move(Use.CAPTURING)
            slot.id, slot.rank = id, trainer.rank
            self._world_sizes[id] = trainer.world_size
            self._tell(trainer.conn, Ticket(id, self._path(slot.name)))

    def _protect(self, message: Protect) -> None:
        manifest = message.manifest
        place = manifest.place_of(self.identity.node)
        if place is None or not manifest.groups[place[0]].parity_shards:
            return
        id = manifest.id
        known = self.manifests.get(id)
        if known is not None and known.edition > manifest.edition:
            self._report(Holds(self._holding(id)))  # so that the coordinator learns of it
            return
        extents = manifest.groups[place[0]].members[place[1]].extents
        if not message.ranks and not set(extents) <= set(self._extents(id)):
            self._fail(id, "dropped", f"{self.identity.node} no longer holds its segments")
            return
        self._keep_manifest(manifest)
        mine = next(
            (
                s
                for s in self.slots.values()
                if s.parity and s.id == id and s.use in (Use.ENCODING, Use.PARITY)
            ),
            None,
        )
        if mine is not None and mine.use is Use.PARITY:
            self._report(Holds(self._holding(id)))
            self._do(
                ev.Encode(manifest, message.cells, mine.name, mine.size_bytes, serve_only=True)
            )
            return
        if mine is not None and mine.doomed:
            return
        size_bytes = parity_cells(manifest, *place) * manifest.cell_bytes
        if mine is None:
            mine = self._parity_slot(id, size_bytes)
            if mine is None:
                return
            mine.place = place
        self._do(
            ev.Encode(manifest, message.cells, mine.name, mine.size_bytes, ranks=message.ranks)
        )

    def _parity_slot(self, id: SnapshotId, size_bytes: int) -> Slot | None:
        """A parity file for `id`: a free one of the job of that size, or a new one."""
        for slot in list(self.slots.values()):
            if slot.parity and slot.job == id.job and slot.use is Use.FREE:
                if slot.size_bytes == size_bytes:
                    slot.move(Use.ENCODING)
                    slot.id = id
                    return slot
                self._delete(slot)
        self._make_room(size_bytes)
        if self.used_bytes + size_bytes > self.identity.memory_limit_bytes:
            self._fail(id, "dropped", self._too_small(size_bytes, "for parity"))
            return None
        slot = Slot(
            self._new_name(id.job, "parity"), id.job, size_bytes, Use.ENCODING, parity=True, id=id
        )
        self.slots[slot.name] = slot
        return slot

    def _free_snapshot(self, id: SnapshotId) -> None:
        """Free all that is held of `id`, as soon as what is under way with it allows."""
        self._do(ev.StopEncode(id))
        for slot in list(self.slots.values()):
            if slot.id != id:
                continue
            match slot.use:
                case Use.CAPTURING:
                    slot.move(Use.REVOKED)
                    if slot.owner is not None:
                        self._tell(slot.owner, Revoked(id))
                case Use.SEALED | Use.PARITY if slot.name not in self._fetches:
                    self._release(slot)
                case Use.SEALED | Use.ENCODING | Use.CHECKING | Use.FETCHING:
                    slot.doomed = True
                case _:
                    pass
        if self.manifests.pop(id, None) is not None:
            self._do(ev.ForgetManifests(id))
        self._forget_size(id)
        self._report(Holds(Holding(id, 0)))

    def _forget(self, job: str) -> None:
        ids = {slot.id for slot in self.slots.values() if slot.job == job and slot.id is not None}
        for id in sorted(ids | {id for id in self.manifests if id.job == job}):
            self._free_snapshot(id)
        self.records.pop(job, None)
        self.grants.pop(job, None)
        self._bereft.discard(job)
        self._do(ev.ForgetJob(job))
        self._trim(job)

    # Trainers and launchers.

    def _from_local(self, event: ev.FromLocal, now: float) -> None:
        conn, message = event.conn, event.message
        match message:
            case WaitForWork():
                self.launchers[conn] = message.job
                self._report(LauncherWaiting(message.job, True))
                return
            case WhereAmI():
                self._tell(conn, Here(self.identity.node, self.identity.address))
                return
            case Attach():
                self._attach(conn, message)
                return
            case _:
                pass
        trainer = self.trainers.get(conn)
        if trainer is None:
            self._tell(conn, Rejected("ProtocolError", "the first message must be Attach"))
            return
        match message:
            case AskResume():
                trainer.ask = message
                self._repeat_ask(trainer)
            case Restore() | OpenLayout() | Resumed():
                self._of_life(trainer, message, now)
            case Progress():
                trainer.step = message.step
                if now - trainer.reported_at >= PROGRESS_INTERVAL_S:
                    self._report_rank(trainer, now)
            case Sealed():
                self._capture_ended(trainer, message.id, None, "", now)
            case CaptureFailed():
                self._capture_ended(trainer, message.id, message.outcome, message.reason, now)
            case Detach():
                self._tell(conn, Detached())
                self._leave(trainer, "detached", message.finished)
                self._disown(conn)
            case _:
                pass

    def _attach(self, conn: int, message: Attach) -> None:
        trainer = Trainer(
            conn,
            message.job,
            message.round,
            message.rank,
            message.world_size,
            message.every,
            message.slots,
            message.keep,
            message.elastic,
        )
        record = self.records.get(message.job)
        if record is not None and 0 < message.life < record.life:
            self._tell(
                conn,
                Rejected(
                    "Refused", f"life {message.life} of {message.job} is over: {record.life} runs"
                ),
            )
            return
        trainer.life = message.life
        self.trainers[conn] = trainer
        self._answer_attach(trainer)

    def _answer_attach(self, trainer: Trainer) -> None:
        if trainer.answered or not self.cell_bytes:
            return
        trainer.answered = True
        self._tell(trainer.conn, Attached(self.identity.node, self.cell_bytes))
        self._report(RankReport(self._rank_state(trainer)))

    def _repeat_ask(self, trainer: Trainer) -> None:
        if trainer.ask is not None and trainer.answered:
            ask, term = trainer.ask, self.term.number
            self._report(AskResumeFor(trainer.job, trainer.round, ask.rejected, term))

    def _tell_waiting(self) -> None:
        for trainer in self.trainers.values():
            if not trainer.answered or trainer.ask is not None:
                self._tell(
                    trainer.conn,
                    Waiting(
                        f"the agent of {self.identity.node} reaches no coordinator at "
                        f"{self.identity.coordinator}"
                    ),
                )

    def _of_life(
        self, trainer: Trainer, message: Restore | OpenLayout | Resumed, now: float
    ) -> None:
        grant = self.grants.get(trainer.job)
        unknown = grant is None or grant.life < message.life  # this agent was restarted meanwhile
        if message.life > trainer.life or (unknown and isinstance(message, Restore)):
            trainer.waits = [*trainer.waits, message][-_WAITS_KEPT:]
            return
        if message.life < trainer.life:
            self._tell(trainer.conn, Rejected("Refused", f"life {message.life} is over"))
            return
        match message:
            case Restore():
                self._restore(trainer, message)
            case OpenLayout():
                self._open_layout(trainer, message, now)
            case Resumed():
                self._report(LifeResumed(trainer.job, message.life, message.step))

    def _restore(self, trainer: Trainer, message: Restore) -> None:
        grant = self.grants.get(trainer.job)
        if grant is None or grant.source is None or grant.id != message.id:
            self._tell(trainer.conn, Rejected("Refused", f"{message.id} was not granted"))
            return
        source = grant.source
        slot = self._slot_of(message.id, message.rank)
        present = slot is not None
        if slot is None:
            size_bytes = source.sizes.get(message.rank)
            if size_bytes is None:
                self._tell(
                    trainer.conn,
                    Rejected("StateMismatch", f"{message.id} has no rank {message.rank}"),
                )
                return
            self._make_room(size_bytes)
            room_bytes = self.identity.memory_limit_bytes - self.used_bytes
            slot = self._slot_to_fetch_into(trainer.job, size_bytes, room_bytes)
            if slot is None:
                reason = self._too_small(size_bytes, f"to fetch rank {message.rank}'s segment")
                self._tell(trainer.conn, Rejected("MemoryTooSmall", reason))
                return
        waiting = self._restoring.setdefault(slot.name, set())
        waiting.add(trainer.conn)
        if present and (slot.name in self._fetches or slot.use is not Use.SEALED):
            return  # under way, for another rank or for a life that is over
        self._fetch(slot, message.id, message.rank, source, trainer.life)

    def _rebuild(self, message: Rebuild) -> None:
        """Hold a lost node's segment in spare memory, for whoever will need it."""
        slot = self._slot_of(message.id, message.rank)
        if slot is not None:
            if slot.use is Use.SEALED:
                self._report(Holds(self._holding(message.id)))
            return
        size_bytes = message.source.sizes.get(message.rank, 0)
        slot = self._slot_to_fetch_into(message.id.job, size_bytes, self.spare_bytes)
        if slot is None:
            reason = (
                f"{self.identity.node} has {self.spare_bytes} spare bytes and rank {message.rank} "
                f"needs {size_bytes}"
            )
            self._report(RebuildFailed(message.id, message.rank, reason))
            return
        slot.guest = True
        if message.source.manifest is not None:
            self._keep_manifest(message.source.manifest)
        self._fetch(slot, message.id, message.rank, message.source, _NO_LIFE)

    def _fetch(self, slot: Slot, id: SnapshotId, rank: int, source: Source, life: int) -> None:
        """Bring a segment into a free slot, or check the one that is there."""
        present = slot.use is not Use.FREE
        if not present:
            slot.id, slot.rank = id, rank
            slot.move(Use.FETCHING)
        self._fetches[slot.name] = life
        world_size = source.manifest.world_size if source.manifest else len(source.sizes)
        self._world_sizes.setdefault(id, world_size)
        self._do(ev.Fetch(slot.name, slot.size_bytes, id, rank, source, present))

    def _make_room(self, size_bytes: int) -> None:
        """Give up lost nodes' segments that are in the way: they can be rebuilt once more."""
        for slot in list(self.slots.values()):
            if self.used_bytes + size_bytes <= self.identity.memory_limit_bytes:
                return
            if slot.guest and slot.use is Use.SEALED and slot.name not in self._fetches:
                self._release(slot)
                if slot.id is not None:
                    self._report(Holds(self._holding(slot.id)))

    def _slot_of(self, id: SnapshotId, rank: int) -> Slot | None:
        """The slot that has the segment, or will have it."""
        for slot in self.slots.values():
            coming = slot.use in (Use.CHECKING, Use.SEALED, Use.FETCHING)
            if (slot.id, slot.rank) == (id, rank) and coming and not slot.doomed:
                return slot
        return None

    def _slot_to_fetch_into(self, job: str, size_bytes: int, room_bytes: int) -> Slot | None:
        """A free slot that is nobody's, or a new one, if there is room for it."""
        for slot in self.slots.values():
            if (
                not slot.parity
                and slot.job == job
                and slot.use is Use.FREE
                and slot.owner is None
                and slot.size_bytes == size_bytes
            ):
                return slot
        if size_bytes > room_bytes:
            return None
        slot = Slot(self._new_name(job, "segment"), job, size_bytes, Use.FREE)
        self.slots[slot.name] = slot
        return slot

    def _open_layout(self, trainer: Trainer, message: OpenLayout, now: float) -> None:
        """Own at least one free slot now, and `slots` in all, counting those freed later."""
        trainer.segment_bytes, trainer.shares = message.size_bytes, message.shares
        trainer.opening = True
        self._claim(trainer)
        new = self._room.slots_to_add(trainer)
        grant = self.grants.get(trainer.job)
        reserve = self._room.parity_reserve(trainer.job, grant, self.cell_bytes)
        needed = new * message.size_bytes + reserve
        limit = self.identity.memory_limit_bytes
        self._make_room(needed)
        if self.used_bytes + needed > limit and self._room.slots_lacking(trainer, False) <= 0 < new:
            # All its slots hold snapshots. Tickets come when the first of them is retired.
            needed -= new * message.size_bytes
            new = 0
        refusal = self._room.over_quota(trainer, grant, self.cell_bytes, self.identity.node)
        if not refusal and self.used_bytes + needed > limit:
            generations = self._room.generations(trainer.job)
            what = (
                f"for {new} slots of {message.size_bytes} bytes and {generations} generations of "
                "parity"
            )
            refusal = self._too_small(needed, what)
            if generations > 2:
                refusal += f", or keep fewer snapshots than Checkpointer(keep={generations - 1})"
        if refusal:
            trainer.opening = False
            trainer.segment_bytes = 0
            self._problem(f"{trainer.job}: {refusal}")
            self._tell(trainer.conn, Rejected("MemoryTooSmall", refusal))
            return
        for _ in range(new):
            name = self._new_name(trainer.job, "segment")
            self.slots[name] = Slot(
                name, trainer.job, message.size_bytes, Use.ALLOCATING, owner=trainer.conn
            )
            self._do(ev.Allocate(name, message.size_bytes))
        self._layout_ready(trainer, now)

    def _claim(self, trainer: Trainer) -> None:
        """Take over fitting free slots whose trainer is dead; delete those that do not fit."""
        for slot in list(self.slots.values()):
            if slot.parity or slot.job != trainer.job or slot.use is not Use.FREE:
                continue
            if slot.owner == trainer.conn and slot.size_bytes != trainer.segment_bytes:
                self._delete(slot)
            elif (
                slot.owner is None
                and slot.size_bytes == trainer.segment_bytes
                and len(self._room.owned(trainer)) < trainer.slots
            ):
                slot.owner = trainer.conn

    def _layout_ready(self, trainer: Trainer, now: float) -> None:
        if trainer.opening and all(s.use is not Use.ALLOCATING for s in self._room.owned(trainer)):
            trainer.opening = False
            paths = tuple(self._path(slot.name) for slot in self._free_slots(trainer))
            self._tell(trainer.conn, LayoutOpened(trainer.segment_bytes, paths))
            self._report_rank(trainer, now)
            if all(t.segment_bytes for t in self._of_last_life(trainer.job)):
                self._bereft.discard(trainer.job)
            self._trim(trainer.job)

    def _capture_ended(
        self, trainer: Trainer, id: SnapshotId, outcome: Outcome | None, reason: str, now: float
    ) -> None:
        slot = next(
            (s for s in self.slots.values() if s.owner == trainer.conn and s.id == id), None
        )
        if slot is None or slot.use not in (Use.CAPTURING, Use.REVOKED):
            return
        trainer.step = max(trainer.step, id.step if outcome is None else 0)
        if slot.use is Use.REVOKED:
            self._release(slot)
        elif outcome is None:
            self._check(slot)
        else:
            self._release(slot)
            self._fail(id, outcome, f"rank {trainer.rank}: {reason}")

    def _local_gone(self, event: ev.LocalGone, now: float) -> None:
        job = self.launchers.pop(event.conn, None)
        if job is not None:
            self._report(LauncherWaiting(job, False))
        trainer = self.trainers.get(event.conn)
        if trainer is not None:
            self._leave(trainer, event.reason, False)
        if event.dead:
            self._disown(event.conn)

    def _leave(self, trainer: Trainer, reason: str, finished: bool) -> None:
        """A trainer is gone, though its process may still live (stopped, for one)."""
        del self.trainers[trainer.conn]
        record = self.records.get(trainer.job)
        if trainer.segment_bytes and (record is None or trainer.life >= record.life):
            self._bereft.add(trainer.job)  # an old life leaves nothing that another waits for
        self._report(
            RankLeft(trainer.job, trainer.round, trainer.life, trainer.rank, reason, finished)
        )

    def _disown(self, conn: int) -> None:
        """A process can write no more. What it had sealed stays; what it was writing is checked."""
        for slot in list(self.slots.values()):
            if slot.owner != conn:
                continue
            slot.owner = None
            match slot.use:
                case Use.CAPTURING:
                    self._check(slot)
                case Use.REVOKED:
                    self._release(slot)
                case Use.ALLOCATING:
                    slot.doomed = True
                case _:
                    pass
            self._trim(slot.job)

    # Results of what the shell did.

    def _allocated(self, name: str, now: float) -> None:
        slot = self.slots[name]
        slot.move(Use.FREE)
        slot.doomed = False
        trainer = self.trainers.get(slot.owner) if slot.owner is not None else None
        if trainer is not None:
            self._layout_ready(trainer, now)
        self._trim(slot.job)

    def _allocation_failed(self, event: ev.AllocationFailed) -> None:
        slot = self.slots.pop(event.name)
        self._problem(f"{event.name}: {event.reason}")
        trainer = self.trainers.get(slot.owner) if slot.owner is not None else None
        if trainer is not None and trainer.opening:
            trainer.opening = False
            self._tell(trainer.conn, Rejected("MemoryTooSmall", event.reason))

    def _segment_checked(self, event: ev.SegmentChecked, now: float) -> None:
        slot = self.slots[event.name]
        id = slot.id
        if event.sidecar is None or slot.doomed or id is None:
            if event.sidecar is None and id is not None:
                self._fail(id, "torn", f"rank {slot.rank}: {event.reason}")
            self._release(slot)
            return
        slot.move(Use.SEALED)
        self._report(Holds(self._holding(id)))
        owner = self.trainers.get(slot.owner) if slot.owner is not None else None
        if owner is not None:
            self._report_rank(owner, now)
        self._restore_again(slot.name, id, slot.rank)

    def _released(self, name: str, now: float) -> None:
        slot = self.slots[name]
        id, rank = slot.id, slot.rank
        slot.move(Use.FREE)
        slot.id, slot.rank, slot.place, slot.doomed = None, -1, None, False
        guest, slot.guest = slot.guest, False
        if slot.broken:
            self._delete(slot)
        elif not slot.parity:
            self._reuse(slot, now)
            if guest and slot.owner is None and name in self.slots:
                self._delete(slot)  # nobody here has a use for it
        self._trim(slot.job)
        if id is not None:
            self._forget_size(id)
            self._restore_again(name, id, rank)

    def _restore_again(self, name: str, id: SnapshotId, rank: int) -> None:
        """Somebody may wait for what was to be in the slot `name`: now it is there, or never."""
        for trainer in self._waiting_for(name):
            self._restore(trainer, Restore(trainer.life, id, rank))

    def _waiting_for(self, name: str) -> list[Trainer]:
        """Those who wait for the segment in this slot, and do so no longer."""
        conns = sorted(self._restoring.pop(name, ()))
        return [self.trainers[conn] for conn in conns if conn in self.trainers]

    def _reuse(self, slot: Slot, now: float) -> None:
        """A segment's slot is free: it goes to a trainer that lacks one, or is given back."""
        if slot.owner is None:
            for trainer in self.trainers.values():
                if trainer.job == slot.job and trainer.segment_bytes == slot.size_bytes:
                    self._claim(trainer)
        trainer_ = self.trainers.get(slot.owner) if slot.owner is not None else None
        if trainer_ is not None:
            surplus = len(self._room.owned(trainer_)) - trainer_.slots
            if surplus > 0 or slot.size_bytes != trainer_.segment_bytes:
                self._delete(slot)
            self._report_rank(trainer_, now)

    def _recode_moved(self, event: ev.RecodeMoved) -> None:
        slot = self._encoding(event.id)
        if slot is not None and not slot.doomed:
            self._recoding[event.id] = Recoding(
                event.id, slot.size_bytes, event.cells, event.done, event.for_s
            )

    def _encoded(self, id: SnapshotId) -> None:
        self._recoding.pop(id, None)
        slot = self._encoding(id)
        if slot is None:
            return
        if slot.doomed:
            self._release(slot)
            return
        slot.move(Use.PARITY)
        self._report(Holds(self._holding(id)))

    def _encoding(self, id: SnapshotId) -> Slot | None:
        slots = self.slots.values()
        return next((s for s in slots if s.id == id and s.use is Use.ENCODING), None)

    def _encode_failed(self, event: ev.EncodeFailed) -> None:
        self._recoding.pop(event.id, None)
        slot = self._encoding(event.id)
        if slot is None:
            return
        self._do(ev.StopEncode(event.id))  # so that another try begins anew
        self._release(slot)
        if event.reason:
            self._problem(f"{event.id} cannot be protected: {event.reason}")
            self._fail(event.id, "dropped", event.reason, event.damaged)

    def _fetch_moved(self, event: ev.FetchMoved) -> None:
        slot = self.slots.get(event.name)
        if slot is not None and slot.id is not None and event.name in self._fetches:
            self._fetching[event.name] = Fetching(
                slot.id, slot.rank, slot.size_bytes, event.cells, event.done, event.for_s
            )

    def _fetched(self, event: ev.Fetched) -> None:
        slot = self.slots[event.name]
        del self._fetches[event.name]
        self._fetching.pop(event.name, None)
        waiting = self._waiting_for(event.name)
        id = slot.id
        if slot.use is Use.SEALED:  # it was here, and was looked at
            self._repaired += event.fetched_cells + event.rebuilt_cells
        if slot.doomed:
            self._release(slot)
        elif slot.use is Use.FETCHING:
            slot.move(Use.SEALED)
        if slot.use is not Use.SEALED or id is None:
            for trainer in waiting:
                self._tell(trainer.conn, Rejected("Gone", "the snapshot was dropped meanwhile"))
            return
        self._report(Holds(self._holding(id)))
        if waiting:
            self._report(
                SegmentReady(
                    id.job,
                    waiting[0].life,
                    slot.rank,
                    id,
                    event.fetched_cells,
                    event.rebuilt_cells,
                )
            )
        for trainer in waiting:
            self._tell(trainer.conn, Restored(id, slot.rank, self._path(slot.name)))

    def _fetch_failed(self, event: ev.FetchFailed) -> None:
        slot = self.slots[event.name]
        life = self._fetches.pop(event.name)
        self._fetching.pop(event.name, None)
        if not slot.doomed:  # else nobody is to blame that its cells are gone
            self._problem(f"{slot.id}, rank {slot.rank}: {event.reason}")
        if life == _NO_LIFE and slot.id is not None:
            self._report(RebuildFailed(slot.id, slot.rank, event.reason))
        for trainer in self._waiting_for(event.name):
            if trainer.life == life or slot.doomed:
                self._tell(trainer.conn, Rejected(event.kind, event.reason))
            else:
                # One that came later is not told: its own grant may know of better places.
                self._restoring.setdefault(event.name, set()).add(trainer.conn)
        if slot.use is Use.FETCHING or slot.doomed:
            slot.broken = slot.use is Use.FETCHING
            self._release(slot)
        # Else it was here before, and stays: what could not be repaired now may be later.
        if slot.id is not None:
            self._report(Holds(self._holding(slot.id)))

    # Small helpers.

    def _free_slots(self, trainer: Trainer) -> list[Slot]:
        return [s for s in self._room.owned(trainer) if s.use is Use.FREE]

    def _rank_state(self, trainer: Trainer) -> RankState:
        return RankState(
            job=trainer.job,
            round=trainer.round,
            life=trainer.life,
            rank=trainer.rank,
            world_size=trainer.world_size,
            every=trainer.every,
            free_slots=0 if trainer.opening else len(self._free_slots(trainer)),
            seen_step=trainer.seen_step,
            step=trainer.step,
            shares=trainer.shares,
            keep=trainer.keep,
            elastic=trainer.elastic,
        )

    def _report_rank(self, trainer: Trainer, now: float) -> None:
        trainer.reported_at = now
        self._report(RankReport(self._rank_state(trainer)))

    def _extents(self, id: SnapshotId) -> tuple[Extent, ...]:
        return tuple(
            sorted(
                Extent(slot.rank, slot.size_bytes)
                for slot in self.slots.values()
                if slot.id == id and slot.use is Use.SEALED and not slot.doomed
            )
        )

    def _holding(self, id: SnapshotId) -> Holding:
        slots = self.slots.values()
        parity = next((s for s in slots if s.id == id and s.use is Use.PARITY), None)
        return Holding(
            id=id,
            world_size=self._world_sizes.get(id, 0),
            extents=self._extents(id),
            parity=parity is not None,
            manifest=self.manifests.get(id),
            place=parity.place if parity is not None else None,
        )

    def _keep_manifest(self, manifest: JobManifest) -> None:
        known = self.manifests.get(manifest.id)
        if known is None or (known != manifest and known.edition <= manifest.edition):
            self._manifest_before = known
            self.manifests[manifest.id] = manifest
            self._world_sizes[manifest.id] = manifest.world_size
            self._do(ev.KeepManifest(manifest))

    def _restore_manifest(self, id: SnapshotId) -> None:
        """The newest edition could not be stored: the one before, if any, is still there."""
        before, self._manifest_before = self._manifest_before, None
        if before is not None and before.id == id:
            self.manifests[id] = before
        else:
            self.manifests.pop(id, None)

    def _forget_size(self, id: SnapshotId) -> None:
        """Its world size is of no use without anything of it."""
        if id not in self.manifests and all(slot.id != id for slot in self.slots.values()):
            self._world_sizes.pop(id, None)

    def _release(self, slot: Slot) -> None:
        slot.move(Use.RELEASING)
        self._do(ev.Release(slot.name))

    def _check(self, slot: Slot) -> None:
        """Look whether what the trainer left in the slot was sealed."""
        if slot.id is None:
            raise InternalError(f"{slot.name} holds nothing to look at")
        slot.move(Use.CHECKING)
        self._do(ev.CheckSegment(slot.name, slot.id, slot.rank))

    def _delete(self, slot: Slot) -> None:
        del self.slots[slot.name]
        self._do(ev.Delete(slot.name))

    def _trim(self, job: str) -> None:
        """Give back what no trainer and no snapshot needs."""
        trainers = self._of_last_life(job)
        # A node that the job has left, or never had, keeps only what snapshots need.
        record = self.records.get(job)
        here = record is not None and (bool(trainers) or self.identity.node in record.nodes)
        # Trainers that have not opened a layout yet will claim what their forerunners left.
        kept = here and (
            job in self._bereft or not trainers or not all(t.segment_bytes for t in trainers)
        )
        for slot in list(self.slots.values()):
            needed = kept or (slot.parity and here)
            if slot.job == job and slot.use is Use.FREE and slot.owner is None and not needed:
                self._delete(slot)

    def _of_last_life(self, job: str) -> list[Trainer]:
        """Its trainers here, but for processes of older lives that are not dead yet."""
        trainers = [t for t in self.trainers.values() if t.job == job]
        life = max((t.life for t in trainers), default=0)
        return [t for t in trainers if t.life == life]

    def _new_name(self, job: str, kind: str) -> str:
        suffix = ".safetensors" if kind == "segment" else ".cells"
        while True:
            name = f"{job}/{kind}-{next(self._numbers)}{suffix}"
            if name not in self.slots:
                return name

    def _path(self, name: str) -> str:
        return f"{self.identity.memory_dir}/{name}"

    def _too_small(self, needed: int, what: str) -> str:
        return (
            f"node {self.identity.node} needs {needed} more bytes {what}; {self.used_bytes} bytes "
            f"are in use and the limit is {self.identity.memory_limit_bytes}; start its agent with "
            f"--memory-limit {self.used_bytes + needed} or more (the embedded one, after `ckptd "
            f"stop`, with CKPTD_MEMORY_LIMIT={self.used_bytes + needed})"
        )

    def _problem(self, text: str) -> None:
        if text in self.problems:
            self.problems.remove(text)
        self.problems = [*self.problems, text][-_PROBLEMS_KEPT:]

    def _fail(self, id: SnapshotId, outcome: Outcome, reason: str, damaged: bool = False) -> None:
        self._report(SnapshotFailed(id, outcome, reason, damaged))

    def _report(self, message: AgentMessage) -> None:
        self._out.append(ev.Report(message))

    def _tell(self, conn: int, message: AgentToTrainer | AgentToLauncher) -> None:
        self._out.append(ev.Tell(conn, message))

    def _do(self, action: ev.Action) -> None:
        self._out.append(action)

    def _flush(self) -> list[ev.Action]:
        out, self._out = self._out, []
        return out


def parity_cells(manifest: JobManifest, group: int, member: int) -> int:
    """How many parity cells a member keeps of a snapshot."""
    if not manifest.groups[group].parity_shards:
        return 0
    return len(manifest.stripe_map(group).parity_of(member))
