"""Which engine computes our code on this machine: the fastest that proves that it does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

from ckptd.erasure import isal
from ckptd.erasure.codec import Codec, CodecError, ZfecCodec, check_geometry, self_test

AUTO = "auto"
ISAL = "isa-l"
ZFEC = "zfec"
ENGINE_CHOICES = (AUTO, ISAL, ZFEC)
"""What can be asked for: the best that works, or one that must work."""

_TRIED_SHARDS = (4, 2)
"""Geometry with which engines are tried when no codec is wanted yet."""

MakeCodec = Callable[[int, int], Codec]


@dataclass(frozen=True)
class Engine:
    """One engine, and whether codecs are made with it."""

    name: str
    """Such as "isa-l 2.32.0 (pyeclib)"."""
    in_use: bool
    reason: str
    """Why it is not in use; "" if it is."""


@dataclass(frozen=True)
class Candidate:
    """An engine that may be there."""

    kind: str
    """ISAL or ZFEC."""
    name: str
    """What to call it before it is loaded."""
    load: Callable[[], tuple[str, MakeCodec]]
    """Its full name and its codecs. Raises CodecError if it is not to be had."""


def _load_isal(load: Callable[[], isal.Library]) -> tuple[str, MakeCodec]:
    library = load()
    return library.name, partial(isal.IsalCodec, library=library)


def _load_zfec() -> tuple[str, MakeCodec]:
    return ZfecCodec.engine, ZfecCodec


CANDIDATES = (
    Candidate(ISAL, "isa-l (pyeclib)", partial(_load_isal, isal.load_bundled)),
    Candidate(ISAL, "isa-l (system)", partial(_load_isal, isal.load_system)),
    Candidate(ZFEC, "zfec", _load_zfec),
)
"""Best first. The bundled library comes before the system's: its version is the one we test."""


class Engines:
    """The engines of one machine. One that has failed is not tried again."""

    def __init__(self, choice: str = AUTO, candidates: Sequence[Candidate] = CANDIDATES) -> None:
        """Raises CodecError if `choice` is none of ENGINE_CHOICES."""
        if choice not in ENGINE_CHOICES:
            raise CodecError(f"no erasure engine {choice!r}: choose {', '.join(ENGINE_CHOICES)}")
        self._choice = choice
        self._candidates = candidates
        self._loaded: dict[str, tuple[str, MakeCodec]] = {}
        self._refused: dict[str, str] = {}
        """Reasons by the name of the candidate."""
        self._mutex = threading.Lock()

    def open(self, data_shards: int, parity_shards: int) -> Codec:
        """A codec of the best engine that passes the self-test, also in this geometry.

        Raises CodecError if the geometry is impossible, or if no engine that was chosen works; it
        then gives every reason.
        """
        check_geometry(data_shards, parity_shards)
        chosen = [one for one in self._candidates if self._choice in (AUTO, one.kind)]
        with self._mutex:
            for candidate in chosen:
                if candidate.name in self._refused:
                    continue
                try:
                    if candidate.name not in self._loaded:
                        self._loaded[candidate.name] = candidate.load()
                    _, make = self._loaded[candidate.name]
                    self_test(make, data_shards, parity_shards)
                    return make(data_shards, parity_shards)
                except CodecError as error:
                    self._refused[candidate.name] = str(error)
        reasons = "; ".join(f"{one.name}: {self._refused[one.name]}" for one in chosen)
        if self._choice == AUTO:
            raise CodecError(f"no erasure engine works: {reasons}")
        raise CodecError(
            f"the {self._choice} engine was chosen and cannot be used: {reasons}. Mend it, or "
            f"choose {AUTO}"
        )

    def listing(self) -> tuple[Engine, ...]:
        """Every engine, best first, after it was tried; exactly one is in use.

        Raises CodecError if none that was chosen works.
        """
        used = self.open(*_TRIED_SHARDS).engine
        found: list[Engine] = []
        for candidate in self._candidates:
            name, _ = self._loaded.get(candidate.name, (candidate.name, None))
            in_use = name == used and not any(engine.in_use for engine in found)
            found.append(Engine(name, in_use, "" if in_use else self._why_not(candidate)))
        return tuple(found)

    def _why_not(self, candidate: Candidate) -> str:
        if candidate.name in self._refused:
            return self._refused[candidate.name]
        if self._choice not in (AUTO, candidate.kind):
            return f"the {self._choice} engine was chosen"
        return "a better engine is in use"


_of_this_machine = cache(Engines)


def open_codec(data_shards: int, parity_shards: int, choice: str = AUTO) -> Codec:
    """The best engine for this geometry that passes the self-test; see `Engines.open`.

    `choice` is one of ENGINE_CHOICES. Raises CodecError if the geometry is impossible, or if no
    engine that was chosen computes our code.
    """
    return _of_this_machine(choice).open(data_shards, parity_shards)


def engines(choice: str = AUTO) -> tuple[Engine, ...]:
    """The engines of this machine, best first, and why each is not used; see `Engines.listing`."""
    return _of_this_machine(choice).listing()


def engine_in_use(choice: str = AUTO) -> tuple[str, str]:
    """The name of the engine in use, and why none of the better ones is ("" if there are none).

    Raises CodecError if none that was chosen works.
    """
    found = engines(choice)
    if choice == ZFEC:
        return found[-1].name, "the zfec engine was chosen"
    rank = next(rank for rank, engine in enumerate(found) if engine.in_use)
    return found[rank].name, "; ".join(f"{one.name}: {one.reason}" for one in found[:rank])
