"""What keys and quotas cost: calls of the HTTP API with both against the same app with neither.

    python -m tests.bench.keys --json keys.json

Both apps are whole front ends in this process, over workers that answer at once, so that nothing
else takes time. In each round they take turns, one after the other and back, so that it does not
matter who was first; each call is checked to give as many tokens. The one with keys finds the
caller's among 1,000 and keeps account of three quotas of its tenant; the other lets everybody in
and looks at nothing. Keys of the summary: `added_ms` of a call and `added_us_token` of a token of a
streamed answer, as the median over the rounds.
"""

import asyncio
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from starlette.types import Scope
from vllm.v1.engine import FinishReason

from cluster.config.app_config import parse_args
from cluster.config.auth import AuthConfig
from cluster.ingress.auth import TRUSTED, Caller, Doorkeeper
from cluster.keys import Keyring, Right, edited_keys, new_key
from tests.bench.report import make_parser, publish
from tests.cluster.ingress.answering_workers import Server, Step, serving

NUM_KEYS = 1000
NUM_TOKENS = 400
"""Tokens of a streamed answer."""
QUARTILES = ("q1_ms", "median_ms", "q3_ms")
TENANT = {"requests_per_minute": 10**7, "tokens_per_minute": 10**10, "max_concurrency": 1000}


class OpenDoor(Doorkeeper):
    """Lets everybody in."""

    def admit(self, scope: Scope) -> Caller:
        """The caller, of whom nothing is asked."""
        return TRUSTED


def make_keys(path: Path) -> str:
    """A file of many keys; one of them."""
    with edited_keys(path) as keys:
        for _ in range(NUM_KEYS):
            text, key = new_key("acme", (Right.INFER,), None)
            keys[key.id] = key
    return text


async def call(server: Server, key: str, stream: bool) -> tuple[float, int]:
    """Seconds of a call, and the number of tokens that it gave."""
    body: dict[str, Any] = {"prompt": "Hello", "max_tokens": NUM_TOKENS, "ignore_eos": True}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    headers = {"authorization": f"Bearer {key}"}
    began_s = time.perf_counter()
    answer = await server.http.post("/v1/completions", json=body, headers=headers)
    took_s = time.perf_counter() - began_s
    assert answer.status_code == httpx.codes.OK, answer.text
    *_, num_tokens = re.findall(r'"completion_tokens":(\d+)', answer.text)
    return took_s, int(num_tokens)


async def measure(rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds by which keys make each call longer, plain and streamed."""
    key = make_keys(folder / "keys")
    base = {"worker": {"kernels": "vllm"}}
    locked = {"auth": {"keys_file": str(folder / "keys")}, "tenants": {"acme": TENANT}}
    added: dict[str, list[float]] = {"call": [], "stream": []}
    async with (
        serving(parse_args(base), doorkeeper=OpenDoor(AuthConfig(), ())) as without,
        serving(parse_args(base | locked), Keyring(folder / "keys")) as with_keys,
    ):
        for kind, num_tokens in (("call", 1), ("stream", NUM_TOKENS)):
            steps: list[Step] = [([28], None)] * (num_tokens - 1)
            steps.append(([28], FinishReason.LENGTH))
            for server in (without, with_keys):
                server.workers.play(steps)
            for _ in range(rounds):
                turns = (without, with_keys, with_keys, without)
                calls = [await call(server, key, kind == "stream") for server in turns]
                assert [num for _, num in calls] == [num_tokens] * len(turns)
                took = [seconds for seconds, _ in calls]
                added[kind].append((took[1] + took[2] - took[0] - took[3]) / 2)
    return added


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        added = asyncio.run(measure(options.rounds, Path(folder)))
    quartiles = {kind: statistics.quantiles(values, n=4) for kind, values in added.items()}
    rows = [
        {"added": kind} | {name: s * 1e3 for name, s in zip(QUARTILES, values, strict=True)}
        for kind, values in quartiles.items()
    ]
    summary = {
        "added_ms": quartiles["call"][1] * 1e3,
        "added_us_token": (quartiles["stream"][1] - quartiles["call"][1]) / NUM_TOKENS * 1e6,
    }
    publish("keys and quotas: time added to a call", rows, summary, options.json)


if __name__ == "__main__":
    main()
