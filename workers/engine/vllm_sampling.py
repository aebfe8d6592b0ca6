"""What vLLM's sampling lacks in an engine in this process, with drafts and on CPUs."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker import gpu_model_runner

from workers.plugin.vllm_seams import VLLM

PLACEHOLDER_TOKEN_ID = -1

# The runner, its samplers and its metadata are vLLM's own affair: looked at, not declared.
Runner = Any


def runner_of(engine: EngineCore | LLMEngine) -> Runner:
    """The model runner of an engine whose executor is in this process."""
    return engine.model_executor.driver_worker.worker.model_runner


@contextmanager
def all_logits_processors() -> Iterator[None]:
    """Have an engine that is made meanwhile keep what it would drop for speculation.

    vLLM's verification knows nothing of `min_p`, `logit_bias` and custom processors, and so it
    loads none. But a request without drafts is sampled as ever, and those requests get none.
    """
    build: Any = gpu_model_runner.build_logitsprocs  # type: ignore[attr-defined]

    def build_all(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        plain = copy.copy(vllm_config)
        plain.speculative_config = None
        return build(plain, *args, **kwargs)

    with VLLM.replaced(gpu_model_runner, "build_logitsprocs", build_all):
        yield


def sample_cheaply(runner: Runner) -> None:
    """Spare steps what vLLM's verification does in vain: all without drafts, most if greedy."""
    verify = runner.rejection_sampler

    def sample(
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        if metadata.max_spec_len == 0:
            output: SamplerOutput = runner.sampler(
                logits=logits, sampling_metadata=sampling_metadata
            )
        elif _takes_the_likeliest(sampling_metadata):
            output = SamplerOutput(verify_greedily(metadata, logits), logprobs_tensors=None)
        else:
            output = verify(metadata, draft_probs, logits, sampling_metadata)
        return output

    VLLM.replace(runner, "rejection_sampler", sample)


def _takes_the_likeliest(sampling: SamplingMetadata) -> bool:
    """Whether the token of the greatest logit is all that any request asks for."""
    thinking = sampling.thinking_budget_state_holder
    return (
        sampling.all_greedy
        and sampling.max_num_logprobs is None
        and sampling.no_penalties
        and sampling.allowed_token_ids_mask is None
        and not sampling.bad_words_token_ids
        and not sampling.logprob_token_ids
        and not (thinking and thinking.has_tracked_requests())
        and all(
            (isinstance(processor, LogitBiasLogitsProcessor) and not processor.biases)
            or (isinstance(processor, MinTokensLogitsProcessor) and not processor.min_toks)
            for processor in sampling.logitsprocs.non_argmax_invariant
        )
    )


def verify_greedily(metadata: SpecDecodeMetadata, logits: torch.Tensor) -> torch.Tensor:
    """The drafts of each request up to the first that is not the likeliest token, and that token.

    `logits [num_drafts + num_requests, vocab_size]`: of each request a row for each of its drafts
    and one for what follows them. Gives `[num_requests, max_spec_len + 1]`, padded with -1.
    """
    likeliest = logits.argmax(dim=-1).tolist()
    drafts = metadata.draft_token_ids.tolist()
    rows = []
    for num_drafts in metadata.num_draft_tokens:
        own, likeliest = likeliest[: num_drafts + 1], likeliest[num_drafts + 1 :]
        guessed, drafts = drafts[:num_drafts], drafts[num_drafts:]
        num_right = next((i for i in range(num_drafts) if guessed[i] != own[i]), num_drafts)
        rows.append(
            own[: num_right + 1] + [PLACEHOLDER_TOKEN_ID] * (metadata.max_spec_len - num_right)
        )
    return torch.tensor(rows, dtype=torch.int32)


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


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: float = 0,
    replace_to: float = 0,
) -> torch.Tensor:
    """Repeat `x [batch_size]` for the draft tokens of each request: `[num_tokens]`.

    vLLM's own on the CPU takes temperatures for integers and gives back what was in memory, so
    that drafts would be verified against another distribution.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(x == replace_from, replace_to, x).to(x.dtype)
    return replaced.repeat_interleave(counts, output_size=num_tokens)


def fix_cpu_sampling(runner: Runner) -> None:
    """Mend what of vLLM's sampling goes wrong on a CPU."""
    keep_seeds_through_chunks(runner)
    VLLM.replace(rejection_sampler, "expand_batch_to_tokens", expand_batch_to_tokens)
