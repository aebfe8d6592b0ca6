"""Real load while replicas die: every request ends once, with the answer it would have had."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.client import XYServe
from cluster.errors import RequestFailed
from tests.chaos.answer import Answer
from tests.chaos.census import census, settled
from tests.chaos.kinds import Call
from tests.chaos.monkey import Hit, Monkey
from tests.chaos.sender import Sender, Sent
from tests.e2e.conftest import MODEL, Server

PROGRESS_S = 10.0
RESTORED_S = 240.0
SETTLED_S = 40.0
ASK_AGAIN_S = 0.5
KNOWN_TIMEOUT_S = 120.0
MAX_RETRIES = 5
BEFORE_GAP_S = 10.0
"""Time for which a hit may have its effect on a stream: a replacement takes about as long."""
NUM_GAPS = 8
"""Longest waits of streams that the summary tells."""
CALM_AT_ONCE = 4

Print = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Gap:
    """A wait for the next chunk of a stream."""

    seconds: float
    call: str
    began_s: float
    hits: str
    """What the monkey did from just before it until it ended."""


@dataclass(slots=True)
class Ledger:
    """What became of all requests."""

    requests: int = 0
    cut_by_ingress: int = 0
    """Answers that broke because the ingress which gave them was killed; each was asked for again,
    and that answer is the request's."""
    faults: list[tuple[str, str, str]] = field(default_factory=list)
    """Sort, call and what is wrong."""
    gaps: list[Gap] = field(default_factory=list)
    worst_by_hits: dict[str, float] = field(default_factory=dict)
    """Longest wait while replicas of these kinds were hit, or shortly after that."""
    worst_first_s: float = 0.0
    by_kind: Counter[str] = field(default_factory=Counter)

    def count(self, sort: str) -> int:
        return sum(fault[0] == sort for fault in self.faults)


@dataclass(slots=True)
class Settings:
    seconds: float
    seed: int = 0
    num_clients: int = 6
    every_s: float = 3.0
    targets: dict[str, int] = field(default_factory=dict)
    min_kills: int = 0
    """Go on, after the time is over, until so many processes were killed."""


