"""Decisions of a worker as lines of JSON: what each was made from, what it was, its outcome.

A header line, then one line for each step, and before it one for each request that is new in it;
one line for each request that ends. Requests are numbered in the order of their lines. Infinite
numbers are null; all others keep their bits.
"""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from scheduler.cost_model import CostModel
from scheduler.policy import StepPolicy
from scheduler.request import Request, RequestState, Slo
from scheduler.stage_policy import ALONE, PolicyReason, WorkerPolicy
from scheduler.task import BatchPlan, Deferral, Limits, Reason, Stage, StageTask, StepView

FORMAT = "xyserve decisions 2"


class Recorder:
    """Writes the record of one worker, step by step."""

    def __init__(
        self, file: TextIO, policy: StepPolicy, limits: Limits, cost_model: CostModel
    ) -> None:
        """Write the header; `cost_model` is as it is before the first step."""
        self._file = file
        self._numbers: dict[str, int] = {}
        self._statics: dict[str, tuple[Request, float]] = {}
        self._num_requests = 0
        self._write(
            {
                "format": FORMAT,
                "policy": dataclasses.asdict(policy),
                "limits": dataclasses.asdict(limits),
                "cost_model": cost_model.to_dict(),
            }
        )

    def decision(
        self,
        view: StepView,
        plan: BatchPlan,
        now: float,
        *,
        tasks: tuple[StageTask, ...],
        late: Iterable[RequestState],
        num_observed: int,
    ) -> dict[str, Any]:
        """What is known of a step when it begins, for `write_step` to complete.

        `tasks` are computed in it, some perhaps of requests that came too `late` for the view. The
        cost model had learnt from `num_observed` of the recorded steps when it was planned.
        Requests that are new in it are written here and now, so that nothing that happens to them
        until the step is over changes it.
        """
        running = [self._state(state) for state in view.running]
        waiting = [self._state(state) for state in view.waiting]
        for state in late:
            self._state(state)
        shared = {}
        if view.num_shared_kv_blocks:  # none are reported live
            rows = [[self._numbers[name], num] for name, num in view.num_shared_kv_blocks.items()]
            shared = {"shared_kv_blocks": rows}
        policy = {}
        if view.policy != ALONE:
            policy = {"worker_policy": dataclasses.astuple(view.policy)}
        return {
            "step": view.step,
            "now": now,
            "num_observed": num_observed,
            "num_free_kv_blocks": view.num_free_kv_blocks,
            **shared,
            **policy,
            "running": running,
            "waiting": waiting,
            "tasks": [self._task(task) for task in plan.tasks],
            "deferred": [[self._numbers[name], reason] for name, reason in plan.deferred],
            "preempted": [self._numbers[name] for name in plan.preempted],
            "predicted_s": plan.predicted_s,
            "limit_s": _finite(plan.limit_s),
            # Nearly always it is what was planned.
            "executed": None
            if set(tasks) == set(plan.tasks)
            else [self._task(task) for task in tasks],
        }

    def write_step(self, decision: dict[str, Any], measured_s: float, decided_s: float) -> None:
        """Write a step that is over."""
        self._write(decision | {"measured_s": measured_s, "decided_s": decided_s})

    def write_finish(self, request_id: str, num_output_tokens: int) -> None:
        """Write that a request has ended with `num_output_tokens` tokens."""
        if request_id in self._numbers:
            number = self._numbers.pop(request_id)
            del self._statics[request_id]
            self._write({"finished": number, "num_output_tokens": num_output_tokens})

    def close(self) -> None:
        """End the record."""
        self._file.close()

    def _state(self, state: RequestState) -> list[Any]:
        static = state.request, state.arrival_s
        request_id = state.request.request_id
        known = self._statics.get(request_id)
        if known != static:
            self._numbers[request_id] = self._num_requests
            self._statics[request_id] = static
            self._num_requests += 1
            self._write({"request": _request_row(*static)})
        return [
            self._numbers[request_id],
            state.num_output_tokens,
            state.num_computed_tokens,
            _finite(state.first_token_s),
            _finite(state.last_token_s),
            list(state.draft_chances),
        ]

    def _task(self, task: StageTask) -> list[Any]:
        return [self._numbers[task.request_id], *task[1:]]

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """One step as a record holds it."""

    view: StepView
    plan: BatchPlan
    began_s: float
    tasks: tuple[StageTask, ...]
    num_observed: int
    """Recorded steps that the cost model had learnt from when the plan was made."""
    measured_s: float
    decided_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a record holds, its steps read one by one."""

    policy: StepPolicy
    limits: Limits
    cost_model: CostModel
    """Its state before the first step."""
    steps: Iterator[RecordedStep]


def read_record(lines: Iterable[str]) -> Record:
    """The record in `lines`; ValueError if they are no record."""
    documents = _documents(lines)
    header = _header(documents)
    return Record(
        policy=StepPolicy(**header["policy"]),
        limits=Limits(**header["limits"]),
        cost_model=CostModel.from_dict(header["cost_model"]),
        steps=_steps(documents),
    )


def arrivals(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The requests of a record in order of arrival: `arrival_s` after the first one,
    `input_length` and `output_length` in tokens, and `class`.

    A request whose end is not in the record has the output tokens that its steps show.
    """
    documents = _documents(lines)
    _header(documents)
    requests: list[tuple[Request, float]] = []
    num_output_tokens: defaultdict[int, int] = defaultdict(int)
    for document in documents:
        if "request" in document:
            requests.append(_read_request(document["request"]))
        elif "finished" in document:
            num_output_tokens[document["finished"]] = document["num_output_tokens"]
        else:
            for number, num_tokens, *_ in (*document["running"], *document["waiting"]):
                # The step in which a request ends is written after its end.
                num_output_tokens[number] = max(num_output_tokens[number], num_tokens)
    order = sorted(range(len(requests)), key=lambda number: requests[number][1])
    for number in order:
        request, arrival_s = requests[number]
        yield {
            "arrival_s": arrival_s - requests[order[0]][1],
            "input_length": request.num_prompt_tokens,
            "output_length": max(num_output_tokens[number], 1),
            "class": request.slo_class,
        }


