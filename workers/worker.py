"""The worker actor: one engine on one device, its tokens leaving by the token stream."""

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from scheduler.policy import StepPolicy
from scheduler.request import Request
from workers.cpus import CpuClaim, claim_cpus
from workers.drafts.draft_stream import DrafterAddress
from workers.engine.engine import DraftStats, Engine, EngineConfig
from workers.engine.engine_loop import EngineLoop
from workers.peaks import Peaks
from workers.step_history import RequestStep, StepHistory, StepSummary
from workers.timeline import Span
from workers.token_stream import StreamAddress

REPORT_HEARTBEAT_S = 2.0
"""A report goes out this often even when nothing changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One worker's device, cores and engine."""

    __pydantic_config__ = {"extra": "forbid"}

    device: Literal["cpu", "cuda", "npu"] = "cpu"
    cpus: int = 1
    """Cores of one worker; on the CPU they are its own, and its number of threads."""
    kernels: Literal["xyserve", "vllm"] = "xyserve"
    """On the CPU: our GEMM, attention and forward pass, or vLLM's own."""
    weight_format: Literal["auto", "int8", "int4"] = "auto"
    """How our kernels keep weights; `auto` loses nothing: bf16 if the checkpoint is, else fp32."""
    calibrate_at_start: bool = True
    """Measure the engine's steps at its first start on a machine, some ten seconds long, so that
    their times can be predicted; `xyserve calibrate` does it more exactly."""
    step_timeout_s: float = 120.0
    """A step that runs longer makes the worker unhealthy, and Serve replaces it."""
    report_interval_s: float = 0.25
    """Least time between two reports of load to the GlobalScheduler."""
    step_policy: StepPolicy = field(default_factory=StepPolicy)
    """Who decides what each step computes."""
    record: str | None = None
    """Write every decision to `<record>.<worker id>.jsonl` on the worker's node, to be replayed."""
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        for name in ("cpus", "step_timeout_s", "report_interval_s"):
            if not getattr(self, name) > 0:  # NaN is not either
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")
        if self.uses_own_kernels and self.engine.dtype not in ("auto", "float32"):
            raise ValueError(
                f"engine.dtype ({self.engine.dtype}) must be float32 or auto with our CPU kernels, "
                "which compute in float32 on bf16 weights; or set kernels: vllm"
            )
        if self.weight_format != "auto" and not self.uses_own_kernels:
            raise ValueError(
                f"weight_format ({self.weight_format}) needs device: cpu and kernels: xyserve"
            )
        if self.record is not None and self.step_policy.name == "vllm":
            raise ValueError(
                f"record ({self.record}) needs a step_policy of ours: vllm's decisions are its own"
            )

    @property
    def uses_own_kernels(self) -> bool:
        """Whether our CPU kernels run the model."""
        return self.device == "cpu" and self.kernels == "xyserve"

    @property
    def thread_env(self) -> dict[str, str]:
        """Environment of the worker's process; it must be there before torch is imported."""
        env = {"OMP_NUM_THREADS": str(self.cpus)}
        if self.uses_own_kernels:
            # Torch's idle threads would spin for milliseconds on the cores that our kernels need.
            env["OMP_WAIT_POLICY"] = "PASSIVE"
        return env


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """A worker's requests, as it tells the GlobalScheduler."""

    worker_id: str
    outstanding: dict[str, int]
    """Tokens that each live request may still need, by request id."""
    finished: tuple[str, ...]
    """Requests that ended since the last report."""
    draining: bool
    drafts: DraftStats | None = None
    """None without speculation."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker at this moment."""

    worker_id: str
    pid: int
    cpus: tuple[int, ...]
    """The cores it is pinned to; empty if it is not."""
    num_running: int
    num_waiting: int
    num_outstanding_tokens: int
    num_steps: int
    """Steps since the start that ran the model."""
    kv_cache_usage: float
    """Share of the KV cache in use, 0 to 1."""
    memory_bytes: int
    """Resident memory of its process."""
    draining: bool
    drafts: DraftStats | None = None
    """None without speculation."""


@dataclass(frozen=True, slots=True)
class WorkerSteps:
    """Steps of one worker."""

    worker_id: str
    steps: list[StepSummary]
    peaks: Peaks | None
    """Of its device; None if they were not measured."""


class WorkerDraining(RuntimeError):
    """The worker takes no new requests; another one should be asked."""


