"""What a step is made of: spans of tokens by stage, what was deferred, and how long it takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from scheduler.request import RequestState
from scheduler.worded import Worded


class Stage(StrEnum):
    """Why a request has tokens in a step; below the scheduler nothing branches on it."""

    PREFILL = "prefill"
    """A chunk of the tokens that are known but not in the KV cache."""
    DECODE = "decode"
    """The newest token."""
    VERIFY = "verify"
    """The newest token and its drafts."""


class StageTask(NamedTuple):
    """A span of one request's query tokens: the last `num_tokens` of `seq_len`."""

    request_id: str
    stage: Stage
    num_tokens: int
    seq_len: int
    """Tokens in the KV cache after the step, these included."""
    samples: bool
    """Whether the span ends at the newest token, so that the step gives the next one."""


class Reason(Worded):
    """Why a request gets nothing in a step."""

    TIME = "time", "the step was as long as the tightest target in it allows"
    TOKENS = "tokens", "the step already had the maximum number of tokens"
    SEATS = "seats", "the worker already ran max_num_seqs requests"
    KV = "kv", "the KV cache had no room for its tokens"
    TPOT = "tpot", "with it, the running requests would have missed their time per token"
    OVERDUE = "overdue", "it could no longer meet its target; requests that could went first"
    BEHIND = "behind", "it must not pass a request ahead of it in the queue"
    PREEMPTED = "preempted", "its KV blocks were freed for other requests"


class Deferral(NamedTuple):
    """A request that gets nothing in a step, and why."""

    request_id: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One step on one worker."""

    tasks: tuple[StageTask, ...]
    deferred: tuple[Deferral, ...]
    """Every request that is not in `tasks`."""
    preempted: tuple[str, ...]
    """Requests whose KV blocks are freed before the step; they wait again, nothing computed."""
    predicted_s: float
    limit_s: float
    """How long the step may last by the targets of those in it; infinite if they set none."""

    @property
    def num_tokens(self) -> int:
        """Query tokens of all stages."""
        return sum(task.num_tokens for task in self.tasks)

    @property
    def is_steady(self) -> bool:
        """Whether it only decodes, for all requests there are.

        Until a request comes or ends or the KV cache is full, each next plan is the same, one
        token further.
        """
        return not self.deferred and all(task.stage is Stage.DECODE for task in self.tasks)


@dataclass(frozen=True, slots=True)
class StepReport:
    """A step that was taken."""

    step: int
    began_s: float
    plan: BatchPlan
    measured_s: float
    decided_s: float
    """Seconds that making the plan took."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step of a worker can hold."""

    max_num_seqs: int
    """Requests that run at the same time."""
    max_num_batched_tokens: int
    """Query tokens of one step."""
    kv_block_size: int
    """Tokens in one block of the KV cache."""
    num_kv_blocks: int

    def num_blocks(self, num_tokens: int) -> int:
        """KV blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.kv_block_size)


@dataclass(frozen=True, slots=True)
class StepView:
    """A worker between two steps: all that a plan is made from, beside the time."""

    step: int
    """Counts the steps of the worker."""
    running: Sequence[RequestState]
    """Those that hold a seat, in the order they took it."""
    waiting: Sequence[RequestState]
    """Those that can take one, by (priority, arrival); preempted ones first."""
    num_free_kv_blocks: int
    num_shared_kv_blocks: Mapping[str, int] = field(default_factory=dict)
    """Of those that run, by id, the blocks that others hold too, so that preemption does not free
    them; those with none may be left out."""


class StepScheduler(Protocol):
    """Decides what a worker computes in its next step.

    A plan depends on the view, the time and the state of the cost model alone: equal inputs give
    equal plans.
    """

    def plan(self, view: StepView, now: float) -> BatchPlan:
        """Make the next step. Empty only if nothing runs and nothing waits, or nothing fits."""
