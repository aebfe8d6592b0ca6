"""The draft worker actor: guesses, for workers elsewhere, what their requests' next tokens are."""

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import zmq

from workers.cpus import CpuClaim, claim_cpus
from workers.drafters.drafter import ContextKey, Draft, Drafter, HiddenStates
from workers.drafters.suffix_drafter import SuffixDrafter
from workers.drafts.draft_stream import (
    ContextDelta,
    ContextsMessage,
    DrafterAddress,
    DraftsMessage,
    DraftTree,
    connect,
    decode_contexts,
    encode,
)
from workers.engine.engine import EngineConfig
from workers.timeline import Span, Timeline
from workers.token_stream import StreamAddress
from workers.worker import WorkerConfig

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.2
"""How long an idle thread sleeps before it looks whether it is to end."""
STOP_TIMEOUT_S = 10.0
FORGET_AFTER_S = 120.0
"""A request of which nothing was said for so long is forgotten, and so is a worker: perhaps it is
dead, or the message of its end was lost. If not, the request is sent whole again."""
REPORT_INTERVAL_S = 0.5
LEAST_MEMORY = 16
"""Shorter outputs are not worth telling other draft workers."""
QUEUE_LIMIT = 1024
"""Messages for one worker that it does not read; more are dropped, as later ones replace them."""


MOST_DRAFTS = 128

DrafterName = Literal["suffix", "model", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    """Speculative decoding: draft workers beside the workers, and what drafts."""

    __pydantic_config__ = {"extra": "forbid"}

    drafters: tuple[DrafterName, ...] = ("suffix",)
    """`suffix` repeats what was written before, `model` asks a smaller model, `head` a light head
    on the target's last hidden states. With several, each draft worker runs them all, in this
    order, and of the drafts for a request the most promising are verified."""
    num_workers: int = 1
    """Draft worker replicas."""
    cpus: int = 0
    """Cores of one draft worker, its own as those of workers are; 0: those that others leave."""
    num_speculative_tokens: int = 12
    """Most drafts that are verified for a request in one step."""
    memory_tokens: int = 200_000
    """Of `suffix`: tokens of output that it remembers, about 0.6 KB each."""
    model: str | None = None
    """Of `model`: a local directory or a hub id with the target's vocabulary."""
    model_weight_format: Literal["auto", "int8", "int4"] = "auto"
    """Of `model`: how our CPU kernels keep its weights."""
    model_kv_cache_gib: float = 0.5
    """Of `model`: memory of its KV cache, in GiB."""
    head: str | None = None
    """Of `head`: a file that `xyserve draft-head train` made; if not given, the default model's."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "num_speculative_tokens", "memory_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.num_speculative_tokens > MOST_DRAFTS:
            raise ValueError(
                f"num_speculative_tokens ({self.num_speculative_tokens}) must be at most "
                f"{MOST_DRAFTS}, which is what vLLM verifies"
            )
        if not self.model_kv_cache_gib > 0:  # NaN is not either
            raise ValueError(f"model_kv_cache_gib ({self.model_kv_cache_gib}) must be positive")
        if self.cpus < 0:
            raise ValueError(f"cpus ({self.cpus}) must not be negative")
        if not self.drafters or len(set(self.drafters)) != len(self.drafters):
            raise ValueError(
                f"drafters ({list(self.drafters)}) must name one or more of suffix, model and "
                "head, each once; leave `draft` out to switch speculation off"
            )
        if (self.model is not None) != ("model" in self.drafters):
            raise ValueError(
                f"model ({self.model}) and the drafter `model` need each other: give both or none"
            )


@dataclass(frozen=True, slots=True)
class DraftWorkerStatus:
    """A draft worker at one moment."""

    draft_worker_id: str
    pid: int
    drafters: tuple[str, ...]
    num_contexts: int
    """Requests that it knows."""
    num_drafts: int
    """Draft tokens sent since the start."""
    busy_share: float
    """Of the time since the report before, how much it spent drafting."""
    memory_bytes: int
    silent: bool = False
    """Has not reported for long: perhaps it is stopped or dead."""


@dataclass(frozen=True, slots=True)
class DraftWorkerReport:
    """What a draft worker tells the GlobalScheduler of itself."""

    address: DrafterAddress
    status: DraftWorkerStatus


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
        self.address = DrafterAddress(
            draft_worker_id,
            secrets.token_hex(8),
            StreamAddress(f"{base}:{port}", secrets.token_bytes(16)),
        )
        self.timeline = Timeline()
        self._drafters = make_drafters()
        self._contexts: dict[ContextKey, _Context] = {}
        self._peers: dict[str, _Peer] = {}
        self._others: list[DrafterAddress] = []
        self._to_others: dict[DrafterAddress, zmq.Socket[bytes]] = {}
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

    def meet(self, others: list[DrafterAddress]) -> None:
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
            if len(output := context.token_ids[context.num_prompt_tokens :]) >= LEAST_MEMORY:
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


def make_drafters(
    config: DraftConfig, target: str, resolve: Callable[[str], str]
) -> dict[str, Drafter]:
    """The drafters of a config by their names, for the target model at the path `target`.

    `resolve` gives the path, or hub id, of a model by its name.
    """
    drafters: dict[str, Drafter] = {}
    for name in config.drafters:
        if name == "suffix":
            drafters[name] = SuffixDrafter(config.memory_tokens)
        elif name == "head":
            # The kernels below it must have been built; the config of an app must not need them.
            from workers.drafters.draft_head import DEFAULT_HEAD, DraftHead
            from workers.drafters.head_drafter import HeadDrafter

            head = Path(config.head) if config.head else DEFAULT_HEAD
            drafters[name] = HeadDrafter(DraftHead(head, Path(target)))
        else:
            # vLLM takes long to import.
            from workers.drafters.vllm_model_drafter import ModelDrafter

            assert config.model  # as DraftConfig has checked
            worker = WorkerConfig(
                cpus=max(config.cpus, 1),
                weight_format=config.model_weight_format,
                engine=EngineConfig(kv_cache_gib=config.model_kv_cache_gib),
            )
            drafters[name] = ModelDrafter(
                resolve(config.model), worker, target, config.num_speculative_tokens
            )
    return drafters
