"""The OpenAI API as the official client and plain HTTP see it."""

import concurrent.futures
import itertools
import json
import re
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from tests.e2e.conftest import MODEL

CAPITAL = "What is the capital of France?"
CAPITAL_TEXT = "The capital of France is"
COUNTING = "One, two, three,"


def user(content: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": content}]


def chat(
    client: openai.OpenAI,
    messages: str | list[ChatCompletionMessageParam] = CAPITAL,
    **params: Any,
) -> ChatCompletion:
    messages = user(messages) if isinstance(messages, str) else messages
    params = {"temperature": 0, "max_tokens": 20} | params
    answer: ChatCompletion = client.chat.completions.create(
        model=MODEL, messages=messages, **params
    )
    return answer


def complete(client: openai.OpenAI, prompt: Any, **params: Any) -> Completion:
    params = {"temperature": 0, "max_tokens": 10} | params
    answer: Completion = client.completions.create(model=MODEL, prompt=prompt, **params)
    return answer


def text(answer: Completion) -> str:
    return answer.choices[0].text


def num_tokens(usage: CompletionUsage | None) -> tuple[int, int, int]:
    """Of the prompt, of the output, together."""
    assert usage is not None
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def tokenize(http: httpx.Client, prompt: str) -> list[int]:
    answer = http.post(
        "/tokenize", json={"model": MODEL, "prompt": prompt, "add_special_tokens": False}
    )
    return list(answer.json()["tokens"])


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[str]:
    """The data of all server-sent events of one answer."""
    with http.stream("POST", path, json={"model": MODEL, "stream": True} | body) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


# What there is


def test_the_one_model_is_listed_with_its_context_length(client: openai.OpenAI) -> None:
    models = client.models.list().data

    assert [(model.id, model.object, model.to_dict()["max_model_len"]) for model in models] == [
        (MODEL, "model", 8192)
    ]


def test_a_model_is_found_by_its_id(client: openai.OpenAI, http: httpx.Client) -> None:
    [listed] = http.get("/v1/models").json()["data"]

    found = http.get(f"/v1/models/{MODEL}")

    assert client.models.retrieve(MODEL).id == MODEL
    assert found.status_code == 200
    assert list(found.json()) == list(listed)
    assert (found.json()["id"], found.json()["root"]) == (listed["id"], listed["root"])


@pytest.mark.parametrize("path", ["another", "org/another", "org%2Fanother", f"{MODEL}/x", "a b"])
def test_another_model_is_not_found(http: httpx.Client, path: str) -> None:
    answer = http.get(f"/v1/models/{path}")

    model = path.replace("%2F", "/")
    assert (answer.status_code, answer.json()) == (
        404,
        {
            "error": {
                "message": f"The model `{model}` does not exist.",
                "type": "NotFoundError",
                "param": "model",
                "code": 404,
            }
        },
    )


def test_clients_raise_what_they_raise_for_openai(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="The model `org/another` does not exist"):
        client.models.retrieve("org/another")


def test_the_tokenizer_is_described(http: httpx.Client) -> None:
    """With what lm-eval's remote tokenizer reads."""
    info = http.get("/tokenizer_info").json()

    assert (info["bos_token"], info["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert "add_generation_prompt" in info["chat_template"]


def test_the_server_says_that_it_is_healthy_and_its_version(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", http.get("/version").json()["version"])


def test_the_api_is_documented_by_the_server_itself(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()

    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models"} <= set(
        schema["paths"]
    )
    assert "swagger-ui" in http.get("/docs").text


def test_tokens_become_the_same_text_again(http: httpx.Client) -> None:
    prompt = "Bonjour, 世界! \N{GRINNING FACE} def f(x):\n\treturn x"

    tokens = http.post("/tokenize", json={"model": MODEL, "prompt": prompt}).json()
    again = http.post("/detokenize", json={"model": MODEL, "tokens": tokens["tokens"]}).json()

    assert again == {"prompt": prompt}
    assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), 8192)


def test_a_chat_is_tokenized_as_it_is_answered(http: httpx.Client, client: openai.OpenAI) -> None:
    tokens = http.post("/tokenize", json={"model": MODEL, "messages": user(CAPITAL)}).json()
    answer = chat(client, max_tokens=1, extra_body={"return_token_ids": True})

    assert answer.to_dict()["prompt_token_ids"] == tokens["tokens"]


# Chat


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = chat(client)

    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    assert num_tokens(answer.usage) == (37, 8, 45)


def test_a_system_message_replaces_the_default_one(client: openai.OpenAI) -> None:
    system: ChatCompletionMessageParam = {"role": "system", "content": "You are a helpful AI."}
    plain = chat(client, max_tokens=1)
    with_system = chat(client, [system, *user(CAPITAL)], max_tokens=1)

    assert num_tokens(with_system.usage) < num_tokens(plain.usage)


def test_earlier_turns_are_remembered(client: openai.OpenAI) -> None:
    turns: list[ChatCompletionMessageParam] = [
        *user("My name is Zelda."),
        {"role": "assistant", "content": "Nice to meet you, Zelda!"},
        *user("What is my name?"),
    ]

    assert "Zelda" in (chat(client, turns).choices[0].message.content or "")


def test_content_may_come_in_parts(client: openai.OpenAI) -> None:
    parts: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": [{"type": "text", "text": CAPITAL}]}
    ]

    assert chat(client, parts).choices[0].message == chat(client).choices[0].message


def test_a_chat_streams_the_same_answer_and_its_usage(client: openai.OpenAI) -> None:
    whole = chat(client)

    *chunks, last = client.chat.completions.create(
        model=MODEL,
        messages=user(CAPITAL),
        temperature=0,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )

    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    assert len(deltas) >= 3  # piece by piece: a chunk for each step, of a token or, by drafts, more
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert (last.choices, num_tokens(last.usage)) == ([], num_tokens(whole.usage))


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/chat/completions", {"messages": user(CAPITAL)}),
        ("/v1/completions", {"prompt": CAPITAL_TEXT}),
    ],
)
def test_a_stream_ends_with_done(http: httpx.Client, path: str, prompt: dict[str, Any]) -> None:
    *chunks, done = events(http, path, prompt | {"max_tokens": 3})

    assert done == "[DONE]"
    assert len({json.loads(chunk)["id"] for chunk in chunks}) == 1


