"""A `VllmEngine` and a draft worker in one process, with drafts as a test wants them."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import zmq

from scheduler.policy import StepPolicy
from scheduler.request import Request
from scheduler.speculation import Acceptance
from scheduler.stage_policy import WorkerPolicy
from tests.workers.planned_engine import CLIENT
from tests.workers.tiny_models import MAX_MODEL_LEN
from workers.config import DraftConfig, EngineConfig, WorkerConfig
from workers.drafters.draft_worker import DraftWorker
from workers.drafters.drafter import ContextKey, Draft, HiddenStates
from workers.drafts.draft_client import DraftCounts
from workers.drafts.draft_stream import DraftWorkerAddress
from workers.engine_request import EngineRequest, Progress
from workers.token_stream import StreamAddress

NUM_DRAFTS = 6
BLOCK = 32
BLOCK_BYTES = 2 * 2 * 2 * 32 * BLOCK * 4
DEAD = DraftWorkerAddress(
    "dead", "dead", StreamAddress("tcp://127.0.0.1:1", b"-", zmq.curve_keypair()[0])
)
"""A draft worker at whose address nobody listens."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request with its sampling parameters, in vLLM's words.

    `regex`, `bad_token_ids` and `eos_token_id` stand for what a front end makes of
    `structured_outputs`, `bad_words` and the model's config.
    """

    prompt: Sequence[int]
    params: dict[str, Any] = field(default_factory=dict)
    prior: Sequence[int] = ()
    """Tokens of its answer that another engine has given."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How the engine of a run gets its drafts."""

    drafts: Sequence[Sequence[int]] | None = None
    """What to propose for each call's whole output; None: no speculation."""
    error_rate: float = 0.0
    """Share of the proposed tokens that are others; the right one is then another branch."""
    is_patient: bool = True
    """Whether the engine begins no step before the drafts for it have come."""
    is_dead: bool = False
    is_trusted: bool = False
    """Whether every draft is taken for a sure one, so that it is verified."""
    verifies_all: bool = True
    """Whether the engine trusts its verification with every parameter; False as on GPUs."""
    max_drafts: int | None = None
    """Drafts of one request that the stage policy allows."""


@dataclass(frozen=True, slots=True)
class Answer:
    """All that a caller gets."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, dict[int, float]]] = field(default_factory=list)
    """At each output token its rank, and log probabilities by token; empty if not asked for."""
    prompt_logprobs: list[tuple[int, dict[int, float]]] = field(default_factory=list)
    """The same at each prompt token except the first."""
    end: list[object] = field(default_factory=list)
    """Reason of the end, and what stopped the answer."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of the calls."""

    answers: list[Answer]
    hidden_states: dict[int, list[bytes]]
    """By call: hidden states that the drafter got with each extension."""
    counts: DraftCounts | None
    num_steps: int

    @property
    def tokens(self) -> list[list[int]]:
        """Output tokens of each call."""
        return [answer.tokens for answer in self.answers]

    @property
    def logprobs(self) -> list[list[float]]:
        """Log probability of each output token of each call; empty if they were not asked for."""
        return [
            [likely[token] for token, (_, likely) in zip(answer.tokens, answer.logprobs)]  # noqa: B905
            for answer in self.answers
        ]


class Trust(Acceptance):
    """Believes every draft."""

    def chances(self, request_id: str, drafter: str, probs: Sequence[float]) -> tuple[float, ...]:
        return (0.98,) * len(super().chances(request_id, drafter, probs))


