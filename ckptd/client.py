"""Questions to the coordinator, from the CLI."""

import json
from typing import Any

import zmq

from ckptd.control import client_socket
from ckptd.errors import CoordinatorUnreachable, ProtocolError, Refused
from ckptd.keys import ClusterKey
from ckptd.wire import Answer, AskStatus, ClientMessage, ClientOrder, Decoder, encode


def ask_status(endpoint: str, key: ClusterKey, timeout_s: float = 5.0) -> dict[str, Any]:
    """Everything the coordinator knows. Raises CoordinatorUnreachable or ProtocolError."""
    document: dict[str, Any] = _ask(endpoint, key, AskStatus(), timeout_s)
    return document


def give_order(
    endpoint: str, key: ClusterKey, order: ClientOrder, timeout_s: float = 5.0
) -> dict[str, Any]:
    """Have the coordinator do something; returns everything it knows then.

    Raises Refused with the reason, or CoordinatorUnreachable.
    """
    document: dict[str, Any] = _ask(endpoint, key, order, timeout_s)
    return document


def _ask(endpoint: str, key: ClusterKey, question: ClientMessage, timeout_s: float) -> Any:
    context = zmq.Context()
    try:
        socket = client_socket(context, b"", key)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise CoordinatorUnreachable(
                f"{endpoint!r} is not an address: {error}; give one like tcp://127.0.0.1:7070"
            ) from error
        with socket:
            socket.rcvtimeo = socket.sndtimeo = int(timeout_s * 1000)
            try:
                socket.send(encode(question))
                frame = socket.recv()
            except zmq.Again:
                raise CoordinatorUnreachable(
                    f"no coordinator answers at {endpoint} within {timeout_s:g} s; is it running "
                    "there? Give its address with --coordinator or CKPTD_COORDINATOR"
                    + (
                        " (with another key than its own, --key-file, it does not answer either)"
                        if key.secret
                        else ", and its key, if it has one, with --key-file"
                    )
                ) from None
    finally:
        context.destroy(linger=0)
    answer = Decoder[Answer](Answer).decode(frame)
    if answer.error:
        if not answer.body:
            raise ProtocolError(answer.error)
        raise Refused(answer.error)
    return json.loads(answer.body)
