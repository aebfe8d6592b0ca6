"""vLLM in processes of their own: one engine fits each, and importing vLLM takes ten seconds."""

import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil

from workers.config import WorkerConfig

Prompt = Sequence[int]

CALL_TIMEOUT_S = 120
"""The first call also waits for vLLM to be imported."""

NUM_LIKELIEST = 20
"""Tokens whose log probabilities are kept at each output token."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts sent at once to an engine that has nothing else to do."""

    prompts: Sequence[Prompt]
    max_tokens: int = 8
    prompt_logprobs: bool = True
    """Also the log probability of each prompt token; vLLM then computes cached ones again."""
    num_threads: int = 1
    """Threads of our kernels."""
    max_step_tokens: int | None = None
    """Cut longer prompts into chunks of this many tokens, whatever the engine's config."""
    by_operators: bool = False
    """Keep our model classes from the one-call forward pass."""


@dataclass(frozen=True, slots=True)
class Output:
    """What came of one prompt."""

    tokens: list[int]
    likeliest: list[dict[int, float]]
    """At each output token, log probabilities by token."""
    prompt: list[float]
    """Log probability of each prompt token but the first."""
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Facts:
    """Who computes what in an engine, as its first batch found it."""

    model_class: str
    forward_refusal: str | None
    """None: one call for all layers."""
    attention_refusals: set[str | None]
    """Reasons of the layers; None: the meta-kernel serves it."""
    attention_impls: set[str]
    linear_methods: set[str]
    """Classes that compute the linear layers and the logits."""
    packed: dict[str, str]
    """Format of each packed layer, by its name."""
    kv_dtypes: set[str]
    """Of the layers' KV caches."""


@dataclass(frozen=True, slots=True)
class Run:
    """One engine's life."""

    facts: Facts
    outputs: list[list[Output]]
    """Outputs of each batch."""
    num_steps: list[int]
    """Steps of each batch."""


class EngineFailed(RuntimeError):
    """The traceback of what ended a call."""


class EngineProcesses:
    """A process that has imported vLLM, and each call in a fork of it, one after another."""

    def __init__(self) -> None:
        # What engines keep is of tiny models, and not for the user.
        self._cache = tempfile.TemporaryDirectory(prefix="xyserve-tests-")
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_fork_calls, args=(theirs, self._cache.name))
        self._process.start()
        theirs.close()  # so that the death of the process ends the pipe

    def call(
        self, function: Callable[..., Any], *args: Any, env: dict[str, str] | None = None
    ) -> Any:
        """`function(*args)` in a process of its own, with `env` added to its environment."""
        self._pipe.send((function, args, env or {}))
        if not self._pipe.poll(CALL_TIMEOUT_S):
            self._kill()
            self._start()
            raise EngineFailed(f"{function.__name__} did not end within {CALL_TIMEOUT_S} s")
        result, failure = self._pipe.recv()
        if failure is not None:
            raise EngineFailed(failure)
        return result

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):
            self._pipe.send(None)
        self._process.join()
        self._cache.cleanup()

    def _kill(self) -> None:
        forks = psutil.Process(self._process.pid).children()
        self._process.kill()
        for fork in forks:
            fork.kill()
        self._process.join()
        self._pipe.close()


def _fork_calls(pipe: Connection, cache: str) -> None:
    os.environ.pop("XYSERVE_HOME", None)
    # A fork loses the threads that OpenMP started; compiling how vLLM ranks tokens takes seconds.
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "XDG_CACHE_HOME": cache,
    }
    import transformers  # noqa: F401
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.model_executor.models import registry

    import workers.engine.vllm_engine  # noqa: F401

    # A look at a model class takes vLLM a process of its own. Ours are that already.
    registry._run_in_subprocess = lambda fn: fn()
    gc.freeze()  # vLLM collects garbage often, and there is none among what was imported
    context = multiprocessing.get_context("fork")
    while (call := pipe.recv()) is not None:
        process = context.Process(target=_run_call, args=(pipe, *call))
        process.start()
        process.join()
        if process.exitcode:
            pipe.send((None, f"the engine's process ended with {process.exitcode}"))


def _run_call(
    pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str]
) -> None:
    os.environ.update(env)
    answer: tuple[Any, str | None]
    try:
        answer = function(*args), None
    except BaseException:
        answer = None, traceback.format_exc()
    pipe.send(answer)
    pipe.close()
    os._exit(0)  # nothing of vLLM's is worth putting away


def run_engine(model: str, config: WorkerConfig, batches: Sequence[Batch]) -> Run:
    """Run the batches on a new engine, one after another."""
    from vllm.v1.engine.llm_engine import LLMEngine

    from workers.engine.vllm_engine import engine_args

    engine = LLMEngine.from_engine_args(engine_args(model, config))
    first, *others = batches
    results = [_run_batch(engine, first)]
    [facts] = engine.apply_model(_facts)
    results += [_run_batch(engine, batch) for batch in others]
    outputs, num_steps = zip(*results, strict=True)
    return Run(facts, list(outputs), list(num_steps))


def _facts(model: Any) -> Facts:
    modules = dict(model.named_modules()).items()
    impls = [module.impl for _, module in modules if hasattr(module, "impl")]
    return Facts(
        type(model).__name__,
        getattr(model, "_refusal", "vLLM's own class"),
        {getattr(impl, "refusal", "vLLM's own class") for impl in impls},
        {type(impl).__name__ for impl in impls},
        {
            type(module.quant_method).__name__
            for _, module in modules
            if hasattr(module, "quant_method") and hasattr(module, "weight")
        },
        {name: module.packed.format for name, module in modules if hasattr(module, "packed")},
        {str(module.kv_cache.dtype) for _, module in modules if hasattr(module, "kv_cache")},
    )


def _run_batch(engine: Any, batch: Batch) -> tuple[list[Output], int]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=batch.max_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=NUM_LIKELIEST,
        prompt_logprobs=0 if batch.prompt_logprobs else None,
    )
    _prepare(engine, batch)
    for index, prompt in enumerate(batch.prompts):
        engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, params)
    outputs: dict[str, Any] = {}
    num_steps = 0
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
        num_steps += 1
    return [_output(outputs[str(index)]) for index in range(len(batch.prompts))], num_steps


def _prepare(engine: Any, batch: Batch) -> None:
    scheduler = engine.engine_core.engine_core.scheduler
    config = scheduler.scheduler_config
    scheduler.max_num_scheduled_tokens = batch.max_step_tokens or config.max_num_batched_tokens
    [is_ours] = engine.apply_model(lambda model: hasattr(model, "_find_stack"))
    if is_ours:
        from workers.kernels import native

        native.set_num_threads(batch.num_threads)
        reason = "the test says so" if batch.by_operators else None
        engine.apply_model(lambda model: setattr(model, "_refusal", reason))


def _output(output: Any) -> Output:
    [completion] = output.outputs
    prompt = (output.prompt_logprobs or [None])[1:]
    return Output(
        list(completion.token_ids),
        [
            {token: entry.logprob for token, entry in entries.items()}
            for entries in completion.logprobs
        ],
        [
            entries[token].logprob
            for token, entries in zip(output.prompt_token_ids[1:], prompt, strict=False)
        ],
        output.num_cached_tokens,
    )
