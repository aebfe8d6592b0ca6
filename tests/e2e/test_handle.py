"""The Python client handle on the running app."""

import asyncio
import dataclasses
import itertools
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pydantic
import pytest
import ray
from openai.types import Completion, CompletionChoice
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage

from cluster.client import XYServe
from cluster.errors import AppNotFound, HandleClosed, RequestFailed
from tests.e2e.conftest import ANSWER_TIMEOUT_S, MODEL, SHADOWS, Server, wait_for_load

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."
COUNTING = "One, two, three,"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
LONG: dict[str, Any] = {"max_tokens": 2000, "ignore_eos": True}


def test_a_chat_gives_the_types_of_the_openai_package(handle: XYServe) -> None:
    answer = handle.chat(CAPITAL, **GREEDY)

    assert isinstance(answer, ChatCompletion)
    assert isinstance(answer.choices[0].message, ChatCompletionMessage)
    assert answer.choices[0].message.content == PARIS
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


@pytest.mark.parametrize("prompt", [COUNTING, [1, 3575, 282, 4649]])
def test_text_and_token_ids_are_continued(handle: XYServe, prompt: str | list[int]) -> None:
    answer = handle.generate(prompt, **GREEDY)

    assert isinstance(answer, Completion)
    assert isinstance(answer.choices[0], CompletionChoice)
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"


def test_streams_give_the_same_answers_piece_by_piece(handle: XYServe) -> None:
    chat = list(handle.stream(CAPITAL, **GREEDY))
    completion = list(handle.stream(COUNTING, **GREEDY))

    assert isinstance(chat[0], ChatCompletionChunk)
    assert isinstance(completion[0], Completion)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chat) == PARIS
    assert (
        "".join(chunk.choices[0].text for chunk in completion)
        == handle.generate(COUNTING, **GREEDY).choices[0].text
    )
    assert 1 < len(completion) <= 12  # by drafts a step may give several tokens


async def test_the_asynchronous_twins_give_the_same_answers(handle: XYServe) -> None:
    chat = await handle.chat_async(CAPITAL, **GREEDY)
    completion = await handle.generate_async(COUNTING, **GREEDY)
    chat_chunks = [chunk async for chunk in handle.stream_async(CAPITAL, **GREEDY)]
    chunks = [chunk async for chunk in handle.stream_async(COUNTING, **GREEDY)]

    assert chat.choices[0].message.content == PARIS
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chat_chunks) == PARIS
    assert "".join(chunk.choices[0].text for chunk in chunks) == completion.choices[0].text


def test_several_choices_come_with_their_logprobs(handle: XYServe) -> None:
    answer = handle.generate("Once", n=2, temperature=1, seed=3, max_tokens=4, logprobs=2)

    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text != answer.choices[1].text
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert "".join(choice.logprobs.tokens or []) == choice.text
        assert len(choice.logprobs.token_logprobs or []) == 4


def test_an_answer_follows_a_json_schema(handle: XYServe) -> None:
    schema = {
        "type": "object",
        "properties": {"capital": {"enum": ["Berlin", "Paris", "Rome"]}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    answer = handle.chat(
        CAPITAL,
        temperature=0,
        max_tokens=30,
        response_format={"type": "json_schema", "json_schema": {"name": "it", "schema": schema}},
    )

    assert json.loads(answer.choices[0].message.content or "") == {"capital": "Paris"}


def test_a_tool_is_called(handle: XYServe) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Berlin", "Paris"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool = {
        "type": "function",
        "function": {"name": "look_up", "strict": True, "parameters": parameters},
    }
    answer = handle.chat(
        CAPITAL, tools=[tool], tool_choice="required", temperature=0, max_tokens=40
    )

    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "look_up",
        {"city": "Paris"},
    )


