"""An engine without a model: every request generates the tokens 0, 1, 2, ..."""

import math
import threading
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec

from scheduler.prefill_queue import QueueReport
from scheduler.prefix_index import PrefixDelta
from scheduler.request import Request
from scheduler.stage_policy import StageReport, WorkerPolicy
from workers.drafts.draft_stream import DraftWorkerAddress
from workers.engine.engine import EngineStats, StepOutput
from workers.engine_request import EngineRequest, Grammar
from workers.errors import GrammarRefused
from workers.token_stream import StreamAddress

STEP_S = 0.001
"""Time of a step: with none at all, no client could keep up."""
MALFORMED = [b"malformed"]
"""An engine request that is refused."""
IMPOSSIBLE = Grammar("REGEX", "[^\\s\\S]")
"""A grammar that is refused."""


def decode_tokens(frames: list[bytes]) -> dict[str, list[int]]:
    """The new tokens of a step's output, by request id."""
    return msgspec.msgpack.decode(frames[0], type=dict[str, list[int]])


@dataclass
class _Sequence:
    request: Request
    client: StreamAddress
    num_output_tokens: int = 0


class FakeEngine:
    """An `Engine` that the test can hold in a step and make fail."""

    def __init__(self, max_num_seqs: int = 8) -> None:
        self.steps: list[list[str]] = []
        """The requests of each step that ran the model."""
        self.num_empty_steps = 0
        self.num_looks = 0
        """How often it was asked for its requests: twice in each turn of the loop."""
        self.is_stepping = threading.Event()
        self.go_on = threading.Event()
        """While it is clear, a step hangs."""
        self.go_on.set()
        self.step_error: Exception | None = None
        self.causes: list[str] | None = None
        """Requests that it takes for the cause of `step_error`; None: it does not recover."""
        self.stats_error: Exception | None = None
        self.predicted_s = math.inf
        self.runs_model = True
        """Whether steps find something to compute."""
        self.is_shut_down = False
        self.draft_worker: DraftWorkerAddress | None = None
        self.record_path: Path | None = None
        self.prefix: PrefixDelta | None = None
        """What the next report tells of the prefix cache; later ones that nothing has changed."""
        self.prefix_due = False
        self.num_prefix_resyncs = 0
        self.queued = QueueReport()
        """What reports tell of its requests."""
        self.staged = StageReport()
        """What reports tell of its stages."""
        self.policies: list[WorkerPolicy | None] = []
        """The policies that it was given."""
        self.threads: set[str] = set()
        """Names of the threads that used the engine."""
        self._max_num_seqs = max_num_seqs
        self._sequences: dict[str, _Sequence] = {}

    def assign_draft_worker(self, draft_worker: DraftWorkerAddress | None) -> None:
        self.draft_worker = draft_worker

    async def prepare(self, grammar: Grammar) -> None:
        if grammar == IMPOSSIBLE:
            raise GrammarRefused("impossible")

    def add_request(self, request: EngineRequest, client: StreamAddress) -> None:
        self.threads.add(threading.current_thread().name)
        if request.core == MALFORMED:
            raise ValueError("malformed")
        self._sequences[request.request.request_id] = _Sequence(request.request, client)

    def abort_requests(self, request_ids: list[str]) -> None:
        self.threads.add(threading.current_thread().name)
        for request_id in request_ids:
            self._sequences.pop(request_id, None)

    def has_requests(self) -> bool:
        self.num_looks += 1
        return bool(self._sequences)

    def step(self) -> tuple[dict[StreamAddress, StepOutput], bool]:
        self.threads.add(threading.current_thread().name)
        self.is_stepping.set()
        assert self.go_on.wait(60)
        time.sleep(STEP_S)
        self.is_stepping.clear()
        if self.step_error is not None:
            raise self.step_error
        if not self.runs_model:
            self.num_empty_steps += 1
            return {}, False
        running = dict(islice(self._sequences.items(), self._max_num_seqs))
        self.steps.append(list(running))
        clients = {sequence.client for sequence in running.values()}
        return {client: self._output(client, running) for client in clients}, True

    def recover(self, error: Exception) -> list[str]:
        if self.causes is None:
            raise error
        self.step_error = None
        self.abort_requests(self.causes)
        return self.causes

    def predicted_step_s(self) -> float:
        return self.predicted_s

    def running(self) -> list[str]:
        return list(islice(self._sequences, self._max_num_seqs))

    def stats(self) -> EngineStats:
        self.threads.add(threading.current_thread().name)
        if self.stats_error is not None:
            raise self.stats_error
        num_running = min(len(self._sequences), self._max_num_seqs)
        return EngineStats(num_running, len(self._sequences) - num_running, num_running / 8)

    def queue(self) -> QueueReport:
        self.threads.add(threading.current_thread().name)
        return self.queued

    def stages(self, queue: QueueReport) -> StageReport:
        self.threads.add(threading.current_thread().name)
        assert queue == self.queued or queue.prefills
        return self.staged

    def follow_policy(self, policy: WorkerPolicy | None) -> None:
        self.threads.add(threading.current_thread().name)
        self.policies.append(policy)

    def take_prefix(self) -> PrefixDelta | None:
        self.threads.add(threading.current_thread().name)
        taken, self.prefix_due = self.prefix, False
        self.prefix = taken.settled() if taken else None
        return taken

    def prefix_is_due(self) -> bool:
        return self.prefix_due

    def resync_prefix(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.num_prefix_resyncs += 1

    def record(self, path: Path) -> None:
        self.threads.add(threading.current_thread().name)
        self.record_path = path

    def shutdown(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.is_shut_down = True

    def _output(self, client: StreamAddress, running: dict[str, _Sequence]) -> StepOutput:
        tokens: dict[str, list[int]] = {}
        finish_reasons: dict[str, str] = {}
        for request_id, sequence in running.items():
            if sequence.client != client:
                continue
            tokens[request_id] = [sequence.num_output_tokens]
            sequence.num_output_tokens += 1
            if sequence.num_output_tokens == sequence.request.max_tokens:
                finish_reasons[request_id] = "length"
                del self._sequences[request_id]
        return StepOutput(
            {request_id: len(new) for request_id, new in tokens.items()},
            finish_reasons,
            [msgspec.msgpack.encode(tokens)],
        )
