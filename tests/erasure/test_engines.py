"""Which engine is used, and what is said of those that are not."""

import ctypes.util
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from ckptd.agent import protect
from ckptd.agent.shell import _erasure_engine
from ckptd.erasure import Codec, CodecError, ZfecCodec, engine_in_use, engines, isal, open_codec
from ckptd.erasure.engines import CANDIDATES, ISAL, ZFEC, Candidate, Engines, MakeCodec
from ckptd.erasure.field import coefficients
from ckptd.errors import ConfigError
from ckptd.ids import SnapshotId
from ckptd.manifest import Group, JobManifest, Member

from . import oracle


class FlipsABit(ZfecCodec):
    """Parity with one bit wrong, as of a faulty kernel; wrong only in codes of `only` if given."""

    engine = "flips a bit"
    only: tuple[int, int] | None = None

    def encode(self, data: Any, parity: Any) -> None:
        super().encode(data, parity)
        if self.only in (None, (self.data_shards, self.parity_shards)):
            memoryview(parity[0]).cast("B")[0] ^= 1


class WrongIn72(FlipsABit):
    engine = "wrong in 7+2"
    only = (7, 2)


class WrongTail(ZfecCodec):
    """Right but for shards shorter than a vector register, which no vector of ours has."""

    engine = "wrong tail"

    def encode(self, data: Any, parity: Any) -> None:
        super().encode(data, parity)
        if len(parity[0]) < 32:
            parity[0][:] = bytes(len(parity[0]))


def missing() -> tuple[str, MakeCodec]:
    raise CodecError("it is not installed")


def fast(make: MakeCodec, name: str = "fast 1.0") -> Candidate:
    return Candidate(ISAL, "fast", lambda: (name, make))


MISSING = Candidate(ISAL, "fast", missing)
GOOD = Candidate(ZFEC, "zfec", lambda: (ZfecCodec.engine, ZfecCodec))


class TestTheCoefficients:
    @pytest.mark.parametrize(("k", "m"), [(1, 1), (1, 255), (2, 2), (6, 3), (32, 8), (128, 128)])
    def test_they_are_the_generator(self, k: int, m: int) -> None:
        rows = oracle.generator(k, m)
        assert coefficients(range(k), range(k + m)) == b"".join(map(bytes, rows))

    @pytest.mark.parametrize(
        ("given", "wanted"), [([1, 3, 4], [0, 2]), ([2, 3, 4], [0, 1, 2]), ([255, 7, 0], [1])]
    )
    def test_they_are_the_inverse_of_what_is_left(
        self, given: list[int], wanted: list[int]
    ) -> None:
        rows = oracle.generator(3, 253)
        back = oracle.inverse([rows[number] for number in given])
        assert coefficients(given, wanted) == b"".join(bytes(back[number]) for number in wanted)


class TestTheChoice:
    def test_the_best_that_works_is_used(self) -> None:
        class Fast(ZfecCodec):
            engine = "fast 1.0"

        found = Engines(candidates=[fast(Fast), GOOD])
        assert found.open(4, 2).engine == "fast 1.0"
        used, other = found.listing()
        assert (used.name, used.in_use, used.reason) == ("fast 1.0", True, "")
        assert (other.in_use, other.reason) == (False, "a better engine is in use")

    def test_one_that_is_missing_is_passed_over_with_the_reason(self) -> None:
        found = Engines(candidates=[MISSING, GOOD])
        assert found.open(4, 2).engine == ZfecCodec.engine
        assert [(one.name, one.in_use, one.reason) for one in found.listing()] == [
            ("fast", False, "it is not installed"),
            (ZfecCodec.engine, True, ""),
        ]

    @pytest.mark.parametrize(
        ("broken", "says"),
        [
            (FlipsABit, r"self-test of flips a bit 1\+1: data shards \[0\] did not decode to"),
            (WrongTail, r"self-test of wrong tail 1\+1: shards of 1 bytes are coded otherwise"),
        ],
    )
    def test_one_that_computes_wrong_bytes_is_never_used(
        self, broken: type[Codec], says: str
    ) -> None:
        found = Engines(candidates=[fast(broken, broken.engine), GOOD])
        assert isinstance(found.open(4, 2), ZfecCodec)
        refused, used = found.listing()
        assert used.in_use
        assert (refused.name, refused.in_use) == (broken.engine, False)
        with pytest.raises(CodecError, match=says):
            raise CodecError(refused.reason)

    def test_one_that_fails_in_one_geometry_is_given_up_for_all(self) -> None:
        """A decoder that needs the geometry notices at once; its answer is no longer trusted."""
        found = Engines(candidates=[fast(WrongIn72, "wrong in 7+2"), GOOD])
        assert found.open(4, 2).engine == "wrong in 7+2"
        assert found.open(7, 2).engine == ZfecCodec.engine
        assert found.open(4, 2).engine == ZfecCodec.engine
        assert "wrong in 7+2 7+2: data shards [0, 1]" in found.listing()[0].reason

    def test_it_is_loaded_once_however_many_threads_ask(self) -> None:
        loads: list[int] = []

        def load() -> tuple[str, MakeCodec]:
            loads.append(1)
            return ZfecCodec.engine, ZfecCodec

        found = Engines(candidates=[Candidate(ZFEC, "zfec", load)])
        with ThreadPoolExecutor(4) as pool:
            codecs = list(pool.map(lambda k: found.open(k, 2), range(1, 9)))
        assert [codec.data_shards for codec in codecs] == list(range(1, 9))
        assert len(loads) == 1

    def test_one_that_is_asked_for_must_work(self) -> None:
        with pytest.raises(
            CodecError,
            match=r"the isa-l engine was chosen and cannot be used: fast: it is not inst",
        ):
            Engines("isa-l", [MISSING, GOOD]).open(4, 2)
        assert isinstance(Engines("zfec", [fast(FlipsABit), GOOD]).open(4, 2), ZfecCodec)

    def test_when_none_works_every_reason_is_given(self) -> None:
        broken = Candidate(ZFEC, "zfec", lambda: ("zfec 9", FlipsABit))
        with pytest.raises(
            CodecError, match=r"no erasure engine works: fast: it is .*; zfec: self"
        ):
            Engines(candidates=[MISSING, broken]).listing()

    def test_what_does_not_exist_cannot_be_asked_for(self) -> None:
        with pytest.raises(CodecError, match=r"no erasure engine 'gpu': choose auto, isa-l, zfec"):
            open_codec(4, 2, "gpu")


