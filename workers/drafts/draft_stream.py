"""The messages between workers and draft workers, sent over ZeroMQ.

Unlike tokens, drafts may be lost: positions say what each side knows, missing tokens are reported,
and every message describes the current state, not changes to an earlier one. Both sides name their
incarnation, so that a restarted peer, or a late message of the one before, is recognised.
"""

import math
from typing import Annotated

import msgspec

from workers.token_stream import StreamAddress

Count = Annotated[int, msgspec.Meta(ge=0)]
TokenIds = list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]]


class DraftWorkerAddress(msgspec.Struct, frozen=True):
    """Identity and endpoint of a draft worker."""

    draft_worker_id: str
    incarnation: str
    """Changes with each start of its process."""
    stream: StreamAddress


class ContextDelta(msgspec.Struct, array_like=True):
    """New tokens of a request."""

    request_id: str
    position: Count
    """Number of tokens of the request before these; 0 starts it again."""
    token_ids: Annotated[TokenIds, msgspec.Meta(min_length=1)]
    num_wanted: Count
    """Number of drafts that the worker could use; 0: none now, but the request goes on."""
    hidden_states: bytes = b""
    """float16 `[n, hidden_size]`: the target's hidden states at the n tokens before the last."""


class ContextsMessage(msgspec.Struct, array_like=True):
    """Sent by a worker after a step that produced tokens."""

    token: bytes
    """Token of the draft worker's address, without which messages are ignored."""
    worker: str
    """Incarnation of the worker."""
    seq: Count
    """Number of the message, counted per draft worker."""
    contexts: list[ContextDelta]
    finished: list[str]
    """Requests that have ended."""
    memories: list[TokenIds] = []
    """Outputs that the sender has seen, if it is another draft worker."""


class DraftTree(msgspec.Struct, array_like=True):
    """A drafter's guesses for one request; the fields are those of `drafter.Draft`."""

    request_id: str
    drafter: str
    position: Count
    token_ids: TokenIds
    parents: list[Annotated[int, msgspec.Meta(ge=-1)]]
    probs: list[float]

    def __post_init__(self) -> None:
        """Raise ValueError unless it is a tree: to a decoder, another form of garbage."""
        if not len(self.token_ids) == len(self.parents) == len(self.probs):
            raise ValueError("a tree needs as many parents and probabilities as tokens")
        if any(parent >= node for node, parent in enumerate(self.parents)):
            raise ValueError("a parent must come before its children")
        if not all(0 <= prob < math.inf for prob in self.probs):
            raise ValueError("a probability must be finite and not negative")


class DraftsMessage(msgspec.Struct, array_like=True):
    """Sent by a draft worker: the answer to all messages up to `seq`, or later, better drafts."""

    incarnation: str
    seq: Count
    """Number of the last message received."""
    drafts: list[DraftTree]
    unknown: list[str]
    """Requests with missing tokens, to be sent from their beginning."""


encode = msgspec.msgpack.Encoder().encode
decode_contexts = msgspec.msgpack.Decoder(ContextsMessage).decode
decode_drafts = msgspec.msgpack.Decoder(DraftsMessage).decode
