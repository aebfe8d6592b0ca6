"""Requests at random without a valid key: none may be answered with anything but a 4xx.

    python -m tests.fuzz.strangers --inputs 5000 --seed 1

To every route, and to what is none, with any method, body and headers, and with what may be taken
for a key: none, words, keys that were never made, and real ones with a character changed. The exit
code is 1 if one is answered otherwise, or if memory or descriptors of a process have grown.
"""

import argparse
import http
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import hypothesis
from hypothesis import strategies as st

from cluster.config.routes import EXTRA_ROUTES, ROUTES
from tests.e2e.conftest import MODEL
from tests.e2e.locked import serving_with_keys
from tests.fuzz.__main__ import NUM_AT_ONCE, growth_faults
from tests.fuzz.parameters import VALID, Input, generated, inputs
from tests.processes import AppProcesses

PATHS = [route.path for route in (*ROUTES, *EXTRA_ROUTES) if route.right]
METHODS = [method.value for method in http.HTTPMethod if method is not http.HTTPMethod.CONNECT]
HEADERS = ("authorization", "x-api-key", "Authorization", "proxy-authorization", "cookie")


@st.composite
def strangers(draw: st.DrawFn, key: str) -> Input:
    """A request without the valid `key`."""
    made = draw(st.sampled_from([*VALID]).flatmap(lambda path: inputs(path, MODEL)))
    path = draw(st.sampled_from(PATHS) | st.text("/abc.%2e-_~v1", max_size=20).map("/{}".format))
    place = draw(st.integers(0, len(key) - 1))
    nearly = key[:place] + draw(st.sampled_from("0aZ-_ \t")) + key[place + 1 :]
    other = f"xy-{secrets.token_hex(5)}-{secrets.token_urlsafe(32)}"
    word = draw(st.binary(max_size=60))
    shown = [b"", word, nearly.encode(), other.encode(), key[:-1].encode(), key.upper().encode()]
    scheme = draw(st.sampled_from([b"Bearer ", b"Basic ", b"bearer", b"Bearer  ", b""]))
    value = scheme + draw(st.sampled_from([one for one in shown if one != key.encode()]))
    return replace(
        made,
        method=draw(st.sampled_from(METHODS)),
        path=path.replace("{model_id}", draw(st.sampled_from([MODEL, "", "a/b"]))),
        headers={**made.headers, draw(st.sampled_from(HEADERS)): value},
    )


def drawn(key: str, number: int, seed: int) -> list[Input]:
    """So many of them."""
    found: list[Input] = []

    @generated(number, seed)
    @hypothesis.given(given=strangers(key))
    def collect(given: Input) -> None:
        found.append(given)

    collect()
    return found


def status_of(client: httpx.Client, given: Input) -> tuple[Input, int | str]:
    """The status of the answer, or why there is none; 0 for what cannot be sent."""
    headers = [(name.encode(), value) for name, value in given.headers.items()]
    try:
        answer = client.request(given.method, given.path, content=given.body, headers=headers)
    except (httpx.LocalProtocolError, httpx.InvalidURL):
        return given, 0
    except httpx.HTTPError as error:
        return given, repr(error)
    return given, answer.status_code


def faults_of(url: str, key: str, number: int, seed: int) -> Iterator[str]:
    """Send so many, and say what was answered otherwise than by a refusal."""
    statuses: Counter[int | str] = Counter()
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        for given, status in pool.map(partial(status_of, client), drawn(key, number, seed)):
            statuses[status] += 1
            if isinstance(status, str) or (status and not 400 <= status < 500):
                yield f"{status}: {given}"
    print(f"answers by status: {dict(statuses)}")


def main() -> None:
    """Send them to a server of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.strangers", description=__doc__)
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving_with_keys(Path(folder)) as locked:
        key = locked.add("acme")
        locked.wait_for_status(key, 200)
        url, half = locked.server.url, options.inputs // 2
        processes = AppProcesses(httpx.URL(url).port or 80)
        faults = [*faults_of(url, key, half, options.seed)]
        warm = processes.usage()
        faults += faults_of(url, key, options.inputs - half, options.seed + 1)
        faults += growth_faults(warm, processes.usage())
    print(*faults, sep="\n")
    print(f"{options.inputs} inputs, {len(faults)} faults")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
