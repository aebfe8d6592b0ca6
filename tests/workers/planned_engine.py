"""Scripts for a `VllmEngine` in a process of its own: requests that come and go at given steps."""

import io
import itertools
import json
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scheduler.replay import replay
from scheduler.request import Request, Slo
from scheduler.simulation.plan_check import check
from scheduler.step_planner import StepPlanner
from scheduler.task import BatchPlan, StepReport, StepView
from tests.workers.tiny_models import VOCAB_SIZE
from workers.config import WorkerConfig
from workers.engine.engine_loop import EMPTY_STEP_WAIT_S
from workers.engine_request import EngineRequest
from workers.reports import WorkerObserver
from workers.step_history import RequestStep, StepHistory
from workers.token_stream import StreamAddress

CLIENT = StreamAddress("tcp://127.0.0.1:1", b"test", b"")
NO_SLO = Slo()
MAX_EMPTY_STEPS = 20_000
"""With more of them in a row the engine is stuck."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request of a script."""

    prompt: Sequence[int]
    max_tokens: int = 8
    priority: int = 0
    slo: Slo | None = NO_SLO
    """None: it is added to vLLM's engine directly."""
    begin: int = 0
    """Comes before this step, or when there is nothing else to do."""
    abort: int | None = None
    """Is aborted before this step."""
    regex: str | None = None
    prompt_logprobs: int | None = None
    lora: int = 0
    """Number of its adapter; only `play_ahead` has some, and one fits a step."""


@dataclass(frozen=True, slots=True)
class Played:
    """What came of a script."""

    tokens: list[list[int]]
    """Output tokens of each job."""
    finish_reasons: list[str | None]
    num_cached: list[int]
    """Prompt tokens of each job that it found in the KV cache."""
    num_preemptions: int
    num_steps: int
    """Steps that computed something."""
    longest_wait: int
    """Most steps in a row that computed nothing."""
    record: list[str]
    """Empty for vLLM's own scheduler."""
    num_kept: int
    """Requests that the scheduler still keeps something of."""
    class_name: str
    seen: list[list[RequestStep]]
    """Steps of each job, from the worker's history."""
    queued_s: list[tuple[str, float]]
    """Service class and queueing time of each job, in the order in which they began."""

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The recorded steps."""
        return steps(self.record)

    @property
    def is_as_planned(self) -> bool:
        """Whether each step was executed as planned."""
        return all(step["executed"] is None for step in self.steps)

    def replayed(self) -> list[tuple[StepReport, Any]]:
        """Each step and its plan, made again."""
        return list(replay(self.record))


class KeptSteps(WorkerObserver):
    """Keeps the reports of an engine's steps."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def took_step(self, step: StepReport) -> None:
        self.reports.append(step)


class CheckedPlanner(StepPlanner):
    """Makes sure that each plan is one that the engine can carry out."""

    def plan(self, view: StepView, now: float) -> BatchPlan:
        plan = super().plan(view, now)
        check(plan, view, self.limits)
        return plan


