"""The draft worker actor: guesses the next tokens of the requests of workers."""

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import zmq

from workers import sockets
from workers.config import DraftConfig
from workers.cpus import CpuClaim, claim_cpus
from workers.drafters.draft_contexts import DraftContexts
from workers.drafters.drafter import ContextKey, Draft, Drafter
from workers.drafts.draft_stream import (
    ContextsMessage,
    DraftsMessage,
    DraftTree,
    DraftWorkerAddress,
    decode_contexts,
    encode,
)
from workers.reports import DraftWorkerReport, DraftWorkerStatus
from workers.timeline import Span, Timeline
from workers.token_stream import StreamAddress

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.2
"""How long an idle thread waits for messages before it checks whether to stop or report."""
STOP_TIMEOUT_S = 10.0
"""How long a shutdown waits for the current step of a drafter, which takes a fraction of a second
unless it hangs."""
FORGET_AFTER_S = 120.0
"""Workers and requests not heard of for this long are forgotten: the worker may be dead, or the
message that ended the request lost. If not, the request is sent again from its beginning."""
REPORT_INTERVAL_S = 0.5
"""Interval of reports: the GlobalScheduler assigns draft workers by the load in them."""
MAX_UNREAD = 1024
"""Max messages waiting for one peer that does not read them; more are dropped, as later messages
replace them."""


@dataclass(slots=True)
class _Sender:
    """A worker, or another draft worker, that sends messages to this one."""

    identity: bytes
    seq: int = 0
    """Number of its last message."""
    answered: int = 0
    """Number of the last message that was answered."""
    heard_s: float = 0.0
    unknown: list[str] = field(default_factory=list)
    """Requests with missing tokens."""


