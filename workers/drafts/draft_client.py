"""The worker's side of drafting: sends new tokens to a draft worker and keeps its drafts."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import zmq

from workers import sockets
from workers.drafts.draft_stream import (
    ContextDelta,
    ContextsMessage,
    DraftTree,
    DraftWorkerAddress,
    decode_drafts,
    encode,
)

MAX_UNANSWERED = 4
"""Max messages in flight to a draft worker. With more it is behind: what it misses goes with the
first message after an answer."""
RETRY_S = 1.0
"""Interval of messages to a draft worker that is behind: its answers may have been lost."""
HOLD_MS = 1
"""How long a step is held for an answer that is about to arrive."""
MIN_STEP_S = 0.012
"""Steps shorter than this are never held: 1 ms would be too large a share."""
MIN_PUNCTUALITY = 0.5
"""Steps are held only while at least this fraction of recent answers arrived within HOLD_MS."""
PUNCTUALITY_RATE = 1 / 16
"""Weight of the newest answer in that fraction."""
RETRY_STEPS = 32
"""A late draft worker is waited for again once in this many steps."""
MAX_QUEUED = 2 * MAX_UNANSWERED
"""Max messages that wait for a connection."""
MAX_DRAFTERS = 16
"""Max drafters that are counted; there are three kinds."""
MAX_UNREAD = 64
"""Max drafts messages waiting to be read; the sender drops more. A step reads all that are there,
so this is reached only while steps take very long."""


@dataclass(slots=True)
class DraftCounts:
    """Draft tokens since the worker's start, by what became of them."""

    proposed: int = 0
    """Received from draft workers."""
    verified: int = 0
    accepted: int = 0
    late: int = 0
    """Arrived when the request already had a token at their position; if they match it, the drafts
    that follow them are used."""
    stale: int = 0
    """Contradicted by tokens that had come meanwhile, or sent by a former draft worker."""
    accepted_at: list[int] = field(default_factory=list)
    """Accepted drafts by their distance from the newest token; index 0 is the next one."""
    verified_at: list[int] = field(default_factory=list)

    def count(self, num_drafts: int, num_accepted: int) -> None:
        """Count the drafts that a step verified for one request."""
        self.verified += num_drafts
        self.accepted += num_accepted
        for counts, number in ((self.verified_at, num_drafts), (self.accepted_at, num_accepted)):
            counts.extend([0] * (number - len(counts)))
            for position in range(number):
                counts[position] += 1

    def __add__(self, other: "DraftCounts") -> "DraftCounts":
        """Sum of both."""
        return DraftCounts(
            proposed=self.proposed + other.proposed,
            verified=self.verified + other.verified,
            accepted=self.accepted + other.accepted,
            late=self.late + other.late,
            stale=self.stale + other.stale,
            accepted_at=_sums(self.accepted_at, other.accepted_at),
            verified_at=_sums(self.verified_at, other.verified_at),
        )


def _sums(some: list[int], others: list[int]) -> list[int]:
    return [sum(pair) for pair in itertools.zip_longest(some, others, fillvalue=0)]


@dataclass(frozen=True, slots=True)
class DraftPath:
    """One drafter's likeliest guesses at the next tokens of a request."""

    drafter: str
    token_ids: list[int]
    probs: list[float]


@dataclass(slots=True)
class _SentContext:
    """What the draft worker has of a request, and the drafts for it."""

    num_sent: int = 0
    """Number of tokens sent."""
    trees: dict[str, DraftTree] = field(default_factory=dict)
    """Latest drafts by drafter."""


