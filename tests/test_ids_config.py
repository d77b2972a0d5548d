"""Names, settings and keys: what is refused, and whether the message says what to do."""

import base64
import os
import uuid
from pathlib import Path

import pytest
import zmq

from ckptd.config import TrainerConfig, erasure_engine, runtime_dir, trainer_config
from ckptd.errors import ConfigError
from ckptd.ids import SnapshotId, check_job_id, check_node_id
from ckptd.keys import ClusterKey, check_bind, new_key


class TestJobIds:
    @pytest.mark.parametrize("job", ["llama", "7b-run.2_x", "123456", "a" * 128, "nonesuch"])
    def test_names_that_can_be_found_again(self, job: str) -> None:
        assert check_job_id(job) == job

    @pytest.mark.parametrize("job", ["", "none", "None", "NONE"])
    def test_no_name(self, job: str) -> None:
        with pytest.raises(
            ConfigError, match=r"does not name a job; give the job a name.*CKPTD_JOB"
        ):
            check_job_id(job)

    @pytest.mark.parametrize("dashes", [True, False])
    @pytest.mark.parametrize("upper", [True, False])
    def test_random_ones(self, dashes: bool, upper: bool) -> None:
        """As `torchrun --standalone` makes them: a restarted job would not find its snapshots."""
        job = str(uuid.UUID(int=0xA1B2C3D4E5F60718293A4B5C6D7E8F90))
        job = job if dashes else job.replace("-", "")
        with pytest.raises(ConfigError, match="looks random"):
            check_job_id(job.upper() if upper else job)

    @pytest.mark.parametrize(
        "job",
        [" ", "my job", "job\n", "../etc", "a/b", "/abs", ".hidden", "-x", "jöb", "a" * 129, "a\0"],
    )
    def test_what_cannot_be_part_of_a_path(self, job: str) -> None:
        with pytest.raises(ConfigError, match="1 to 128 letters, digits"):
            check_job_id(job)
        with pytest.raises(ConfigError, match="node id"):
            check_node_id(job)

    def test_snapshots_are_ordered_by_life_then_step(self) -> None:
        ids = [SnapshotId("j", 2, 1), SnapshotId("j", 1, 10), SnapshotId("j", 1, 9)]
        assert [str(id) for id in sorted(ids)] == ["j/1.9", "j/1.10", "j/2.1"]


