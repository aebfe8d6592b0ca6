import math
from collections.abc import Mapping
from dataclasses import replace
from random import Random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from scheduler.cost_model import CostModel
from scheduler.policy import StepPolicy
from scheduler.request import Request, Slo
from scheduler.simulation import simulated_worker
from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.device import DeviceProfile
from scheduler.simulation.simulated_worker import SimulationError
from scheduler.simulation.simulator import (
    SimulationConfig,
    SimulationResult,
    Speculation,
    simulate,
)
from scheduler.stage_policy import StagePolicy, StageView, WorkerPolicy
from scheduler.task import BatchPlan, Limits, Stage, StageTask, StepView
from tests.scheduler.scenes import NO_SLO

FIXED_S, TOKEN_S, CONTEXT_S = 0.010, 0.001, 1e-6
BLOCK = 16
POLICIES = ("hybrid", "static", "decode_first", "prefill_first")
SLO = Slo(0.5, 0.03)


def device(
    num_kv_blocks: int = 1000, max_num_seqs: int = 32, max_num_batched_tokens: int = 256
) -> DeviceProfile:
    weights = [FIXED_S, TOKEN_S, 0.0, 0.0, CONTEXT_S, 0.0]
    return DeviceProfile(
        name="round",
        source="made up",
        modelled=True,
        cost_model=CostModel(weights, token_knots=(0,), sample_knots=(0,)),
        limits=Limits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_block_size=BLOCK,
            num_kv_blocks=num_kv_blocks,
        ),
    )


def arrival(
    name: str,
    arrival_s: float = 0.0,
    num_prompt: int = 100,
    num_output: int = 10,
    *,
    slo: Slo = NO_SLO,
    hash_ids: tuple[int, ...] = (),
    after: str | None = None,
    slo_class: str = "",
) -> Arrival:
    request = Request(name, num_prompt, num_output, slo=slo, slo_class=slo_class)
    return Arrival(
        request,
        arrival_s,
        num_output,
        hash_ids=hash_ids,
        hash_block_size=BLOCK if hash_ids else 0,
        after=after,
    )


