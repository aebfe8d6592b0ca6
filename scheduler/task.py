"""What a step is made of: tasks by stage, deferrals, and how long it takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from scheduler.request import RequestState
from scheduler.stage_policy import ALONE, WorkerPolicy
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
    """Whether the span ends at the newest token, so that the step samples the next one."""


class Reason(Worded):
    """Why a request gets nothing in a step."""

    TIME = "time", "the step was as long as the tightest target in it allows"
    SHARE = "share", "the step had all the prefills that the stage policy allows beside its decodes"
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
    """Longest duration that the targets of its requests allow; infinite if they set none."""

    @property
    def num_tokens(self) -> int:
        """Query tokens of all stages."""
        return sum(task.num_tokens for task in self.tasks)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """A step as it was planned, computed and measured."""

    step: int
    """Number of the step, counted by its worker."""
    began_s: float
    plan: BatchPlan
    tasks: tuple[StageTask, ...]
    """What was computed: the plan's tasks, except where vLLM had to deviate."""
    measured_s: float
    decided_s: float
    """Seconds that making the plan took."""
    num_new_tokens: Mapping[str, int] = field(default_factory=dict)
    """Number of output tokens that the step produced, by request id."""
    preempted: frozenset[str] = frozenset()
    """Requests whose KV cache was freed before the step, by the plan or by vLLM."""
    queued_s: tuple[tuple[str, float], ...] = ()
    """Service class and queueing time of each request whose first task is in this step."""
    num_flops: float = 0.0
    """Floating-point operations, by the model's dimensions; 0 if they are not known."""
    num_bytes: float = 0.0
    """Bytes of weights and KV cache moved, by the model's dimensions; 0 if they are not known."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one step of a worker."""

    max_num_seqs: int
    """Requests that run at the same time."""
    max_num_batched_tokens: int
    """Query tokens of one step."""
    kv_block_size: int
    """Tokens in one block of the KV cache."""
    num_kv_blocks: int

    def num_blocks(self, num_tokens: int) -> int:
        """KV blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.kv_block_size)


@dataclass(frozen=True, slots=True)
class StepView:
    """A worker between two steps: all that a plan is made from, except the time."""

    step: int
    """Number of the step to plan, counted by the worker."""
    running: Sequence[RequestState]
    """Requests that hold a seat, in the order of their admission."""
    waiting: Sequence[RequestState]
    """Requests that may be admitted, by (priority, arrival); preempted ones first."""
    num_free_kv_blocks: int
    num_shared_kv_blocks: Mapping[str, int] = field(default_factory=dict)
    """Blocks of running requests that others hold too, so that preemption does not free them, by
    request id; requests without such blocks may be left out."""
    policy: WorkerPolicy = ALONE
    """The bounds that the stage policy sets."""


class StepScheduler(Protocol):
    """Decides what a worker computes in its next step.

    A plan depends only on the view, the time and the state of the cost model: equal inputs give
    equal plans.
    """

    def plan(self, view: StepView, now: float) -> BatchPlan:
        """Make the next step. Empty only if nothing runs and nothing waits, or nothing fits."""
