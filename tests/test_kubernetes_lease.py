"""The Kubernetes Lease: on a real API server where etcd, kube-apiserver and kubectl are installed.

Elsewhere a stand-in for kubectl keeps the objects in a file, with the API's rule for versions.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ckptd.cli.local_cluster import wait_until
from ckptd.coordinator.kubernetes_lease import KubernetesLease
from ckptd.errors import ConfigError
from tests.kubernetes import put_kubectl

DURATION_S = 3.0
NEEDED = ("etcd", "kube-apiserver", "kubectl", "openssl")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _real_cluster(folder: Path, stack: ExitStack) -> None:
    """etcd and an API server, and a kubeconfig for kubectl."""
    client, peer, secure = _free_port(), _free_port(), _free_port()

    def start(*command: str) -> subprocess.Popen[bytes]:
        log = stack.enter_context((folder / f"{command[0]}.log").open("wb"))
        process = subprocess.Popen(command, stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.kill)
        return process

    urls = f"http://127.0.0.1:{client}"
    start(
        *("etcd", "--data-dir", str(folder / "etcd"), "--listen-client-urls", urls),
        *("--advertise-client-urls", urls),
        *("--listen-peer-urls", f"http://127.0.0.1:{peer}"),
    )
    key, tokens = folder / "sa.key", folder / "tokens.csv"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    tokens.write_text('secret,admin,1,"system:masters"\n')
    start(
        *("kube-apiserver", "--etcd-servers", urls, "--secure-port", str(secure)),
        *("--cert-dir", str(folder / "certs"), "--token-auth-file", str(tokens)),
        *("--service-account-key-file", str(key), "--service-account-issuer", "https://local"),
        *("--service-account-signing-key-file", str(key), "--bind-address", "127.0.0.1"),
        *("--service-cluster-ip-range", "10.0.0.0/24", "--authorization-mode", "RBAC"),
        "--disable-admission-plugins=ServiceAccount",
    )
    config = folder / "config"
    os.environ["KUBECONFIG"] = str(config)
    for change in (
        f"set-cluster c --server https://127.0.0.1:{secure} --insecure-skip-tls-verify=true",
        "set-credentials admin --token secret",
        "set-context c --cluster c --user admin --namespace default",
        "use-context c",
    ):
        subprocess.run(["kubectl", "config", *change.split()], check=True, capture_output=True)

    def ready() -> bool:
        command = ["kubectl", "get", "namespace", "default"]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    wait_until("the API server", ready, 120)


@pytest.fixture(scope="module", params=["stand-in", "real"])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("kubernetes")
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        if request.param == "real":
            missing = [name for name in NEEDED if shutil.which(name) is None]
            if missing:
                pytest.skip(f"not installed: {', '.join(missing)}")
            patch.setenv("KUBECONFIG", "")
            _real_cluster(folder, stack)
        else:
            put_kubectl(folder, patch)
        yield request.param


@pytest.fixture
def name(cluster: str, request: pytest.FixtureRequest) -> str:
    return "ckptd-" + "".join(c if c.isalnum() else "-" for c in request.node.name.lower())[
        :40
    ].strip("-")


def lease(name: str, holder: str, duration_s: float = DURATION_S) -> KubernetesLease:
    return KubernetesLease(name, duration_s, holder)


class Waiting:
    """Somebody who waits for the lease."""

    def __init__(self, wanted: KubernetesLease) -> None:
        self.lease, self.term = wanted, -1
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.term = self.lease.acquire()


class TestLease:
    def test_it_keeps_the_highest_term_for_the_next_holder(self, name: str) -> None:
        first = lease(name, "a")
        assert first.acquire() == 0
        first.record(7)
        first.record(3)
        first.release()
        second = lease(name, "b")
        assert second.acquire() == 7
        second.release()

    def test_one_that_is_renewed_is_waited_for(self, name: str) -> None:
        first = lease(name, "a")
        first.acquire()
        first.record(2)
        other = Waiting(lease(name, "b"))
        time.sleep(1.5 * DURATION_S)
        assert other.term == -1
        assert not first.lost
        first.release()
        wait_until("the one who waits to have it", lambda: other.term == 2, 30)
        other.lease.release()

    def test_of_several_that_want_it_one_gets_it(self, name: str) -> None:
        everyone = [Waiting(lease(name, f"h{number}")) for number in range(4)]
        wait_until("somebody who has it", lambda: any(each.term >= 0 for each in everyone), 60)
        time.sleep(1)
        assert sum(each.term >= 0 for each in everyone) == 1
        while everyone:
            wait_until("somebody who has it", lambda: any(each.term >= 0 for each in everyone), 60)
            (holder,) = (each for each in everyone if each.term >= 0)
            everyone.remove(holder)
            holder.lease.release()

    def test_a_holder_that_was_stopped_for_long_has_lost_it(self, name: str) -> None:
        program = (
            "import sys, time\n"
            "from ckptd.coordinator.kubernetes_lease import KubernetesLease\n"
            "lease = KubernetesLease(sys.argv[1], float(sys.argv[2]), 'stopped')\n"
            "lease.acquire()\n"
            "print('held', flush=True)\n"
            "while not lease.lost: time.sleep(0.05)\n"
            "lease.release()\n"
            "print(lease.lost, flush=True)\n"
        )
        command = [sys.executable, "-c", program, name, str(DURATION_S)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            process.send_signal(signal.SIGSTOP)
            second = lease(name, "second")
            second.acquire()
            process.send_signal(signal.SIGCONT)
            assert "second" in process.stdout.readline() or process.wait() == 0
            assert not second.lost
            second.release()

    def test_somebody_who_only_annotates_it_takes_nothing(self, cluster: str, name: str) -> None:
        if cluster != "real":
            pytest.skip("the stand-in cannot annotate")
        first = lease(name, "a")
        first.acquire()
        subprocess.run(
            ["kubectl", "annotate", "lease", name, "by=hand"], check=True, capture_output=True
        )
        time.sleep(DURATION_S)
        first.record(4)
        assert not first.lost
        first.release()


def test_a_cluster_that_is_away_costs_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_kubectl(tmp_path, monkeypatch)
    held = lease("one", "a")
    held.acquire()
    (tmp_path / "away").touch()
    wait_until("its loss", lambda: held.lost, 60)
    assert "could not be renewed in time" in held.lost
    held.release()
    with pytest.raises(ConfigError, match="connection refused"):
        lease("one", "b").acquire()


def test_an_answer_that_is_none_costs_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_kubectl(tmp_path, monkeypatch)
    held = lease("one", "a")
    held.acquire()
    (tmp_path / "kubectl").write_text("#!/bin/sh\necho '<html>'\n")
    wait_until("its loss", lambda: held.lost, 60)
    assert "cannot be renewed" in held.lost
    held.release()


def test_without_kubectl_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="install it, or put it on PATH"):
        lease("one", "a").acquire()


@pytest.mark.parametrize("where", ["", "a/b/c", "space/", "--all"])
def test_a_name_that_is_none(where: str) -> None:
    with pytest.raises(ConfigError, match="give NAMESPACE/NAME"):
        KubernetesLease(where)