def _documents(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    broken: ValueError | None = None
    for number, line in enumerate(lines, 1):
        if broken is not None:
            raise broken
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            # Only the last line may be: its worker died while it wrote.
            broken = ValueError(f"line {number} of the record is no JSON: {error}")


def _header(documents: Iterator[dict[str, Any]]) -> dict[str, Any]:
    header = next(documents, None)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"this is no record of decisions: its first line lacks {FORMAT!r}")
    return header


def _steps(documents: Iterable[dict[str, Any]]) -> Iterator[RecordedStep]:
    requests: list[tuple[Request, float]] = []
    ids: list[str] = []
    for document in documents:
        if "request" in document:
            requests.append(_read_request(document["request"]))
            ids.append(requests[-1][0].request_id)
        elif "step" in document:
            yield _read_step(document, requests, ids)


def _read_step(
    document: dict[str, Any], requests: list[tuple[Request, float]], ids: list[str]
) -> RecordedStep:
    plan = BatchPlan(
        tasks=_read_tasks(document["tasks"], ids),
        deferred=tuple(
            Deferral(ids[number], Reason(reason)) for number, reason in document["deferred"]
        ),
        preempted=tuple(ids[number] for number in document["preempted"]),
        predicted_s=document["predicted_s"],
        limit_s=_float(document["limit_s"]),
    )
    executed = document["executed"]
    return RecordedStep(
        view=StepView(
            document["step"],
            [_read_state(row, requests) for row in document["running"]],
            [_read_state(row, requests) for row in document["waiting"]],
            document["num_free_kv_blocks"],
            {ids[number]: num for number, num in document.get("shared_kv_blocks", ())},
            _read_policy(document.get("worker_policy")),
        ),
        plan=plan,
        began_s=document["now"],
        tasks=plan.tasks if executed is None else _read_tasks(executed, ids),
        num_observed=document["num_observed"],
        measured_s=document["measured_s"],
        decided_s=document["decided_s"],
    )


def _request_row(request: Request, arrival_s: float) -> list[Any]:
    return [
        request.request_id,
        request.num_prompt_tokens,
        request.max_tokens,
        request.priority,
        _finite(request.slo.ttft_s),
        _finite(request.slo.tpot_s),
        request.slo_class,
        arrival_s,
        request.tenant,
    ]


def _read_request(row: list[Any]) -> tuple[Request, float]:
    request_id, num_prompt_tokens, max_tokens, priority, ttft_s, tpot_s, *rest = row
    slo_class, arrival_s, *tenant = rest  # older records have none
    slo = Slo(_float(ttft_s), _float(tpot_s))
    request = Request(request_id, num_prompt_tokens, max_tokens, priority, slo, slo_class, *tenant)
    return request, arrival_s


def _read_state(row: list[Any], requests: list[tuple[Request, float]]) -> RequestState:
    number, num_output_tokens, num_computed_tokens, first_s, last_s, draft_chances = row
    request, arrival_s = requests[number]
    return RequestState(
        request,
        arrival_s,
        num_output_tokens,
        num_computed_tokens,
        _float(first_s),
        _float(last_s),
        tuple(draft_chances),
    )


def _read_tasks(rows: list[list[Any]], ids: list[str]) -> tuple[StageTask, ...]:
    return tuple(
        StageTask(ids[number], Stage(stage), num_tokens, seq_len, samples)
        for number, stage, num_tokens, seq_len, samples in rows
    )


def _read_policy(row: list[Any] | None) -> WorkerPolicy:
    if row is None:  # the usual case, and older records have none
        return ALONE
    prefill_share, max_drafts, version, reason = row
    return WorkerPolicy(prefill_share, max_drafts, version, PolicyReason(reason))


def _finite(number: float) -> float | None:
    return None if number == math.inf else number


def _float(number: float | None) -> float:
    return math.inf if number is None else number