def workload(
    seed: int, count: int = 40, rate: float = 5.0, *, slo: Slo = SLO, max_prompt: int = 200
) -> list[Arrival]:
    random = Random(seed)
    now, found = 0.0, []
    for index in range(count):
        now += random.expovariate(rate)
        num_prompt = random.randint(1, max_prompt)
        shared = tuple(range(random.randint(0, num_prompt // BLOCK)))
        own = tuple(range(1000 * (index + 1), 1000 * (index + 1) + num_prompt // BLOCK))
        found.append(
            arrival(
                f"r{index}",
                now,
                num_prompt,
                random.randint(1, 60),
                slo=random.choice([slo, NO_SLO]),
                hash_ids=(shared + own)[: num_prompt // BLOCK],
            )
        )
    return found


def policy_of(name: str, budget: int | None = None) -> StepPolicy:
    return StepPolicy(name=name, budget=budget)  # type: ignore[arg-type]


def step_s(num_tokens: int, context: int) -> float:
    return FIXED_S + TOKEN_S * num_tokens + CONTEXT_S * context


def finishes(result: SimulationResult) -> list[float]:
    return [outcome.finish_s for outcome in result.outcomes]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fast_forward", [True, False])
def test_one_request_takes_the_sum_of_its_steps(policy: str, fast_forward: bool) -> None:
    result = simulate(
        [arrival("r", 3.0, num_prompt=30, num_output=10)],
        device(),
        SimulationConfig(policy=policy_of(policy), fast_forward=fast_forward),
    )

    (outcome,) = result.outcomes
    decodes = [step_s(1, context) for context in range(31, 40)]
    assert outcome.ttft_s == pytest.approx(step_s(30, 30))
    assert outcome.tpot_s == pytest.approx(sum(decodes) / 9)
    assert outcome.finish_s == pytest.approx(3.0 + step_s(30, 30) + sum(decodes))
    assert result.summary.num_steps == 10
    assert result.summary.utilisation == pytest.approx(1.0)
    assert result.summary.mean_batch == 1.0


def test_a_prompt_above_the_budget_takes_several_steps() -> None:
    result = simulate(
        [arrival("r", num_prompt=600, num_output=1)],
        device(),
        SimulationConfig(policy=policy_of("static"), log_steps=True),
    )

    (steps,) = result.steps.values()
    assert [step.num_prefill_tokens for step in steps] == [256, 256, 88]
    assert result.outcomes[0].tpot_s == 0.0


@pytest.mark.parametrize("policy", POLICIES)
def test_each_token_is_computed_once(policy: str) -> None:
    arrivals = [replace(a, hash_ids=()) for a in workload(1)]
    config = SimulationConfig(policy=policy_of(policy), num_workers=2, log_steps=True)

    result = simulate(arrivals, device(), config)

    steps = [step for log in result.steps.values() for step in log]
    assert result.summary.num_preemptions == 0
    assert sum(step.num_prefill_tokens for step in steps) == sum(
        a.request.num_prompt_tokens for a in arrivals
    )
    assert sum(step.num_decode_tokens for step in steps) == sum(
        a.num_output_tokens - 1 for a in arrivals
    )
    assert [o.num_output_tokens for o in result.outcomes] == [a.num_output_tokens for a in arrivals]
    assert {o.worker_id for o in result.outcomes} == {"worker-0", "worker-1"}


@pytest.mark.parametrize("policy", POLICIES)
def test_preempted_requests_still_give_all_their_tokens(policy: str) -> None:
    arrivals = [arrival(f"r{i}", 0.0, 60, 60, slo=SLO) for i in range(8)]

    result = simulate(
        arrivals,
        device(num_kv_blocks=24),
        SimulationConfig(policy=policy_of(policy), log_steps=True),
    )

    (steps,) = result.steps.values()
    assert result.summary.num_preemptions > 0
    assert all(outcome.num_output_tokens == 60 for outcome in result.outcomes)
    # What was preempted is computed again.
    assert sum(step.num_prefill_tokens for step in steps) > 8 * 60


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_kv_blocks", [30, 1000])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_fast_forward_changes_nothing(policy: str, num_kv_blocks: int, noise: float) -> None:
    arrivals = workload(2, count=60)
    fast, slow = (
        simulate(
            arrivals,
            device(num_kv_blocks),
            SimulationConfig(
                policy=policy_of(policy),
                num_workers=2,
                noise=noise,
                fast_forward=fast_forward,
                log_steps=True,
            ),
        )
        for fast_forward in (True, False)
    )

    assert finishes(fast) == pytest.approx(finishes(slow), abs=1e-9)
    assert fast.summary.to_dict()["ttft_s"] == pytest.approx(slow.summary.to_dict()["ttft_s"])
    assert fast.summary.num_steps == slow.summary.num_steps
    for worker, steps in fast.steps.items():
        for ours, theirs in zip(steps, slow.steps[worker], strict=True):
            assert ours == pytest.approx(theirs)


class Restless(StagePolicy):
    """Sets other shares with each report."""

    def decide(self, views: Mapping[str, StageView], now: float) -> dict[str, WorkerPolicy]:
        super().decide(views, now)
        random = Random(f"{now}")
        return {worker: WorkerPolicy(random.randint(0, 10) / 10) for worker in sorted(views)}


@pytest.mark.parametrize("stage_policy", [StagePolicy, Restless])
@pytest.mark.parametrize("rate", [5.0, 20.0])
def test_fast_forward_changes_nothing_of_what_a_stage_policy_sets(
    stage_policy: type[StagePolicy], rate: float
) -> None:
    # Gaps, after which all is at rest, and times of more load than two workers can take.
    arrivals = workload(3, count=60, rate=rate)
    arrivals += [
        replace(a, arrival_s=a.arrival_s + 100, request=replace(a.request, request_id=f"late{n}"))
        for n, a in enumerate(arrivals)
    ]
    free, fast, slow = (
        simulate(
            arrivals,
            device(300),
            SimulationConfig(
                num_workers=2,
                stage_policy=stage_policy if governed else None,
                fast_forward=fast_forward,
                log_steps=True,
            ),
        )
        for governed, fast_forward in ((False, True), (True, True), (True, False))
    )

    assert finishes(fast) == pytest.approx(finishes(slow), abs=1e-9)
    assert fast.summary.num_steps == slow.summary.num_steps
    if stage_policy is Restless:
        assert finishes(fast) != pytest.approx(finishes(free), abs=1e-9)


def test_fast_forward_plans_less(monkeypatch: pytest.MonkeyPatch) -> None:
    num_plans = 0

    class Counting:
        def __init__(self, scheduler: object) -> None:
            self.scheduler = scheduler

        def plan(self, view: StepView, now: float) -> BatchPlan:
            nonlocal num_plans
            num_plans += 1
            return self.scheduler.plan(view, now)  # type: ignore[attr-defined,no-any-return]

    make = StepPolicy.make
    monkeypatch.setattr(StepPolicy, "make", lambda *args: Counting(make(*args)))

    result = simulate([arrival(f"r{i}", num_output=900, slo=SLO) for i in range(2)], device())

    assert result.summary.num_steps > 900
    assert num_plans < 60


@pytest.mark.parametrize("fast_forward", [True, False])
def test_a_request_joins_at_the_end_of_the_step_in_which_it_comes(fast_forward: bool) -> None:
    arrivals = [arrival("first", 0.0, 10, 100), arrival("second", 0.5, 10, 1)]

    result = simulate(
        arrivals, device(), SimulationConfig(fast_forward=fast_forward, log_steps=True)
    )

    (steps,) = result.steps.values()
    joined = next(step for step in steps[1:] if step.num_prefill_tokens)
    (before,) = (step for step in steps if step.began_s <= 0.5 < step.began_s + step.seconds)
    assert joined.began_s == pytest.approx(before.began_s + before.seconds)
    assert result.outcomes[1].finish_s == pytest.approx(joined.began_s + joined.seconds)


def test_a_prefix_that_was_computed_is_not_computed_again() -> None:
    ids = tuple(range(6))
    arrivals = [
        arrival("first", 0.0, 100, 1, hash_ids=ids),
        arrival("same", 1.0, 100, 1, hash_ids=ids),
        arrival("half", 2.0, 100, 1, hash_ids=(0, 1, 2, 90, 91, 92)),
        arrival("other", 3.0, 100, 1, hash_ids=(80, 81, 82, 83, 84, 85)),
    ]

    result = simulate(arrivals, device(), SimulationConfig(log_steps=True))

    (steps,) = result.steps.values()
    assert [o.num_cached_tokens for o in result.outcomes] == [0, 96, 48, 0]
    assert [step.num_prefill_tokens for step in steps] == [100, 4, 52, 100]
    assert result.summary.prefix_hit_share == pytest.approx(144 / 400)


def test_at_least_one_token_is_computed_after_a_prefix_hit() -> None:
    arrivals = [arrival(f"r{i}", float(i), 32, 1, hash_ids=(0, 1)) for i in range(2)]

    result = simulate(arrivals, device())

    assert [outcome.num_cached_tokens for outcome in result.outcomes] == [0, 16]


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    a, b = (0, 1, 2), (10, 11, 12)
    arrivals = [
        arrival("a", 0.0, 50, 1, hash_ids=a),
        arrival("b", 1.0, 50, 1, hash_ids=b),
        arrival("a again", 2.0, 50, 1, hash_ids=a),
        arrival("large", 3.0, 80, 1),  # evicts one entry of b, the last
        arrival("a at last", 4.0, 50, 1, hash_ids=a),
        arrival("b at last", 5.0, 50, 1, hash_ids=b),
    ]

    result = simulate(arrivals, device(num_kv_blocks=10))

    assert [o.num_cached_tokens for o in result.outcomes] == [0, 0, 48, 0, 48, 32]


def test_the_next_call_of_a_session_follows_the_end_of_the_one_before() -> None:
    arrivals = [
        arrival("call 1", 1.0, 50, 20),
        arrival("call 2", 2.5, 60, 5, after="call 1"),
        arrival("call 3", 0.0, 70, 5, after="call 2"),
    ]

    first, second, third = simulate(arrivals, device()).outcomes

    assert second.arrival_s == pytest.approx(first.finish_s + 2.5)
    assert third.arrival_s == second.finish_s


@pytest.mark.parametrize("policy", POLICIES)
def test_the_rate_of_acceptance_decides_how_many_tokens_a_verify_gives(policy: str) -> None:
    def steps_at(rate: float) -> int:
        config = SimulationConfig(
            policy=policy_of(policy),
            speculation=Speculation(num_drafts=4, acceptance_rate=rate),
        )
        return simulate([arrival("r", num_output=101)], device(), config).summary.num_steps

    assert steps_at(1.0) == 21
    assert 21 < steps_at(0.7) < 101
    assert steps_at(0.0) == 101


def test_a_scheduler_that_learns_comes_to_predict_the_device() -> None:
    believed = CostModel(
        [FIXED_S / 4, TOKEN_S / 4, 0, 0, 0, 0], token_knots=(0,), sample_knots=(0,)
    )
    config = SimulationConfig(scheduler_cost_model=believed, learns=True, log_steps=True)

    result = simulate(workload(3, count=100), device(), config)

    (steps,) = result.steps.values()
    errors = [abs(step.predicted_s / step.seconds - 1) for step in steps]
    assert errors[0] > 0.6
    assert max(errors[-50:]) < 0.3
    assert believed.speed == 1.0  # each worker has its own


def test_each_class_has_its_own_summary() -> None:
    arrivals = [arrival("a", slo_class="chat", slo=Slo(1e-9)), arrival("b", slo_class="code")]

    result = simulate(arrivals, device())

    assert {name: s.attainment for name, s in result.by_class.items()} == {"chat": 0, "code": 1}
    assert result.summary.attainment == 0.5
    assert result.summary.goodput_rps == pytest.approx(1 / result.summary.makespan_s)
    assert result.to_dict()["by_class"]["chat"]["num_requests"] == 1  # type: ignore[index]


def test_progress_is_reported() -> None:
    shares: list[float] = []

    simulate(workload(4), device(), on_progress=shares.append)

    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize(
    ("arrivals", "message"),
    [
        ([arrival("r", num_prompt=20000)], "needs 20010 tokens of KV cache and round has 16000"),
        ([arrival("r"), arrival("r")], "same request id"),
        ([arrival("r", after="gone")], "follows gone"),
        ([arrival("r", num_prompt=0)], "empty prompt"),
        ([replace(arrival("r"), num_output_tokens=11)], "1 to its max_tokens, 10"),
    ],
)
def test_arrivals_that_can_never_be_served_are_refused(
    arrivals: list[Arrival], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(arrivals, device())


def test_a_cluster_has_a_worker() -> None:
    with pytest.raises(ValueError, match=r"num_workers \(0\) must be at least 1"):
        SimulationConfig(num_workers=0)


def plan_of(*tasks: StageTask, preempted: tuple[str, ...] = ()) -> BatchPlan:
    return BatchPlan(
        tasks=tasks, deferred=(), preempted=preempted, predicted_s=0.0, limit_s=math.inf
    )


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(StageTask("x", Stage.PREFILL, 10, 10, False)), "tasks of unknown requests"),
        (plan_of(StageTask("r", Stage.PREFILL, 101, 101, True)), "100 tokens are left"),
        (plan_of(StageTask("r", Stage.PREFILL, 0, 0, False)), "100 tokens are left"),
        (plan_of(StageTask("r", Stage.PREFILL, 10, 20, False)), "does not fit"),
        (plan_of(StageTask("r", Stage.PREFILL, 10, 10, True)), "does not fit"),
        (plan_of(preempted=("r",)), "names each request once"),
        (plan_of(), "names each request once"),
    ],
)
def test_a_plan_that_breaks_a_limit_is_an_error(
    plan: BatchPlan, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def plan(self, view: StepView, now: float) -> BatchPlan:
            return plan

    monkeypatch.setattr(StepPolicy, "make", lambda *args: Broken())

    with pytest.raises(SimulationError, match=message):
        simulate([arrival("r")], device())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_num_batched_tokens": 150}, "200 tokens in a step; at most 150 fit"),
        ({"max_num_seqs": 1}, "2 requests run; at most 1 can"),
        ({"num_kv_blocks": 10}, "the KV cache is full"),
    ],
)
def test_the_limits_hold_for_all_requests_together(
    limits: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = plan_of(*(StageTask(name, Stage.PREFILL, 100, 100, True) for name in ("a", "b")))

    class Broken:
        def plan(self, view: StepView, now: float) -> BatchPlan:
            return both

    monkeypatch.setattr(StepPolicy, "make", lambda *args: Broken())

    with pytest.raises(SimulationError, match=message):
        simulate([arrival("a"), arrival("b")], device(**limits))


def test_requests_that_never_run_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        def plan(self, view: StepView, now: float) -> BatchPlan:
            return plan_of()

    monkeypatch.setattr(StepPolicy, "make", lambda *args: Idle())
    monkeypatch.setattr(simulated_worker, "check", lambda *args: None)

    with pytest.raises(SimulationError, match="1 of 1 requests never finish"):
        simulate([arrival("r")], device())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(POLICIES),
    budget=st.sampled_from([None, 32, 64]),
    num_kv_blocks=st.integers(18, 80),
    max_num_seqs=st.integers(1, 12),
    num_workers=st.integers(1, 3),
    rate=st.sampled_from([1.0, 10.0, 100.0]),
    num_drafts=st.sampled_from([0, 0, 3]),
)
@example(140891, "hybrid", 32, 25, 8, 3, 10.0, 0)  # evicts in a jump what placement looks for
@example(235, "hybrid", None, 18, 2, 3, 10.0, 0)  # two end in one step
@example(725278, "decode_first", 32, 19, 12, 3, 1.0, 0)
def test_every_workload_is_served_within_the_limits(
    seed: int,
    policy: str,
    budget: int | None,
    num_kv_blocks: int,
    max_num_seqs: int,
    num_workers: int,
    rate: float,
    num_drafts: int,
) -> None:
    arrivals = workload(seed, count=25, rate=rate)
    machine = device(num_kv_blocks, max_num_seqs, max_num_batched_tokens=64)
    speculation = Speculation(num_drafts=num_drafts, spread=0.2) if num_drafts else None

    def run(fast_forward: bool) -> SimulationResult:
        config = SimulationConfig(
            policy=policy_of(policy, budget),
            num_workers=num_workers,
            speculation=speculation,
            fast_forward=fast_forward,
            seed=seed,
        )
        return simulate(arrivals, machine, config)

    result = run(True)

    assert [o.num_output_tokens for o in result.outcomes] == [a.num_output_tokens for a in arrivals]
    assert all(o.e2e_s >= o.ttft_s - 1e-9 and o.ttft_s > 0 for o in result.outcomes)
    assert 0 < result.summary.utilisation <= 1 + 1e-9
    assert run(True) == result
    assert finishes(run(False)) == pytest.approx(finishes(result), abs=1e-9)


def test_preemption_does_not_count_on_blocks_that_others_hold_too() -> None:
    # Workloads on a tiny cache, among them some that preempt a request with a shared prefix.
    for seed in range(100_250, 100_290):
        random = Random(seed)
        machine = device(random.randint(18, 30), random.randint(2, 12))
        arrivals = workload(seed, count=25, rate=100.0)

        result = simulate(arrivals, machine, SimulationConfig(policy=policy_of("decode_first")))

        assert len(result.outcomes) == 25
