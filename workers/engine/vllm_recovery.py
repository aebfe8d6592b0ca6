"""An engine that goes on after a step that failed, without the request that is the cause."""

import logging
import time
from collections import deque

from vllm.v1.engine.core import EngineCore
from vllm.v1.sample.logits_processor import BatchUpdate

from workers.engine.vllm_sampling import runner_of
from workers.engine.vllm_scheduler import PlannedScheduler
from workers.engine_request import EngineRequest

logger = logging.getLogger(__name__)

MAX_IN_VAIN = 3
"""Failures in which no request is found to be the cause, before the engine is given up."""
IN_VAIN_S = 60.0
"""Time in which they count."""
MAX_IN_A_ROW = 4
"""Failures without a step in between that does not fail: then the engine is the cause."""


class StepRecovery:
    """Finds the request that makes steps fail.

    When a step fails its requests are computed again, each in a step of its own first: one whose
    step fails again is the cause, and the others have lost some time and no token. What failed
    must have been the computation: nothing of the step may have been taken in, and the device must
    still compute, as a CPU does.
    """

    def __init__(self, core: EngineCore, scheduler: PlannedScheduler) -> None:
        self._core = core
        self._scheduler = scheduler
        self._in_vain: deque[float] = deque(maxlen=MAX_IN_VAIN)
        """Times of failures of which no cause is found yet."""
        self._num_in_a_row = 0

    def step_succeeded(self) -> None:
        """Note that a step has not failed."""
        self._num_in_a_row = 0

    def undo_step(self, error: Exception) -> tuple[list[str], list[tuple[EngineRequest, int]]]:
        """Undo the step that has just failed with `error`, and take all requests from the engine.

        Gives the ids of the requests that are the cause, if that is clear, and all the others with
        vLLM's indices of their clients, to be added again. Raises `error` if the engine cannot go
        on.
        """
        if self._core.batch_queue is not None or self._core.vllm_config.kv_transfer_config:
            raise error
        self._num_in_a_row += 1
        pending = list(self._scheduler.on_trial)
        abandoned = self._scheduler.abandon_step()
        if abandoned is None or self._num_in_a_row > MAX_IN_A_ROW:
            raise error
        in_step, requests = abandoned
        causes = in_step if len(in_step) == 1 else []
        if causes:
            self._in_vain.clear()
        elif self._is_in_vain(time.monotonic()):
            raise error
        self._forget_batch()
        if not self._core.reset_prefix_cache():  # blocks of the step count as computed
            raise error
        suspects = dict.fromkeys((*in_step, *pending))
        self._scheduler.on_trial.extend(name for name in suspects if name not in causes)
        logger.error(
            "a step failed, and its requests are computed again one by one",
            exc_info=error,
            extra={"requests": in_step, "is_the_cause": bool(causes)},
        )
        return causes, [one for one in requests if one[0].request.request_id not in causes]

    def _forget_batch(self) -> None:
        """Have the runner forget all requests, wherever in the step it was."""
        runner = runner_of(self._core)
        runner.execute_model_state = None
        # Some may have missed that rows of the batch were added or moved.
        batch = runner.input_batch
        nothing = BatchUpdate(0, removed=range(batch.max_num_reqs), added=(), moved=())
        for processor in batch.logitsprocs.all:
            processor.update_state(nothing)
        if (holder := batch.thinking_budget_state_holder) is not None:
            holder.sync_batch(nothing)
        self._core.step_fn()  # a step without requests

    def _is_in_vain(self, now: float) -> bool:
        """Note a failure without a clear cause; whether there were too many of late."""
        is_full = len(self._in_vain) == MAX_IN_VAIN
        too_many = is_full and now - self._in_vain[0] < IN_VAIN_S
        self._in_vain.append(now)
        return too_many
