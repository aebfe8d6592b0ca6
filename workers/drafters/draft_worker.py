"""The draft worker actor: guesses, for workers elsewhere, what their requests' next tokens are."""

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil
import zmq

from workers.config import DraftConfig
from workers.cpus import CpuClaim, claim_cpus
from workers.drafters.drafter import ContextKey, Draft, Drafter, HiddenStates
from workers.drafts.draft_stream import (
    ContextDelta,
    ContextsMessage,
    DraftsMessage,
    DraftTree,
    DraftWorkerAddress,
    connect,
    decode_contexts,
    encode,
)
from workers.reports import DraftWorkerReport, DraftWorkerStatus
from workers.timeline import Span, Timeline
from workers.token_stream import StreamAddress

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.2
"""How long an idle thread sleeps before it looks whether it is to end."""
STOP_TIMEOUT_S = 10.0
FORGET_AFTER_S = 120.0
"""A request of which nothing was said for so long is forgotten, and so is a worker: perhaps it is
dead, or the message of its end was lost. If not, the request is sent whole again."""
REPORT_INTERVAL_S = 0.5
MIN_MEMORY = 16
"""Shorter outputs are not worth telling other draft workers."""
QUEUE_LIMIT = 1024
"""Messages for one worker that it does not read; more are dropped, as later ones replace them."""


@dataclass(slots=True)
class _Context:
    """What is known of a request, and how much of it each drafter has been told."""

    token_ids: list[int] = field(default_factory=list)
    num_wanted: int = 0
    num_told: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    heard_s: float = 0.0


@dataclass(slots=True)
class _Peer:
    """A worker that speaks to this draft worker."""

    identity: bytes
    seq: int = 0
    """Of the last message."""
    answered: int = 0
    """Of the last message that was answered."""
    heard_s: float = 0.0
    unknown: list[str] = field(default_factory=list)
    """Requests of which tokens are missing."""


