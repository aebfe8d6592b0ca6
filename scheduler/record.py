"""Decisions of a worker as lines of JSON: what each was made from, what it was, what came of it.

A header line, then one line for each step, and before it one for each request that is new in it;
one line for each request that ends. Requests are numbered in the order of their lines. Infinite
numbers are null; all others keep their bits.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from scheduler.cost_model import CostModel
from scheduler.policy import StepPolicy
from scheduler.request import Request, RequestState, Slo
from scheduler.task import (
    BatchPlan,
    Deferral,
    Limits,
    Reason,
    Stage,
    StageTask,
    StepReport,
    StepView,
)

FORMAT = "xyserve decisions 2"


class Recorder:
    """Writes a record as its worker goes on."""

    def __init__(
        self, file: TextIO, policy: StepPolicy, limits: Limits, cost_model: CostModel
    ) -> None:
        """`cost_model` as it is before the first step."""
        self.num_steps = 0
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

    def write_step(
        self,
        view: StepView,
        report: StepReport,
        executed: tuple[StageTask, ...],
        num_observed: int,
    ) -> None:
        """Write a step: its `view`, and the tasks that were computed in it.

        The cost model had learnt from `num_observed` of the recorded steps when it was planned.
        """
        running = [self._state(state) for state in view.running]
        waiting = [self._state(state) for state in view.waiting]
        plan = report.plan
        tasks = [self._task(task) for task in plan.tasks]
        self._write(
            {
                "step": view.step,
                "now": report.began_s,
                "num_observed": num_observed,
                "num_free_kv_blocks": view.num_free_kv_blocks,
                "running": running,
                "waiting": waiting,
                "tasks": tasks,
                "deferred": [[self._numbers[name], reason] for name, reason in plan.deferred],
                "preempted": [self._numbers[name] for name in plan.preempted],
                "predicted_s": plan.predicted_s,
                "limit_s": _finite(plan.limit_s),
                # Most often it is what was planned.
                "executed": None
                if set(executed) == set(plan.tasks)
                else [self._task(task) for task in executed],
                "measured_s": report.measured_s,
                "decided_s": report.decided_s,
            }
        )
        self.num_steps += 1

    def write_finish(self, request_id: str, num_output_tokens: int) -> None:
        """Write that a request has ended, with so many tokens."""
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


def replay(lines: Iterable[str]) -> Iterator[tuple[StepReport, BatchPlan]]:
    """Decide each step of a record again: what was recorded, and the plan made now.

    The cost model learns from the recorded times, so it is at each step what it was. ValueError
    if `lines` are no record.
    """
    documents = _documents(lines)
    header = _header(documents)
    limits, cost_model = Limits(**header["limits"]), CostModel.from_dict(header["cost_model"])
    scheduler = StepPolicy(**header["policy"]).make(limits, cost_model)
    observations: list[tuple[tuple[StageTask, ...], float]] = []
    num_observed = 0
    for report, view, executed, num_observed_then in _steps(documents):
        for tasks, measured_s in observations[num_observed:num_observed_then]:
            cost_model.observe(cost_model.shape_of(tasks), measured_s)
        num_observed = num_observed_then
        yield report, scheduler.plan(view, report.began_s)
        observations.append((executed, report.measured_s))


def arrivals(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The requests of a record in order of arrival: `arrival_s` after the first one,
    `input_length` and `output_length` in tokens, and `class`.

    One whose end is not in the record has the output tokens that were seen of it.
    """
    documents = _documents(lines)
    _header(documents)
    requests: list[tuple[Request, float]] = []
    num_output_tokens: dict[int, int] = {}
    for document in documents:
        if "request" in document:
            requests.append(_read_request(document["request"]))
        elif "finished" in document:
            num_output_tokens[document["finished"]] = document["num_output_tokens"]
        else:
            for number, num_tokens, *_ in (*document["running"], *document["waiting"]):
                num_output_tokens[number] = num_tokens
    order = sorted(range(len(requests)), key=lambda number: requests[number][1])
    for number in order:
        request, arrival_s = requests[number]
        yield {
            "arrival_s": arrival_s - requests[order[0]][1],
            "input_length": request.num_prompt_tokens,
            "output_length": max(num_output_tokens.get(number, 0), 1),
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
            # The last line may be cut off, where its worker died.
            broken = ValueError(f"line {number} of the record is no JSON: {error}")


def _header(documents: Iterator[dict[str, Any]]) -> dict[str, Any]:
    header = next(documents, None)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"this is no record of decisions: its first line lacks {FORMAT!r}")
    return header


def _steps(
    documents: Iterable[dict[str, Any]],
) -> Iterator[tuple[StepReport, StepView, tuple[StageTask, ...], int]]:
    requests: list[tuple[Request, float]] = []
    ids: list[str] = []
    for document in documents:
        if "request" in document:
            requests.append(_read_request(document["request"]))
            ids.append(requests[-1][0].request_id)
        elif "step" in document:
            plan = BatchPlan(
                tasks=_read_tasks(document["tasks"], ids),
                deferred=tuple(
                    Deferral(ids[number], Reason(reason)) for number, reason in document["deferred"]
                ),
                preempted=tuple(ids[number] for number in document["preempted"]),
                predicted_s=document["predicted_s"],
                limit_s=_float(document["limit_s"]),
            )
            view = StepView(
                document["step"],
                [_read_state(row, requests) for row in document["running"]],
                [_read_state(row, requests) for row in document["waiting"]],
                document["num_free_kv_blocks"],
            )
            report = StepReport(
                view.step, document["now"], plan, document["measured_s"], document["decided_s"]
            )
            executed = document["executed"]
            tasks = plan.tasks if executed is None else _read_tasks(executed, ids)
            yield report, view, tasks, document["num_observed"]


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
    ]


def _read_request(row: list[Any]) -> tuple[Request, float]:
    request_id, num_prompt_tokens, max_tokens, priority, ttft_s, tpot_s, slo_class, arrival_s = row
    slo = Slo(_float(ttft_s), _float(tpot_s))
    request = Request(request_id, num_prompt_tokens, max_tokens, priority, slo, slo_class)
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


def _finite(number: float) -> float | None:
    return None if number == math.inf else number


def _float(number: float | None) -> float:
    return math.inf if number is None else number
