"""The ledger of live requests, on requests that look like vLLM's."""

import time
from dataclasses import dataclass, field
from math import inf
from typing import Any

import pytest

from scheduler.request import Request, RequestState, Slo
from workers.engine.vllm_requests import LOOKUP_STEPS, MAX_LOOKUPS, LiveRequests

NOW = 100.0


@dataclass
class FakeRequest:
    """What the ledger reads of a request of vLLM's."""

    request_id: str
    num_prompt_tokens: int = 50
    max_tokens: int = 9
    priority: int = 0
    arrival_time: float = field(default_factory=time.time)
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    num_output_placeholders: int = 0
    """Tokens that steps in flight are sampling."""
    spec_token_ids: list[int] = field(default_factory=list)


def fake(request_id: str = "r", **fields: Any) -> Any:
    """A request that has just arrived, except for `fields`."""
    return FakeRequest(request_id, **fields)


def ledger(*requests: Any) -> LiveRequests:
    live = LiveRequests()
    for request in requests:
        slo = Slo(1.0, 0.1)
        live.add(RequestState(Request(request.request_id, 50, 9, slo=slo), NOW - 2.0))
    return live


def test_a_state_follows_vllms_request() -> None:
    request = fake()
    live = ledger(request)

    waits = live.wait(request, NOW)
    request.num_computed_tokens = 30
    runs = live.run(request, NOW + 1)

    assert (waits.num_computed_tokens, waits.arrival_s, waits.request.slo.ttft_s) == (0, 98.0, 1.0)
    assert (runs.num_computed_tokens, runs.first_token_s, runs.request) == (30, inf, waits.request)


def test_a_state_that_was_returned_never_changes() -> None:
    request = fake()
    live = ledger(request)
    states = [live.run(request, NOW)]
    request.num_computed_tokens, request.num_output_tokens = 50, 1
    live.deliver([request], NOW + 1)
    states.append(live.run(request, NOW + 2))

    assert [state.num_output_tokens for state in states] == [0, 1]
    assert [state.last_token_s for state in states] == [inf, NOW + 1]


def test_tokens_are_delivered_once_with_their_time() -> None:
    request = fake()
    live = ledger(request)
    delivered = []
    for step, num_output_tokens in enumerate((0, 1, 1, 4)):
        request.num_output_tokens = num_output_tokens
        delivered.append(live.deliver([request], NOW + step))

    state = live.run(request, NOW + 9)
    assert delivered == [{"r": 0}, {"r": 1}, {"r": 0}, {"r": 3}]
    assert (state.first_token_s, state.last_token_s) == (NOW + 1, NOW + 3)


def test_tokens_in_flight_count_as_known() -> None:
    request = fake(num_computed_tokens=50, num_output_placeholders=1)

    state = ledger(request).run(request, NOW)

    assert (state.num_output_tokens, state.first_token_s) == (1, NOW)


def test_the_last_tokens_of_a_request_come_with_the_step_that_ended_it() -> None:
    ends, goes_on = fake("ends", num_output_tokens=3), fake("goes on")
    live = ledger(ends, goes_on)
    live.deliver([ends], NOW)
    ends.num_output_tokens = 5

    live.finish(ends)

    assert "ends" not in live
    assert live.deliver([ends, goes_on], NOW) == {"ends": 2, "goes on": 0}
    assert live.deliver([ends, goes_on], NOW) == {"goes on": 0}


@pytest.mark.parametrize("num_spec_tokens", [0, 1, 2, 3])
def test_chances_are_those_of_the_drafts_that_vllm_holds(num_spec_tokens: int) -> None:
    request = fake(spec_token_ids=[7] * num_spec_tokens)
    live = ledger(request)
    live["r"].draft_chances = (0.9, 0.8)

    assert live.run(request, NOW).draft_chances == (0.9, 0.8)[:num_spec_tokens]


def test_prefixes_are_looked_up_now_and_then_a_few_at_a_time() -> None:
    requests = [fake(str(index)) for index in range(MAX_LOOKUPS + 2)]
    live = ledger(*requests)
    looked_up: dict[int, list[str]] = {}

    for step in range(LOOKUP_STEPS + 1):
        found = looked_up.setdefault(step, [])

        def prefix_hit(request: Any, found: list[str] = found) -> int:
            found.append(request.request_id)
            return 16

        live.look_up(requests, step, prefix_hit)

    names = [request.request_id for request in requests]
    assert looked_up[0] == names[:MAX_LOOKUPS]
    assert looked_up[1] == names[MAX_LOOKUPS:]
    assert all(looked_up[step] == [] for step in range(2, LOOKUP_STEPS))
    assert looked_up[LOOKUP_STEPS] == names[:MAX_LOOKUPS]
    assert live.wait(requests[0], NOW).num_computed_tokens == 16


def test_a_request_that_ran_is_looked_up_again_when_it_waits() -> None:
    request = fake()
    live = ledger(request)
    live.look_up([request], 1, lambda _: 16)
    live.run(request, NOW)
    live.look_up([request], 2, lambda _: 32)

    assert live.wait(request, NOW).num_computed_tokens == 32


def test_the_next_turn_of_a_session_is_a_request_of_its_own_with_the_same_targets() -> None:
    request = fake()
    live = ledger(request)
    live.run(request, NOW)
    request.num_output_tokens = 3
    live.deliver([request], NOW)

    request.num_prompt_tokens, request.num_output_tokens = 80, 0
    request.arrival_time = time.time() - 5.0
    state = live.wait(request, NOW + 10)

    assert state.request.num_prompt_tokens == 80
    assert state.request.slo == Slo(1.0, 0.1)
    assert state.arrival_s == pytest.approx(time.monotonic() - 5.0, abs=1.0)
    assert (state.num_output_tokens, state.first_token_s) == (0, inf)


def test_a_look_at_a_state_leaves_all_as_it_is() -> None:
    waits, runs = fake("w"), fake("r", num_computed_tokens=30)
    live = ledger(waits, runs)
    live.look_up([waits], 1, lambda _: 16)
    before = repr((live["w"], live["r"]))

    assert live.peek(waits).num_computed_tokens == 16
    assert live.peek(runs).num_computed_tokens == 30
    runs.num_output_placeholders, runs.num_computed_tokens = 1, 50
    assert live.peek(runs).is_decoding
    assert repr((live["w"], live["r"])) == before