class DraftWorker:
    """Runs its drafters in one thread. `report` is called there."""

    def __init__(
        self,
        draft_worker_id: str,
        config: DraftConfig,
        make_drafters: Callable[[], dict[str, Drafter]],
        report: Callable[[DraftWorkerReport], object],
        host: str,
    ) -> None:
        """Listen on a free port of `host`, an address that the workers can reach."""
        began_s = time.monotonic()
        self._config = config
        self._report = report
        self._cpus: CpuClaim | None = None
        if config.cpus:
            self._cpus = claim_cpus(config.cpus)
            self._cpus.pin_process()
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._zmq.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_LIMIT)
        self._socket.setsockopt(zmq.IPV6, ":" in host)
        base = f"tcp://[{host}]" if ":" in host else f"tcp://{host}"
        port = self._socket.bind_to_random_port(base)
        self.address = DraftWorkerAddress(
            draft_worker_id,
            secrets.token_hex(8),
            StreamAddress(f"{base}:{port}", secrets.token_bytes(16)),
        )
        self.timeline = Timeline()
        self._drafters = make_drafters()
        self._contexts: dict[ContextKey, _Context] = {}
        self._peers: dict[str, _Peer] = {}
        self._others: list[DraftWorkerAddress] = []
        self._to_others: dict[DraftWorkerAddress, zmq.Socket[bytes]] = {}
        self._memories: list[list[int]] = []
        """Outputs that the other draft workers have not been told."""
        self._num_drafts = 0
        self._busy_s = 0.0
        self._reported_s = time.monotonic()
        self._stopping = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="drafter", daemon=True)
        self._thread.start()
        logger.info(
            "draft worker ready",
            extra={
                "drafters": ",".join(self._drafters),
                "took_s": round(time.monotonic() - began_s, 1),
            },
        )

    def check_health(self) -> None:
        """Raise RuntimeError when the drafting thread has ended."""
        if not self._thread.is_alive():
            raise RuntimeError(f"the drafter failed: {self._failure!r}")

    def meet(self, others: list[DraftWorkerAddress]) -> None:
        """Share what is written here with these draft workers from now on."""
        self._others = others

    async def spans(self, since_s: float) -> tuple[str, list[Span]]:
        """Its id, and its drafting that ended after a time, by the wall clock."""
        return self.address.draft_worker_id, self.timeline.since(since_s)

    def shutdown(self) -> None:
        """End the thread and give the cores back."""
        self._stopping = True
        self._thread.join(STOP_TIMEOUT_S)
        if self._cpus:
            self._cpus.release()

    # What follows runs in the drafting thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_messages()
                self._draft()
                self._report_load()
        except Exception as error:
            logger.exception("the drafter failed; its draft worker must be replaced")
            self._failure = error
        finally:
            for drafter in self._drafters.values():
                drafter.shutdown()
            for socket in (self._socket, *self._to_others.values()):
                socket.close()
            self._zmq.term()
            logger.info("draft worker stopped")

    def _take_messages(self) -> None:
        """Take in all that has come before anything is drafted: only the newest state counts."""
        is_busy = any(drafter.has_work() for drafter in self._drafters.values())
        wait_ms = 0 if is_busy else int(1000 * IDLE_WAIT_S)
        while self._socket.poll(wait_ms):
            wait_ms = 0
            identity, body = self._socket.recv_multipart()[:2]
            try:
                message = decode_contexts(body)
            except (ValueError, RecursionError):
                continue  # a stranger
            if message.token == self.address.stream.token:
                self._take(identity, message)

    def _take(self, identity: bytes, message: ContextsMessage) -> None:
        peer = self._peers.get(message.worker)
        if peer is None or peer.identity != identity:  # a new connection may count anew
            peer = self._peers[message.worker] = _Peer(identity)
        peer.seq, peer.heard_s = message.seq, time.monotonic()
        for output in message.memories:
            for drafter in self._drafters.values():
                drafter.learn(output)
        for request_id in message.finished:
            self._forget(ContextKey(message.worker, request_id))
        for delta in message.contexts:
            if not self._extend(ContextKey(message.worker, delta.request_id), delta):
                peer.unknown.append(delta.request_id)

    def _extend(self, key: ContextKey, delta: ContextDelta) -> bool:
        """Take in new tokens of a request; False if some before them are missing."""
        context = self._contexts.get(key)
        if delta.position == 0 or context is None:
            context = self._contexts[key] = _Context(
                num_told=[0] * len(self._drafters), num_prompt_tokens=len(delta.token_ids)
            )
        if delta.position != len(context.token_ids):
            self._forget(key)
            return False
        context.token_ids += delta.token_ids
        context.num_wanted = delta.num_wanted
        context.heard_s = time.monotonic()
        if not delta.num_wanted:
            return True  # the drafters hear of it when it is of use
        for index, drafter in enumerate(self._drafters.values()):
            num_told = context.num_told[index]
            drafter.extend(
                key,
                num_told,
                context.token_ids[num_told:],
                self._hidden_states(drafter, delta.hidden_states),
            )
            context.num_told[index] = len(context.token_ids)
        return True

    def _hidden_states(self, drafter: Drafter, raw: bytes) -> HiddenStates | None:
        if not drafter.hidden_size or not raw:
            return None
        return np.frombuffer(raw, np.float16).reshape(-1, drafter.hidden_size)

    def _forget(self, key: ContextKey) -> None:
        if (context := self._contexts.pop(key, None)) is not None:
            if len(output := context.token_ids[context.num_prompt_tokens :]) >= MIN_MEMORY:
                self._memories.append(output)
            for drafter in self._drafters.values():
                drafter.forget(key)

    def _draft(self) -> None:
        """One step of each drafter, its drafts sent at once; every worker heard gets an answer."""
        for name, drafter in self._drafters.items():
            if not drafter.has_work():
                continue
            began_s = time.monotonic()
            drafts = drafter.step()
            ended_s = time.monotonic()
            self._busy_s += ended_s - began_s
            self.timeline.add(
                name,
                began_s,
                ended_s,
                {key.request_id: len(d.token_ids) for key, d in drafts.items()},
            )
            self._send(name, drafts)
        self._answer()

    def _send(self, name: str, drafts: dict[ContextKey, Draft]) -> None:
        by_worker: dict[str, list[DraftTree]] = {}
        for key, draft in drafts.items():
            if draft.token_ids:
                tree = DraftTree(
                    key.request_id,
                    name,
                    draft.position,
                    list(draft.token_ids),
                    list(draft.parents),
                    list(draft.probs),
                )
                by_worker.setdefault(key.worker, []).append(tree)
                self._num_drafts += len(draft.token_ids)
        for worker, trees in by_worker.items():
            if peer := self._peers.get(worker):
                self._send_to(peer, trees)

    def _answer(self) -> None:
        """Tell the workers whose messages were taken in and brought no drafts."""
        for peer in self._peers.values():
            if peer.answered != peer.seq:
                self._send_to(peer, [])

    def _send_to(self, peer: _Peer, trees: Sequence[DraftTree]) -> None:
        message = DraftsMessage(self.address.incarnation, peer.seq, list(trees), peer.unknown)
        peer.unknown = []
        peer.answered = peer.seq
        # A ROUTER drops what a peer that is gone or does not read has no room for.
        self._socket.send_multipart([peer.identity, encode(message)], zmq.DONTWAIT)

    def _report_load(self) -> None:
        now = time.monotonic()
        past_s = now - self._reported_s
        if past_s < REPORT_INTERVAL_S:
            return
        self._forget_silent(now)
        self._share_memories()
        self._report(DraftWorkerReport(self.address, self._status(self._busy_s / past_s)))
        self._reported_s, self._busy_s = now, 0.0

    def _status(self, busy_share: float) -> DraftWorkerStatus:
        return DraftWorkerStatus(
            self.address.draft_worker_id,
            os.getpid(),
            tuple(self._drafters),
            len(self._contexts),
            self._num_drafts,
            busy_share,
            psutil.Process().memory_info().rss,
        )

    def _share_memories(self) -> None:
        """Tell the other draft workers what was written here."""
        peers, memories, self._memories = self._others, self._memories, []
        for gone in self._to_others.keys() - set(peers):
            self._to_others.pop(gone).close()
        for peer in peers if memories else ():
            if peer not in self._to_others:
                self._to_others[peer] = connect(  # the answers are not read
                    self._zmq, peer, send_limit=QUEUE_LIMIT, receive_limit=1
                )
            message = ContextsMessage(
                peer.stream.token, self.address.incarnation, 0, [], [], memories
            )
            with contextlib.suppress(zmq.Again):  # it is gone; the next report may say so
                self._to_others[peer].send(encode(message), zmq.DONTWAIT)

    def _forget_silent(self, now: float) -> None:
        for worker, peer in list(self._peers.items()):
            if now - peer.heard_s > FORGET_AFTER_S:
                del self._peers[worker]
        for key, context in list(self._contexts.items()):
            if now - context.heard_s > FORGET_AFTER_S:
                self._forget(key)
