"""A training job in which every dependency is real, and faults, from a seed.

Ranks are laid out as data × pipeline × tensor, tensor innermost, eight to a node. Each step sends
micro-batches through the pipeline and back, all-reduces inside tensor groups, exchanges tokens in
expert groups, and reduces gradients over data-parallel groups. An operation begins when all of its
ranks have entered; a rank that never enters has the time infinity, and so has all that waits for
it. All ranks of one stage go through the same operations, so a stage is one array.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptd.collectives import MEETING
from ckptd.sketches import SAMPLES_PER_SKETCH, Part, Sample, Sketch, pack, pair_name, sample

Array = NDArray[Any]
NEVER = np.inf


@dataclass(frozen=True)
class Shape:
    """How the job is laid out, and how long things take, in seconds."""

    data: int = 8
    pipeline: int = 2
    tensor: int = 4
    expert: int = 1
    """Ranks of an expert group, along the data axis; 1: no experts."""
    ranks_per_node: int = 8
    microbatches: int = 2
    layers: int = 2
    buckets: int = 2
    step_s: float = 1.0
    transfer_share: float = 0.1
    """Of the step, in transfers."""
    noise: float = 0.03
    """Deviation of each piece of computation."""
    drift: float = 0.005
    """How much ranks differ for good."""
    hiccups: float = 1e-4
    """Chance of a rank, in a step, of a delay of half to two and a half steps."""
    uneven: float = 0.0
    """Deviation of a whole micro-batch of one replica: sequences of different lengths."""
    warmup_steps: int = 3
    compile_s: float = 0.0
    """How long the first step compiles, more or less, differently on each rank."""

    @property
    def ranks(self) -> int:
        return self.data * self.pipeline * self.tensor

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)


@dataclass(frozen=True)
class Fault:
    """What goes wrong, from `step` to `until`. `kind` is one of the methods of Job with that name:
    hang, slow, loader, link_hang, node_hang, link_slow, node_slow_net, all_slow, evaluate, kernel.
    """

    kind: str
    step: int
    until: int = 1 << 30
    ranks: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()
    factor: float = 1.0
    seconds: float = 0.0


@dataclass
class Stream:
    """The operations of one sort of group of one stage."""

    op: str
    parts: list[Part]
    size_bytes: int
    ranks: Array
    """Of the job, as [data, tensor]; or of both ends, as [2, data, tensor]."""
    axis: int | None
    """Along which a group's ranks are; None: all of them; for pairs 0."""
    base: int = 0
    """Operations that were dropped, because they have ended on all ranks and been told."""
    entered: list[Array] = field(default_factory=list)
    seen: list[Array] = field(default_factory=list)
    """When a source says it was entered: earlier, where it was only enqueued."""
    ended: list[Array] = field(default_factory=list)
    waited: Array = field(default_factory=lambda: np.zeros(0))