def steps(record: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of a record that are steps."""
    return [line for line in map(json.loads, record) if "step" in line]


def play_scripts(model: str, config: WorkerConfig, *scripts: Sequence[Job]) -> list[Played]:
    """Play scripts on a new engine, one after another."""
    from workers.engine.vllm_engine import VllmEngine

    engine = VllmEngine(model, config)
    return [_play(engine, config, script, index) for index, script in enumerate(scripts)]


def _play(engine: Any, config: WorkerConfig, jobs: Sequence[Job], script: int) -> Played:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder

    scheduler = engine.core.scheduler
    record, history = io.StringIO(), StepHistory()
    queued_s: list[tuple[str, float]] = []

    def on_step(step: StepReport) -> None:
        history.add(step)
        queued_s.extend(step.queued_s)

    if config.step_policy.name != "vllm":
        planner = CheckedPlanner(scheduler.limits, config.step_policy, on_step=on_step)
        planner.record(record)
        scheduler.planner = planner
    decoder = MsgpackDecoder(EngineCoreOutputs)
    ids = [f"{script}-{index}" for index in range(len(jobs))]
    tokens: dict[str, list[int]] = {name: [] for name in ids}
    reasons: dict[str, str] = {}
    cached: dict[str, int] = {}
    requests = {}
    waiting = dict(zip(ids, jobs, strict=True))
    num_steps = wait = longest_wait = 0
    for step in itertools.count():
        for name, job in list(waiting.items()):
            if job.begin <= step or not engine.has_requests():
                add_job(engine, name, job)
                requests[name] = scheduler.requests[name]
                del waiting[name]
        engine.abort_requests([name for name in requests if jobs[ids.index(name)].abort == step])
        if not engine.has_requests():
            break
        outputs, model_ran = engine.step()
        num_steps += model_ran
        wait = 0 if model_ran else wait + 1
        if wait:  # as the engine's loop does, for example while a grammar is compiled
            time.sleep(EMPTY_STEP_WAIT_S)
        longest_wait = max(wait, longest_wait)
        assert wait < MAX_EMPTY_STEPS, "the engine spins"
        for output in outputs.values():
            reasons |= output.finish_reasons
            for of_request in decoder.decode(output.frames).outputs:
                tokens[of_request.request_id] += of_request.new_token_ids
                if stats := of_request.prefill_stats:
                    cached[of_request.request_id] = stats.num_cached_tokens
    return Played(
        [tokens[name] for name in ids],
        [reasons.get(name) for name in ids],
        [cached.get(name, 0) for name in ids],
        sum(request.num_preemptions for request in requests.values()),
        num_steps,
        longest_wait,
        record.getvalue().splitlines(keepends=True),
        len(getattr(scheduler, "_live", ())) + len(scheduler.requests),
        type(scheduler).__name__,
        [history.of_request(name) for name in ids],
        queued_s,
    )


def play_ahead(
    model: str, config: WorkerConfig, jobs: Sequence[Job]
) -> tuple[list[int], list[str]]:
    """Have the async scheduler make steps while others are in flight.

    vLLM runs no model that way on the CPU, so tokens are made up here: some drafts are right.
    Returns the number of output tokens of each job, and the record.
    """
    from vllm.config.lora import LoRAConfig
    from vllm.v1.outputs import ModelRunnerOutput

    from workers.engine.vllm_engine import VllmEngine
    from workers.engine.vllm_scheduler import PlannedAsyncScheduler

    engine = VllmEngine(model, config)
    made: Any = engine.core.scheduler
    scheduler = PlannedAsyncScheduler(
        vllm_config=made.vllm_config,
        kv_cache_config=made.kv_cache_config,
        structured_output_manager=made.structured_output_manager,
        block_size=made.block_size,
        hash_block_size=made.hash_block_size,
        log_stats=True,
    )
    if any(job.lora for job in jobs):
        scheduler.lora_config = LoRAConfig(max_loras=1)
    engine.core.scheduler = engine._planned = scheduler
    record = io.StringIO()
    scheduler.planner = CheckedPlanner(scheduler.limits, config.step_policy)
    scheduler.planner.record(record)
    draw = random.Random(0)
    ids = [str(index) for index in range(len(jobs))]
    num_tokens = dict.fromkeys(ids, 0)
    waiting = dict(zip(ids, jobs, strict=True))
    in_flight: deque[tuple[Any, list[str]]] = deque()
    for step in range(2000):
        for name, job in list(waiting.items()):
            if job.begin <= step:
                add_job(engine, name, waiting.pop(name))
        if not waiting and not scheduler.has_requests() and not in_flight:
            return list(num_tokens.values()), record.getvalue().splitlines()
        if scheduler.has_requests():
            output = scheduler.schedule()
            scheduled = output.num_scheduled_tokens
            samples = [name for name in scheduled if not scheduler.requests[name].is_prefill_chunk]
            in_flight.append((output, samples))
            if len(in_flight) < 2:
                continue
        output, samples = in_flight.popleft()
        names = list(output.num_scheduled_tokens)
        drafts = output.scheduled_spec_decode_tokens
        sampled = [
            [7] * (1 + draw.randint(0, len(drafts.get(name, ())))) if name in samples else []
            for name in names
        ]
        answer = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
        )
        for of_client in scheduler.update_from_output(output, answer).values():
            for of_request in of_client.outputs:
                num_tokens[of_request.request_id] += len(of_request.new_token_ids)
    raise AssertionError("the scheduler spins")


def add_job(engine: Any, name: str, job: Job) -> None:
    """Add a request to a `VllmEngine` under a name."""
    if job.slo is None:
        engine._clients[:] = [CLIENT]
        engine.core.add_request(*engine.core.preprocess_add_request(core_request(name, job)))
        return
    engine.add_request(engine_request(name, job), CLIENT)


def engine_request(name: str, job: Job) -> EngineRequest:
    """A request as an ingress sends it to a worker."""
    from workers.engine.vllm_engine import encoder

    assert job.slo is not None
    request = Request(name, len(job.prompt), job.max_tokens, job.priority, job.slo, "test")
    return EngineRequest(request, encoder()(core_request(name, job)))


def core_request(name: str, job: Job) -> Any:
    """A request as vLLM has it."""
    import time

    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.engine import EngineCoreRequest

    params = SamplingParams(
        temperature=0,
        max_tokens=job.max_tokens,
        prompt_logprobs=job.prompt_logprobs,
        ignore_eos=job.regex is None,
        detokenize=False,
    )
    if job.regex is not None:
        params.structured_outputs = StructuredOutputsParams(regex=job.regex)
        params.structured_outputs._backend = "xgrammar"
        params.update_from_generation_config({}, 2)
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=list(job.prompt),
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=LoRARequest(f"lora-{job.lora}", job.lora, "-") if job.lora else None,
        cache_salt=None,
        data_parallel_rank=None,
        priority=job.priority,
    )


def write_tokenizer(folder: Path) -> None:
    """Give a checkpoint a tokenizer: token 3 + n is the nth letter, the others are words."""
    import string

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", *string.ascii_lowercase]
    words = [f"<{number}>" for number in range(len(letters), VOCAB_SIZE)]
    vocab = {token: number for number, token in enumerate([*letters, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
