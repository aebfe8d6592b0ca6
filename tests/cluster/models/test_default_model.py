"""Tests of the default model as it is fetched: its weights, tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from cluster.models.default_model import fetch_default_model


@pytest.fixture(scope="session")
def default_model() -> Path:
    return fetch_default_model()


@pytest.fixture(scope="session")
def tokenizer(default_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(default_model)


def test_the_default_model_is_as_published(default_model: Path) -> None:
    config = AutoConfig.from_pretrained(default_model)
    published = {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": torch.bfloat16,
    }

    assert {name: getattr(config, name) for name in published} == published
    assert config.rope_parameters["rope_theta"] == 100_000


def test_the_default_models_sampling_suits_it(default_model: Path) -> None:
    config = GenerationConfig.from_pretrained(default_model)

    assert (config.do_sample, config.temperature, config.max_new_tokens) == (True, 0.01, 512)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)


def test_the_default_models_weights_are_all_there_and_of_usual_size(default_model: Path) -> None:
    weights = load_file(default_model / "model.safetensors")
    with torch.device("meta"):
        expected = LlamaForCausalLM(AutoConfig.from_pretrained(default_model)).state_dict()
    del expected["lm_head.weight"]

    shapes = {name: weight.shape for name, weight in weights.items()}
    assert shapes == {name: weight.shape for name, weight in expected.items()}
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        assert 0.01 < weight.float().square().mean().sqrt() < 10, name


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "  leading, trailing and   inner spaces \n\n\ttabs\r\n",
        "don't we'll I've 3.14159 and 2024-11-22",
        "naïve café, Ελληνικά, русский, 日本語, العربية, 😀👩‍👩‍👧",
        'def f(x: int) -> str:\n    return f"{x!r}"\n',
        "<|im_start|>user\nhi<|im_end|>\n",
        "",
    ],
)
def test_text_survives_tokens_and_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_are_smollms(tokenizer: Any) -> None:
    assert tokenizer.tokenize("It's 2024 now") == [
        *["It", "'s", "Ġ", "2", "0", "2", "4", "Ġnow"],
    ]
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n") == [1, 4093, 198, 6004, 2, 198]
    assert tokenizer.decode([1, 6004, 2, 0], skip_special_tokens=True) == "hi"
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")


# The chat template.

ORIGINAL_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": '  Weather in\nParis? <b>&amp;"é"</b> {{ x }} '}
ASSISTANT = {"role": "assistant", "content": "Sunny."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TOOLS_TEXT = (
    "\n\nYou may call functions to help with the request. These are available, as JSON within "
    "<tools></tools> tags:\n<tools>\n"
    '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]'
    "\n</tools>\nTo call one, answer with its name and arguments as JSON within "
    "<tool_call></tool_call> tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <arguments-object>}\n</tool_call>'
)


def render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return rendered


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [SYSTEM, USER],
        [USER, ASSISTANT, USER],
        [SYSTEM, USER, ASSISTANT, SYSTEM, USER],
        [{"role": "system", "content": ""}, USER],
    ],
)
def test_without_tools_the_template_renders_what_the_original_does(
    tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    options = {"add_generation_prompt": add_generation_prompt}

    expected = render(tokenizer, messages, chat_template=ORIGINAL_TEMPLATE, **options)

    assert render(tokenizer, messages, **options) == expected
    assert render(tokenizer, messages, tools=[], **options) == expected


def test_text_parts_are_lines(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]

    assert render(tokenizer, [SYSTEM, {"role": "user", "content": parts}]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("messages", "system"),
    [
        ([], "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        ([SYSTEM], "Be brief."),
    ],
)
def test_tools_are_described_in_the_system_message(
    tokenizer: Any, messages: list[dict[str, Any]], system: str
) -> None:
    user = {"role": "user", "content": "Weather?"}

    rendered = render(tokenizer, [*messages, user], tools=[TOOL], add_generation_prompt=True)

    assert rendered == (
        f"<|im_start|>system\n{system}{TOOLS_TEXT}<|im_end|>\n"
        "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("arguments", [{"city": "Zürich"}, '{"city": "Zürich"}'])
@pytest.mark.parametrize(
    ("content", "before"), [(None, ""), ("", ""), ("Let me see.", "Let me see.\n")]
)
def test_calls_and_their_results_are_rendered(
    tokenizer: Any, arguments: object, content: str | None, before: str
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages: list[dict[str, Any]] = [
        SYSTEM,
        {"role": "assistant", "content": content, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": '{"celsius": 20}'},
    ]
    call_text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'

    assert render(tokenizer, messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>assistant\n{before}{call_text}\n{call_text}<|im_end|>\n"
        '<|im_start|>tool\n<tool_response>\n{"celsius": 20}\n</tool_response><|im_end|>\n'
    )
    assert json.loads(call_text.splitlines()[1])["arguments"] == {"city": "Zürich"}
