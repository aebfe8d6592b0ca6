"""What a worker and a draft worker say to each other, as ZeroMQ messages.

Unlike tokens, drafts may be lost: each side counts what the other knows by positions, says when it
lacks something, and speaks of its present state, never of a history. Both name their incarnation,
so that what a restarted peer does not know, or what an old one still says, is noticed.
"""

import msgspec
import zmq

from workers.token_stream import StreamAddress


class DraftWorkerAddress(msgspec.Struct, frozen=True):
    """Where a draft worker listens."""

    draft_worker_id: str
    incarnation: str
    """New at each start of its process."""
    stream: StreamAddress


class ContextDelta(msgspec.Struct, array_like=True):
    """Tokens of a request that the draft worker does not know yet."""

    request_id: str
    position: int
    """Tokens of the request before these; 0 begins it anew."""
    token_ids: list[int]
    num_wanted: int
    """Drafts that would be of use; 0: only keep up."""
    hidden_states: bytes = b""
    """float16 `[n, hidden_size]`: the target's states at the n tokens before the last."""


class ContextsMessage(msgspec.Struct, array_like=True):
    """From a worker, after a step that gave tokens."""

    token: bytes
    """The draft worker's, which keeps strangers on the network out."""
    worker: str
    """The worker's incarnation."""
    seq: int
    """Counts the messages to this draft worker."""
    contexts: list[ContextDelta]
    finished: list[str]
    """Requests that ended."""
    memories: list[list[int]] = []
    """Outputs that the sender, another draft worker, has seen."""


class DraftTree(msgspec.Struct, array_like=True):
    """A drafter's guesses for one request; the fields are those of `drafter.Draft`."""

    request_id: str
    drafter: str
    position: int
    token_ids: list[int]
    parents: list[int]
    probs: list[float]


class DraftsMessage(msgspec.Struct, array_like=True):
    """From a draft worker: the answer to all messages up to `seq`, or better drafts later."""

    incarnation: str
    seq: int
    """Of the last message that was taken in."""
    drafts: list[DraftTree]
    unknown: list[str]
    """Requests of which tokens are missing: to be sent whole."""


def connect(
    context: "zmq.Context[zmq.Socket[bytes]]",
    draft_worker: DraftWorkerAddress,
    *,
    send_limit: int,
    receive_limit: int,
) -> "zmq.Socket[bytes]":
    """A socket to a draft worker; at most so many messages wait on each way, and more are lost."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, send_limit)
    socket.setsockopt(zmq.RCVHWM, receive_limit)
    socket.setsockopt(zmq.IPV6, "[" in draft_worker.stream.endpoint)
    socket.connect(draft_worker.stream.endpoint)
    return socket


encode = msgspec.msgpack.Encoder().encode
decode_contexts = msgspec.msgpack.Decoder(ContextsMessage).decode
decode_drafts = msgspec.msgpack.Decoder(DraftsMessage).decode
