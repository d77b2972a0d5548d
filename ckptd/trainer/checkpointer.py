"""The two lines that a training script needs."""

import logging
import mmap
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Literal

import msgspec
import torch
import torch.distributed as dist

from ckptd import errors
from ckptd.config import trainer_config, watch_config
from ckptd.errors import CaptureFailure, CkptdError, ConfigError, CorruptData, StateMismatch
from ckptd.ids import SnapshotId
from ckptd.segment import Sidecar, parse_header, read_checked_record, sidecar_path
from ckptd.trainer import embedded, timing, worker_server
from ckptd.trainer.agreement import Agreement
from ckptd.trainer.capture import Capture, CaptureStats, LayoutChanged
from ckptd.trainer.client import AgentClient
from ckptd.trainer.loading import OpenSegment, SavedState, check_fits, load
from ckptd.trainer.objects import load_objects
from ckptd.trainer.state import LiveState, Stateful
from ckptd.watching import Paused
from ckptd.wire import SLOTS_LIMIT, Attach, OpenLayout, Outcome, Resumed, Ticket

_PAUSE_TEXT_MAX = 200

log = logging.getLogger("ckptd")


class _Decision(msgspec.Struct):
    """What rank 0 tells the others at resume."""

    life: int = 0
    id: SnapshotId | None = None
    reason: str = ""
    error: str = ""
    message: str = ""


