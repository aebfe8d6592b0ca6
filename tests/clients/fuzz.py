"""Requests at random to every route of the API, whole and streamed, valid and not.

Schemathesis makes them from the server's own OpenAPI schema: bodies, queries and headers that it
allows and that it does not, and, for routes that need more to get past the first check, a few such
fields put into a valid body. Meanwhile other clients stream an answer that is known.

  python -m tests.clients.fuzz                             2,000 requests, to a server of its own
  python -m tests.clients.fuzz --url http://127.0.0.1:8000 --requests 300 --only /v1/responses

The exit code is 1 if a request is answered with a 5xx or has its connection cut, if a stream does
not end as its API says, or if the server, its replicas or the other streams are not as before. Each
such request is printed as it was sent.
"""

import argparse
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import hypothesis
import requests
import schemathesis
from hypothesis import strategies as st

from tests.clients.run import Target, own_server

TIMEOUT_S = 300
NUM_AT_ONCE = 8
NUM_OTHERS = 2
WITHOUT_BODY = 10
"""Requests of each kind to a route that takes no body."""
HELLO = [{"role": "user", "content": "Hello"}]
BOUNDED = {"best_of", "max_completion_tokens", "max_output_tokens", "max_tokens", "min_tokens", "n"}
MOST = 2
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": MOST},
    "/v1/completions": {"prompt": "Hello", "max_tokens": MOST},
    "/v1/messages": {"messages": HELLO, "max_tokens": MOST},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/v1/responses": {"input": "Hello", "max_output_tokens": MOST},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [5]},
}
"""Bodies, without the model, that random fields are put into."""
LAST_EVENTS = {
    "/v1/responses": ("response.completed", "response.incomplete", "response.failed", "error"),
    "/v1/messages": ("message_stop", "error"),
}
"""How the streams of a path end; those of others with [DONE]."""


@dataclass(frozen=True)
class Fault:
    """A request and what is wrong with its answer."""

    case: schemathesis.Case[Any]
    what: str

    def __str__(self) -> str:
        body = self.case.body
        sent = json.dumps(body, default=repr) if isinstance(body, (dict, list)) else repr(body)
        request = f"{self.case.method} {self.case.formatted_path} {self.case.query or ''} {sent}"
        return f"{request}\n    {self.what}"


class Others:
    """Clients that stream one known answer again and again while the requests come in."""

    def __init__(self, url: str, model: str) -> None:
        self._url = f"{url}/v1/completions"
        self._body = {"model": model, "prompt": "One, two, three,", "temperature": 0}
        self._body |= {"max_tokens": 30, "stream": True}
        self._known = self._stream()
        self._done = threading.Event()
        self.num_streams = 0
        self.faults: list[str] = []

    @contextmanager
    def streaming(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._repeat) for _ in range(NUM_OTHERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._done.set()
            for thread in threads:
                thread.join()

    def _repeat(self) -> None:
        while not self._done.is_set():
            try:
                answer = self._stream()
            except (httpx.HTTPError, KeyError, ValueError) as error:
                self.faults.append(f"another client's stream broke: {error!r}")
            else:
                if answer != self._known:
                    self.faults.append(f"another client got {answer!r}, not {self._known!r}")
            self.num_streams += 1

    def _stream(self) -> str:
        text = ""
        with httpx.stream("POST", self._url, json=self._body, timeout=TIMEOUT_S) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return text
                if line:
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        raise ValueError(f"it ended without [DONE] after {text!r}")


def make_cases(url: str, model: str, paths: Sequence[str], number: int, seed: int) -> Iterator[Any]:
    """Requests to these paths, about as many to each: valid and not, streamed and whole."""
    schema = schemathesis.openapi.from_dict(few_fields(httpx.get(f"{url}/openapi.json").json()))
    schema.config.update(base_url=url)
    chosen = [path for path in schema if not paths or path in paths]
    operations = [schema[path][method] for path in chosen for method in schema[path]]
    kinds = [(each, mode) for each in operations for mode in schemathesis.GenerationMode]
    share = -(-number // sum(bool(operation.body) for operation, _ in kinds))
    for operation, mode in kinds:
        valid = {"model": model} | VALID[operation.path] if operation.path in VALID else None
        few = min(share, WITHOUT_BODY)
        yield from _cases(operation, mode, valid, share if operation.body else few, seed)


def few_fields(document: dict[str, Any]) -> dict[str, Any]:
    """The API's schema, but of the bodies with a valid one only some fields, which are put in."""
    schemas = document["components"]["schemas"]
    for path in VALID.keys() & document["paths"].keys():
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for reference in body["schema"].get("anyOf", [body["schema"]]):
            request = schemas[reference["$ref"].rpartition("/")[2]]
            request |= {"required": [], "additionalProperties": False}
            request |= {"minProperties": 1, "maxProperties": 3}
    return document


def _cases(
    operation: Any,
    mode: schemathesis.GenerationMode,
    valid: dict[str, Any] | None,
    number: int,
    seed: int,
) -> list[Any]:
    """Requests to one route; where a valid body is known most have it, with other fields."""
    found = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=number,
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    def collect(case: Any, data: st.DataObject) -> None:
        if isinstance(case.body, dict):
            fixed = valid | {"stream": data.draw(st.booleans())} if valid else {"max_tokens": MOST}
            case.body = bounded(fixed | case.body)
        found.append(case)

    with suppress(hypothesis.errors.Unsatisfiable):  # a route without parameters has no wrong ones
        collect()
    return found


def bounded(body: dict[str, Any]) -> dict[str, Any]:
    """Of few tokens, where it would be many: that is legal, but takes its time."""
    few = {key: MOST if body[key] is None else body[key] for key in BOUNDED & body.keys()}
    few = {key: min(value, MOST) for key, value in few.items() if isinstance(value, int)}
    return body | few


def fault_of(case: Any) -> Fault | None:
    """Send one request and look at the whole answer."""
    try:
        answer = case.call(timeout=TIMEOUT_S)
    except requests.RequestException as error:
        return Fault(case, f"no answer, or one that was cut: {error!r}")
    text = answer.content.decode(errors="replace")
    if answer.status_code >= 500:
        return Fault(case, f"{answer.status_code}: {text[:300]}")
    is_stream = any("event-stream" in kind for kind in answer.headers.get("content-type", ()))
    if is_stream and not _is_ended(case.operation.path, text):
        return Fault(case, f"a stream without its end: {text[-300:]!r}")
    return None


def _is_ended(path: str, text: str) -> bool:
    *_, last = ["", *(part for part in text.split("\n\n") if part.strip())]
    if path in LAST_EVENTS:
        return last.startswith(tuple(f"event: {name}\n" for name in LAST_EVENTS[path]))
    return last.strip() == "data: [DONE]"


def main() -> None:
    """Send the requests and say what was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.clients.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=2000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another one makes other requests")
    parser.add_argument("--only", nargs="+", default=(), metavar="PATH", help="only these paths")
    parser.add_argument("--url", help="a running server; without it one is started")
    options = parser.parse_args()

    with nullcontext(Target(options.url)) if options.url else own_server() as target:
        model = target.env["XYSERVE_MODEL"]
        others = Others(target.url, model)
        cases = make_cases(target.url, model, options.only, options.requests, options.seed)
        found = []
        with others.streaming(), ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            for fault in pool.map(fault_of, cases):
                found.append(fault)
                if fault:
                    print(fault, flush=True)
        faults = [*filter(None, found), *others.faults, *target.faults()]
    print(*faults, sep="\n")
    print(f"{len(found)} requests, {others.num_streams} streams beside, {len(faults)} faults")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