class DraftWorker:
    """Runs its drafters in one thread, which also calls `report`."""

    def __init__(
        self,
        draft_worker_id: str,
        config: DraftConfig,
        make_drafters: Callable[[], dict[str, Drafter]],
        report: Callable[[DraftWorkerReport], object],
        host: str,
        ports: sockets.Ports | None = None,
    ) -> None:
        """Listen on `host`, an address that the workers can reach, at one of `ports`."""
        began_s = time.monotonic()
        self._report = report
        self._cpus: CpuClaim | None = None
        if config.cpus:
            self._cpus = claim_cpus(config.cpus)
            self._cpus.pin_process()
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket, endpoint, public_key = sockets.listen(
            self._zmq, host, {zmq.SNDHWM: MAX_UNREAD}, ports
        )
        self.address = DraftWorkerAddress(
            draft_worker_id,
            secrets.token_hex(8),
            StreamAddress(endpoint, secrets.token_bytes(16), public_key),
        )
        self.dropped = sockets.Dropped(endpoint)
        """Messages, and tokens in them, that cannot be of a worker of ours."""
        self._timeline = Timeline()
        self._drafters = make_drafters()
        self._contexts = DraftContexts(self._drafters)
        self._senders: dict[str, _Sender] = {}
        self._peers: list[DraftWorkerAddress] = []
        self._to_peers: dict[DraftWorkerAddress, zmq.Socket[bytes]] = {}
        self._num_drafts = 0
        self._busy_s = 0.0
        self._reported_s = time.monotonic()
        self._stopping = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="drafting", daemon=True)
        self._thread.start()
        logger.info(
            "draft worker ready",
            extra={
                "drafters": ",".join(self._drafters),
                "took_s": round(time.monotonic() - began_s, 1),
            },
        )

    def check_health(self) -> None:
        """Raise RuntimeError if the drafting thread has ended."""
        if not self._thread.is_alive():
            raise RuntimeError(f"drafting failed: {self._failure!r}")

    def set_peers(self, peers: list[DraftWorkerAddress]) -> None:
        """Share outputs with these other draft workers from now on."""
        self._peers = peers

    async def spans(self, since_s: float) -> tuple[str, list[Span]]:
        """The draft worker's id, and its drafting that ended after a time, by the wall clock."""
        return self.address.draft_worker_id, self._timeline.since(since_s)

    def shutdown(self) -> None:
        """End the thread and release the cores."""
        self._stopping = True
        self._thread.join(STOP_TIMEOUT_S)
        if self._cpus:
            self._cpus.release()

    # The rest runs in the drafting thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._receive()
                self._draft()
                self._report_load()
        except Exception as error:
            logger.exception("drafting failed; the draft worker must be replaced")
            self._failure = error
        finally:
            for drafter in self._drafters.values():
                drafter.shutdown()
            for socket in (self._socket, *self._to_peers.values()):
                socket.close()
            self._zmq.term()
            logger.info("draft worker stopped")

    def _receive(self) -> None:
        """Read all messages before anything is drafted: only the newest state counts."""
        is_busy = any(drafter.has_work() for drafter in self._drafters.values())
        wait_ms = 0 if is_busy else int(1000 * IDLE_WAIT_S)
        while self._socket.poll(wait_ms):
            wait_ms = 0
            identity, *parts = self._socket.recv_multipart()
            try:
                message = decode_contexts(sockets.joined(parts))
            except sockets.UNREADABLE as error:
                self.dropped.add(error)
                continue
            if secrets.compare_digest(message.token, self.address.stream.token):
                self._take(identity, message)
            else:
                self.dropped.add("another token")

    def _take(self, identity: bytes, message: ContextsMessage) -> None:
        now = time.monotonic()
        sender = self._senders.get(message.worker)
        if sender is None or sender.identity != identity:  # a new connection may count from 1 again
            sender = self._senders[message.worker] = _Sender(identity)
        sender.seq, sender.heard_s = message.seq, now
        for output in message.memories:
            for drafter in self._drafters.values():
                drafter.learn(output)
        for request_id in message.finished:
            self._contexts.forget(ContextKey(message.worker, request_id))
        for delta in message.contexts:
            if fault := self._contexts.fault(delta):
                self.dropped.add(fault)
            elif not self._contexts.extend(
                ContextKey(message.worker, delta.request_id), delta, now
            ):
                sender.unknown.append(delta.request_id)

    def _draft(self) -> None:
        """One step of each drafter, its drafts sent at once; then answer all other messages."""
        for name, drafter in self._drafters.items():
            if not drafter.has_work():
                continue
            began_s = time.monotonic()
            drafts = drafter.step()
            ended_s = time.monotonic()
            self._busy_s += ended_s - began_s
            self._timeline.add(
                name,
                began_s,
                ended_s,
                {key.request_id: len(draft.token_ids) for key, draft in drafts.items()},
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
            if sender := self._senders.get(worker):
                self._send_to(sender, trees)

    def _answer(self) -> None:
        """Answer those whose last message got no drafts."""
        for sender in self._senders.values():
            if sender.answered != sender.seq:
                self._send_to(sender, [])

    def _send_to(self, sender: _Sender, trees: list[DraftTree]) -> None:
        message = DraftsMessage(self.address.incarnation, sender.seq, trees, sender.unknown)
        sender.unknown = []
        sender.answered = sender.seq
        # A ROUTER socket drops messages to one that is gone or whose queue is full.
        sockets.send(self._socket, encode(message), sender.identity)

    def _report_load(self) -> None:
        now = time.monotonic()
        past_s = now - self._reported_s
        if past_s < REPORT_INTERVAL_S:
            return
        self._forget_silent(now)
        self._share_outputs()
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

    def _share_outputs(self) -> None:
        """Send the outputs of requests that ended to the other draft workers."""
        peers, outputs = self._peers, self._contexts.take_outputs()
        for gone in self._to_peers.keys() - set(peers):
            self._to_peers.pop(gone).close()
        for peer in peers if outputs else ():
            if peer not in self._to_peers:
                # The answers are not read.
                options: sockets.Options = {zmq.SNDHWM: MAX_UNREAD, zmq.RCVHWM: 1}
                self._to_peers[peer] = sockets.connect(
                    self._zmq, peer.stream.endpoint, peer.stream.public_key, options
                )
            message = ContextsMessage(
                peer.stream.token, self.address.incarnation, 0, [], [], memories=outputs
            )
            if not sockets.send(self._to_peers[peer], encode(message)):
                self._to_peers.pop(peer).close()  # it is gone, as later reports may show

    def _forget_silent(self, now: float) -> None:
        for name, sender in list(self._senders.items()):
            if now - sender.heard_s > FORGET_AFTER_S:
                del self._senders[name]
        self._contexts.forget_unchanged(now - FORGET_AFTER_S)