class OracleDrafter:
    """A `Drafter` that knows what every request will say."""

    hidden_size = 96
    vocab_size = 0

    def __init__(self, calls: Sequence[Call], setting: Setting) -> None:
        self._texts = [
            [*call.prompt, *text] for call, text in zip(calls, setting.drafts or [], strict=True)
        ]
        self._setting = setting
        self._lengths: dict[ContextKey, int] = {}
        self._changed: dict[ContextKey, None] = {}
        self._draw = random.Random(0)
        self.hidden_states: dict[int, list[bytes]] = {}

    def extend(
        self,
        key: ContextKey,
        position: int,
        token_ids: list[int],
        hidden_states: HiddenStates | None = None,
    ) -> None:
        assert position in (0, self._lengths.get(key, 0))
        self._lengths[key] = position + len(token_ids)
        self._changed[key] = None
        if hidden_states is not None:
            states = self.hidden_states.setdefault(int(key.request_id), [])
            states += [row.tobytes() for row in hidden_states]

    def learn(self, token_ids: list[int]) -> None:
        """Nothing: all answers are known already."""

    def forget(self, key: ContextKey) -> None:
        self._lengths.pop(key, None)
        self._changed.pop(key, None)

    def has_work(self) -> bool:
        return bool(self._changed)

    def step(self) -> dict[ContextKey, Draft]:
        drafts = {key: self._draft(key) for key in self._changed}
        self._changed.clear()
        return drafts

    def _draft(self, key: ContextKey) -> Draft:
        begin = self._lengths[key]
        token_ids: list[int] = []
        parents: list[int] = []
        probs: list[float] = []
        node = -1
        for token in self._texts[int(key.request_id)][begin : begin + 2 * NUM_DRAFTS]:
            if self._draw.random() < self._setting.error_rate:
                token_ids.append(token + 1 if token < 300 else token - 1)
                parents.append(node)
                probs.append(0.6)
            token_ids.append(token)
            parents.append(node)
            probs.append(0.5)
            node = len(token_ids) - 1
        return Draft(begin, tuple(token_ids), tuple(parents), tuple(probs))

    def shutdown(self) -> None:
        pass


def tiny_config(
    num_blocks: int = 600, max_num_seqs: int = 8, extra_args: dict[str, Any] | None = None
) -> WorkerConfig:
    """An engine of the tiny model."""
    return WorkerConfig(
        calibrate_at_start=False,
        step_policy=StepPolicy(name="hybrid"),
        kv_cache_format="float32",  # as many blocks on every CPU
        engine=EngineConfig(
            dtype="float32",
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(64, 4 * max_num_seqs),
            max_model_len=MAX_MODEL_LEN,
            kv_cache_gib=num_blocks * BLOCK_BYTES / 2**30,
            block_size=BLOCK,
            extra_args=extra_args or {},
        ),
    )


def run_calls(model: str, config: WorkerConfig, *runs: tuple[Sequence[Call], Setting]) -> list[Ran]:
    """Run calls one set after another on one new engine, which speculates if any run does."""
    from workers.engine.vllm_engine import VllmEngine

    speculates = any(setting.drafts is not None for _, setting in runs)
    draft = DraftConfig(num_speculative_tokens=NUM_DRAFTS) if speculates else None
    engine: Any = VllmEngine(model, config, draft=draft)
    if speculates and config.tensor_parallel_size == 1:
        # Any of the drafters may want the states; here one that is not in the config does.
        from workers.engine.vllm_sampling import runner_of
        from workers.engine.vllm_speculation import LastHiddenStates

        drafts = engine._planned.drafts
        drafts.connect(drafts.client, LastHiddenStates(runner_of(engine.core).model).rows)
    return [_run(engine, *run) for run in runs]


