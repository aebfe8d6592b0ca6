"""A worker's side of drafting: tells a draft worker of new tokens, and keeps what it answers."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from workers.drafts.draft_stream import (
    ContextDelta,
    ContextsMessage,
    DraftTree,
    DraftWorkerAddress,
    connect,
    decode_drafts,
    encode,
)

MAX_UNANSWERED = 4
"""Messages on their way to a draft worker; with so many, it is left alone until it answers. What it
has missed goes with the next message."""
RETRY_S = 1.0
"""One that owes answers for so long gets a message more now and then: they may have been lost."""
HOLD_MS = 1
"""An answer that is about to come is given so long before a step begins without it."""
MIN_STEP_S = 0.012
"""Of shorter steps that would be too great a share."""
PUNCTUAL = 0.5
"""A draft worker is given that time if so large a share of its answers came within it lately."""
PUNCTUALITY_RATE = 1 / 16
"""Weight of one answer in that share."""
RETRY_ANSWERS = 32
"""One that is not punctual is given a chance in so many steps."""
QUEUE_LIMIT = 64
"""Drafts messages that wait to be read; more are dropped by the sender."""


@dataclass(slots=True)
class DraftCounts:
    """What came of drafts since the worker's start, in draft tokens."""

    proposed: int = 0
    """That came from draft workers."""
    verified: int = 0
    accepted: int = 0
    late: int = 0
    """Whose place in the request was taken when they came; if they were right, the drafts behind
    them are used."""
    stale: int = 0
    """That did not continue the tokens that had come meanwhile, or were another incarnation's."""
    accepted_at: list[int] = dataclasses.field(default_factory=list)
    """Accepted drafts by their position behind the newest token, from the first on."""
    verified_at: list[int] = dataclasses.field(default_factory=list)

    def count(self, num_drafts: int, num_accepted: int) -> None:
        """Count the drafts of one request that a step has verified."""
        self.verified += num_drafts
        self.accepted += num_accepted
        for counts, number in ((self.verified_at, num_drafts), (self.accepted_at, num_accepted)):
            counts.extend([0] * (number - len(counts)))
            for position in range(number):
                counts[position] += 1

    def __add__(self, other: "DraftCounts") -> "DraftCounts":
        """Both together."""

        def added(name: str) -> Any:
            mine, its = getattr(self, name), getattr(other, name)
            if isinstance(mine, int):
                return mine + its
            return [sum(pair) for pair in itertools.zip_longest(mine, its, fillvalue=0)]

        return DraftCounts(**{field.name: added(field.name) for field in dataclasses.fields(self)})


@dataclass(frozen=True, slots=True)
class DraftPath:
    """The likeliest guesses of one drafter at the next tokens of a request."""

    drafter: str
    token_ids: list[int]
    probs: list[float]


@dataclass(slots=True)
class _Context:
    num_sent: int = 0
    """Tokens that the draft worker has been told."""
    trees: dict[str, DraftTree] = dataclasses.field(default_factory=dict)
    """The last of each drafter."""


