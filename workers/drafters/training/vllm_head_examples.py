"""Lets a target model answer prompts and keeps its hidden states for a draft head to learn."""

from collections.abc import Iterable, Iterator
from itertools import count, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.forward_context import get_forward_context
from vllm.v1.engine.llm_engine import LLMEngine

from workers.config import EngineConfig, WorkerConfig
from workers.drafters.training.example import Example, Message
from workers.engine.vllm_engine import engine_args
from workers.engine.vllm_sampling import runner_of

NUM_SEQS = 32
"""Requests at once: enough for large steps; more would only need more KV cache."""
KV_CACHE_GIB = 2.0
"""Room for the chats at once, with up to about 1,400 tokens each for the default model, whose KV
cache takes 46 kB per token; if a larger model lacks room, vLLM preempts."""


def generate(
    model: str, prompts: Iterable[list[Message]], max_tokens: int, cpus: int
) -> Iterator[Example]:
    """Let the target in the folder `model` answer prompts greedily."""
    config = WorkerConfig(
        cpus=cpus,
        # Tokens taken from the prefix cache would have no states.
        engine=EngineConfig(
            max_num_seqs=NUM_SEQS, kv_cache_gib=KV_CACHE_GIB, enable_prefix_caching=False
        ),
    )
    engine: Any = LLMEngine.from_engine_args(engine_args(model, config))
    max_prompt_len = engine.model_config.max_model_len - max_tokens
    runner = runner_of(engine)
    states: dict[str, list[NDArray[np.float16]]] = {}

    def keep(module: object, args: object, hidden: Tensor) -> None:
        of_layers: Any = get_forward_context().attn_metadata
        if of_layers is None:  # vLLM is only warming up
            return
        starts = next(iter(of_layers.values())).query_start_loc.tolist()
        of_step = hidden.numpy().astype(np.float16)
        for request_id, span in zip(runner.input_batch.req_ids, pairwise(starts), strict=False):
            states.setdefault(request_id, []).append(of_step[slice(*span)])

    runner.get_model().register_forward_hook(keep)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    waiting = iter(prompts)
    running: dict[str, tuple[str, list[int]]] = {}
    """Per request, the engine's internal id and the prompt."""
    numbers = count()
    while True:
        while len(running) < 2 * NUM_SEQS and (messages := next(waiting, None)):
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(prompt) <= max_prompt_len:
                name = str(next(numbers))
                own_name = engine.add_request(name, {"prompt_token_ids": prompt}, params)
                running[name] = own_name, prompt
        if not running:
            return
        for output in engine.step():
            if output.finished:
                own_name, prompt = running.pop(output.request_id)
                tokens = np.array(prompt + list(output.outputs[0].token_ids), np.int32)
                of_request = np.concatenate(states.pop(own_name))
                # A step scheduled before the end was known leaves one more state.
                yield Example(len(prompt), tokens, of_request[: len(tokens) - 1])