@pytest.mark.parametrize(
    ("messages", "params", "status", "named"),
    [
        ([], {}, 400, ""),
        (CAPITAL, {"model": "gpt-17"}, 404, "gpt-17"),
        (CAPITAL, {"max_tokens": -1}, 400, "max_tokens"),
        (CAPITAL, {"max_tokens": "many"}, 400, "max_tokens"),
        (CAPITAL, {"n": 10_000}, 400, "10000"),
        (CAPITAL, {"structured_outputs": {"regex": "(("}}, 400, ""),
        (CAPITAL, {"max_tokenz": 3}, 400, "did you mean max_tokens?"),
        (CAPITAL, {"stream": True}, 400, "use the method `stream`"),
        (CAPITAL, {"stream_options": 5}, 400, "Stream options"),
        (CAPITAL, {"response_format": {"type": "json_schema"}}, 400, "json_schema"),
        (CAPITAL, {"timeout_s": "soon"}, 400, "timeout_s"),
        (None, {}, 400, "messages: None is no list of messages"),
        ("text", {}, 400, "messages: 'text' is no list of messages"),
        ([5], {}, 400, "messages"),
    ],
)
def test_what_the_server_refuses_is_raised(
    server: Server,
    handle: XYServe,
    messages: Any,
    params: dict[str, Any],
    status: int,
    named: str,
) -> None:
    crashes = server.tracebacks()

    with pytest.raises(RequestFailed) as raised:
        handle.chat(messages, **params)

    assert raised.value.status == status
    assert named in str(raised.value)
    assert server.tracebacks() == crashes


@pytest.mark.parametrize(
    "prompt", [None, [], 5, [10**6], [-1], [1.5], {"a": 1}, [None], object(), b"\xff", True]
)
async def test_a_prompt_that_is_none_is_refused_by_every_method(
    handle: XYServe, prompt: Any
) -> None:
    async def read() -> None:
        async for _ in handle.stream_async(prompt):
            pass

    for call in (
        lambda: asyncio.to_thread(handle.generate, prompt),
        lambda: asyncio.to_thread(lambda: list(handle.stream(prompt))),
        lambda: handle.generate_async(prompt),
        read,
    ):
        with pytest.raises(RequestFailed) as raised:
            await call()
        assert raised.value.status == 400


class Place(pydantic.BaseModel):
    capital: str
    country: str


@dataclasses.dataclass
class Capital:
    capital: str


@pytest.mark.parametrize("wanted", [Place, Capital])
async def test_an_answer_has_the_type_that_is_asked_for(handle: XYServe, wanted: Any) -> None:
    params: dict[str, Any] = {"temperature": 0, "max_tokens": 60, "response_format": wanted}

    for answer in (handle.chat(CAPITAL, **params), await handle.chat_async(CAPITAL, **params)):
        message: Any = answer.choices[0].message
        assert isinstance(message.parsed, wanted)
        assert json.loads(message.content)["capital"] == message.parsed.capital
    chunks = handle.stream(CAPITAL, **params)
    assert "capital" in json.loads("".join(c.choices[0].delta.content or "" for c in chunks))


def test_an_answer_goes_back_into_the_conversation_as_it_came(handle: XYServe) -> None:
    answer = handle.chat(CAPITAL, **GREEDY).choices[0].message

    again = handle.chat([*CAPITAL, answer, *CAPITAL], **GREEDY)

    assert "Paris" in (again.choices[0].message.content or "")


def test_a_handle_that_is_pickled_connects_again(handle: XYServe) -> None:
    with pickle.loads(pickle.dumps(handle)) as other:
        assert other is not handle
        assert other.chat(CAPITAL, **GREEDY).choices[0].message.content == PARIS

    with pytest.raises(HandleClosed):
        other.status()
    with pytest.raises(HandleClosed):
        pickle.dumps(other)
    assert handle.chat(CAPITAL, **GREEDY).choices[0].message.content == PARIS


def test_a_users_own_tasks_and_actors_find_a_free_cpu_and_use_the_handle(handle: XYServe) -> None:
    def ask(handle: XYServe) -> Any:
        return handle.chat(CAPITAL, **GREEDY).choices[0].message.content

    class Asker:
        def __init__(self, handle: XYServe) -> None:
            self._handle = handle

        def ask(self) -> str:
            chunks = self._handle.stream(CAPITAL, **GREEDY)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    remote: Any = ray.remote(num_cpus=1)
    asker = remote(Asker).remote(handle)
    by_closure = remote(lambda: ask(handle))
    answers = [remote(ask).remote(handle), asker.ask.remote(), by_closure.remote()]
    try:
        assert ray.get(answers, timeout=ANSWER_TIMEOUT_S) == [PARIS] * 3
    finally:
        ray.kill(asker)


def test_a_call_that_takes_too_long_is_ended_and_frees_its_slot(handle: XYServe) -> None:
    with pytest.raises(TimeoutError, match=r"no complete answer within 1\.5 s"):
        handle.generate(COUNTING, timeout_s=1.5, **LONG)
    wait_for_load(handle, num_running=0)

    with pytest.raises(TimeoutError, match=r"no complete answer within 1\.5 s"):
        list(handle.stream(COUNTING, timeout_s=1.5, **LONG))
    wait_for_load(handle, num_running=0)