# Completion


def test_a_text_is_continued(client: openai.OpenAI) -> None:
    answer = complete(client, CAPITAL_TEXT, max_tokens=2)

    assert (text(answer), answer.choices[0].finish_reason) == (" Paris.", "length")


def test_a_prompt_may_be_token_ids(http: httpx.Client, client: openai.OpenAI) -> None:
    token_ids = tokenize(http, CAPITAL_TEXT)

    assert text(complete(client, token_ids)) == text(complete(client, CAPITAL_TEXT))


def test_several_prompts_are_answered_in_order(http: httpx.Client, client: openai.OpenAI) -> None:
    texts = [CAPITAL_TEXT, COUNTING]
    alone = [text(complete(client, prompt)) for prompt in texts]

    for prompts in (texts, [tokenize(http, prompt) for prompt in texts]):
        answer = complete(client, prompts)
        assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(alone))


def test_echo_gives_the_prompt_back(client: openai.OpenAI) -> None:
    assert text(complete(client, CAPITAL_TEXT, max_tokens=2, echo=True)) == CAPITAL_TEXT + " Paris."
    assert text(complete(client, CAPITAL_TEXT, max_tokens=0, echo=True)) == CAPITAL_TEXT


def test_a_completion_streams_the_same_answer_and_its_usage(client: openai.OpenAI) -> None:
    whole = complete(client, COUNTING)

    *chunks, last = client.completions.create(
        model=MODEL,
        prompt=COUNTING,
        temperature=0,
        max_tokens=10,
        stream=True,
        stream_options={"include_usage": True},
    )

    assert "".join(map(text, chunks)) == text(whole)
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert (last.choices, num_tokens(last.usage)) == ([], num_tokens(whole.usage))


# Sampling