class Job:
    """Runs steps, and tells what agents would have told at any moment. One fault at most."""

    def __init__(
        self,
        shape: Shape,
        seed: int,
        fault: Fault | None = None,
        source: str = "durations",
    ) -> None:
        self.shape, self.fault, self.source = shape, fault, source
        self.random = np.random.default_rng(seed)
        self.step = 0
        s = shape
        self.rank = np.arange(s.ranks).reshape(s.data, s.pipeline, s.tensor)
        self.node = self.rank // s.ranks_per_node
        self.clock = np.zeros((s.pipeline, s.data, s.tensor))
        self.pace = 1 + s.drift * self.random.standard_normal(self.clock.shape)
        self.begin = self.clock.copy()
        self.hung_cpu = np.zeros(self.clock.shape, np.bool_)
        self.order = 0
        work_s = s.step_s * (1 - s.transfer_share)
        self.piece_s = work_s / (2 * (s.microbatches + s.pipeline - 1) * s.layers)
        pieces = 2 * s.microbatches * s.layers
        self.transfer_s = s.step_s * s.transfer_share / (pieces + 4 * s.buckets)
        self._make_streams()
        self.fault_at = NEVER
        """When the fault began, by the clock of the first rank that has it."""
        self._told = -1.0
        self._index: list[Array] = []

    # The groups.

    def _make_streams(self) -> None:
        s = self.shape
        self.tensor: list[Stream] = []
        self.data: list[Stream] = []
        self.expert: list[Stream] = []
        self.forward: list[Stream] = []
        self.backward: list[Stream] = []
        for p in range(s.pipeline):
            ranks = self.rank[:, p, :]
            self.tensor.append(self._stream("all_reduce", ranks, 1, f"tp{p}", "tp", 1 << 24))
            self.data.append(self._stream("reduce_scatter", ranks, 0, f"dp{p}", "dp", 1 << 27))
            if s.expert > 1:
                shaped = ranks.reshape(s.data // s.expert, s.expert, s.tensor)
                self.expert.append(self._stream("all_to_all", shaped, 1, f"ep{p}", "ep", 1 << 22))
            if p + 1 < s.pipeline:
                after = self.rank[:, p + 1, :]
                self.forward.append(self._pairs(ranks, after))
                self.backward.append(self._pairs(after, ranks))
        self.world = self._stream("all_reduce", self.rank, None, "world", "", 4)
        self.streams = [*self.tensor, *self.data, *self.expert, self.world]
        if self.source != "entries":
            self.streams += [*self.forward, *self.backward]  # gloo's recorder has none of these

    def _stream(
        self, op: str, ranks: Array, axis: int | None, name: str, what: str, size_bytes: int
    ) -> Stream:
        gpu = self.source.startswith("gpu")
        if axis is None:
            parts = [Part(name, ranks.size, tuple(ranks.ravel().tolist()), what, gpu)]
        else:
            groups = np.moveaxis(ranks, axis, -1).reshape(-1, ranks.shape[axis])
            parts = [
                Part(f"{name}.{i}", len(g), tuple(g.tolist()), what, gpu)
                for i, g in enumerate(groups)
            ]
        return Stream(op, parts, size_bytes, ranks, axis, waited=np.zeros(ranks.shape))

    def _pairs(self, sources: Array, destinations: Array) -> Stream:
        gpu = self.source.startswith("gpu")
        parts = [
            Part(pair_name("pp", a, b), 2, (a, b), "pp", gpu, (a, b))
            for a, b in zip(sources.ravel().tolist(), destinations.ravel().tolist(), strict=True)
        ]
        both = np.stack([sources, destinations])
        return Stream("send", parts, 1 << 25, both, 0, waited=np.zeros(both.shape))

    # A step.

    def run_step(self) -> None:
        """One step of all ranks."""
        s = self.shape
        self.step += 1
        self.order = 0
        self._interfere()
        length = 1 + s.uneven * self.random.standard_normal((s.microbatches, s.data))
        for m in range(s.microbatches):
            for p in range(s.pipeline):
                if p:
                    self._pass(self.forward[p - 1], p - 1, p)
                self._compute(p, length[m])
        for m in range(s.microbatches):
            for p in reversed(range(s.pipeline)):
                if p + 1 < s.pipeline:
                    self._pass(self.backward[p], p + 1, p)
                self._compute(p, length[m])
        for _ in range(s.buckets):
            for p in range(s.pipeline):
                self._meet(self.data[p], p, 2.0)
        self._meet_all()

    def _interfere(self) -> None:
        """What happens to ranks at the beginning of a step."""
        s = self.shape
        hit = self.random.random(self.clock.shape) < s.hiccups
        self.clock += hit * s.step_s * self.random.uniform(0.5, 2.5, self.clock.shape)
        if self.step == 1 and s.compile_s:
            self.clock += s.compile_s * self.random.uniform(0.8, 1.2, self.clock.shape)
        fault = self._active("hang", "kernel", "slow", "loader", "evaluate", "all_slow")
        if fault is None:
            self.begin = self.clock.copy()
            return
        mask = self._mask(fault)
        if self.fault_at == NEVER:
            self.fault_at = float(self.clock[mask].min() if mask.any() else self.clock.min())
        if fault.kind in ("loader", "evaluate"):
            self.clock[mask] += fault.seconds
        self.begin = self.clock.copy()
        if fault.kind in ("hang", "kernel"):
            self.clock[mask] = NEVER
            self.hung_cpu |= mask & (fault.kind == "hang")

    def _mask(self, fault: Fault) -> Array:
        return np.isin(self.rank, fault.ranks).transpose(1, 0, 2)

    def _active(self, *kinds: str) -> Fault | None:
        fault = self.fault
        if fault is None or fault.kind not in kinds:
            return None
        return fault if fault.step <= self.step < fault.until else None

    def _compute(self, p: int, length: Array) -> None:
        s = self.shape
        for _ in range(s.layers):
            noise = 1 + s.noise * self.random.standard_normal(self.clock[p].shape)
            piece = self.piece_s * np.abs(noise) * self.pace[p] * length[:, None]
            if self.step <= s.warmup_steps:
                piece *= self.random.uniform(1.5, 3.0)
            fault = self._active("slow", "all_slow")
            if fault is not None:
                mask = self._mask(fault)[p] | (fault.kind == "all_slow")
                piece = np.where(mask, piece * fault.factor, piece)
            self.clock[p] += piece
            self._meet(self.tensor[p], p, 1.0)
        if self.expert:
            self._meet(self.expert[p], p, 1.0)

    # Operations.

    def _meet(self, stream: Stream, p: int, weight: float) -> None:
        enter = self.clock[p].reshape(stream.ranks.shape).copy()
        start = enter.max(axis=stream.axis, keepdims=True)
        nodes = stream.ranks // self.shape.ranks_per_node
        end = start + weight * self._transfer(nodes, stream.axis, start)
        self._record(stream, enter, np.broadcast_to(end, enter.shape), p)
        self.clock[p] = np.broadcast_to(end, enter.shape).reshape(self.clock[p].shape)

    def _meet_all(self) -> None:
        enter = np.moveaxis(self.clock, 0, 1).copy()
        nodes = (self.world.ranks // self.shape.ranks_per_node).reshape(-1)
        start = enter.max(keepdims=True)
        end = start + self._transfer(nodes, 0, start.reshape(-1)).reshape(start.shape)
        self._record(self.world, enter, np.broadcast_to(end, enter.shape), None)
        self.clock = np.moveaxis(np.broadcast_to(end, enter.shape), 1, 0).copy()

    def _pass(self, stream: Stream, source: int, destination: int) -> None:
        """The sender goes on, and the operation ends on both when all has arrived."""
        sent, wants = self.clock[source].copy(), self.clock[destination].copy()
        nodes = stream.ranks // self.shape.ranks_per_node
        transfer_s = self._transfer(nodes, 0, np.maximum(sent, wants)[None])[0]
        arrived = np.maximum(sent, wants) + transfer_s
        self.clock[destination] = arrived
        self._record(stream, np.stack([sent, wants]), np.stack([arrived, arrived]), None)

    def _transfer(self, nodes: Array, axis: int | None, start: Array) -> Array:
        """How long the transfers of each group take; infinity over what is broken."""
        shape = np.max(nodes, axis=axis, keepdims=True).shape
        takes: Array = self.transfer_s * (1 + 0.03 * np.abs(self.random.standard_normal(shape)))
        fault = self._active("link_hang", "node_hang", "link_slow", "node_slow_net")
        if fault is not None:
            first, last = nodes.min(axis=axis, keepdims=True), nodes.max(axis=axis, keepdims=True)
            hit = first != last
            for node in fault.nodes:
                hit = hit & (nodes == node).any(axis=axis, keepdims=True)
            if hit.any() and self.fault_at == NEVER:
                self.fault_at = float(np.broadcast_to(start, hit.shape)[hit].min())
            takes = np.where(hit, takes * fault.factor, takes)
        return takes

    def _record(self, stream: Stream, enter: Array, end: Array, p: int | None) -> None:
        if self.source == "entries" and stream.op == "send":
            return
        seen = enter
        if self.source.startswith("gpu"):
            seen = self._enqueued(stream, enter, p)
        stream.entered.append(enter)
        stream.seen.append(seen)
        stream.ended.append(np.array(end))

    def _enqueued(self, stream: Stream, enter: Array, p: int | None) -> Array:
        """The processor has put all of a step on the stream soon after the step began."""
        self.order += 1
        if p is not None:
            begin, hung = self.begin[p], self.hung_cpu[p]
        elif stream.axis is None:
            begin, hung = np.moveaxis(self.begin, 0, 1), np.moveaxis(self.hung_cpu, 0, 1)
        else:
            begin = self.begin.transpose(1, 0, 2).reshape(-1)[stream.ranks]
            hung = self.hung_cpu.transpose(1, 0, 2).reshape(-1)[stream.ranks]
        soon = begin.reshape(enter.shape) + self.order * 1e-4 * self.shape.step_s
        return np.where(hung.reshape(enter.shape), NEVER, np.minimum(soon, enter))

    def probe(self, source: int, destination: int) -> float:
        """How many times as long as usual a transfer between two nodes takes now."""
        fault = self._active("link_hang", "node_hang", "link_slow", "node_slow_net")
        is_hit = fault is not None and set(fault.nodes) <= {source, destination}
        return fault.factor if fault is not None and is_hit else 1.0

    # What agents tell.

    @property
    def now(self) -> float:
        """Until when all is known: the earliest that any rank has come to; infinite in a hang."""
        return float(self.clock.min())

    def sketches(self, at: float) -> list[Sketch]:
        """What every agent says at `at`, given that steps were run until then."""
        entered, ended, waiting, waited = [], [], [], []
        rows: list[tuple[int, int, int, Array, Array]] = []
        kinds: dict[tuple[str, int], int] = {}
        offset = 0
        for stream in self.streams:
            mine = self._observe(stream, at, kinds, offset, rows)
            for column, values in zip((entered, ended, waiting, waited), mine, strict=True):
                column.append(values.reshape(-1))
            offset += stream.ranks.size
        columns = [np.concatenate(c) for c in (entered, ended, waiting, waited)]
        first = not self._index
        if first:
            self._lay_out()
        self._told = at
        return [self._sketch(n, at, columns, rows, tuple(kinds), first) for n in self._nodes]

    def _observe(
        self,
        stream: Stream,
        at: float,
        kinds: dict[tuple[str, int], int],
        offset: int,
        rows: list[tuple[int, int, int, Array, Array]],
    ) -> tuple[Array, Array, Array, Array]:
        shape = stream.ranks.shape
        if not stream.entered:
            count = np.full(shape, stream.base)
            return count, count, np.full(shape, np.nan), stream.waited
        seen, ended = np.stack(stream.seen), np.stack(stream.ended)
        n_entered = stream.base + (seen <= at).sum(axis=0)
        n_ended = stream.base + (ended <= at).sum(axis=0)
        first_open = np.minimum(n_ended - stream.base, len(seen) - 1)
        waiting = at - np.take_along_axis(seen, first_open[None], axis=0)[0]
        waiting = np.where(n_entered > n_ended, waiting, np.nan)
        over = int((ended.reshape(len(ended), -1).max(axis=1) <= at).sum())
        self._tell(stream, over, at, kinds, offset, rows)
        for column in (stream.entered, stream.seen, stream.ended):
            del column[:over]
        stream.base += over
        return n_entered, n_ended, waiting, stream.waited

    def _tell(
        self,
        stream: Stream,
        over: int,
        at: float,
        kinds: dict[tuple[str, int], int],
        offset: int,
        rows: list[tuple[int, int, int, Array, Array]],
    ) -> None:
        """Samples, and sums of waiting, of operations that are over on all ranks."""
        timed = self.source in ("durations", "gpu")
        for i in range(over):
            if timed:
                stream.waited = stream.waited + (stream.ended[i] - stream.entered[i])
            elif stream.op in MEETING and self._is_local(stream):
                last = stream.entered[i].max(axis=stream.axis, keepdims=True)
                stream.waited = stream.waited + (last - stream.entered[i])
        if not timed and not self._is_local(stream):
            stream.waited = np.full(stream.ranks.shape, np.nan)
        kind = kinds.setdefault((stream.op, stream.size_bytes.bit_length()), len(kinds))
        for seq in sample(range(stream.base + 1, stream.base + over + 1), SAMPLES_PER_SKETCH):
            i = seq - stream.base - 1
            duration = stream.ended[i] - stream.entered[i]
            duration = duration if timed else np.full(duration.shape, np.nan)
            rows.append((offset, seq, kind, at - stream.seen[i].ravel(), duration.ravel()))

    def _is_local(self, stream: Stream) -> bool:
        return stream.axis == 1 and self.shape.ranks_per_node % self.shape.tensor == 0

    def _lay_out(self) -> None:
        """Which slots are whose, in the order of all streams' ranks."""
        ranks = np.concatenate([stream.ranks.reshape(-1) for stream in self.streams])
        node = ranks // self.shape.ranks_per_node
        names = np.concatenate([self._group_numbers(stream) for stream in self.streams])
        self._nodes = list(range(self.shape.nodes))
        self._parts: list[tuple[Part, ...]] = []
        self._all_parts = [part for stream in self.streams for part in stream.parts]
        shift = np.cumsum([0, *(len(stream.parts) for stream in self.streams)])
        sizes = [stream.ranks.size for stream in self.streams]
        names = names + np.repeat(shift[:-1], sizes)
        self._position = np.concatenate([np.arange(size) for size in sizes])
        self._offset = np.repeat(np.cumsum([0, *sizes])[:-1], sizes)
        for n in self._nodes:
            slots = np.flatnonzero(node == n)
            slots = slots[np.argsort(names[slots], kind="stable")]
            self._index.append(slots)
            parts = []
            for name in np.unique(names[slots]):
                whole = self._all_parts[int(name)]
                mine = tuple(ranks[slots[names[slots] == name]].tolist())
                parts.append(
                    Part(
                        whole.group, whole.size, mine, whole.description, whole.enqueued, whole.pair
                    )
                )
            self._parts.append(tuple(parts))

    @staticmethod
    def _group_numbers(stream: Stream) -> Array:
        if stream.axis is None:
            return np.zeros(stream.ranks.size, np.int64)
        shape = list(stream.ranks.shape)
        shape[stream.axis] = 1
        count = int(np.prod(shape))
        numbers = np.moveaxis(
            np.broadcast_to(
                np.arange(count).reshape([n for i, n in enumerate(shape) if i != stream.axis]),
                [
                    stream.ranks.shape[stream.axis],
                    *(n for i, n in enumerate(shape) if i != stream.axis),
                ],
            ),
            0,
            stream.axis,
        )
        return np.array(numbers).reshape(-1)

    def _sketch(
        self,
        node: int,
        at: float,
        columns: list[Array],
        rows: list[tuple[int, int, int, Array, Array]],
        kinds: tuple[tuple[str, int], ...],
        first: bool,
    ) -> Sketch:
        slots = self._index[node]
        entered, ended, waiting, waited = (tuple(c[slots].tolist()) for c in columns)
        offsets, positions = self._offset[slots], self._position[slots]
        samples: list[Sample] = []
        for offset, seq, kind, age, duration in rows:
            local = np.flatnonzero(offsets == offset)
            where = positions[local]
            times = zip(local.tolist(), age[where].tolist(), duration[where].tolist(), strict=True)
            samples.extend(Sample(slot, kind, seq, *each) for slot, *each in times)
        return Sketch(
            job="simulated",
            life=1,
            node=node_name(node),
            layout=1,
            at=at,
            entered=entered,
            ended=ended,
            waiting_s=waiting,
            waited_s=waited,
            samples=pack(samples),
            kinds=kinds,
            resolution_s=1e-4,
            parts=self._parts[node] if first else None,
        )


def node_name(node: int) -> str:
    return f"node-{node:05}"


Observer = Callable[[float, list[Sketch]], bool]


def play(job: Job, poll_s: float, until_s: float, observe: Observer, jitter: float = 0.2) -> None:
    """Run the job and poll all agents every `poll_s`, until `observe` says that it has enough."""
    at = poll_s
    while at < until_s:
        while job.now <= at:
            job.run_step()
        if observe(at, job.sketches(at)):
            return
        at += poll_s * (1 + jitter * float(job.random.uniform(-1, 1)))
