"""Which nodes have sent cells that did not have their digest, and how many."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping

_ADDRESSES_KNOWN = 4096

log = logging.getLogger("ckptd")


class Damage:
    """Counts damaged cells by the node that they came from. Thread-safe.

    The bytes were wrong in that node's memory, or became so on the way: which of the two cannot be
    told from here. Cells come from addresses; who is at one is learnt from what names both.
    """

    def __init__(self, told: Callable[[str, int], None] = lambda node, cells: None) -> None:
        """`told` hears of every damaged cell, in any thread: the node, and how many by now."""
        self.told = told
        self._mutex = threading.Lock()
        self._names: dict[str, str] = {}
        self._cells: Counter[str] = Counter()

    def meet(self, cells: Mapping[str, str]) -> None:
        """Nodes serve cells at these addresses."""
        with self._mutex:
            for node, address in cells.items():
                self._names.pop(address, None)
                self._names[address] = node
            while len(self._names) > _ADDRESSES_KNOWN:
                del self._names[next(iter(self._names))]

    def name(self, address: str) -> str:
        """The node at an address; the address itself if nobody has said."""
        with self._mutex:
            return self._names.get(address, address)

    def found(self, address: str, what: str) -> None:
        """`what` came from `address`, and is not what it should be."""
        self.found_of(self.name(address), what)

    def found_of(self, node: str, what: str) -> None:
        """`what` came from `node`, and is not what it should be."""
        with self._mutex:
            self._cells[node] += 1
            cells = self._cells[node]
        if cells & (cells - 1) == 0:  # a bad link must not fill the log
            log.warning("%s from %s is damaged; it has sent %d such", what, node, cells)
        self.told(node, cells)

    @property
    def cells(self) -> dict[str, int]:
        """Damaged cells by node, since this agent was started."""
        with self._mutex:
            return dict(self._cells)
