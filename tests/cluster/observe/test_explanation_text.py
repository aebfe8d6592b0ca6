import dataclasses
import io

from rich.console import Console

from cluster.observe.explanation import AttemptTrace, Explanation
from cluster.observe.explanation_text import describe, describe_refusal, steps_table
from cluster.observe.request_history import Attempt, Refusal, RequestRecord
from scheduler.placement import Placement, PlacementReason, WorkerLoad
from scheduler.prefill_queue import Forecast
from scheduler.request import Request, Slo
from scheduler.task import Reason, Stage
from tests.cluster.observe.test_phases import STEPS, step
from workers.step_history import RequestStep

LOST = "RayActorError: the worker died"
PLACEMENT = Placement(
    WorkerLoad("w1", 120, 2), WorkerLoad("w2", 340, 5), PlacementReason.SOONEST, num_closed=1
)


def record(*attempts: Attempt, outcome: str = "length", error: str = "") -> RequestRecord:
    request = Request("cmpl-1", 24, 60, slo=Slo(ttft_s=4.0, tpot_s=3.0), slo_class="interactive")
    one = RequestRecord(request, 0.5, list(attempts), outcome=outcome, error=error)
    one.deliver([7], 6.0)
    one.deliver([7] * 5, 12.0)
    return one


def text_of(explanation: Explanation) -> str:
    return "\n".join(describe(explanation))


def test_a_request_that_was_preempted_says_when_why_and_for_how_long() -> None:
    one = Explanation(record(Attempt("cmpl-1.0", 0.6)), [AttemptTrace(PLACEMENT, {"w1": STEPS})])

    text = text_of(one)

    assert "ended by length after 6 tokens and 11.50 s" in text.replace("11.500", "11.50")
    assert "class interactive: TTFT 5.50 s of 4.00 s (MISSED), TPOT 1.20 s of 3.00 s (met)" in text
    assert "placed on w1 (120 outstanding tokens in 2 requests" in text
    assert (
        "it was predicted to be done with its work first; runner-up w2 (340 outstanding tokens in "
        "5 requests" in text
    )
    assert "1 worker did not take it" in text
    assert (
        "queue 2.50 s; waited 1.00 s because the worker already ran max_num_seqs requests" in text
    )
    assert "decode 6.00 s: 36 tokens in 3 steps, 2 of 4 drafts accepted" in text
    assert "preempted 7.500 s after its arrival (step 8)" in text
    assert "it was computed again after 3.000 s" in text


def test_what_was_predicted_is_told_beside_what_came() -> None:
    forecast = Forecast(num_cached_tokens=16, prefill_s=1.5, ttft_s=4.5, num_late=1, fits=False)
    best = dataclasses.replace(PLACEMENT.chosen, forecast=forecast)
    worse = dataclasses.replace(WorkerLoad("w2", 340, 5), forecast=Forecast(ttft_s=9.0))
    placement = Placement(best, worse, PlacementReason.PREFIX, 0)
    attempt = Attempt("cmpl-1.0", 0.6, forecast=forecast, placed_s=1.0)
    one = record(attempt)
    attempt.num_cached_tokens = 20

    text = text_of(Explanation(one, [AttemptTrace(placement, {})]))

    assert (
        "predicted: first token after 4.50 s, 16 tokens cached, the rest in 1.50 s of prefill, "
        "1 request late because of it, itself included, no room in the KV cache): most of its "
        "prompt that is cached anywhere is cached there; runner-up w2" in text
    )
    assert "predicted: first token after 9.00 s, 0 tokens cached" in text
    assert (
        "its first token came 5.00 s after that (predicted 4.50 s), with 20 of its tokens found "
        "cached (predicted 16)" in text
    )


def test_a_request_that_lost_its_worker_shows_both_attempts() -> None:
    attempts = Attempt("cmpl-1.0", 0.6, LOST), Attempt("cmpl-1.1", 2.9)
    one = Explanation(
        record(*attempts), [AttemptTrace(None, {}), AttemptTrace(PLACEMENT, {"w1": STEPS[2:]})]
    )

    text = text_of(one)

    first, second = text.split("Attempt 2 of 2:")
    assert "Attempt 1 of 2:" in first
    assert f"it lost this worker: {LOST}" in first
    assert "no worker remembers a step of it" in first
    assert "placed on w1" in second
    # Its queue time starts again.
    assert "queue 100.0 ms" in second


def test_a_request_that_waited_for_its_turn_says_for_how_long() -> None:
    attempt = Attempt("cmpl-1.0", 0.6, queued_s=2.5)
    text = text_of(Explanation(record(attempt), [AttemptTrace(PLACEMENT, {"w1": STEPS})]))

    assert "waited 2.50 s for its turn: the workers were busy" in text
    assert text.index("for its turn") < text.index("placed on w1")


def test_a_request_that_failed_shows_the_error() -> None:
    one = Explanation(
        record(Attempt("cmpl-1.0", 0.6, LOST), outcome="error", error="EngineDead('x')"),
        [AttemptTrace(None, {})],
    )

    assert "It failed: EngineDead('x')" in text_of(one)
    assert "TPOT 1.20 s of 3.00 s (MISSED)" in text_of(one)


def test_a_refused_call_says_whose_error_it_was_and_that_no_worker_was_asked() -> None:
    text = "\n".join(describe_refusal(Refusal("my-call", 1.0, 400, "max_tokens must be positive")))

    assert "my-call was refused" in text
    assert "status 400 (the client's error); no worker was asked" in text
    assert "max_tokens must be positive" in text


PREFILLED = [*STEPS[:3], step(4, Stage.PREFILL, 4), step(5, Stage.PREFILL, 4), step(6, Reason.KV)]


def rendered(each: bool, steps: list[RequestStep] = PREFILLED) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=150).print(steps_table(steps, 0.5, each))
    return [line for line in file.getvalue().splitlines() if line.startswith("│")]


def test_alike_steps_share_a_row_unless_each_is_wanted() -> None:
    rows = rendered(each=False)

    assert len(rows) == 4
    assert [part.strip() for part in rows[2].split("│")[1:-1]] == [
        "2.500 s", "3-5", "prefill", "24", "0", "3", "2.70 s", "3.00 s",
    ]  # fmt: skip
    assert "deferred: seats" in rows[0]
    assert len(rendered(each=True)) == 6


def test_decodes_with_and_without_drafts_are_alike() -> None:
    rows = rendered(each=False, steps=STEPS[5:8])

    assert len(rows) == 2
    assert "decode, 1 verify" in rows[0]
