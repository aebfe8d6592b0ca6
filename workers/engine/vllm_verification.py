"""Verification of drafts that gives what steps without drafts give, on vLLM's runner for CPUs."""

import dataclasses
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from workers.plugin.vllm_seams import VLLM

PLACEHOLDER_TOKEN_ID = -1

# The runner and its sampler are vLLM's own affair: looked at, not declared.
Runner = Any


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
        and not any(map(_is_at_work, sampling.logitsprocs.non_argmax_invariant))
    )


def _is_at_work(processor: Any) -> bool:
    """Whether a logits processor may change anything of this batch."""
    match processor:
        case LogitBiasLogitsProcessor():
            return bool(processor.biases)
        case MinPLogitsProcessor():
            return bool(processor.min_p_count)
        case MinTokensLogitsProcessor():
            return bool(processor.min_toks)
        case _:
            return True


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
    logprobs: list[tuple[list[int], LogprobsTensors | None]] = []
    sampling = dataclasses.replace(sampling, spec_token_ids=None)
    going = list(range(len(num_drafts)))
    while going:
        place = len(logprobs)
        rows = logits[[first_rows[i] + place for i in going]]
        output = _sample(runner, rows, sampling, going, len(num_drafts))
        logprobs.append((going, output.logprobs_tensors))
        accepted = []
        for i, token in zip(going, output.sampled_token_ids[:, 0].tolist(), strict=True):
            sampled[i].append(token)
            if drafts[i][place : place + 1] == [token]:
                outputs[i].append(token)
                accepted.append(i)
        going = accepted
    for i, tokens in enumerate(sampled):
        # vLLM appends all tokens of the step later.
        del outputs[i][len(outputs[i]) - len(tokens) + 1 :]
    return SamplerOutput(_padded(sampled, len(logprobs)), _by_request(logprobs))


def _sample(
    runner: Runner,
    logits: torch.Tensor,
    sampling: SamplingMetadata,
    requests: list[int],
    num_requests: int,
) -> SamplerOutput:
    """Sample one token of each of these `requests`, by their places in the batch.

    `logits` is `[len(requests), vocab_size]`.
    """
    for processor in sampling.logitsprocs.non_argmax_invariant:
        if isinstance(processor, MinTokensLogitsProcessor):
            processor.update_state(None)  # outputs may have grown
    output: SamplerOutput
    if len(requests) == num_requests:
        output = runner.sampler(logits=logits, sampling_metadata=sampling)
        return output
    row_of = {request: row for row, request in enumerate(requests)}

    def select(value: Any) -> Any:
        match value:
            case torch.Tensor():
                return value[requests]
            case list():
                return [value[request] for request in requests] if value else value
            case dict():
                return {row_of[key]: value[key] for key in value if key in row_of}
            case LogitsProcessors():
                at_work: list[Any] = [
                    _Selected(processor, requests, num_requests)
                    for processor in filter(_is_at_work, value.all)
                ]
                return LogitsProcessors(at_work)
            case _:
                return value

    fields = dataclasses.fields(sampling)
    selected = {field.name: select(getattr(sampling, field.name)) for field in fields}
    holder = sampling.thinking_budget_state_holder
    if holder:
        states, holder._state = holder._state, select(holder._state)
    output = runner.sampler(logits=logits, sampling_metadata=SamplingMetadata(**selected))
    if holder:
        holder._state = states
    return output


class _Selected:
    """A logits processor for some requests of the batch; it knows them by their places there."""

    def __init__(self, processor: Any, requests: list[int], num_requests: int) -> None:
        self._processor = processor
        self._requests = requests
        self._num_requests = num_requests

    def is_argmax_invariant(self) -> bool:
        invariant: bool = self._processor.is_argmax_invariant()
        return invariant

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        batch = logits.new_zeros(self._num_requests, logits.shape[1])
        batch[self._requests] = logits
        applied: torch.Tensor = self._processor.apply(batch)
        return applied[self._requests]


def _padded(tokens: Sequence[list[int]], width: int) -> torch.Tensor:
    """Tokens of each request as `[num_requests, width]`."""
    rows = [
        of_request + [PLACEHOLDER_TOKEN_ID] * (width - len(of_request)) for of_request in tokens
    ]
    return torch.tensor(rows, dtype=torch.int32)


def _by_request(
    logprobs: list[tuple[list[int], LogprobsTensors | None]],
) -> LogprobsTensors | None:
    """Log probabilities of the requests that were sampled at each place, put in vLLM's order.

    Rows are `[num_requests * num_places]`, and zero where no token was sampled.
    """
    (all_requests, first), *_ = logprobs
    if first is None:
        return None
    present = [
        (place, requests, tensors[:3])
        for place, (requests, tensors) in enumerate(logprobs)
        if tensors is not None
    ]
    merged = []
    for index, like in enumerate(first[:3]):
        # Of chosen tokens there may be fewer columns, once the request that wants most is done.
        whole = like.new_zeros(len(all_requests), len(logprobs), *like.shape[1:])
        for place, requests, fields in present:
            field, rows = fields[index], whole[:, place]
            (rows[:, : field.shape[1]] if field.dim() > 1 else rows)[requests] = field
        merged.append(whole.flatten(0, 1))
    token_ids, values, ranks = merged
    return LogprobsTensors(token_ids, values, ranks)
