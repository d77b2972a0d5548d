"""What an agent knows of the collectives of its trainers, and what it can find out on demand.

The watcher's records go on to who decides; the last of each rank are kept here for incident
folders.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from ckptd.agent import incident, ras, witness
from ckptd.agent.watcher import Pace, TrainerView, Watcher
from ckptd.collectives import Collective, GroupInfo
from ckptd.errors import Gone, ProtocolError
from ckptd.watching import Introduction, Observed, trainers_dir

_SAY_EVERY_S = 1.0
_RANKS_LIMIT = 1024

log = structlog.get_logger()


class Diagnosis:
    """The sources and witnesses of one node. Its coroutines run in the agent's event loop."""

    def __init__(
        self,
        node: str,
        socket: Path,
        forward: Callable[[Observed], None],
        tell: Callable[[str], None],
        pace: Pace | None = None,
    ) -> None:
        """`socket`: the agent's. `forward` gets all records; `tell` what is not seen, once each.

        Neither may block.
        """
        self._node, self._forward, self._tell = node, forward, tell
        self.incidents = socket.with_name(socket.name + ".incidents")
        """Where incident folders are."""
        self._watcher = Watcher(trainers_dir(socket), self._observed, pace)
        self._last: dict[tuple[str, int], deque[Collective]] = {}
        self._groups: dict[str, dict[str, GroupInfo]] = {}
        self._told: set[str] = set()

    async def run(self) -> None:
        """Watch until cancelled; never ends by itself, and what fails is told."""
        saying = asyncio.create_task(self._say())
        try:
            while True:
                try:
                    await self._watcher.run()
                except OSError as error:
                    self._tell_once(f"trainers are not watched: {error}")
                    await asyncio.sleep(10 * _SAY_EVERY_S)
        finally:
            saying.cancel()

    def views(self, job: str | None = None) -> list[TrainerView]:
        """The live trainers of the node, of one job or all, by rank."""
        views = self._watcher.views()
        return [view for view in views if job is None or view.introduction.job == job]

    def hurry(self, for_s: float) -> None:
        """Read fast for so long: something is suspected."""
        self._watcher.hurry(for_s)

    async def look_twice(
        self, job: str, apart_s: float = 1.0
    ) -> list[tuple[witness.Sample, witness.Sample]]:
        """Two samples of each trainer of the job on this node, all at the same time."""
        return await self.look_twice_at([view.introduction for view in self.views(job)], apart_s)

    async def look_twice_at(
        self, shown: Sequence[Introduction], apart_s: float = 1.0
    ) -> list[tuple[witness.Sample, witness.Sample]]:
        """Two samples of each of these trainers, all at the same time."""
        directory = self._watcher.directory
        looks = [witness.sample_twice(told, directory, apart_s) for told in shown]
        return list(await asyncio.gather(*looks))

    async def counts(self, job: str, shown: Sequence[Introduction]) -> ras.Counts | None:
        """What NCCL itself counts of the job, of which these trainers are here.

        None where it is not in use, or does not answer, which is told.
        """
        groups = self._groups.get(job, {}).values()
        addresses = {told.ras for told in shown if told.ras}
        if not addresses or not any(info.is_nccl for info in groups):
            return None
        trainers = {told.pid: told.rank for told in shown}
        world_size = max(told.world_size for told in shown)
        address = min(addresses)
        try:
            raw = await ras.ask(address)
            return await asyncio.to_thread(ras.read, raw, trainers, world_size)
        except (TimeoutError, Gone, ProtocolError) as error:
            why = str(error) or "no answer in time"
            self._tell_once(f"NCCL's own counts (RAS, at {address}) are not seen: {why[:200]}")
            return None

    async def collect(self, job: str, reason: str, apart_s: float = 1.0) -> Path:
        """Write an incident folder of this node's part of the job; returns it. Raises OSError."""
        views = {view.introduction.rank: view for view in self.views(job)}
        evidence = [
            incident.RankEvidence(
                rank=second.rank,
                samples=(first, second),
                records=list(self._last.get((job, second.rank), ())),
                problems=views[second.rank].problems if second.rank in views else (),
            )
            for first, second in await self.look_twice(job, apart_s)
        ]
        groups = list(self._groups.get(job, {}).values())
        return await asyncio.to_thread(
            incident.write, self.incidents, job, self._node, reason, evidence, groups
        )

    def _observed(self, observed: Observed) -> None:
        key = observed.job, observed.rank
        if key not in self._last and len(self._last) >= _RANKS_LIMIT:
            self._last.pop(next(iter(self._last)))
        kept = self._last.setdefault(key, deque(maxlen=incident.RECORDS_PER_RANK))
        kept.extend(observed.collectives)
        if observed.groups:
            known = self._groups.setdefault(observed.job, {})
            known.update((info.group, info) for info in observed.groups)
        self._forward(observed)

    async def _say(self) -> None:
        """Tell what is not seen of trainers, for status to show."""
        while True:
            await asyncio.sleep(_SAY_EVERY_S)
            for view in self.views():
                for problem in view.problems:
                    self._tell_once(f"rank {view.introduction.rank}: {problem}")

    def _tell_once(self, text: str) -> None:
        if text not in self._told and len(self._told) < _RANKS_LIMIT:
            self._told.add(text)
            with contextlib.suppress(RuntimeError):
                self._tell(text)
