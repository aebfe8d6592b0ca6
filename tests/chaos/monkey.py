"""Kills, stops and continues replicas of an app at random, so that one of each kind stays."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import psutil
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from tests.e2e.conftest import Server

Action = Literal["kill", "stop", "stop and kill", "terminate"]

WEIGHTS = {"Worker": 5, "DraftWorker": 3, "GlobalScheduler": 2, "Ingress": 3}
"""How often each kind of replica is hit, compared with the others."""
ACTIONS: dict[Action, int] = {"kill": 3, "stop": 1, "stop and kill": 1, "terminate": 1}
"""How often each is chosen. Some clouds terminate, by SIGTERM, what they take back."""
_AT_ONCE: dict[Action, signal.Signals] = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}
DYING_S = 10.0
"""Time in which a process ends that was told to terminate."""
MAX_STOP_S = 1.5
"""Longest time for which a process is stopped: a stream that it serves stands as long."""
LOOK_AGAIN_S = 0.5
NOTICED_S = 0.2
"""Pause before a replica counts as alive again, in which its users hear of it."""


@dataclass(slots=True)
class Hit:
    """One thing that the monkey did."""

    target: str
    action: Action
    pid: int
    began_s: float
    ended_s: float

    @property
    def gone_s(self) -> float:
        """Time at which the process had ended, if it was to end, at the latest."""
        return self.ended_s + DYING_S * (self.action == "terminate")

    def __str__(self) -> str:
        return f"{self.action} {self.target}"


class Monkey:
    """Hits replicas of a server.

    A kind is hit only while as many of it serve as the app wants: so another worker and another
    ingress live, and a GlobalScheduler has lived since the last one died.
    """

    def __init__(self, server: Server, draw: random.Random, targets: dict[str, int]) -> None:
        self._server = server
        self._draw = draw
        self._targets = targets
        self.wanted = {name: self._replicas().count(name) for name in WEIGHTS}
        self.hits: list[Hit] = []

    @property
    def num_kills(self) -> int:
        """Processes killed so far."""
        return sum(hit.action != "stop" for hit in self.hits)

    def counts(self) -> dict[str, int]:
        """Number of hits of each kind."""
        return dict(sorted(Counter(str(hit) for hit in self.hits).items()))

    async def run(self, goes_on: Callable[[], bool], every_s: float) -> None:
        """Hit a replica each `every_s` seconds, or later if Serve takes longer to replace it."""
        while goes_on():
            await asyncio.sleep(self._draw.uniform(0, 2 * every_s))
            names, weights = zip(*self._targets.items(), strict=True)
            name = self._draw.choices(names, weights)[0]
            action = self._draw.choices(list(ACTIONS), list(ACTIONS.values()))[0]
            while goes_on() and not await asyncio.to_thread(self._may_be_hit, name):
                await asyncio.sleep(LOOK_AGAIN_S)  # hitting another one would be less random
            if goes_on():
                await self._hit(name, action)

    async def restored(self, timeout_s: float) -> None:
        """Wait until Serve has replaced everything."""
        give_up_s = time.monotonic() + timeout_s
        while not await asyncio.to_thread(self._is_whole):
            if time.monotonic() > give_up_s:
                raise TimeoutError(f"not replaced in {timeout_s:g} s: {self._replicas()}")
            await asyncio.sleep(0.5)

    def pids(self, name: str) -> list[int]:
        """Processes of one kind of replica that have not ended."""
        return sorted(pid for pid, found in self._server.replicas().items() if found == name)

    async def _hit(self, name: str, action: Action) -> None:
        if not (pids := await asyncio.to_thread(self.pids, name)):
            return
        pid = self._draw.choice(pids)
        hit = Hit(name, action, pid, time.monotonic(), 0.0)
        with contextlib.suppress(ProcessLookupError):
            if action in _AT_ONCE:
                os.kill(pid, _AT_ONCE[action])
            else:
                os.kill(pid, signal.SIGSTOP)
                try:
                    await asyncio.sleep(self._draw.uniform(0.1, MAX_STOP_S))
                finally:
                    os.kill(pid, signal.SIGCONT if action == "stop" else signal.SIGKILL)
            hit.ended_s = time.monotonic()
            self.hits.append(hit)

    def _may_be_hit(self, name: str) -> bool:
        """Whether as many of its kind serve as are wanted, and their users have heard of all."""
        if not self._is_whole((name,)):
            return False
        time.sleep(NOTICED_S)
        return self._is_whole((name,))

    def _is_whole(self, names: tuple[str, ...] = tuple(WEIGHTS)) -> bool:
        """Whether each replica wanted has its process, and Serve counts as many that run."""
        found = Counter(self._replicas())
        try:
            deployments = serve.status().applications["xyserve"].deployments
        except (RayError, RayServeException, KeyError):
            return False
        return all(
            found[name]
            == self.wanted[name]
            == deployments[name].replica_states.get("RUNNING", 0)
            == sum(deployments[name].replica_states.values())
            for name in names
            if self.wanted[name]
        )

    def _replicas(self) -> list[str]:
        names = []
        for pid, name in self._server.replicas().items():
            with contextlib.suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    names.append(name)
        return names
