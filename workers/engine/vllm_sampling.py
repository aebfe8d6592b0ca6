"""What vLLM's sampling lacks in an engine in this process, with drafts and on CPUs."""

import copy
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
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
    loads none. Ours does; with vLLM's such requests get no drafts and are sampled as ever.
    """
    build: Any = gpu_model_runner.build_logitsprocs  # type: ignore[attr-defined]

    def build_all(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        plain = copy.copy(vllm_config)
        plain.speculative_config = None
        return build(plain, *args, **kwargs)

    with VLLM.replaced(gpu_model_runner, "build_logitsprocs", build_all):
        yield


def verify_as_without_drafts(runner: Runner) -> None:
    """Have a step that verifies drafts give what steps without drafts would give.

    vLLM's verification ends the engine at some parameters, ignores others, and samples the token
    behind the drafts under what held before them.
    """

    def verify(
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        if _takes_the_likeliest(sampling_metadata):
            return SamplerOutput(verify_greedily(metadata, logits), logprobs_tensors=None)
        return verify_by_sampling(runner, metadata, logits, sampling_metadata)

    VLLM.replace(runner, "rejection_sampler", verify)
    if (holder := runner.input_batch.thinking_budget_state_holder) is not None:
        holder.in_spec_mode = False  # it always sees one token of each request


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
        rows.append(own[: num_right + 1])
    return _padded(rows, metadata.max_spec_len + 1)


def verify_by_sampling(
    runner: Runner, metadata: SpecDecodeMetadata, logits: torch.Tensor, sampling: SamplingMetadata
) -> SamplerOutput:
    """Sample the tokens of each request one after another, until one is not the draft in its place.

    A draft that was sampled counts as output from then on. So each parameter, logits processor and
    seed does what it does without drafts, and random tokens keep their distribution: a draft is
    accepted with the probability that the token has. `logits` has the rows of `verify_greedily`.
    """
    num_drafts = metadata.num_draft_tokens
    drafts = [of_request.tolist() for of_request in metadata.draft_token_ids.split(num_drafts)]
    first_rows = list(accumulate((num + 1 for num in num_drafts[:-1]), initial=0))
    outputs = runner.input_batch.req_output_token_ids
    sampled: list[list[int]] = [[] for _ in num_drafts]
    logprobs: list[LogprobsTensors | None] = []
    open_rows = list(range(len(num_drafts)))
    for place in range(metadata.max_spec_len + 1):
        # vLLM's processors know requests by their row, so those that are done keep theirs.
        rows = [row + min(place, num) for row, num in zip(first_rows, num_drafts, strict=True)]
        output = _sample_rows(runner, logits[rows], sampling, open_rows)
        logprobs.append(output.logprobs_tensors)
        tokens = output.sampled_token_ids[:, 0].tolist()
        for row in open_rows:
            sampled[row].append(tokens[row])
        open_rows = [row for row in open_rows if drafts[row][place : place + 1] == [tokens[row]]]
        if not open_rows:
            break
        for row in open_rows:
            outputs[row].append(tokens[row])
    for row, tokens in enumerate(sampled):
        # vLLM appends all tokens of the step later.
        del outputs[row][len(outputs[row]) - len(tokens) + 1 :]
    return SamplerOutput(_padded(sampled, len(logprobs)), _in_rows(logprobs))


def _sample_rows(
    runner: Runner, logits: torch.Tensor, sampling: SamplingMetadata, open_rows: list[int]
) -> SamplerOutput:
    """Sample one token of each request; for those not in `open_rows` it leaves no trace."""
    is_open = set(open_rows)
    for processor in sampling.logitsprocs.non_argmax_invariant:
        if isinstance(processor, MinTokensLogitsProcessor):
            processor.update_state(None)
    thinking: dict[int, Any] = {}
    if holder := sampling.thinking_budget_state_holder:
        thinking = holder._state
    done = {row: thinking.pop(row) for row in list(thinking) if row not in is_open}
    generators = {row: made for row, made in sampling.generators.items() if row in is_open}
    output: SamplerOutput = runner.sampler(
        logits=logits,
        sampling_metadata=dataclasses.replace(sampling, generators=generators, spec_token_ids=None),
    )
    thinking.update(done)
    return output


def _padded(tokens: list[list[int]], width: int) -> torch.Tensor:
    """Tokens of each request as `[num_requests, width]`."""
    rows = [row + [PLACEHOLDER_TOKEN_ID] * (width - len(row)) for row in tokens]
    return torch.tensor(rows, dtype=torch.int32)


def _in_rows(logprobs: list[LogprobsTensors | None]) -> LogprobsTensors | None:
    """Log probabilities of each place of all requests, put together request by request."""
    present = [of_place for of_place in logprobs if of_place is not None]
    if not present:
        return None
    fields = zip(*(of_place[:3] for of_place in present), strict=True)
    token_ids, values, ranks = (torch.stack(field, dim=1).flatten(0, 1) for field in fields)
    return LogprobsTensors(token_ids, values, ranks)


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


def fix_sampling(runner: Runner) -> None:
    """Fix what of vLLM's sampling goes wrong in its runner for CPUs."""
    keep_seeds_through_chunks(runner)
    keep_logprobs_apart(runner)
    if runner.speculative_config:
        verify_as_without_drafts(runner)
