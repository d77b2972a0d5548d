"""A Kubernetes Lease, used as leader election there uses it: who holds it is the one coordinator.

The holder renews it. Whoever wants it watches for a lease duration, by his own clock, that nobody
does (as client-go's leaderelection: clocks of machines are never compared), and takes it with the
version that he has read, so that of several one succeeds. `kubectl` talks to the cluster: it knows
service accounts, kubeconfig files and whatever a cluster wants of its clients.
"""

import datetime
import json
import os
import secrets
import subprocess
import threading
import time
from typing import Any

import structlog

from ckptd.errors import CkptdError, ConfigError, Superseded

_TERM = "ckptd/term"
_NOBODY = ""
log = structlog.get_logger()


class _Refused(CkptdError):
    """It was not written."""


class _Changed(_Refused):
    """Somebody else has written it since it was read."""


class _Unreachable(_Refused):
    """The cluster did not answer, or not now."""


class KubernetesLease:
    """Held from `acquire` to `release`, or until `lost` says why no more."""

    exclusive = True

    def __init__(self, where: str, duration_s: float = 15.0, holder: str = "") -> None:
        """`where`: NAMESPACE/NAME, or NAME in kubectl's own namespace.

        `duration_s`: when others may take it after it was renewed last; at least 3.
        """
        namespace, _, self._name = where.rpartition("/")
        if not self._name or self._name.startswith("-") or "/" in namespace:
            raise ConfigError(f"--kubernetes-lease {where}: give NAMESPACE/NAME or NAME")
        self._namespace = ["--namespace", namespace] if namespace else []
        self._duration_s = duration_s
        self.holder = holder or f"{os.uname().nodename}-{secrets.token_hex(4)}"
        self._mutex = threading.Lock()
        self._lease: dict[str, Any] = {}
        self._renewed_s = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost = ""

    @property
    def lost(self) -> str:
        """Why it is no longer held, or "": said before anybody else may think that it is free."""
        held = self._thread is not None and not self._stop.is_set()
        if held and time.monotonic() > self._renewed_s + self._duration_s * 2 / 3:
            self._lost = self._lost or f"the lease {self._name} could not be renewed in time"
        return self._lost

    def acquire(self) -> int:
        """Wait until nobody holds it, and take it; returns the highest term that it has seen.

        Raises ConfigError if it cannot be used, and Superseded after `release`.
        """
        seen, since_s, waited = "", 0.0, False
        while not self._stop.is_set():
            try:
                found = self._read()
                if found is None:
                    self._write("create", {"metadata": {"name": self._name}})
                    break
                version = found["metadata"]["resourceVersion"]
                if version != seen:
                    seen, since_s = version, time.monotonic()
                spec = found.get("spec", {})
                free_s = since_s + (spec.get("leaseDurationSeconds") or 0) - time.monotonic()
                if not spec.get("holderIdentity") or free_s <= 0:
                    self._write("replace", found)
                    break
                if not waited:
                    log.info(
                        "waiting until the lease is free",
                        lease=self._name,
                        holder=spec["holderIdentity"],
                    )
                waited = True
                self._stop.wait(min(free_s, self._duration_s / 5))
            except _Changed:
                continue
            except _Unreachable as error:
                if not waited:
                    raise ConfigError(f"cannot use the lease {self._name}: {error}") from error
                log.warning("cannot read the lease", lease=self._name, error=str(error))
                self._stop.wait(self._duration_s / 5)
        else:
            raise Superseded(f"somebody else holds the lease {self._name}")
        self._thread = threading.Thread(target=self._renew, name="ckptd-lease", daemon=True)
        self._thread.start()
        return self._term

    def record(self, term: int) -> None:
        """Called before anything is ordered in `term`. Raises ConfigError if it cannot be kept."""
        if term <= self._term:
            return
        try:
            with self._mutex:
                self._renew_once(term)
        except _Refused as error:
            raise ConfigError(f"cannot write the lease {self._name}: {error}") from error

    def release(self) -> None:
        """Let somebody else hold it."""
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join()
        if not self.lost:
            try:
                self._write("replace", self._lease, _NOBODY)
            except _Refused as error:
                log.warning("the lease was not given back", lease=self._name, error=str(error))

    @property
    def _term(self) -> int:
        """The one in its annotation."""
        notes = self._lease["metadata"].get("annotations") or {}
        try:
            return int(notes.get(_TERM, 0))
        except ValueError:
            raise ConfigError(
                f"the lease {self._name} has the annotation {_TERM}={notes[_TERM]!r}, which is no "
                "number; remove it, or use a lease of another name"
            ) from None

    def _renew(self) -> None:
        while not self.lost and not self._stop.wait(self._duration_s / 3):
            try:
                with self._mutex:
                    self._renew_once()
            except _Unreachable as error:
                log.warning("cannot renew the lease", lease=self._name, error=str(error))
            except Exception as error:  # whatever it is, nobody else would renew it
                self._lost = f"the lease {self._name} cannot be renewed: {error}"

    def _renew_once(self, term: int | None = None) -> None:
        try:
            self._write("replace", self._lease, term=term)
        except _Changed:
            found = self._read()
            holder = found.get("spec", {}).get("holderIdentity") if found else None
            if found is None or holder != self.holder:
                self._lost = f"the lease {self._name} has another holder: {holder or 'nobody'}"
                raise
            # Somebody has noted something in it.
            self._write("replace", found, term=term)

    def _read(self) -> dict[str, Any] | None:
        text = self._kubectl("get", "lease", self._name, "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def _write(
        self, verb: str, lease: dict[str, Any], holder: str | None = None, term: int | None = None
    ) -> None:
        """Create it, or replace the version that was read; renewed by that."""
        began_s = time.monotonic()
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = dict(lease.get("spec", {}))
        if spec.get("holderIdentity") != self.holder:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = (spec.get("leaseTransitions") or 0) + 1
        spec["holderIdentity"] = self.holder if holder is None else holder
        spec["leaseDurationSeconds"] = max(1, round(self._duration_s))
        spec["renewTime"] = now
        metadata = dict(lease["metadata"])
        if term is not None:
            metadata["annotations"] = {**(metadata.get("annotations") or {}), _TERM: str(term)}
        kind = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
        body = json.dumps({**kind, "metadata": metadata, "spec": spec})
        self._lease = json.loads(self._kubectl(verb, "--filename", "-", given=body))
        self._renewed_s = began_s

    def _kubectl(self, *arguments: str, given: str | None = None) -> str:
        patience_s = max(1, round(self._duration_s / 3))
        limit = f"--request-timeout={patience_s}s"
        command = ["kubectl", *self._namespace, *arguments, "--output", "json", limit]
        try:
            done = subprocess.run(
                command,
                input=given or "",
                capture_output=True,
                text=True,
                timeout=2 * patience_s,
                check=False,
            )
        except OSError as error:
            raise ConfigError(
                f"--kubernetes-lease needs kubectl, which cannot be run: {error.strerror}; install "
                "it, or put it on PATH"
            ) from error
        except subprocess.TimeoutExpired:
            raise _Unreachable("kubectl did not end in time") from None
        if not done.returncode:
            return done.stdout
        # Above its last line it says what it tried before.
        reason = (done.stderr.splitlines() or [f"kubectl ended with {done.returncode}"])[-1]
        if "(Conflict)" in reason or "(AlreadyExists)" in reason:
            raise _Changed(reason)
        if "(Forbidden)" in reason:
            raise ConfigError(
                f"{reason}\nallow get, create and update of leases in coordination.k8s.io there"
            )
        raise _Unreachable(reason)