class Checkpointer:
    """Snapshots of one rank's training state, and the way back from them.

    ::

        ckpt = ckptd.Checkpointer(model=model, optimizer=optimizer, extra={"data": loader})
        start = ckpt.resume()
        for step in range(start, steps):
            ...
            optimizer.step()
            ckpt.step(step + 1)
        ckpt.close(finished=True)

    Create it after `torch.distributed` is initialised, with the model in the form in which it is
    trained. It captures the model's parameters and persistent buffers, the optimizer's state and
    hyperparameters, the objects in `extra`, and the random number states of Python, NumPy and
    torch.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer],
        extra: Mapping[str, Stateful] | None = None,
        every: int = 1,
        job: str | None = None,
        agent: str | None = None,
        keep: int | None = None,
        slots: int | None = None,
        replicas: Literal["once", "all"] = "once",
        replicated_over: "Sequence[int] | dist.ProcessGroup | None" = None,
        audit_every: int = 100,
        rate_bytes_per_s: float | None = None,
        strict: bool = False,
        resume_timeout_s: float = 600.0,
    ) -> None:
        """Connects to nothing yet.

        `optimizer`: one, or several by name. `extra`: objects with `state_dict()` and
        `load_state_dict()`, such as schedulers and data loaders. `every`: at least so many steps
        between snapshots. `job`: the job's id, the same after every restart (or `CKPTD_JOB`).
        `agent`: the Unix socket of this node's agent (or `CKPTD_AGENT`); without one, an agent
        for this machine is started, or found again, by `resume()`. `keep`: so many
        protected snapshots are kept (or `CKPTD_KEEP`; 1 by default), so that `ckptd rollback` can
        go back to an older one, past a loss spike, say; each costs one more copy of the state and
        of its parity in memory, and all ranks must say the same. `slots`: places for segments, at
        least and by default `keep + 1`; one more lets capture and protection overlap, for one more
        copy of the state in memory.

        `replicas`: with "once", what several ranks hold alike (under DDP, or with a Replicate
        dimension of a DTensor) is divided among them: each copies and keeps its part only, and
        `resume()` needs the segments of all. With "all", each rank keeps all of it: as many times
        the copies and the memory, but `resume()` needs no other rank's segment. `replicated_over`:
        the ranks, or the process group, over which plain tensors are the same where no wrapper
        says so.

        `audit_every`: the first three captures of a layout, and then each so many-th, compare
        every byte with the copy at the next gate, to find writes to captured tensors that pass
        neither an optimizer nor `gate()`; the others compare samples: 64 bytes of each MiB, at most
        16 times a tensor. A write to the share *f* of a tensor, in one run, is missed by *n*
        samples with the probability (1 - f)^n: eight rows of a large embedding nearly always, a
        change to all of it never. 0: no full comparison after the first three.

        `rate_bytes_per_s`: copy at most so fast in the background; what the gate waits for is
        copied at full speed. `strict`: a capture that fails raises CaptureFailure in the next
        `step()`, instead of costing a snapshot. `resume_timeout_s`: how long `resume()` waits for
        the cluster before it raises.

        Raises ConfigError for an argument, a job id or an agent that is missing or unusable, and
        UnsavableState for an `extra` object without the two methods.
        """
        if every < 1:
            raise ConfigError(f"every={every}: snapshots at least 1 step apart")
        if replicas not in ("once", "all"):
            raise ConfigError(f'replicas={replicas!r}: "once" or "all"')
        if audit_every < 0:
            raise ConfigError(f"audit_every={audit_every}: captures, or 0 for never")
        if rate_bytes_per_s is not None and not rate_bytes_per_s > 0:
            raise ConfigError(f"rate_bytes_per_s={rate_bytes_per_s}: more than 0, or None")
        self._config = trainer_config(job, agent, keep=keep)
        least = self._config.keep + 1
        self._slots = least if slots is None else slots
        if not least <= self._slots <= SLOTS_LIMIT:
            raise ConfigError(
                f"slots={slots}: keep={least - 1} hold a snapshot each, and one takes the next: "
                f"{least} or more, and at most {SLOTS_LIMIT}"
            )
        self._optimizers = (
            dict(optimizer) if isinstance(optimizer, Mapping) else {"optimizer": optimizer}
        )
        ranks = _ranks(replicated_over)
        self._state = LiveState(model, self._optimizers, extra or {}, ranks)
        self._once, self._audit_every = replicas == "once", audit_every
        self._rate_bytes_per_s, self._strict = rate_bytes_per_s, strict
        self._failure = self._last_reason = ""
        """Why a capture failed, to be raised in the next step()."""
        self._every, self._resume_timeout_s = every, resume_timeout_s
        self._client = AgentClient(self._config.agent or str(embedded.places().socket))
        self._agreement: Agreement | None = None
        self._capture: Capture | None = None
        self._shown: worker_server.Shown | None = None
        self._life = 0
        self._step = 0
        self._layout_due = True
        self._stepped = False
        self._closed = False
        for each in self._optimizers.values():
            each.register_step_pre_hook(self._before_optimizer_step)

    @property
    def life(self) -> int:
        """Number of this run between two resumes, from 1; 0 before `resume()`."""
        return self._life

    @property
    def job(self) -> str:
        """The job's id."""
        return self._config.job

    @property
    def stats(self) -> CaptureStats:
        """What the captures of this rank have come to so far."""
        return self._capture.stats if self._capture is not None else CaptureStats()

    def resume(self) -> int:
        """Load the newest snapshot that can be restored; returns the step to continue from.

        Every rank must call it, once. Returns 0 only when this job certainly has no snapshot;
        otherwise it waits, says for what, and after `resume_timeout_s` raises ResumeImpossible
        or AgentUnreachable. Raises StateMismatch, naming the first tensors that differ, when the
        snapshot does not fit the script.
        """
        if self._agreement is not None:
            raise ConfigError("resume() was already called; it begins the life of a Checkpointer")
        agree = self._agreement = Agreement()
        deadline = monotonic() + self._resume_timeout_s
        self._attach(agree, deadline)
        rejected: tuple[SnapshotId, ...] = ()
        while True:
            decision = self._decide(agree, rejected, deadline)
            self._life = decision.life
            self._client.set_life(decision.life)
            if decision.id is None:
                step = 0
                break
            failures = [raw.decode() for raw in agree.gather(self._try(decision, deadline))]
            if not any(failures):
                step = decision.id.step
                break
            self._raise_mismatch(failures)
            rejected = (*rejected, decision.id)
            first = next(text for text in failures if text)
            log.warning("ckptd: %s could not be loaded (%s); trying another", decision.id, first)
        self._step = step
        self._show(agree)
        self._capture = Capture(
            self._state,
            agree.rank,
            agree.world_size,
            self._client.sealed,
            self._failed,
            once=self._once,
            audit_every=self._audit_every,
            rate_bytes_per_s=self._rate_bytes_per_s,
        )
        if agree.rank == 0:
            self._client.tell(Resumed(self._life, step))
            where = f"from the snapshot of step {step}" if step else "from the beginning"
            log.warning(
                "ckptd: job %s, life %d, trains %s: %s",
                self.job,
                self._life,
                where,
                decision.reason,
            )
        return step

    def step(self, step: int) -> None:
        """Tell ckptd that `step` steps are done; captures the state if this step has a ticket.

        Call it after `optimizer.step()`. It does not wait for the copy. The first call lays out
        the memory, which takes a moment, and raises UnsavableState or MemoryTooSmall if that
        cannot be done; later ones never raise, unless `strict`: what fails costs a snapshot, not
        the training.
        """
        capture = self._capture
        if capture is None:
            raise ConfigError("call resume() before step()")
        if self._strict and self._failure:
            failure, self._failure = self._failure, ""
            raise CaptureFailure(failure)
        self._step = step
        if self._client.save_all and capture.once:
            capture.once, self._layout_due = False, True
            log.warning("ckptd: every rank saves all that it has: %s", self._client.save_all)
        self._layout_due = self._layout_due or bool(capture.outgrown)
        if self._layout_due and self._client.connected:
            self._open_layout(capture, step)
        ticket = self._client.progress(step)
        if ticket is not None:
            self._take(capture, ticket, step)

    def gate(self) -> None:
        """Wait until nothing is being copied: call it before writing to captured tensors.

        Optimizers call it by themselves; anything else that writes to parameters or optimizer
        state between two steps (an average of the weights, a manual edit) must.
        """
        if self._capture is not None:
            self._capture.gate()

    @contextmanager
    def pause(self, what: str, at_most_s: float = 3600.0) -> Iterator[None]:
        """Say that this rank does something else than training for a while.

        ::

            with ckpt.pause("evaluation"):
                evaluate(model)

        Until the block ends this rank's silence is no hang, whatever its process does, and `ckptd
        status` says why. Only a rank that does something else says so: those that wait for it in a
        collective need not. After `at_most_s` seconds the pause counts no more: it may have been
        forgotten, or the rank may hang in it. Without a pause, too, a rank that makes progress is
        left alone.

        Raises ConfigError for a pause without a name or an end, and nothing else.
        """
        if not what or not 0 < at_most_s < float("inf"):
            raise ConfigError(
                f"pause({what!r}, at_most_s={at_most_s}): say what is done, and for how many "
                "seconds at most, more than 0"
            )
        began = monotonic()
        before = self._shown.introduction.paused if self._shown is not None else None
        self._introduce_pause(Paused(what[:_PAUSE_TEXT_MAX], began, at_most_s))
        try:
            yield
        finally:
            self._introduce_pause(before)
            lasted_s = monotonic() - began
            if lasted_s > at_most_s:
                log.warning(
                    "ckptd: the pause for %s lasted %.0f s, and counted for %.0f s only: pass a "
                    "larger at_most_s",
                    what,
                    lasted_s,
                    at_most_s,
                )

    def close(self, finished: bool = False) -> None:
        """Wait for the capture that is under way, and leave.

        `finished`: the job is done; when all ranks have said so its memory is given back.
        Otherwise the newest snapshot stays for the next `resume()`.
        """
        if self._closed:
            return
        self._closed = True
        if self._capture is not None:
            self._capture.wait_sealed()
        self._client.detach(finished, timeout_s=10.0)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Resuming.

    def _attach(self, agree: Agreement, deadline: float) -> None:
        round_ = agree.broadcast(secrets.token_hex(8).encode()).decode()
        request = Attach(
            self.job,
            round_,
            agree.rank,
            agree.world_size,
            self._every,
            self._slots,
            keep=self._config.keep,
            elastic=self._config.elastic,
        )
        failure: CkptdError | None = None
        try:
            if not self._config.agent:
                embedded.ensure(deadline)
            self._client.attach(request, deadline)
        except CkptdError as error:
            failure = error
        # All find out together, so that none is left waiting in a collective.
        texts = [raw.decode() for raw in agree.gather(str(failure or "").encode())]
        if failure is not None:
            raise failure
        for rank, text in enumerate(texts):
            if text:
                raise errors.AgentUnreachable(f"rank {rank} cannot take part: {text}")

    def _show(self, agree: Agreement) -> None:
        """Let the agent see this rank's collectives; without that, training goes on as well."""
        config = replace(watch_config(), agent=self._config.agent)
        self._shown = shown = worker_server.start(config)
        if shown is not None:
            shown.introduce(
                job=self.job, rank=agree.rank, world_size=agree.world_size, life=self._life
            )
            if config.timing:
                timing.start(shown)

    def _introduce_pause(self, paused: Paused | None) -> None:
        if self._shown is not None:
            self._shown.introduce(paused=paused)

    def _decide(
        self, agree: Agreement, rejected: tuple[SnapshotId, ...], deadline: float
    ) -> _Decision:
        decision = _Decision()
        if agree.rank == 0:
            try:
                granted = self._client.ask_resume(rejected, deadline)
                decision = _Decision(granted.life, granted.id, granted.reason[:500])
            except CkptdError as error:
                decision = _Decision(error=type(error).__name__, message=str(error)[:2000])
        raw = agree.broadcast(msgspec.msgpack.encode(decision))
        decision = msgspec.msgpack.decode(raw, type=_Decision)
        if decision.error:
            raise getattr(errors, decision.error, CkptdError)(decision.message)
        return decision

    def _try(self, decision: _Decision, deadline: float) -> bytes:
        """Load the granted snapshot; returns b"" or the reason why it could not be loaded."""
        if decision.id is None:
            return b""
        rank = self._agreement.rank if self._agreement is not None else 0
        try:
            try:
                self._load(decision.id, rank, deadline)
            except CorruptData:
                self._load(decision.id, rank, deadline)  # the agent mends what it finds
        except Exception as error:  # the other ranks must hear of it, whatever it is
            return f"{type(error).__name__}: rank {rank}: {error}"[:1000].encode()
        return b""

    def _raise_mismatch(self, failures: list[str]) -> None:
        """Another snapshot would not fit the script either, nor make memory larger."""
        for kind in (StateMismatch, errors.MemoryTooSmall):
            prefix = kind.__name__ + ": "
            for text in failures:
                if text.startswith(prefix):
                    raise kind(text.removeprefix(prefix))

    def _load(self, id: SnapshotId, rank: int, deadline: float) -> None:
        path = Path(self._client.restore(self._life, id, rank, deadline))
        own = self._open_segment(path, id, rank)
        opened = [(path, own)]
        header = own.header
        world_size = self._agreement.world_size if self._agreement is not None else 1
        if header.world_size != world_size:
            raise StateMismatch(
                f"{id} was taken by {header.world_size} ranks, and {world_size} are running; "
                "start as many"
            )
        for other in sorted({other for ranks in header.shares for other in ranks} - {rank}):
            there = Path(self._client.restore(self._life, id, other, deadline))
            opened.append((there, self._open_segment(there, id, other)))
        end = header.objects_begin + header.objects_bytes
        objects = load_objects(bytes(own.data[header.objects_begin : end]))
        saved = SavedState(own, [segment for _, segment in opened[1:]], objects)
        check_fits(self._state, saved, str(id))
        load(self._state, saved)
        for where, segment in opened:
            segment.verify(read_checked_record(sidecar_path(where), Sidecar))

    def _open_segment(self, path: Path, id: SnapshotId, rank: int) -> OpenSegment:
        what = f"rank {rank}'s segment of {id}"
        with path.open("rb") as file:
            # A private map: torch wants writable memory, and nothing must change the segment.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        data = memoryview(mapped)
        header = parse_header(data, what)
        if (header.id, header.rank) != (id, rank):
            raise CorruptData(f"{path} holds rank {header.rank} of {header.id}, not {what}")
        return OpenSegment(header, data)

    # Capturing.

    def _open_layout(self, capture: Capture, step: int) -> None:
        self._layout_due = False
        first, self._stepped = not self._stepped, True
        try:
            plan = capture.lay_out(step)
            request = OpenLayout(self._life, plan.layout.size_bytes, plan.shares)
            capture.prepare(self._client.open_layout(request, monotonic() + 60.0))
        except errors.AgentUnreachable as error:
            # When it comes back, the client tells it the layout.
            log.warning("ckptd: no snapshots for now: %s", error)
        except Exception as error:
            if first:
                raise
            log.warning("ckptd: no snapshots for now: %s", error)

    def _take(self, capture: Capture, ticket: Ticket, step: int) -> None:
        try:
            capture.begin(ticket.id, ticket.path, self._client.cell_bytes)
        except LayoutChanged as error:
            log.warning("ckptd: %s; laying out anew", error)
            self._client.failed(ticket.id, "dropped", str(error))
            self._layout_due = True
        except Exception as error:  # whatever it is, it costs a snapshot, not the training
            self._failed(ticket.id, "dropped", str(error))

    def _failed(self, id: SnapshotId, outcome: Outcome, reason: str) -> None:
        self._client.failed(id, outcome, reason)
        self._failure = f"the capture of {id} failed: {reason}"
        if reason != self._last_reason:  # else every step might say it again
            self._last_reason = reason
            log.warning("ckptd: %s", self._failure)

    def _before_optimizer_step(self, *_: object) -> None:
        self.gate()


def _ranks(over: "Sequence[int] | dist.ProcessGroup | None") -> tuple[int, ...]:
    if over is None:
        return ()
    if isinstance(over, dist.ProcessGroup):
        return tuple(dist.get_process_group_ranks(over))
    return tuple(over)
