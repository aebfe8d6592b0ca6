"""Streamed answers as a client sees them: when each token came."""

import time
from dataclasses import dataclass, field
from typing import Any

from openai.types import CompletionChoice
from openai.types.chat.chat_completion_chunk import Choice

from cluster.client import XYServe


@dataclass(slots=True)
class Answer:
    """One request and the times of its tokens, by `time.perf_counter`."""

    sent_s: float = field(default_factory=time.perf_counter)
    token_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.token_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first."""
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)


def token_ids(choice: CompletionChoice | Choice) -> list[int]:
    """Token ids of a choice, which vLLM adds for calls with `return_token_ids`."""
    return (choice.model_extra or {}).get("token_ids") or []


async def ask(handle: XYServe, prompt: Any, max_tokens: int, **params: Any) -> Answer:
    """Stream one answer, greedy and of exactly `max_tokens` tokens unless `params` differ."""
    answer = Answer()
    params = {"temperature": 0, "ignore_eos": True} | params
    stream = handle.stream_async(prompt, max_tokens=max_tokens, return_token_ids=True, **params)
    async for chunk in stream:
        for choice in chunk.choices:
            new = token_ids(choice)
            answer.token_ids += new
            answer.token_s += [time.perf_counter()] * len(new)
    return answer


def makespan_s(answers: list[Answer]) -> float:
    """Time from the first request sent to the last token of all."""
    return max(a.token_s[-1] for a in answers) - min(a.sent_s for a in answers)
