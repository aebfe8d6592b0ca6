"""A drafter that runs a smaller language model on its own engine, in the caller's process."""

import dataclasses
import itertools
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer
from typing_extensions import override
from vllm import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.request import RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder

from scheduler.policy import StepPolicy
from scheduler.request import Request
from workers.config import WorkerConfig
from workers.drafters.drafter import ContextKey, Draft, Drafter, HiddenStates
from workers.engine.vllm_engine import VllmEngine, encoder
from workers.engine_request import EngineRequest
from workers.token_stream import StreamAddress

BLOCK_SIZE = 32
"""Tokens in one block of the KV cache. Contexts share whole blocks only, so small ones are better;
but smaller ones our kernels do not support on every processor."""
NOWHERE = StreamAddress("", b"", b"")
"""The client of every request: outputs stay in this process."""


class RewindingScheduler(Scheduler):
    """vLLM's scheduler with requests that can be halted and continued from other tokens.

    A new request with the right tokens would compute those after its last full block again, which
    takes several times as long as a guess.
    """

    def halt(self, request_id: str) -> None:
        """Stop scheduling a request, which keeps its KV cache."""
        request = self.requests[request_id]
        if request.status == RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove_requests([request])
            self.kv_holding_waiting.remove_requests([request])
        request.status = RequestStatus.PREEMPTED

    def continue_from(self, request_id: str, token_ids: list[int], max_tokens: int) -> bool:
        """Continue a halted request from `token_ids`; False if its KV cache cannot be reused."""
        request = self.requests[request_id]
        [manager, *others] = self.kv_cache_manager.coordinator.single_type_managers
        num_kept = min(
            _num_equal(request._all_token_ids, token_ids),
            request.num_computed_tokens,
            len(token_ids) - 1,  # the last token has to be computed for the next one
        )
        num_full_blocks = num_kept // self.block_size
        written = manager.req_to_blocks[request_id][num_full_blocks:]
        if (
            num_kept == 0
            or others
            or type(manager) is not FullAttentionManager  # others may have freed old tokens
            or any(block.ref_cnt > 1 for block in written)  # shared with another request
        ):
            return False
        for block in written:
            self.kv_cache_manager.block_pool._maybe_evict_cached_block(block)
        num_cached = manager.num_cached_block.get(request_id, 0)
        manager.num_cached_block[request_id] = min(num_cached, num_full_blocks)
        request.num_computed_tokens = num_kept
        request.prompt_token_ids = token_ids
        request.num_prompt_tokens = len(token_ids)
        request._all_token_ids[:] = token_ids
        request._output_token_ids.clear()
        del request.block_hashes[num_full_blocks:]
        request.update_block_hashes()
        request.max_tokens = max_tokens
        request.status = RequestStatus.WAITING
        self._enqueue_waiting_request(request)
        return True


def _num_equal(some: list[int], others: list[int]) -> int:
    pairs = enumerate(zip(some, others, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(some), len(others)))


@dataclass(slots=True)
class _ModelContext:
    """Known tokens of a request, and the model's guesses at those that follow."""

    tokens: list[int] = field(default_factory=list)
    guesses: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    request_id: str | None = None
    """Id of the engine's request that holds its KV cache."""
    is_running: bool = False
    """Whether that request is being scheduled, to add guesses."""

    def append(self, token_ids: list[int]) -> bool:
        """Append true tokens; return whether they were guessed. If not, drop the guesses."""
        self.tokens += token_ids
        was_guessed = self.guesses[: len(token_ids)] == token_ids
        num_past = len(token_ids) if was_guessed else len(self.guesses)
        del self.guesses[:num_past], self.probs[:num_past]
        return was_guessed

    def draft(self) -> Draft:
        """The guesses as a path."""
        parents = tuple(range(-1, len(self.guesses) - 1))
        return Draft(len(self.tokens), tuple(self.guesses), parents, tuple(self.probs))


