"""ZeroMQ sockets for control, set up the one way that ckptd uses them."""

from typing import Any

import zmq
import zmq.auth.asyncio

from ckptd.keys import ClusterKey
from ckptd.wire import FRAME_LIMIT_BYTES

QUEUE_LIMIT_MESSAGES = 10_000
_ZAP_DOMAIN = "ckptd"


def client_socket(context: "zmq.Context[Any]", identity: bytes, key: ClusterKey) -> Any:
    """A DEALER for the coordinator, not connected yet; what cannot be sent at once is not queued.

    Watch it before you connect it, or the first connection may go unseen.
    """
    socket = context.socket(zmq.DEALER)
    if identity:
        socket.identity = identity
    socket.linger = 0
    socket.immediate = 1
    socket.sndhwm = socket.rcvhwm = QUEUE_LIMIT_MESSAGES
    socket.maxmsgsize = FRAME_LIMIT_BYTES
    socket.heartbeat_ivl = 1000
    socket.heartbeat_timeout = 5000
    socket.reconnect_ivl = 100
    socket.reconnect_ivl_max = 1000
    if key.secret:
        secret = key.curve_secret("client")
        socket.curve_secretkey = secret
        socket.curve_publickey = zmq.curve_public(secret)
        socket.curve_serverkey = zmq.curve_public(key.curve_secret("coordinator"))
    return socket


def server_socket(context: "zmq.Context[Any]", key: ClusterKey) -> Any:
    """The coordinator's ROUTER, not bound yet."""
    socket = context.socket(zmq.ROUTER)
    socket.linger = 0
    socket.router_handover = True
    socket.sndhwm = socket.rcvhwm = QUEUE_LIMIT_MESSAGES
    socket.maxmsgsize = FRAME_LIMIT_BYTES
    socket.heartbeat_ivl = 1000
    socket.heartbeat_timeout = 5000
    if key.secret:
        socket.curve_server = True
        socket.curve_secretkey = key.curve_secret("coordinator")
        socket.zap_domain = _ZAP_DOMAIN.encode()
    return socket


class OnlyHolders:
    """CURVE credentials: admits clients that hold the cluster key."""

    def __init__(self, key: ClusterKey) -> None:
        self._public = zmq.curve_public(key.curve_secret("client"))

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by pyzmq for every handshake."""
        return key == self._public


def start_authenticator(context: Any, key: ClusterKey) -> Any:
    """Refuse CURVE clients without the cluster key; returns the authenticator, or None."""
    if not key.secret:
        return None
    authenticator = zmq.auth.asyncio.AsyncioAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(_ZAP_DOMAIN, OnlyHolders(key))
    return authenticator
