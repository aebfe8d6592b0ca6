"""The memory that one request takes in the ingress and in a worker, and whether it comes back.

    python -m tests.bench.memory --url http://127.0.0.1:8000 --json memory.json

Sends one large request after another to an app that runs on this machine, for example by `make
serve`, and watches the resident memory of its ingresses and workers. The first requests, which are
not shown, let every process reach its usual size. `peak` and `after` are the growth of the process
that grew most, in MB: while the request ran, and some seconds after it. `answer` is the status.
"""

import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil

from tests.bench.report import make_parser, publish, say_row

MB = 1 << 20
SAMPLE_S = 0.02
SETTLE_S = 4.0
"""Time that a process has to give memory back after a request."""
TIMEOUT_S = 600.0
ROLES = {"ingress": "Ingress", "worker": "Worker"}
WORD = " time"
"""One token of the default model."""


def replicas(port: int) -> dict[str, list[psutil.Process]]:
    """The ingresses and workers on the node whose proxy listens at a port, as Ray titles them."""
    proxies = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and getattr(connection.laddr, "port", 0) == port
    }
    found: dict[str, list[psutil.Process]] = {role: [] for role in ROLES}
    for proxy in proxies - {None}:
        raylet = psutil.Process(proxy).parent()
        for process in raylet.children() if raylet else ():
            for role, deployment in ROLES.items():
                title = " ".join(process.cmdline())
                if re.match(rf"ray::ServeReplica:\w+:{deployment}\b", title):
                    found[role].append(process)
    if not all(found.values()):
        raise SystemExit(f"no app of XY-Serve that listens at port {port} runs on this machine")
    return found


class Watch:
    """The resident memory of all replicas, sampled in a thread."""

    def __init__(self, watched: dict[str, list[psutil.Process]]) -> None:
        self._watched = watched
        self._before = self._rss()
        self._peak = self._before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def figures(self) -> dict[str, float]:
        """Growth in MB: at the peak until now, and after some seconds more."""
        self._stop.set()
        self._thread.join()
        time.sleep(SETTLE_S)
        after = self._rss()
        return {
            f"{role} {name}": max(
                0.0, *(b - a for a, b in zip(self._before[role], now[role], strict=True))
            )
            / MB
            for role in ROLES
            for name, now in (("peak", self._peak), ("after", after))
        }

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            now = self._rss()
            self._peak = {role: [*map(max, self._peak[role], now[role])] for role in ROLES}

    def _rss(self) -> dict[str, list[int]]:
        return {
            role: [process.memory_info().rss for process in found]
            for role, found in self._watched.items()
        }