class DraftClient:
    """Connection to the assigned draft worker; used from the engine's thread only.

    Nothing but `await_answer` waits: a step uses the drafts that have arrived.
    """

    def __init__(self, incarnation: str, vocab_size: int) -> None:
        """`incarnation` names this run of the worker; drafts beyond the vocabulary are dropped."""
        self.counts_of: defaultdict[str, DraftCounts] = defaultdict(DraftCounts)
        """Counts by drafter."""
        self.dropped = sockets.Dropped("drafts")
        """Messages that cannot be drafts of ours."""
        self._incarnation = incarnation
        self._vocab_size = vocab_size
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._draft_worker: DraftWorkerAddress | None = None
        self._contexts: dict[str, _SentContext] = {}
        self._deltas: list[ContextDelta] = []
        self._finished: list[str] = []
        self._seq = self._answered = 0
        self._punctuality = 1.0
        self._num_unwaited = 0
        self._sent_s = self._heard_s = 0.0
        """Times of the last attempt to send, and of the last answer, or of the first message that
        owes one if that is later."""

    @property
    def draft_worker(self) -> DraftWorkerAddress | None:
        """The assigned draft worker."""
        return self._draft_worker

    def silent_s(self, now: float) -> float:
        """Seconds that the draft worker has owed an answer and sent none; 0 if it owes none."""
        return now - self._heard_s if self._seq > self._answered else 0.0

    def _is_behind(self, now: float) -> bool:
        return self._seq - self._answered >= MAX_UNANSWERED and now - self._sent_s < RETRY_S

    def assign(self, draft_worker: DraftWorkerAddress | None) -> None:
        """Switch to this draft worker, which is sent all requests from their beginning."""
        if draft_worker == self._draft_worker:
            return
        self._draft_worker = draft_worker
        self._connect()
        self._seq = self._answered = 0
        self._punctuality, self._num_unwaited = 1.0, 0
        self._finished.clear()
        self._deltas.clear()
        for context in self._contexts.values():
            context.num_sent = 0

    def _connect(self) -> None:
        """Open a connection to the assigned draft worker in place of what there is."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._draft_worker is not None:
            stream = self._draft_worker.stream
            options: sockets.Options = {zmq.SNDHWM: MAX_QUEUED, zmq.RCVHWM: MAX_UNREAD}
            self._socket = sockets.connect(self._zmq, stream.endpoint, stream.public_key, options)

    def update(
        self,
        request_id: str,
        token_ids: Sequence[int],
        num_wanted: int,
        hidden_states: bytes,
        now: float,
    ) -> bool:
        """Queue what is new in `token_ids`, all of the request; return whether `flush` sends it."""
        if self._draft_worker is None or self._is_behind(now):
            return False
        context = self._contexts.setdefault(request_id, _SentContext())
        if context.num_sent > len(token_ids):
            context.num_sent = 0  # a new request under the same id
        new = list(token_ids[context.num_sent :])
        if not new:
            return False
        delta = ContextDelta(request_id, context.num_sent, new, num_wanted, hidden_states)
        self._deltas.append(delta)
        context.num_sent += len(new)
        return True

    def finish(self, request_id: str) -> None:
        """Forget a request that has ended."""
        if self._contexts.pop(request_id, None) is not None:
            self._deltas = [delta for delta in self._deltas if delta.request_id != request_id]
            self._finished.append(request_id)

    def flush(self, now: float) -> None:
        """Send what is queued, unless the draft worker is behind."""
        if self._socket is None or self._draft_worker is None:
            return
        if self._is_behind(now) or not (self._deltas or self._finished):
            return
        message = ContextsMessage(
            self._draft_worker.stream.token,
            self._incarnation,
            self._seq + 1,
            self._deltas,
            self._finished,
        )
        self._sent_s = now
        if not sockets.send(self._socket, encode(message)):
            # The queue is full, or, with too few messages for that, the connection given up.
            if self._seq - self._answered < MAX_QUEUED:
                self._connect()
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
        """Hold a step of about `step_s` seconds for up to HOLD_MS, if an answer is about to arrive.

        An answer usually takes a fraction of a millisecond, and the worker's own work after a step
        much of that. A draft worker that usually takes longer is not waited for.
        """
        self.poll(now)
        if self._socket is None or self._seq == self._answered or step_s < MIN_STEP_S:
            return
        self._num_unwaited += 1
        if self._punctuality < MIN_PUNCTUALITY and self._num_unwaited < RETRY_STEPS:
            return
        self._num_unwaited = 0
        self._socket.poll(HOLD_MS)
        self.poll(now)
        came = self._seq == self._answered
        self._punctuality += PUNCTUALITY_RATE * (came - self._punctuality)

    def poll(self, now: float) -> None:
        """Read the messages that have arrived."""
        while self._socket is not None and self._socket.poll(0):
            parts = self._socket.recv_multipart()
            try:
                message = decode_drafts(sockets.joined(parts))
            except sockets.UNREADABLE as error:
                self.dropped.add(error)
                continue
            if not all(map(self._is_usable, message.drafts)):
                self.dropped.add("drafts of another vocabulary, or of too many drafters")
                continue
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

    def _is_usable(self, tree: DraftTree) -> bool:
        is_known = tree.drafter in self.counts_of or len(self.counts_of) < MAX_DRAFTERS
        return is_known and max(tree.token_ids, default=0) < self._vocab_size

    def paths(self, request_id: str, token_ids: Sequence[int]) -> list[DraftPath]:
        """Each drafter's likeliest path of guesses after `token_ids`, all of the request.

        A tree that was made for fewer tokens is first followed along the tokens since.
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
        """Node of the newest token, -1 if the tree begins after it; None if no branch matches."""
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
    """Children of each node; those of the root are at -1."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents):
        children.setdefault(parent, []).append(node)
    return children


def _num_above(tree: DraftTree, depth: int) -> int:
    """Number of nodes with fewer than `depth` ancestors."""
    if depth <= 0:
        return 0
    depths: list[int] = []
    for parent in tree.parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return sum(of_node < depth for of_node in depths)


def _likeliest(tree: DraftTree, children: dict[int, list[int]], node: int) -> list[int]:
    """The path below `node` that always takes the likeliest child."""
    path = []
    while below := children.get(node):
        node = max(below, key=lambda child: tree.probs[child])
        path.append(node)
    return path