class ModelDrafter(Drafter):
    """A `Drafter` that continues each context greedily with a model of the target's vocabulary.

    It runs ahead: while the target verifies `num_speculative_tokens` guesses, the model makes up to
    as many more. Tokens of the target that were guessed need not be computed again.
    """

    hidden_size = 0

    def __init__(
        self, model: str, config: WorkerConfig, target: str, num_speculative_tokens: int
    ) -> None:
        """Load the checkpoint `model`; ValueError if its vocabulary is not that of `target`.

        Steps are planned by vLLM's own scheduler, whatever `config` says.
        """
        check_same_vocabulary(Path(model), Path(target))
        self.vocab_size = _vocab_size(Path(target))
        engine = dataclasses.replace(
            config.engine,
            enable_prefix_caching=True,
            block_size=config.engine.block_size or BLOCK_SIZE,
            extra_args=config.engine.extra_args
            | {"scheduler_cls": RewindingScheduler, "async_scheduling": False},
        )
        config = dataclasses.replace(
            config,
            calibrate_at_start=False,
            step_policy=StepPolicy(name="vllm"),
            record=None,
            engine=engine,
        )
        self._engine = VllmEngine(model, config)
        assert isinstance(self._engine.core.scheduler, RewindingScheduler)
        self._scheduler = self._engine.core.scheduler
        self._num_speculative_tokens = num_speculative_tokens
        self._contexts: dict[ContextKey, _ModelContext] = {}
        self._keys: dict[str, ContextKey] = {}
        self._changed: set[ContextKey] = set()
        self._request_ids = map(str, itertools.count())
        self._encode = encoder()
        self._decoder = MsgpackDecoder(EngineCoreOutputs)
        self._warm_up()

    def extend(
        self,
        key: ContextKey,
        position: int,
        token_ids: list[int],
        hidden_states: HiddenStates | None = None,
    ) -> None:
        """Append true tokens; the engine continues if it guessed them, else starts again."""
        if position == 0:
            self.forget(key)
            self._contexts[key] = _ModelContext()
        context = self._contexts[key]
        assert position == len(context.tokens), (position, len(context.tokens))
        if context.append(token_ids):
            self._changed.add(key)
        else:
            self._halt(context)
        self._keep_ahead(key)

    @override
    def learn(self, token_ids: list[int]) -> None:
        pass  # the model is fixed

    @override
    def forget(self, key: ContextKey) -> None:
        if context := self._contexts.pop(key, None):
            self._end(context)
            self._changed.discard(key)

    @override
    def has_work(self) -> bool:
        return bool(self._changed) or self._engine.has_requests()

    def step(self) -> dict[ContextKey, Draft]:
        """Return the guesses that remain after new tokens, or else make one more per request."""
        if not self._changed:
            self._make_guesses()
        drafts = {key: self._contexts[key].draft() for key in self._changed}
        self._changed.clear()
        return {key: draft for key, draft in drafts.items() if draft.token_ids}

    @override
    def shutdown(self) -> None:
        self._engine.shutdown()

    def _make_guesses(self) -> None:
        outputs, model_ran = self._engine.step()
        if not model_ran and self._engine.stats().num_waiting:
            self._make_room()
        for step_output in outputs.values():
            for output in self._decoder.decode(step_output.frames).outputs:
                key = self._keys[output.request_id]
                context = self._contexts[key]
                context.guesses += output.new_token_ids
                if output.new_logprobs is not None:
                    context.probs += map(math.exp, output.new_logprobs.logprobs[:, 0].tolist())
                if output.finished:
                    self._end(context)
                self._changed.add(key)
                self._keep_ahead(key)

    def _make_room(self) -> None:
        """Free the KV cache of halted requests; what is not evicted is found by prefix caching."""
        for context in self._contexts.values():
            if not context.is_running:
                self._end(context)

    def _keep_ahead(self, key: ContextKey) -> None:
        """Run the engine when fewer guesses are left than the target verifies, up to twice that."""
        context = self._contexts[key]
        num_ahead = len(context.guesses)
        if num_ahead >= 2 * self._num_speculative_tokens:
            self._halt(context)
        elif num_ahead < self._num_speculative_tokens and not context.is_running:
            self._start(key, context)

    def _start(self, key: ContextKey, context: _ModelContext) -> None:
        token_ids = context.tokens + context.guesses
        max_tokens = self._scheduler.max_model_len - len(token_ids)
        if not token_ids or max_tokens < 1:
            return
        if context.request_id is not None:
            if self._scheduler.continue_from(context.request_id, token_ids, max_tokens):
                context.is_running = True
                return
            self._end(context)
        request_id = next(self._request_ids)
        core_request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            mm_features=None,
            sampling_params=SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,  # of the sampled token only
            ),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        request = Request(request_id, len(token_ids), max_tokens)
        self._engine.add_request(EngineRequest(request, self._encode(core_request)), NOWHERE)
        self._keys[request_id] = key
        context.request_id, context.is_running = request_id, True

    def _halt(self, context: _ModelContext) -> None:
        if context.request_id is not None and context.is_running:
            self._scheduler.halt(context.request_id)
        context.is_running = False

    def _end(self, context: _ModelContext) -> None:
        if context.request_id is not None:
            self._engine.abort_requests([context.request_id])
            del self._keys[context.request_id]
        context.request_id, context.is_running = None, False

    def _warm_up(self) -> None:
        """Draft once: at first vLLM compiles how it ranks tokens, which takes seconds."""
        key = ContextKey("", "")
        self.extend(key, 0, [0])
        while self._contexts[key].is_running:
            self.step()
        self.forget(key)


def check_same_vocabulary(model: Path, target: Path) -> None:
    """ValueError unless both checkpoints have the same number of tokens, with the same ids.

    Ids are compared only if both have a `tokenizer.json`.
    """
    remedy = "choose a draft model of the target's family"
    size, target_size = _vocab_size(model), _vocab_size(target)
    if size != target_size:
        raise ValueError(
            f"the draft model {model} ({size} tokens) must have the vocabulary of its target "
            f"{target} ({target_size} tokens); {remedy}"
        )
    ids, target_ids = _token_ids(model), _token_ids(target)
    if ids and target_ids and (different := ids.items() ^ target_ids.items()):
        token = min(token for token, _ in different)
        raise ValueError(
            f"token {token!r} has the id {ids.get(token)} in the draft model {model} and "
            f"{target_ids.get(token)} in its target {target}; {remedy}"
        )


def _vocab_size(checkpoint: Path) -> int:
    config = json.loads((checkpoint / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])


def _token_ids(checkpoint: Path) -> dict[str, int]:
    """Ids by token; empty if the checkpoint has no `tokenizer.json`."""
    path = checkpoint / "tokenizer.json"
    return Tokenizer.from_file(str(path)).get_vocab() if path.exists() else {}
