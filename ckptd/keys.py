"""The cluster key: one secret, from which all keys on the wire are derived.

Control connections are CURVE-encrypted with key pairs derived from it, and cell connections are
accepted after a challenge that only its holders can answer. Without a key everything stays on
loopback.
"""

import base64
import hashlib
import hmac
import ipaddress
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path

from ckptd.errors import ConfigError

NONCE_BYTES = 32
_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """`secret` is empty where no key is configured."""

    secret: bytes = b""

    @classmethod
    def read(cls, path: Path | None) -> "ClusterKey":
        """The key in a file that `ckptd keygen` made; no path, no key. Raises ConfigError."""
        if path is None:
            return cls()
        try:
            mode = path.stat().st_mode
            secret = base64.b64decode(path.read_bytes().strip(), validate=True)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot read the cluster key {path}: {error}; make one with `ckptd keygen {path}` "
                "and copy it to every node"
            ) from error
        if len(secret) < 32:
            raise ConfigError(f"the cluster key {path} is too short; make one with `ckptd keygen`")
        if mode & 0o077:
            raise ConfigError(f"the cluster key {path} is readable by others: chmod 600 {path}")
        return cls(secret)

    def curve_secret(self, role: str) -> bytes:
        """The CURVE secret key of `role` ("coordinator" or "client"), in Z85."""
        raw = hmac.digest(self.secret, b"ckptd curve " + role.encode(), hashlib.sha256)
        return _z85(raw)

    def proof(self, role: bytes, ours: bytes, theirs: bytes) -> bytes:
        """Answer to a challenge on a cell connection."""
        return hmac.digest(self.secret, b"ckptd cells " + role + ours + theirs, hashlib.sha256)


def new_key() -> bytes:
    """Content of a key file."""
    return base64.b64encode(secrets.token_bytes(32)) + b"\n"


def check_bind(host: str, key: ClusterKey, flag: str) -> None:
    """Raise ConfigError when `host` is not loopback and there is no key."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not key.secret:
        raise ConfigError(
            f"{flag} {host} can be reached from outside this machine, and there is no cluster "
            "key; make one with `ckptd keygen FILE` and give it to every node with --key-file"
        )


def _z85(raw: bytes) -> bytes:
    out: list[str] = []
    for (value,) in struct.iter_unpack(">I", raw):
        digits = []
        for _ in range(5):
            value, digit = divmod(value, 85)
            digits.append(_Z85[digit])
        out.extend(reversed(digits))
    return "".join(out).encode()