def requests(model: str, megabytes: int, tokens: int) -> Iterator[tuple[str, str, Any]]:
    """Name, route and body (an object, or bytes) of each request."""
    size = megabytes * 1_000_000
    long, words = WORD * tokens, "a b c d " * (size // 8)
    completion = {"model": model, "prompt": "Once", "max_tokens": 1, "temperature": 0}
    hello = [{"role": "user", "content": "Hello"}]
    chat = {"model": model, "messages": hello, "max_completion_tokens": 1}
    one, many = "/v1/completions", "/v1/chat/completions"
    yield f"{tokens:,} tokens", one, completion | {"prompt": long}
    yield (
        f"{tokens:,} tokens, prompt_logprobs 20",
        one,
        completion | {"prompt": long, "prompt_logprobs": 20},
    )
    yield (
        f"{tokens:,} tokens, echo, logprobs 20",
        one,
        completion | {"prompt": long, "echo": True, "logprobs": 20},
    )
    yield (
        f"chat, {tokens:,} tokens, prompt_logprobs 20",
        many,
        chat | {"messages": [{"role": "user", "content": long}], "prompt_logprobs": 20},
    )
    yield (
        "n=128 of 200 tokens, logprobs 20",
        one,
        completion
        | {"n": 128, "max_tokens": 200, "logprobs": 20, "ignore_eos": True, "temperature": 1},
    )
    yield (
        f"{tokens:,} tokens, n=16, prompt_logprobs 20",
        one,
        completion | {"prompt": long, "n": 16, "temperature": 1, "prompt_logprobs": 20},
    )
    yield (
        "beam search, 128 beams, 30 tokens",
        one,
        completion | {"use_beam_search": True, "n": 128, "max_tokens": 30},
    )
    yield "2,000 prompts", one, completion | {"prompt": ["Once"] * 2000}
    yield (
        "1,000 prompts, n=128",
        one,
        completion | {"prompt": ["Once"] * 1000, "n": 128, "temperature": 1},
    )
    yield f"prompt of {megabytes} MB", one, completion | {"prompt": words}
    yield f"prompt of {megabytes} MB without spaces", one, completion | {"prompt": "x" * size}
    yield f"token ids, {megabytes} MB", one, completion | {"prompt": [1000] * (size // 6)}
    yield (
        f"one message of {megabytes} MB",
        many,
        chat | {"messages": [{"role": "user", "content": words}]},
    )
    yield f"messages, {megabytes} MB", many, chat | {"messages": hello * (size // 40)}
    yield (
        f"text parts, {megabytes} MB",
        many,
        chat
        | {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}] * (size // 30)}
            ]
        },
    )
    yield (f"responses, {megabytes} MB", "/v1/responses", {"model": model, "input": words})
    yield (
        f"messages API, {megabytes} MB",
        "/v1/messages",
        {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": words}]},
    )
    yield (f"tokenize, {megabytes} MB", "/tokenize", {"model": model, "prompt": words})
    yield (
        f"detokenize, {megabytes} MB",
        "/detokenize",
        {"model": model, "tokens": [1000] * (size // 6)},
    )
    yield f"an unknown field of {megabytes} MB", many, chat | {"extra": [[0]] * (size // 6)}
    yield "JSON of 100,000 levels", many, b'{"model":"m","messages":' + b"[" * 100_000
    yield "tool schema of 10,000 levels", many, chat | {"tools": [tool("deep", nested(400))]}
    yield "1,000 tools", many, chat | {"tools": [tool(f"tool_{n}", NO_ARGS) for n in range(1000)]}
    yield "100,000 stop strings", one, completion | {"stop": [f"s{n}" for n in range(100_000)]}
    yield "100,000 stop_token_ids", one, completion | {"stop_token_ids": [5] * 100_000}
    yield (
        "logit_bias of 49,000 tokens",
        one,
        completion | {"logit_bias": {str(n): 1 for n in range(49_000)}},
    )
    yield "100,000 allowed_token_ids", one, completion | {"allowed_token_ids": [5] * 100_000}
    yield "100,000 bad_words", one, completion | {"bad_words": [f"b{n}" for n in range(100_000)]}
    yield (
        f"image of {megabytes} MB",
        many,
        chat | {"messages": [{"role": "user", "content": [image("A" * size)]}]},
    )


NO_ARGS = {"type": "object", "properties": {}}


def tool(name: str, parameters: Any) -> dict[str, Any]:
    """A tool of the model."""
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def nested(levels: int) -> dict[str, Any]:
    """A schema within a schema."""
    schema: dict[str, Any] = NO_ARGS
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def image(data: str) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the app")
    parser.add_argument("--megabytes", type=int, default=8, help="size of the large bodies")
    parser.add_argument("--tokens", type=int, default=8000, help="length of the long prompt")
    parser.add_argument("--only", default="", help="only requests with this in their name")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with httpx.Client(base_url=options.url, timeout=TIMEOUT_S) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        _warm_up(client, model)
        watched = replicas(client.base_url.port or 80)
        for name, route, body in requests(model, options.megabytes, options.tokens):
            if options.only in name:
                rows.append({"request": name} | _measured(client, watched, route, body))
                say_row(rows[-1])
    worst = {
        key: max(row[key] for row in rows) for key in rows[0] if key.endswith(("peak", "after"))
    }
    publish("Memory of one request, MB", rows, worst, options.json)


def _warm_up(client: httpx.Client, model: str) -> None:
    for _ in range(3):
        body = {"model": model, "prompt": WORD * 500, "max_tokens": 20, "prompt_logprobs": 1}
        client.post("/v1/completions", json=body).raise_for_status()


def _measured(
    client: httpx.Client, watched: dict[str, list[psutil.Process]], route: str, body: Any
) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    watch, began_s, answered = Watch(watched), time.monotonic(), "none"
    try:
        answer = client.post(route, content=content, headers={"content-type": "application/json"})
        answered = str(answer.status_code)
        if answer.status_code != 200:
            answered += " " + answer.text[:160]
    except httpx.HTTPError as error:
        answered = repr(error)
    seconds = time.monotonic() - began_s
    return {"answer": answered, "seconds": seconds} | watch.figures()


if __name__ == "__main__":
    main()