def test_leaving_a_stream_frees_its_slot(handle: XYServe) -> None:
    stream = handle.stream(COUNTING, **LONG)
    next(stream)
    wait_for_load(handle, num_running=1)

    stream.close()

    wait_for_load(handle, num_running=0)


async def test_cancelling_an_asynchronous_call_frees_its_slot(handle: XYServe) -> None:
    call = asyncio.create_task(handle.generate_async(COUNTING, **LONG))
    await asyncio.to_thread(wait_for_load, handle, num_running=1)

    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.to_thread(wait_for_load, handle, num_running=0)


async def test_many_streams_at_once_get_each_its_own_answer(handle: XYServe) -> None:
    async def read(prompt: str) -> str:
        chunks = handle.stream_async(prompt, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    prompts = [COUNTING, "Once upon a time", "def main():", "The capital of France is"]
    alone = [await read(prompt) for prompt in prompts]

    assert await asyncio.gather(*map(read, prompts * 6)) == alone * 6
    assert len(set(alone)) == 4


def test_two_handles_work_side_by_side(server: Server, handle: XYServe) -> None:
    with XYServe.connect(server.ray_address) as other:
        streams = [handle.stream(COUNTING, **GREEDY), other.stream(COUNTING, **GREEDY)]
        texts = ["", ""]
        for chunks in itertools.zip_longest(*streams):
            for index, chunk in enumerate(chunks):
                texts[index] += chunk.choices[0].text if chunk else ""

    assert texts[0] == texts[1] != ""
    assert handle.chat(CAPITAL, **GREEDY).choices[0].message.content == PARIS


def test_closing_a_handle_ends_its_calls(server: Server, handle: XYServe) -> None:
    other = XYServe.connect(server.ray_address)
    outcome: list[BaseException] = []

    def generate() -> None:
        try:
            other.generate(COUNTING, **LONG)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    wait_for_load(handle, num_running=1)
    other.close()
    thread.join(ANSWER_TIMEOUT_S)

    assert [type(error).__name__ for error in outcome] == ["HandleClosed"]
    wait_for_load(handle, num_running=0)
    with pytest.raises(HandleClosed, match="this handle is closed"):
        other.status()


def test_an_app_that_does_not_run_is_not_found(server: Server, handle: XYServe) -> None:
    with pytest.raises(
        AppNotFound, match=r"no app 'other' on this Ray cluster \(running: xyserve\)"
    ):
        XYServe.connect(server.ray_address, app="other")


def test_any_process_that_reaches_the_cluster_can_connect(server: Server) -> None:
    code = f"""
from cluster.client import XYServe
with XYServe.connect({server.ray_address!r}) as handle:
    for chunk in handle.stream({CAPITAL!r}, **{GREEDY!r}):
        print(chunk.choices[0].delta.content or "", end="")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=ANSWER_TIMEOUT_S
    )

    assert (done.stdout, done.returncode) == (PARIS, 0), done.stderr


@pytest.mark.parametrize("name", SHADOWS[:2])
def test_a_file_of_a_users_with_a_name_of_ours_is_named(
    server: Server, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("")
    script = tmp_path / "script.py"
    script.write_text(f"""
from cluster.client import XYServe
with XYServe.connect({server.ray_address!r}) as handle:
    print(handle.chat({CAPITAL!r}, **{GREEDY!r}).choices[0].message.content)
""")

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *options, str(script)]
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_TIMEOUT_S)

    shadowed = run()
    assert shadowed.returncode == 1
    assert f"finds {tmp_path / name}, which shadows XY-Serve's package" in shadowed.stderr
    assert "run Python with -P" in shadowed.stderr
    assert run("-P").stdout == f"{PARIS}\n"


def test_a_handle_whose_ray_was_shut_down_says_so(server: Server) -> None:
    code = f"""
import ray
from cluster.client import XYServe
from cluster.errors import HandleClosed

def check(handle):
    for call in (handle.status, lambda: handle.chat({CAPITAL!r}), lambda: list(handle.stream("x"))):
        try:
            call()
        except HandleClosed as error:
            print(error)

with XYServe.connect({server.ray_address!r}) as handle:
    handle.status()
    ray.shutdown()
    check(handle)
    assert not ray.is_initialized()
    with XYServe.connect({server.ray_address!r}) as other:
        check(handle)
        other.status()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=ANSWER_TIMEOUT_S
    )

    said = "Ray was shut down in this process; make another handle with `XYServe.connect`\n"
    assert (done.stdout, done.returncode) == (said * 6, 0), done.stderr