class DraftClient:
    """Used from the engine's thread only. Nothing here waits: what has not come is not used."""

    def __init__(self, incarnation: str) -> None:
        """`incarnation` names this life of the worker."""
        self.counts_of: defaultdict[str, DraftCounts] = defaultdict(DraftCounts)
        """By drafter."""
        self.num_held_back = 0
        """Steps whose new tokens were not sent at once, as the draft worker owed answers."""
        self._incarnation = incarnation
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._draft_worker: DraftWorkerAddress | None = None
        self._contexts: dict[str, _Context] = {}
        self._deltas: list[ContextDelta] = []
        self._finished: list[str] = []
        self._seq = self._answered = 0
        self._punctuality = 1.0
        self._num_unwaited = 0
        self._sent_s = self._heard_s = 0.0
        """When a message was last tried to be sent, and since when the oldest answer is owed."""

    @property
    def counts(self) -> DraftCounts:
        """What came of all drafters' drafts."""
        return sum(self.counts_of.values(), DraftCounts())

    @property
    def draft_worker(self) -> DraftWorkerAddress | None:
        """The draft worker that it speaks to."""
        return self._draft_worker

    def silent_s(self, now: float) -> float:
        """How long the draft worker has owed an answer and given none; 0 if it owes none."""
        return now - self._heard_s if self._seq > self._answered else 0.0

    def _is_behind(self, now: float) -> bool:
        return self._seq - self._answered >= MAX_UNANSWERED and now - self._sent_s < RETRY_S

    def assign(self, draft_worker: DraftWorkerAddress | None) -> None:
        """Speak to this draft worker from now on; it is told all requests from their beginning."""
        if draft_worker == self._draft_worker:
            return
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._draft_worker = draft_worker
        self._seq = self._answered = 0
        self._punctuality, self._num_unwaited = 1.0, 0
        self._finished.clear()
        self._deltas.clear()
        for context in self._contexts.values():
            context.num_sent = 0
        if draft_worker is not None:
            self._socket = connect(
                self._zmq, draft_worker, send_limit=2 * MAX_UNANSWERED, receive_limit=QUEUE_LIMIT
            )

    def update(
        self,
        request_id: str,
        token_ids: Sequence[int],
        num_wanted: int,
        hidden_states: bytes,
        now: float,
    ) -> bool:
        """Have the draft worker know `token_ids`, all of the request; whether `flush` sends it."""
        if self._draft_worker is None or self._is_behind(now):
            return False
        context = self._contexts.setdefault(request_id, _Context())
        if context.num_sent > len(token_ids):
            context.num_sent = 0  # it is another one under the same id
        new = list(token_ids[context.num_sent :])
        if not new:
            return False
        delta = ContextDelta(request_id, context.num_sent, new, num_wanted, hidden_states)
        self._deltas.append(delta)
        context.num_sent += len(new)
        return True

    def finish(self, request_id: str) -> None:
        """The request has ended."""
        if self._contexts.pop(request_id, None) is not None:
            self._deltas = [delta for delta in self._deltas if delta.request_id != request_id]
            self._finished.append(request_id)

    def flush(self, now: float) -> None:
        """Send what is new, unless the draft worker is behind."""
        if self._socket is None or self._draft_worker is None:
            return
        if self._is_behind(now):
            self.num_held_back += 1
            return
        if not (self._deltas or self._finished):
            return
        message = ContextsMessage(
            self._draft_worker.stream.token,
            self._incarnation,
            self._seq + 1,
            self._deltas,
            self._finished,
        )
        self._sent_s = now
        try:
            self._socket.send(encode(message), zmq.DONTWAIT)
        except zmq.Again:  # no connection, and no room to wait for one
            self.num_held_back += 1
            for delta in self._deltas:
                context = self._contexts[delta.request_id]
                context.num_sent = min(context.num_sent, delta.position)
            self._contexts = {id_: c for id_, c in self._contexts.items() if c.num_sent}
            self._deltas = []
            return
        if self._seq == self._answered:
            self._heard_s = now
        self._seq += 1
        self._deltas, self._finished = [], []

    def await_answer(self, step_s: float, now: float) -> None:
        """Before a step of about `step_s` seconds: give an answer that is about to come a moment.

        It takes a fraction of a millisecond, of which the worker's own work after a step leaves
        little to be waited for; what would not come within HOLD_MS is not waited for again.
        """
        self.poll(now)
        if self._socket is None or self._seq == self._answered or step_s < MIN_STEP_S:
            return
        self._num_unwaited += 1
        if self._punctuality < PUNCTUAL and self._num_unwaited < RETRY_ANSWERS:
            return
        self._num_unwaited = 0
        self._socket.poll(HOLD_MS)
        self.poll(now)
        came = self._seq == self._answered
        self._punctuality += PUNCTUALITY_RATE * (came - self._punctuality)

    def poll(self, now: float) -> None:
        """Take in what has come."""
        while self._socket is not None and self._socket.poll(0):
            try:
                message = decode_drafts(self._socket.recv())
            except (ValueError, RecursionError):
                continue  # a stranger that took over the port of a draft worker that is gone
            if self._draft_worker is None or message.incarnation != self._draft_worker.incarnation:
                for tree in message.drafts:
                    self.counts_of[tree.drafter].stale += len(tree.token_ids)
                continue
            self._answered = max(self._answered, min(message.seq, self._seq))
            self._heard_s = now
            for request_id in message.unknown:
                if context := self._contexts.get(request_id):
                    context.num_sent = 0
            for tree in message.drafts:
                counts = self.counts_of[tree.drafter]
                counts.proposed += len(tree.token_ids)
                if context := self._contexts.get(tree.request_id):
                    context.trees[tree.drafter] = tree
                    counts.late += _num_above(tree, context.num_sent - tree.position)
                else:
                    counts.stale += len(tree.token_ids)

    def paths(self, request_id: str, token_ids: Sequence[int]) -> list[DraftPath]:
        """Of each drafter, the likeliest path of guesses behind `token_ids`, all of the request.

        A tree that was made for fewer tokens is followed along those that came meanwhile.
        """
        context = self._contexts.get(request_id)
        if context is None:
            return []
        paths = []
        for drafter, tree in list(context.trees.items()):
            children = _children(tree)
            node = self._follow(tree, children, token_ids)
            path = _likeliest(tree, children, node) if node is not None else []
            if not path:
                del context.trees[drafter]
                self.counts_of[drafter].stale += len(tree.token_ids) if node is None else 0
                continue
            paths.append(
                DraftPath(drafter, [tree.token_ids[i] for i in path], [tree.probs[i] for i in path])
            )
        return paths

    def _follow(
        self, tree: DraftTree, children: dict[int, list[int]], token_ids: Sequence[int]
    ) -> int | None:
        """The node of the newest token, -1 if the tree begins behind it; None if it strays."""
        node = -1
        if tree.position > len(token_ids):
            return None
        for token in token_ids[tree.position :]:
            for child in children.get(node, ()):
                if tree.token_ids[child] == token:
                    node = child
                    break
            else:
                return None
        return node

    def close(self) -> None:
        """Close the socket."""
        self.assign(None)
        self._zmq.term()


def _children(tree: DraftTree) -> dict[int, list[int]]:
    """Nodes by their parent."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents):
        children.setdefault(parent, []).append(node)
    return children


def _num_above(tree: DraftTree, depth: int) -> int:
    """Nodes with fewer than `depth` others above them."""
    if depth <= 0:
        return 0
    depths: list[int] = []
    for parent in tree.parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return sum(of_node < depth for of_node in depths)


def _likeliest(tree: DraftTree, children: dict[int, list[int]], node: int) -> list[int]:
    """The path below `node` on which each node is the likeliest of its siblings."""
    path = []
    while below := children.get(node):
        node = max(below, key=lambda child: tree.probs[child])
        path.append(node)
    return path