def _run(engine: Any, calls: Sequence[Call], setting: Setting) -> Ran:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder

    drafter, worker = None, None
    drafts = engine._planned.drafts.client if engine._planned else None
    if drafts is not None:
        drafts.counts_of.clear()
        engine._planned.planner.acceptance = Trust() if setting.is_trusted else Acceptance()
        engine._planned.drafts.verifies_all = setting.verifies_all
        engine.assign_draft_worker(DEAD if setting.is_dead else None)
        engine.follow_policy(WorkerPolicy(max_drafts=setting.max_drafts))
    if setting.drafts is not None and not setting.is_dead:
        drafter = OracleDrafter(calls, setting)
        worker = DraftWorker(
            "d", DraftConfig(), lambda: {"oracle": drafter}, lambda report: None, "127.0.0.1"
        )
        engine.assign_draft_worker(worker.address)
    decoder = MsgpackDecoder(EngineCoreOutputs)
    answers = [Answer() for _ in calls]
    params = [_add(engine, str(index), call) for index, call in enumerate(calls)]
    num_steps = 0
    while engine.has_requests():
        if worker is not None and setting.is_patient:
            _wait_for_drafts(drafts)
        try:
            outputs, model_ran = engine.step()
        except RuntimeError as error:
            for cause in engine.recover(error):
                answers[int(cause)].end.append("cause")
            continue
        num_steps += model_ran
        for output in outputs.values():
            for of_request in decoder.decode(output.frames).outputs:
                index = int(of_request.request_id)
                answer, asked = answers[index], params[index]
                answer.tokens.extend(of_request.new_token_ids)
                if of_request.new_logprobs is not None:
                    answer.logprobs.extend(_by_token(of_request.new_logprobs, asked.num_logprobs))
                if (of_prompt := of_request.new_prompt_logprobs_tensors) is not None:
                    answer.prompt_logprobs.extend(_by_token(of_prompt, asked.prompt_logprobs))
                if of_request.finish_reason is not None:
                    answer.end.extend([str(of_request.finish_reason), of_request.stop_reason])
    if worker is not None:
        worker.shutdown()
    counts = sum(drafts.counts_of.values(), DraftCounts()) if drafts is not None else None
    return Ran(answers, drafter.hidden_states if drafter else {}, counts, num_steps)


def _wait_for_drafts(drafts: Any) -> None:
    give_up_s = time.monotonic() + 5
    while drafts.silent_s(now := time.monotonic()) and now < give_up_s:
        time.sleep(0.0002)
        drafts.poll(now)


def _by_token(lists: Any, num_logprobs: int) -> list[tuple[int, dict[int, float]]]:
    """The ranks, and as many log probabilities as were asked for and that of the token itself.

    Tokens that a grammar forbids are left out: which of them stand among the likeliest is chance.
    """
    rows = zip(*(column.tolist() for column in lists[:3]), strict=True)
    num = len(lists[0][0]) if num_logprobs == -1 else num_logprobs + 1
    return [
        (
            rank,
            {
                token: value
                for token, value in zip(token_ids[:num], values[:num], strict=True)
                if value > -math.inf
            },
        )
        for token_ids, values, rank in rows
    ]


def _add(engine: Any, name: str, call: Call) -> Any:
    """Add a call; gives its `SamplingParams`."""
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams
    from vllm.v1.engine import EngineCoreRequest

    given = {"temperature": 0, "max_tokens": 24, "ignore_eos": True} | call.params
    regex = given.pop("regex", None)
    bad_token_ids = given.pop("bad_token_ids", None)
    eos_token_id = given.pop("eos_token_id", 2)
    if "repetition_detection" in given:
        given["repetition_detection"] = RepetitionDetectionParams(**given["repetition_detection"])
    params = SamplingParams(detokenize=False, **given)
    params._bad_words_token_ids = bad_token_ids
    if regex is not None:
        params.structured_outputs = StructuredOutputsParams(regex=regex)
        params.structured_outputs._backend = "xgrammar"
    params.update_from_generation_config({}, eos_token_id)
    core_request = EngineCoreRequest(
        request_id=name,
        prompt_token_ids=list(call.prompt),
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    request = EngineRequest(
        Request(name, len(call.prompt), params.max_tokens or 1), engine._encode(core_request)
    )
    progress = Progress(tuple(call.prior), time.time(), time.time()) if call.prior else None
    engine.add_request(request.for_attempt(name, progress), CLIENT)
    return params