class TestTrainerConfig:
    def test_argument_over_ours_over_torchrun_over_slurm(self) -> None:
        environ = {
            "CKPTD_JOB": "ours",
            "TORCHELASTIC_RUN_ID": "torchrun",
            "SLURM_JOB_ID": "77",
            "CKPTD_AGENT": "/run/agent",
        }
        assert trainer_config("mine", "/run/other", environ).agent == "/run/other"
        assert trainer_config("mine", None, environ).job == "mine"
        for job in ("ours", "torchrun", "77"):
            config = trainer_config(None, None, environ)
            assert (config.job, config.agent) == (job, "/run/agent")
            environ.pop({"ours": "CKPTD_JOB", "torchrun": "TORCHELASTIC_RUN_ID"}.get(job, ""), None)

    def test_no_job_anywhere(self) -> None:
        with pytest.raises(ConfigError, match=r"Checkpointer\(job=\.\.\.\)"):
            trainer_config(None, "/run/agent", {})

    def test_torchruns_default_is_refused_rather_than_passed_over(self) -> None:
        with pytest.raises(ConfigError, match="the job id is 'none'"):
            trainer_config(None, "/run/agent", {"TORCHELASTIC_RUN_ID": "none"})

    def test_an_empty_argument_is_not_taken_for_none_given(self) -> None:
        with pytest.raises(ConfigError, match="the job id is ''"):
            trainer_config("", "/run/agent", {"CKPTD_JOB": "ours"})

    @pytest.mark.parametrize(
        "environ",
        [
            {},
            {"CKPTD_AGENT": ""},
            {"WORLD_SIZE": "4"},
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"},
            # torchrun on one node of a larger allocation
            {"GROUP_WORLD_SIZE": "1", "SLURM_STEP_NUM_NODES": "3"},
            {"GROUP_WORLD_SIZE": "many"},
        ],
    )
    def test_without_an_agent_one_machine_uses_the_embedded_one(
        self, environ: dict[str, str]
    ) -> None:
        assert trainer_config("mine", None, environ) == TrainerConfig("mine", "")

    @pytest.mark.parametrize(
        ("environ", "seen"),
        [
            ({"GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, "2 machines"),
            ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, "4 of 8 ranks on this one"),
            ({"SLURM_STEP_NUM_NODES": "3"}, "3 machines"),
        ],
    )
    def test_without_an_agent_several_machines_are_refused(
        self, environ: dict[str, str], seen: str
    ) -> None:
        with pytest.raises(ConfigError, match=rf"{seen}.*ckptd agent --socket PATH.*CKPTD_AGENT"):
            trainer_config("mine", None, environ)
        assert trainer_config("mine", "/run/agent", environ).agent == "/run/agent"

    def test_how_many_snapshots_are_kept_argument_over_environment_over_one(self) -> None:
        assert trainer_config("mine", "/a", {}).keep == 1
        assert trainer_config("mine", "/a", {"CKPTD_KEEP": "3"}).keep == 3
        assert trainer_config("mine", "/a", {"CKPTD_KEEP": "3"}, keep=2).keep == 2
        for environ, keep in (({"CKPTD_KEEP": "0"}, None), ({"CKPTD_KEEP": "x"}, None), ({}, 0)):
            with pytest.raises(ConfigError, match=r"(CKPTD_KEEP|keep)=.*1 or more"):
                trainer_config("mine", "/a", environ, keep=keep)

    def test_the_embedded_agents_directory_is_the_users_own(self) -> None:
        assert runtime_dir({"XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/run/user/7/ckptd")
        for environ in ({}, {"XDG_RUNTIME_DIR": ""}):
            assert runtime_dir(environ) == Path(f"/tmp/ckptd-{os.getuid()}")

    def test_the_erasure_engine_is_the_best_one_unless_one_is_named(self) -> None:
        for environ in ({}, {"CKPTD_ERASURE_ENGINE": ""}, {"CKPTD_ERASURE_ENGINE": "auto"}):
            assert erasure_engine(environ) == "auto"
        assert erasure_engine({"CKPTD_ERASURE_ENGINE": "isa-l"}) == "isa-l"
        with pytest.raises(ConfigError, match=r"ENGINE is 'ISAL'; it must be .*auto, isa-l, zfec"):
            erasure_engine({"CKPTD_ERASURE_ENGINE": "ISAL"})


class TestKeys:
    def key_file(self, tmp_path: Path, content: bytes, mode: int = 0o600) -> Path:
        path = tmp_path / "key"
        path.write_bytes(content)
        path.chmod(mode)
        return path

    def test_no_path_no_key(self) -> None:
        assert ClusterKey.read(None) == ClusterKey(b"")

    def test_what_keygen_makes_can_be_read(self, tmp_path: Path) -> None:
        content = new_key()
        key = ClusterKey.read(self.key_file(tmp_path, content))
        assert key.secret == base64.b64decode(content)
        assert len(key.secret) == 32
        assert content != new_key()

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"cannot read the cluster key .*ckptd keygen"):
            ClusterKey.read(tmp_path / "key")

    def test_a_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot read the cluster key"):
            ClusterKey.read(tmp_path)

    @pytest.mark.parametrize("content", [b"not base64!", b"\xff\xfe\xfd", b"abc"])
    def test_not_a_key(self, tmp_path: Path, content: bytes) -> None:
        with pytest.raises(ConfigError, match="cannot read the cluster key"):
            ClusterKey.read(self.key_file(tmp_path, content))

    @pytest.mark.parametrize("content", [b"", base64.b64encode(bytes(31))])
    def test_too_short(self, tmp_path: Path, content: bytes) -> None:
        with pytest.raises(ConfigError, match="is too short"):
            ClusterKey.read(self.key_file(tmp_path, content))

    @pytest.mark.parametrize("mode", [0o604, 0o640, 0o644, 0o602])
    def test_open_to_others(self, tmp_path: Path, mode: int) -> None:
        path = self.key_file(tmp_path, new_key(), mode)
        with pytest.raises(ConfigError, match=f"is readable by others: chmod 600 {path}"):
            ClusterKey.read(path)

    def test_curve_keys_are_zeromqs_and_one_for_each_role(self) -> None:
        key = ClusterKey(bytes(range(32)))
        secret = key.curve_secret("coordinator")
        assert len(zmq.curve_public(secret)) == 40
        assert secret == key.curve_secret("coordinator")
        assert secret != key.curve_secret("client")
        assert secret != ClusterKey(bytes(32)).curve_secret("coordinator")

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
    def test_loopback_needs_no_key(self, host: str) -> None:
        check_bind(host, ClusterKey(), "--listen")

    @pytest.mark.parametrize("host", ["0.0.0.0", "", "10.0.0.1", "::", "node7"])
    def test_anything_wider_does(self, host: str) -> None:
        with pytest.raises(ConfigError, match=r"--listen .*no cluster key; .*ckptd keygen FILE"):
            check_bind(host, ClusterKey(), "--listen")
        check_bind(host, ClusterKey(bytes(32)), "--listen")


@pytest.mark.parametrize(("restarts", "elastic"), [(None, False), ("0", False), ("3", True)])
def test_whether_a_launcher_starts_a_trainer_anew(restarts: str | None, elastic: bool) -> None:
    environ = {} if restarts is None else {"TORCHELASTIC_MAX_RESTARTS": restarts}
    assert trainer_config("mine", "/run/agent", environ).elastic is elastic