def test_a_request_that_says_nothing_about_sampling_is_answered_right(
    client: openai.OpenAI,
) -> None:
    for seed in range(10):
        answer = client.chat.completions.create(
            model=MODEL, messages=user("What is the capital of France?"), seed=seed
        )
        assert answer.choices[0].message.content == "The capital of France is Paris."
    several = client.chat.completions.create(model=MODEL, messages=user("Hello"), n=2)
    assert len(several.choices) == 2


def test_an_answer_ends_though_nobody_says_when(client: openai.OpenAI, http: httpx.Client) -> None:
    endless: dict[str, Any] = {"ignore_eos": True}
    chat_answer = client.chat.completions.create(
        model=MODEL, messages=user("Hello"), extra_body=endless
    )
    response = http.post("/v1/responses", json={"input": "Hello", "ignore_eos": True}).json()
    longer = client.chat.completions.create(
        model=MODEL, messages=user("Hello"), max_completion_tokens=530, extra_body=endless
    )

    assert chat_answer.choices[0].finish_reason == "length"
    assert [num_tokens(answer.usage)[1] for answer in (chat_answer, longer)] == [512, 530]
    assert response["usage"]["output_tokens"] <= 512


def test_the_same_seed_gives_the_same_choices_and_they_differ(client: openai.OpenAI) -> None:
    sampled = [
        [
            choice.message.content
            for choice in chat(
                client, "Tell a story.", n=2, temperature=1, seed=seed, max_tokens=8
            ).choices
        ]
        for seed in (7, 7, 8)
    ]

    assert sampled[0] == sampled[1]
    assert sampled[0] != sampled[2]
    assert sampled[0][0] != sampled[0][1]


def test_several_choices_stream_side_by_side(client: openai.OpenAI) -> None:
    params: dict[str, Any] = {"n": 2, "temperature": 1, "seed": 7, "max_tokens": 8}
    whole = complete(client, "Once", **params)

    texts = ["", ""]
    for chunk in client.completions.create(model=MODEL, prompt="Once", stream=True, **params):
        texts[chunk.choices[0].index] += text(chunk)

    assert texts == [choice.text for choice in whole.choices]


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        ("six", " four, five, "),
        ([" seven", " five"], " four,"),
        ("ve, si", " four, fi"),  # begins in one token and ends in another
    ],
)
def test_generation_ends_before_a_stop_string(
    client: openai.OpenAI, stop: str | list[str], left: str
) -> None:
    answer = complete(client, COUNTING, stop=stop, max_tokens=20)
    streamed = client.completions.create(
        model=MODEL, prompt=COUNTING, temperature=0, stop=stop, max_tokens=20, stream=True
    )

    assert (text(answer), answer.choices[0].finish_reason) == (left, "stop")
    assert "".join(map(text, streamed)) == left


@pytest.mark.parametrize(
    "penalty",
    [
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"extra_body": {"repetition_penalty": 1.5}},
    ],
)
def test_a_penalty_changes_the_output(client: openai.OpenAI, penalty: dict[str, Any]) -> None:
    plain, penalised = (
        complete(client, COUNTING, max_tokens=20, **params) for params in ({}, penalty)
    )

    assert text(penalised) != text(plain)


def test_logit_bias_forces_and_bans_a_token(http: httpx.Client, client: openai.OpenAI) -> None:
    (paris,) = tokenize(http, " Paris")

    forced = complete(client, COUNTING, max_tokens=3, logit_bias={str(paris): 100})
    banned = complete(client, CAPITAL_TEXT, max_tokens=3, logit_bias={str(paris): -100})

    assert text(forced) == " Paris Paris Paris"
    assert not text(banned).startswith(" Paris")


def test_a_completion_has_the_logprobs_of_its_tokens(client: openai.OpenAI) -> None:
    logprobs = complete(client, CAPITAL_TEXT, max_tokens=2, logprobs=3).choices[0].logprobs

    assert logprobs is not None
    assert logprobs.tokens == [" Paris", "."]
    assert logprobs.token_logprobs == pytest.approx([-0.2606, -0.3880], abs=1e-3)
    assert logprobs.top_logprobs is not None
    assert list(logprobs.top_logprobs[0]) == [" Paris", " the", " London"]