class Chaos:
    """One run on a server that is calm when it begins."""

    def __init__(
        self, server: Server, handle: XYServe, calls: Sequence[Call], print_line: Print = print
    ) -> None:
        self._server = server
        self._handle = handle
        self._calls = calls
        self._print = print_line
        self._sender = Sender(server.url, MODEL, handle)
        self._unbroken: dict[str, Answer] = {}
        self._ledger = Ledger()
        self._num_sent = 0

    async def run(self, settings: Settings) -> dict[str, Any]:
        """The summary."""
        try:
            await self._learn()
            before = await asyncio.to_thread(census, self._server)
            draw = random.Random(settings.seed)
            monkey = Monkey(self._server, draw, settings.targets)
            began_s = time.monotonic()

            def goes_on() -> bool:
                is_over = time.monotonic() - began_s >= settings.seconds
                return not is_over or bool(
                    settings.targets and monkey.num_kills < settings.min_kills
                )

            telling = asyncio.create_task(self._tell(monkey, began_s))
            clients = [
                self._be_client(random.Random(f"{settings.seed} {number}"), monkey, goes_on)
                for number in range(settings.num_clients)
            ]
            hitting = [monkey.run(goes_on, settings.every_s)] if settings.targets else []
            await asyncio.gather(*hitting, *clients)
            telling.cancel()
            took_s = time.monotonic() - began_s
            await monkey.restored(RESTORED_S)
            after = await asyncio.to_thread(settled, self._server, before, SETTLED_S)
            return self._summary(settings, monkey, took_s, before.leaks(after))
        finally:
            await self._sender.close()

    async def _learn(self) -> None:
        """Ask for every answer while nothing happens."""
        self._print(f"asking {len(self._calls)} calls of a calm server")
        room = asyncio.Semaphore(CALM_AT_ONCE)

        async def learn(call: Call) -> None:
            async with room:
                sent = await self._send(call, "calm")
            self._unbroken[call.name] = sent.answer
            if fault := sent.fault():
                faults.append(f"{call.name}: {fault}")

        faults: list[str] = []
        await asyncio.gather(*(learn(call) for call in self._calls))
        if faults:
            raise AssertionError("on a calm server:\n" + "\n".join(faults))

    async def _be_client(
        self, draw: random.Random, monkey: Monkey, goes_on: Callable[[], bool]
    ) -> None:
        while goes_on():
            call = draw.choice(self._calls)
            sent = await self._send(call, "chaos")
            for _ in range(MAX_RETRIES):
                if not sent.fault() or not await self._was_cut(sent, monkey.hits):
                    break
                self._ledger.cut_by_ingress += 1
                sent = await self._send(call, "again")
            self._enter(sent, monkey.hits)

    async def _send(self, call: Call, word: str) -> Sent:
        self._num_sent += 1
        return await self._sender.send(call, f"{word}-{self._num_sent:06}-{call.name}")

    async def _was_cut(self, sent: Sent, hits: Sequence[Hit]) -> bool:
        """Whether a call broke with its ingress: one died meanwhile, and no other knows it."""
        killed = [
            hit
            for hit in hits
            if hit.target == "Ingress"
            and hit.action != "stop"
            and hit.ended_s <= sent.ended_s
            and sent.began_s <= hit.gone_s
        ]
        return bool(killed) and not await self._is_known(sent.call_id)

    async def _is_known(self, call_id: str) -> bool:
        """Whether a living ingress has had a call, or none answers that for long."""
        give_up_s = time.monotonic() + KNOWN_TIMEOUT_S
        while True:
            try:
                return bool(await asyncio.to_thread(self._handle.explain, call_id))
            except (RequestFailed, TimeoutError):  # asked of the one that was killed
                if time.monotonic() > give_up_s:
                    return True
                await asyncio.sleep(ASK_AGAIN_S)

    def _enter(self, sent: Sent, hits: Sequence[Hit]) -> None:
        ledger, call = self._ledger, sent.call
        ledger.requests += 1
        ledger.by_kind[call.kind.name] += 1
        if fault := sent.fault():
            sort, _, words = fault.partition(": ")
            self._fault(sort, sent, words)
        elif call.kind.exact and (words := self._unbroken[call.name].difference(sent.answer)):
            self._fault("unequal", sent, words)
        if sent.chunk_s:
            ledger.worst_first_s = max(ledger.worst_first_s, sent.chunk_s[0] - sent.began_s)
        for began_s, seconds in sent.gaps():
            self._enter_gap(sent, began_s, seconds, hits)

    def _enter_gap(self, sent: Sent, began_s: float, seconds: float, hits: Sequence[Hit]) -> None:
        ledger = self._ledger
        during = [
            hit
            for hit in hits
            if began_s - BEFORE_GAP_S <= hit.ended_s and hit.began_s <= began_s + seconds
        ]
        targets = "+".join(sorted({hit.target for hit in during})) or "none"
        ledger.worst_by_hits[targets] = max(ledger.worst_by_hits.get(targets, 0.0), seconds)
        if len(ledger.gaps) < NUM_GAPS or seconds > ledger.gaps[-1].seconds:
            words = ", ".join(f"{hit} {hit.began_s - began_s:+.1f} s" for hit in during)
            ledger.gaps.append(Gap(seconds, sent.call_id, began_s, words))
            ledger.gaps.sort(key=lambda gap: -gap.seconds)
            del ledger.gaps[NUM_GAPS:]

    def _fault(self, sort: str, sent: Sent, words: str) -> None:
        self._ledger.faults.append((sort, sent.call_id, words))
        self._print(f"{sort.upper()}: {sent.call_id}: {words[:400]}")

    async def _tell(self, monkey: Monkey, began_s: float) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            ledger = self._ledger
            worst_s = ledger.gaps[0].seconds if ledger.gaps else 0.0
            self._print(
                f"{time.monotonic() - began_s:6.0f} s: {monkey.num_kills} kills, "
                f"{ledger.requests} requests, {len(ledger.faults)} faults, "
                f"{ledger.cut_by_ingress} cut by an ingress, worst gap {worst_s:.1f} s"
            )

    def _summary(
        self, settings: Settings, monkey: Monkey, took_s: float, leaks: list[str]
    ) -> dict[str, Any]:
        ledger = self._ledger
        return {
            "kills": monkey.num_kills,
            "requests": ledger.requests,
            **{sort: ledger.count(sort) for sort in ("lost", "doubled", "unequal", "failed")},
            "leaks": len(leaks),
            "worst_gap_s": round(ledger.gaps[0].seconds, 2) if ledger.gaps else 0.0,
            "cut_by_ingress": ledger.cut_by_ingress,
            "worst_first_s": round(ledger.worst_first_s, 2),
            "seconds": round(took_s),
            "seed": settings.seed,
            "hits": monkey.counts(),
            "faults": [list(fault) for fault in ledger.faults],
            "leaked": leaks,
            "worst_gaps": [
                {"seconds": round(gap.seconds, 2), "call": gap.call, "hits": gap.hits}
                for gap in ledger.gaps
            ],
            "worst_by_hits": {
                name: round(seconds, 2) for name, seconds in sorted(ledger.worst_by_hits.items())
            },
            "by_kind": dict(sorted(ledger.by_kind.items())),
        }


def is_clean(summary: dict[str, Any]) -> bool:
    """Whether no request suffered and nothing was left behind."""
    return not any(summary[key] for key in ("lost", "doubled", "unequal", "failed", "leaks"))


def to_json(summary: dict[str, Any]) -> str:
    return json.dumps(summary, indent=2)
