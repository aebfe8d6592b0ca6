"""What vLLM's sampling lacks in an engine in this process, with drafts and on CPUs."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import vllm.v1.sample.sampler
from vllm.config import VllmConfig
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.worker import gpu_model_runner

from workers.engine.vllm_verification import verify_as_without_drafts
from workers.plugin.vllm_seams import VLLM

# The runner, its samplers and its metadata are vLLM's own affair: looked at, not declared.
Runner = Any


def runner_of(engine: EngineCore | LLMEngine) -> Runner:
    """The model runner of an engine whose executor is in this process."""
    return engine.model_executor.driver_worker.worker.model_runner


def on_each_rank(core: EngineCore, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(runner, *args)` in each process of an engine, in the order of its steps."""
    return core.collective_rpc(_on_runner, args=(function, *args))


def _on_runner(worker: Any, function: Callable[..., Any], *args: Any) -> Any:
    return function(worker.model_runner, *args)


@contextmanager
def all_logits_processors() -> Iterator[None]:
    """Have an engine that is made meanwhile keep what it would drop for speculation.

    vLLM's verification knows nothing of `min_p`, `logit_bias` and custom processors, and so it
    loads none. Ours does; with vLLM's such requests get no drafts and are sampled as ever.
    """
    build: Any = gpu_model_runner.build_logitsprocs  # type: ignore[attr-defined]

    def build_all(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        plain = copy.copy(vllm_config)
        plain.speculative_config = None
        return build(plain, *args, **kwargs)

    with VLLM.replaced(gpu_model_runner, "build_logitsprocs", build_all):
        yield


def keep_logprobs_apart(runner: Runner) -> None:
    """Have each request get the log probabilities that it asks for.

    With vLLM's sampler one request with `logprob_token_ids` leaves the others in its batch without
    those of the likeliest tokens.
    """
    sampler = runner.sampler
    gather_chosen = sampler.gather_specific_token_logprobs

    def gather(
        logprobs: torch.Tensor, logprob_token_ids: dict[int, list[int]], sampled: torch.Tensor
    ) -> LogprobsTensors | None:
        chosen: LogprobsTensors | None = gather_chosen(logprobs, logprob_token_ids, sampled)
        num_logprobs = runner.input_batch.sampling_metadata.max_num_logprobs
        if chosen is None or num_logprobs is None:
            return chosen
        likeliest = sampler.gather_logprobs(logprobs, num_logprobs, sampled)
        chooses = torch.zeros(len(sampled), 1, dtype=torch.bool)
        chooses[list(logprob_token_ids)] = True
        num_columns = max(chosen.logprobs.shape[1], likeliest.logprobs.shape[1])

        def merge(of_chosen: torch.Tensor, of_likeliest: torch.Tensor, fill: float) -> torch.Tensor:
            pad = torch.nn.functional.pad
            return torch.where(
                chooses,
                pad(of_chosen, (0, num_columns - of_chosen.shape[1]), value=fill),
                pad(of_likeliest, (0, num_columns - of_likeliest.shape[1]), value=fill),
            )

        return LogprobsTensors(
            merge(chosen.logprob_token_ids, likeliest.logprob_token_ids, 0),
            merge(chosen.logprobs, likeliest.logprobs, -math.inf),
            likeliest.selected_token_ranks,
        )

    VLLM.replace(sampler, "gather_specific_token_logprobs", gather)


def keep_seeds_through_chunks(runner: Runner) -> None:
    """Have the generators of seeded requests untouched by chunks of their prompts.

    vLLM samples after each chunk and takes that back by the generator's offset, which those of a
    CPU do not have: without this a seeded request with a chunked prompt ends the engine.
    """
    sample, bookkeep = runner._sample, runner._bookkeeping_sync

    def discarded(generators: dict[int, torch.Generator]) -> dict[int, torch.Generator]:
        mask = runner.discard_request_mask.np
        return {row: generator for row, generator in generators.items() if mask[row]}

    def sample_and_rewind(*args: Any, **kwargs: Any) -> Any:
        states = [(g, g.get_state()) for g in discarded(runner.input_batch.generators).values()]
        output = sample(*args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return output

    def bookkeep_without(*args: Any, **kwargs: Any) -> Any:
        generators = runner.input_batch.generators
        rewound = discarded(generators)
        for row in rewound:
            del generators[row]
        try:
            return bookkeep(*args, **kwargs)
        finally:
            generators.update(rewound)

    VLLM.replace(runner, "_sample", sample_and_rewind)
    VLLM.replace(runner, "_bookkeeping_sync", bookkeep_without)


def keep_thinking_apart(runner: Runner) -> None:
    """Have no request inherit the thinking budget of the one whose row in the batch it takes.

    vLLM would end its thinking when that of the other was to end.
    """
    if (holder := runner.input_batch.thinking_budget_state_holder) is None:
        return
    sync = holder.sync_batch

    def sync_batch(batch_update: BatchUpdate | None) -> None:
        if batch_update:
            one_way = MoveDirectionality.UNIDIRECTIONAL
            taken = [row for _, row, direction in batch_update.moved if direction is one_way]
            batch_update = replace(batch_update, removed=[*batch_update.removed, *taken])
        sync(batch_update)

    VLLM.replace(holder, "sync_batch", sync_batch)


def count_at_least(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """How many entries of each row of `x [rows, columns]` are at least `values [rows, 1]`."""
    rows = zip(x.numpy(), values.numpy(), strict=True)
    return torch.tensor([np.count_nonzero(row >= value) for row, value in rows])


def fix_sampling(runner: Runner) -> None:
    """Fix what of vLLM's sampling goes wrong in its runner for CPUs."""
    # vLLM compiles it when a request first asks for log probabilities, which took 2 to 22 s, in the
    # middle of everybody's steps. This one is as fast.
    VLLM.replace(vllm.v1.sample.sampler, "batched_count_greater_than", count_at_least)
    keep_seeds_through_chunks(runner)
    keep_logprobs_apart(runner)
    keep_thinking_apart(runner)
    if runner.speculative_config:
        verify_as_without_drafts(runner)