class Worker:
    """Runs requests on an engine. `report` is called in the engine's thread."""

    def __init__(
        self,
        worker_id: str,
        config: WorkerConfig,
        make_engine: Callable[[], Engine],
        report: Callable[[WorkerReport], object],
    ) -> None:
        self.worker_id = worker_id
        self._config = config
        self._report = report
        self._reported_at = 0.0
        self._reported: WorkerReport | None = None
        self._draining = False
        self.history = StepHistory()
        self.peaks: Peaks | None = None
        self._cpus: CpuClaim | None = None
        if config.device == "cpu":
            self._cpus = claim_cpus(config.cpus)
            self._cpus.pin_process()
        try:
            self._loop = EngineLoop(lambda: self._recorded(make_engine()), self._report_load)
        except BaseException:
            self._release_cpus()
            raise

    async def generate(
        self, request: Request, engine_request: list[bytes], reply_to: StreamAddress
    ) -> str:
        """Run `request`, its tokens going to `reply_to`; returns the finish reason at the end.

        The call lasts as long as its request, so that the death of either side is noticed by
        the other, and a replica that is asked to stop waits for what it runs. Cancelling the
        call aborts the request. Raises ValueError for a malformed request, WorkerDraining,
        EngineDead, and ClientLost when `reply_to` takes nothing any more.
        """
        if self._draining:
            raise WorkerDraining(f"worker {self.worker_id} is draining")
        self.check_health()
        try:
            return await asyncio.wrap_future(self._loop.add(request, engine_request, reply_to))
        except asyncio.CancelledError:
            self._loop.abort([request.request_id])
            raise

    async def abort(self, request_ids: list[str]) -> None:
        """Free the slots of these requests before the next step; unknown ids are ignored."""
        self._loop.abort(request_ids)

    async def status(self) -> WorkerStatus:
        """The worker's load and place on its node."""
        state = await asyncio.wrap_future(self._loop.state())
        return WorkerStatus(
            worker_id=self.worker_id,
            pid=os.getpid(),
            cpus=self._cpus.cpus if self._cpus else (),
            num_running=state.engine.num_running,
            num_waiting=state.engine.num_waiting,
            num_outstanding_tokens=sum(state.outstanding.values()),
            num_steps=state.num_steps,
            kv_cache_usage=state.engine.kv_cache_usage,
            memory_bytes=psutil.Process().memory_info().rss,
            draining=self._draining,
            drafts=state.engine.drafts,
        )

    def assign_drafter(self, drafter: DrafterAddress | None) -> None:
        """Have this draft worker make the drafts from the next step on."""
        self._loop.assign_drafter(drafter)

    async def spans(self, since_s: float) -> tuple[str, list[Span]]:
        """The worker's id, and its steps that ended after a time, by the wall clock."""
        return self.worker_id, self.history.spans(since_s)

    async def steps(self, since_s: float, most: int) -> WorkerSteps:
        """The latest `most` of its steps that ended after a time, by the wall clock."""
        return WorkerSteps(self.worker_id, self.history.summaries(since_s, most), self.peaks)

    async def steps_of(self, request_ids: list[str]) -> tuple[str, dict[str, list[RequestStep]]]:
        """The worker's id, and the steps that each request had a part in, or waited through."""
        found = {request_id: self.history.of_request(request_id) for request_id in request_ids}
        return self.worker_id, {request_id: steps for request_id, steps in found.items() if steps}

    async def drain(self) -> None:
        """Take nothing new and return when the last request has ended."""
        self._draining = True
        while (await asyncio.wrap_future(self._loop.state())).outstanding:
            await asyncio.sleep(0.1)

    def check_health(self) -> None:
        """Raise EngineDead when the engine's thread ended or a step hangs."""
        self._loop.check(self._config.step_timeout_s)

    def shutdown(self) -> None:
        """End the engine and give the cores back."""
        self._loop.stop()
        self._release_cpus()

    def _recorded(self, engine: Engine) -> Engine:
        if self._config.record is not None:
            engine.record(Path(f"{self._config.record}.{self.worker_id}.jsonl"))
        return engine

    def _release_cpus(self) -> None:
        if self._cpus:
            self._cpus.release()

    def _report_load(self, loop: EngineLoop) -> None:
        now = time.monotonic()
        if now - self._reported_at < self._config.report_interval_s:
            return
        report = WorkerReport(
            self.worker_id,
            loop.outstanding(),
            loop.take_finished(),
            self._draining,
            loop.engine_stats().drafts,
        )
        if report == self._reported and now - self._reported_at < REPORT_HEARTBEAT_S:
            return
        self._reported_at, self._reported = now, report
        self._report(report)
