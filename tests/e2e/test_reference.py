"""Greedy output through the whole path equals the reference implementation, token for token."""

import asyncio
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.client import XYServe
from cluster.models.model import resolve_model
from tests.bench.answers import token_ids
from tests.e2e.conftest import MODEL, Server
from tests.workload import questions

NUM_PROMPTS, NUM_TOKENS = 20, 32


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Token ids, so that only what the model computes is compared."""
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model(MODEL))
    chats = [[{"role": "user", "content": question}] for question in questions(NUM_PROMPTS)]
    token_ids: list[list[int]] = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in chats
    ]
    return token_ids


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model(MODEL), dtype=torch.float32, attn_implementation="eager"
    )
    return [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    tokens: list[int] = []
    new, cache = prompt, None
    for _ in range(num_tokens):
        output = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens.append(int(output.logits[0, -1].argmax()))
        new = tokens[-1:]
    return tokens


async def test_http_gives_the_tokens_of_transformers(
    server: Server, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answers = await asyncio.gather(
            *(
                client.completions.create(
                    model=MODEL,
                    prompt=prompt,
                    max_tokens=NUM_TOKENS,
                    temperature=0,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )
                for prompt in prompts
            )
        )

    assert [token_ids(answer.choices[0]) for answer in answers] == expected


async def test_the_handle_gives_the_tokens_of_transformers(
    handle: XYServe, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    answers = await asyncio.gather(
        *(
            handle.generate_async(
                prompt,
                max_tokens=NUM_TOKENS,
                temperature=0,
                ignore_eos=True,
                return_token_ids=True,
            )
            for prompt in prompts
        )
    )

    assert [token_ids(answer.choices[0]) for answer in answers] == expected
