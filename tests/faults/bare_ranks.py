"""All ranks of a job in one process, without torch: they speak the agents' protocol, write real
segments, and compare every byte of what comes back with what they had captured.

    python bare_ranks.py SEED JOB SIZE_BYTES HOLD SOCKET ...

One rank for each socket. What a rank captures is drawn from (seed, rank, life, step), so a later
process knows what an earlier one captured. While the file HOLD exists, a capture that half of the
ranks have sealed goes no further. Says on standard output, a JSON object a line, what happens.
"""

import json
import random
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

from ckptd.digest import cell_count, cell_span, digest, pack
from ckptd.errors import CkptdError, ResumeImpossible
from ckptd.ids import SnapshotId
from ckptd.segment import (
    LENGTH_BYTES,
    Sidecar,
    TensorSpec,
    checked_record,
    plan_layout,
    sidecar_path,
)
from ckptd.trainer.client import AgentClient
from ckptd.wire import Attach, OpenLayout, Resumed, Ticket

STEP_S = 0.02
PATIENCE_S = 60.0
OBJECTS_BYTES = 64

_pace = threading.Event()


def say(event: str, **fields: object) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def size_of(rank: int, size_bytes: int) -> int:
    """Ranks differ in size, so that stripes have cells that are virtual or short."""
    return size_bytes - 1000 * rank


class Ranks:
    """The ranks of one life, in lockstep."""

    def __init__(self, seed: int, job: str, size_bytes: int, hold: Path, sockets: list[str]):
        self.seed, self.job, self.hold = seed, job, hold
        self.clients = [AgentClient(path) for path in sockets]
        self.world_size = len(sockets)
        self.layouts = [
            plan_layout([TensorSpec("model.w", "U8", (size_of(rank, size_bytes),))], OBJECTS_BYTES)
            for rank in range(self.world_size)
        ]
        self.pool = ThreadPoolExecutor(self.world_size)

    def segment(self, id: SnapshotId, rank: int) -> bytes:
        """What `rank` captures for `id`."""
        layout = self.layouts[rank]
        numbers = random.Random(f"{self.seed} {rank} {id.life} {id.step}")
        header = layout.header(id, rank, self.world_size, OBJECTS_BYTES)
        return header + numbers.randbytes(layout.size_bytes - layout.data_begin)

    def run(self) -> None:
        deadline, round_ = monotonic() + PATIENCE_S, uuid.uuid4().hex

        def attach(rank: int) -> None:
            request = Attach(self.job, round_, rank, self.world_size, 1, 2)
            self.clients[rank].attach(request, deadline)

        list(self.pool.map(attach, range(self.world_size)))
        life, step = self.resume(deadline)

        def open_layout(rank: int) -> None:
            client = self.clients[rank]
            client.set_life(life)
            client.open_layout(OpenLayout(life, self.layouts[rank].size_bytes), deadline)

        self.clients[0].tell(Resumed(life, step))
        list(self.pool.map(open_layout, range(self.world_size)))
        say("start", life=life, step=step)
        while True:
            step += 1
            tickets = [client.progress(step) for client in self.clients]
            for rank, ticket in enumerate(tickets):
                if ticket is None:
                    continue
                if rank == self.world_size // 2 and self.hold.exists():
                    say("held", step=step)
                    while self.hold.exists():
                        _pace.wait(STEP_S / 4)
                self.capture(rank, ticket)
            _pace.wait(STEP_S)

    def resume(self, deadline: float) -> tuple[int, int]:
        """(life, step) to go on from, once every rank has found its bytes."""
        rejected: tuple[SnapshotId, ...] = ()
        while True:
            granted = self.clients[0].ask_resume(rejected, deadline)
            id = granted.id
            say("granted", life=granted.life, step=id.step if id else 0, reason=granted.reason)
            if id is None:
                return granted.life, 0

            def load(rank: int, life: int = granted.life, id: SnapshotId = id) -> str:
                try:
                    path = Path(self.clients[rank].restore(life, id, rank, deadline))
                except CkptdError as error:
                    return f"rank {rank}: {type(error).__name__}: {error}"
                if path.read_bytes() != self.segment(id, rank):
                    say("wrong", rank=rank, id=str(id))
                    raise SystemExit(f"rank {rank} of {id} is not what was captured")
                say("compared", rank=rank, bytes=self.layouts[rank].size_bytes)
                return ""

            failures = [text for text in self.pool.map(load, range(self.world_size)) if text]
            if not failures:
                return granted.life, id.step
            say("rejected", step=id.step, reasons=failures)
            rejected += (id,)

    def capture(self, rank: int, ticket: Ticket) -> None:
        """Fill the slot and publish, in the order of real captures."""
        client, path, layout = self.clients[rank], Path(ticket.path), self.layouts[rank]
        raw = self.segment(ticket.id, rank)
        cell_bytes = client.cell_bytes
        spans = [
            cell_span(n, len(raw), cell_bytes) for n in range(cell_count(len(raw), cell_bytes))
        ]
        digests = pack(digest(raw[begin : begin + length]) for begin, length in spans)
        sidecar = Sidecar(ticket.id, rank, self.world_size, len(raw), cell_bytes, digests)
        try:
            with path.open("r+b", buffering=0) as file:
                file.write(bytes(LENGTH_BYTES))
                file.seek(layout.data_begin)
                file.write(raw[layout.data_begin :])
                sidecar_path(path).write_bytes(checked_record(sidecar))
                file.seek(LENGTH_BYTES)
                file.write(raw[LENGTH_BYTES : layout.data_begin])
                file.seek(0)
                file.write(raw[:LENGTH_BYTES])
        except FileNotFoundError:
            return  # its node has burnt
        except OSError as error:
            client.failed(ticket.id, "dropped", str(error))
            return
        client.sealed(ticket.id)
        if rank == self.world_size - 1:
            say("sealed", step=ticket.id.step)


def main() -> None:
    seed, job, size_bytes, hold, *sockets = sys.argv[1:]
    try:
        Ranks(int(seed), job, int(size_bytes), Path(hold), sockets).run()
    except ResumeImpossible as error:
        say("refused", text=str(error))


if __name__ == "__main__":
    main()