class TestThisMachine:
    def test_every_engine_is_listed_and_one_is_in_use(self) -> None:
        found = engines()
        assert len(found) == len(CANDIDATES)
        assert [engine.name for engine in found if engine.in_use] == [open_codec(6, 2).engine]
        assert all(engine.reason for engine in found if not engine.in_use)

    def test_where_pyeclib_is_installed_its_library_is_used(self) -> None:
        try:
            isal.bundled_path()
        except CodecError as error:
            pytest.skip(str(error))
        name, reason = engine_in_use()
        assert name.startswith("isa-l 2.")
        assert name.endswith(" (pyeclib)")
        assert reason == ""

    def test_zfec_can_be_chosen(self) -> None:
        assert engine_in_use("zfec") == (ZfecCodec.engine, "the zfec engine was chosen")

    def test_the_environment_chooses_for_agents(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CKPTD_ERASURE_ENGINE", "zfec")
        group = Group(tuple(Member(name, ()) for name in "abc"), 1)
        manifest = JobManifest(SnapshotId("job", 1, 1), 2, (group,), "zfec", 4096, ())
        assert _erasure_engine()[0] == ZfecCodec.engine
        assert protect.codec_for(manifest, group).engine == ZfecCodec.engine
        monkeypatch.setenv("CKPTD_ERASURE_ENGINE", "fastest")
        with pytest.raises(ConfigError, match="CKPTD_ERASURE_ENGINE is 'fastest'"):
            _erasure_engine()
        with pytest.raises(ConfigError, match="CKPTD_ERASURE_ENGINE is 'fastest'"):
            protect.codec_for(manifest, group)

    def test_an_agent_whose_chosen_engine_is_unusable_does_not_start(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unusable(choice: str) -> tuple[str, str]:
            raise CodecError("the isa-l engine was chosen and cannot be used: why")

        monkeypatch.setenv("CKPTD_ERASURE_ENGINE", "isa-l")
        monkeypatch.setattr("ckptd.agent.shell.engine_in_use", unusable)
        with pytest.raises(ConfigError, match=r"cannot be used: why \(CKPTD_ERASURE_ENGINE is isa"):
            _erasure_engine()


class TestTheLibrary:
    def test_a_missing_one(self) -> None:
        with pytest.raises(CodecError, match=r"cannot be loaded: .*libnot-there"):
            isal.load("libnot-there.so.2", "system")

    def test_one_without_erasure_codes(self) -> None:
        name = ctypes.util.find_library("c") or "libc.so.6"
        with pytest.raises(CodecError, match=r"cannot be loaded: .*ec_init_tables"):
            isal.load(name, "system")

    def test_what_is_no_library(self, tmp_path: Path) -> None:
        path = tmp_path / "libisal.so.2"
        path.write_bytes(b"not a library")
        with pytest.raises(CodecError, match="cannot be loaded"):
            isal.load(str(path), "system")

    def test_without_pyeclib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def files(name: str) -> None:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "files", files)
        with pytest.raises(CodecError, match="pyeclib is not installed: pip install pyeclib"):
            isal.bundled_path()

    @pytest.mark.parametrize("listed", [None, []])
    def test_pyeclib_without_the_library_and_without_a_list_of_files(
        self, listed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        folder = tmp_path / "pyeclib.libs"
        folder.mkdir()
        monkeypatch.setattr(metadata, "files", lambda name: listed)
        monkeypatch.setattr(isal, "_folders_beside_package", lambda: [folder])
        with pytest.raises(CodecError, match=r"brings no libisal\*\.so\*"):
            isal.bundled_path()
        there = folder / "libisal-1234.so.2"
        there.touch()
        assert isal.bundled_path() == there