def test_a_chat_has_the_logprobs_of_its_tokens(client: openai.OpenAI) -> None:
    logprobs = chat(client, max_tokens=2, logprobs=True, top_logprobs=2).choices[0].logprobs

    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.token for token in logprobs.content] == ["The", " capital"]
    assert [[top.token for top in token.top_logprobs] for token in logprobs.content] == [
        ["The", "L"],
        [" capital", " Capital"],
    ]
    for token in logprobs.content:
        assert token.logprob == token.top_logprobs[0].logprob < 0


def test_a_priority_is_accepted(client: openai.OpenAI) -> None:
    urgent = complete(client, CAPITAL_TEXT, extra_body={"priority": -5})

    assert text(urgent) == text(complete(client, CAPITAL_TEXT))


# Structured output

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "continent": {"enum": ["Africa", "Asia", "Europe"]},
        "founded": {"type": "integer", "minimum": 1, "maximum": 2025},
    },
    "required": ["city", "continent", "founded"],
    "additionalProperties": False,
}


def test_an_answer_follows_a_json_schema(client: openai.OpenAI) -> None:
    answer = chat(
        client,
        "Describe Paris.",
        max_tokens=80,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": CITY, "strict": True},
        },
    )

    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), CITY)


def test_an_answer_is_a_json_object(client: openai.OpenAI) -> None:
    answer = chat(
        client,
        'Repeat exactly: {"name": "Bob"}',
        max_tokens=60,
        response_format={"type": "json_object"},
    )

    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"choice": ["yes", "no"]}, r"yes|no"),
        ({"regex": r"\d{4}-\d{2}-\d{2}"}, r"\d{4}-\d{2}-\d{2}"),
        (
            {"grammar": 'root ::= sum\nsum ::= num " + " num\nnum ::= [0-9]+'},
            r"[0-9]+ \+ [0-9]+",
        ),
    ],
)
def test_an_answer_follows_a_constraint(
    client: openai.OpenAI, constraint: dict[str, Any], pattern: str
) -> None:
    answer = chat(
        client, "Add 2 and 3.", max_tokens=30, extra_body={"structured_outputs": constraint}
    )

    assert re.fullmatch(pattern, answer.choices[0].message.content or "")


# Tools

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 30},
                    "unit": {"enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"zone": {"type": "string", "maxLength": 30}},
                "required": ["zone"],
                "additionalProperties": False,
            },
        },
    },
]
WEATHER = "What is the weather in Paris in celsius?"
PARIS = {"city": "Paris", "unit": "celsius"}


def test_a_required_tool_is_called(client: openai.OpenAI) -> None:
    answer = chat(client, WEATHER, tools=TOOLS, tool_choice="required", max_tokens=60)

    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", PARIS)
    assert answer.choices[0].finish_reason == "tool_calls"


def test_the_named_tool_is_called(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "get_time"}}
    answer = chat(client, WEATHER, tools=TOOLS, tool_choice=choice, max_tokens=60)

    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, list(json.loads(call.function.arguments))) == ("get_time", ["zone"])


def test_a_tool_call_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=user(WEATHER),
        tools=TOOLS,
        tool_choice="required",
        temperature=0,
        max_tokens=60,
        stream=True,
    )

    deltas = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
    functions = [call.function for call in deltas if call.function]
    assert [function.name for function in functions if function.name] == ["get_weather"]
    assert deltas[0].id
    assert json.loads("".join(function.arguments or "" for function in functions)) == PARIS
    assert len(deltas) >= 2  # a step with accepted drafts gives several tokens


def test_a_tool_may_be_left_to_the_model(client: openai.OpenAI) -> None:
    answer = chat(client, WEATHER, tools=TOOLS, tool_choice="auto", max_tokens=10)

    message = answer.choices[0].message
    assert message.content or message.tool_calls


def test_the_result_of_a_tool_is_read(client: openai.OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    messages: list[Any] = [
        *user(WEATHER),
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "It is 31 degrees."},
    ]

    assert "31" in (chat(client, messages, tools=TOOLS).choices[0].message.content or "")


