"""Questions to the coordinator, from the CLI."""

import json
from typing import Any

import zmq

from ckptd.control import client_socket
from ckptd.errors import CoordinatorUnreachable, ProtocolError, Refused
from ckptd.keys import ClusterKey
from ckptd.wire import Answer, AskStatus, ClientMessage, Decoder, RemoveJob, encode


def ask_status(endpoint: str, key: ClusterKey, timeout_s: float = 5.0) -> dict[str, Any]:
    """Everything the coordinator knows. Raises CoordinatorUnreachable or ProtocolError."""
    document: dict[str, Any] = _ask(endpoint, key, AskStatus(), timeout_s)
    return document


def remove_job(endpoint: str, key: ClusterKey, job: str, timeout_s: float = 5.0) -> None:
    """Forget a job everywhere. Raises Refused with the reason, or CoordinatorUnreachable."""
    _ask(endpoint, key, RemoveJob(job), timeout_s)


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