LENIENT: Any = [
    {
        "type": "function",
        "function": {
            "name": "book_table",
            "description": "Book a table at a restaurant",
            "parameters": {
                "type": "object",
                "properties": {
                    "restaurant": {"type": "string", "maxLength": 20},
                    "guests": {"type": "integer", "minimum": 1, "maximum": 12},
                    "when": {
                        "type": "object",
                        "properties": {
                            "day": {"enum": ["today", "tomorrow"]},
                            "hour": {"type": "integer", "minimum": 0, "maximum": 23},
                        },
                        "required": ["day", "hour"],
                    },
                },
                "required": ["restaurant", "guests", "when"],
            },
        },
    }
]
"""A tool as most clients describe one: without `strict`."""
BOOK = "Call the tool book_table: a table at Luigi's for four, tomorrow at eight in the evening."
NAMED = {"type": "function", "function": {"name": "book_table"}}
NUM_TRIES = 20
CALL_TOKENS = 150
"""Enough for any call that the schema allows, except for one with long runs of spaces."""


def assert_arguments_are_valid(name: str, arguments: str) -> None:
    assert name == "book_table"
    jsonschema.validate(json.loads(arguments), LENIENT[0]["function"]["parameters"])


@pytest.mark.parametrize(
    "tool_choice", ["required", NAMED, "auto"], ids=["required", "named", "auto"]
)
def test_arguments_obey_their_schema_without_strict(
    client: openai.OpenAI, tool_choice: Any
) -> None:
    def ask(seed: int) -> tuple[str, list[Any]]:
        params = {"tools": LENIENT, "tool_choice": tool_choice, "parallel_tool_calls": False}
        params |= {"temperature": 1, "seed": seed, "max_tokens": CALL_TOKENS}
        [choice] = chat(client, BOOK, **params).choices
        return choice.finish_reason, choice.message.tool_calls or []

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(NUM_TRIES)))

    calls = [call for reason, calls in answers if reason != "length" for call in calls]
    assert len(calls) >= (1 if tool_choice == "auto" else NUM_TRIES - 3)
    for call in calls:
        assert_arguments_are_valid(call.function.name, call.function.arguments)


@pytest.mark.parametrize("tool_choice", ["required", "auto"])
def test_a_tool_whose_schema_means_nothing_is_refused(
    client: openai.OpenAI, tool_choice: str
) -> None:
    wrong = {"type": "function", "function": {"name": "f", "parameters": {"type": "dict"}}}

    with pytest.raises(openai.BadRequestError):
        chat(client, BOOK, tools=[wrong], tool_choice=tool_choice)


def test_a_marker_in_a_streamed_answer_begins_a_valid_call(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=user("Repeat exactly: <tool_call> is a marker"),
        tools=LENIENT,
        temperature=0,
        max_tokens=CALL_TOKENS,
        stream=True,
    )

    deltas = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or []]
    functions = [call.function for call in deltas if call.function]
    assert_arguments_are_valid(
        "".join(function.name or "" for function in functions),
        "".join(function.arguments or "" for function in functions),
    )


# Responses


def test_a_response_is_made(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL, input=CAPITAL, temperature=0, max_output_tokens=20
    )

    assert (response.status, response.output_text) == (
        "completed",
        "The capital of France is Paris.",
    )


def test_a_response_streams(client: openai.OpenAI) -> None:
    *events, last = client.responses.create(
        model=MODEL, input=CAPITAL, temperature=0, max_output_tokens=20, stream=True
    )

    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "The capital of France is Paris."
    assert events[0].type == "response.created"
    assert last.type == "response.completed"


# Many at once


def test_twenty_requests_at_once_get_each_its_own_answer(client: openai.OpenAI) -> None:
    prompts = [CAPITAL_TEXT, COUNTING, "Once upon a time", "def main():"]
    alone = {c.index: c.text for c in complete(client, prompts).choices}

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        many = list(itertools.islice(itertools.cycle(prompts), 20))
        answers = list(pool.map(lambda prompt: text(complete(client, prompt)), many))

    assert answers == [alone[index % 4] for index in range(20)]
