"""The cost of the cluster path: tokens/s by HTTP and by client handle against the bare engine.

    python -m tests.bench.overhead --json overhead.json

One worker serves through the whole cluster; vLLM's own in-process engine runs on the same cores
with the same engine arguments. Contestants take turns in one run, on the same prompts, each
first checked to produce the same tokens. Keys of the summary: `http_cN` and `handle_cN` are
shares of the bare engine's output tokens/s at concurrency N (medians over the rounds),
`added_ms_c1` is the time that HTTP adds to a token at concurrency 1, in the mean.
"""

import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import openai
import ray
from ray import serve

from cluster.app import build_app
from cluster.client import XYServe
from cluster.config.app_config import AppConfig, parse_args
from cluster.models.model import resolve_model
from tests.bench.answers import token_ids
from tests.bench.report import make_parser, publish, say_row
from tests.workload import questions

ROUTE = "http://127.0.0.1:{port}/v1"
TURN = ("bare", "http", "handle")


def bare_engine(pipe: Connection, cores: list[int], model: str, config: AppConfig) -> None:
    """Run vLLM's engine on `cores`: receives prompts, sends (seconds, token ids)."""
    os.sched_setaffinity(0, cores)
    os.environ.update(config.worker.env)
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    from workers.engine.vllm_engine import engine_args

    engine = LLMEngine.from_engine_args(engine_args(model, config.worker))
    while (work := pipe.recv()) is not None:
        prompts, max_tokens = work
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        tokens: dict[str, list[int]] = {}
        began_s = time.perf_counter()
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), prompt, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    tokens[output.request_id] = list(output.outputs[0].token_ids)  # type: ignore[index]
        pipe.send((time.perf_counter() - began_s, [tokens[str(i)] for i in range(len(prompts))]))


@contextmanager
def running_app(args: dict[str, Any], port: int) -> Iterator[XYServe]:
    """The app on a Ray cluster of its own."""
    with tempfile.TemporaryDirectory(prefix="xyb") as folder:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_app(args), name="xyserve")
        handle = XYServe.connect()
        try:
            yield handle
        finally:
            handle.close()
            serve.shutdown()
            ray.shutdown()


async def by_http(
    client: openai.AsyncOpenAI, model: str, prompts: list[str], max_tokens: int
) -> tuple[float, list[list[int]]]:
    """Stream all prompts at once by HTTP."""

    async def one(prompt: str) -> list[int]:
        stream = await client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        return [t async for chunk in stream for c in chunk.choices for t in token_ids(c)]

    began_s = time.perf_counter()
    tokens = await asyncio.gather(*(one(prompt) for prompt in prompts))
    return time.perf_counter() - began_s, tokens


async def by_handle(
    handle: XYServe, prompts: list[str], max_tokens: int
) -> tuple[float, list[list[int]]]:
    """Stream all prompts at once by the client handle."""

    async def one(prompt: str) -> list[int]:
        stream = handle.stream_async(
            prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True, return_token_ids=True
        )
        return [t async for chunk in stream for c in chunk.choices for t in token_ids(c)]

    began_s = time.perf_counter()
    tokens = await asyncio.gather(*(one(prompt) for prompt in prompts))
    return time.perf_counter() - began_s, list(tokens)


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--cpus", type=int, default=1, help="cores of the engine")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--port", type=int, default=8123)
    options = parser.parse_args()
    args = {
        "worker": {
            "cpus": options.cpus,
            "engine": {"dtype": "float32", "max_num_seqs": 32, "enable_prefix_caching": False},
        }
    }
    config = parse_args(args)
    model = resolve_model(config.model)
    rows = []
    with running_app(args, options.port) as handle:
        cores = list(handle.status().workers[0].cpus)
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        engine = multiprocessing.get_context("spawn").Process(
            target=bare_engine, args=(theirs, cores, model, config), daemon=True
        )
        engine.start()

        async def run(contestant: str, prompts: list[str]) -> tuple[float, list[list[int]]]:
            if contestant == "bare":
                ours.send((prompts, options.max_tokens))
                return await asyncio.to_thread(ours.recv)
            if contestant == "http":
                async with openai.AsyncOpenAI(
                    base_url=ROUTE.format(port=options.port), api_key="none"
                ) as client:
                    return await by_http(client, config.model_name, prompts, options.max_tokens)
            return await by_handle(handle, prompts, options.max_tokens)

        for concurrency in options.concurrency:
            prompts = questions(concurrency)
            results = {c: asyncio.run(run(c, prompts)) for c in TURN}
            for contestant in TURN[1:]:
                if results[contestant][1] != results["bare"][1]:
                    raise SystemExit(f"{contestant} and the bare engine differ in their tokens")
            times: dict[str, list[float]] = {c: [] for c in TURN}
            for index in range(options.rounds):
                for contestant in TURN[index % 3 :] + TURN[: index % 3]:
                    times[contestant].append(asyncio.run(run(contestant, prompts))[0])
            num_tokens = concurrency * options.max_tokens
            median = {c: statistics.median(times[c]) for c in TURN}
            rows.append(
                {"concurrency": concurrency}
                | {f"{c} tok/s": num_tokens / median[c] for c in TURN}
                | {
                    f"{c} share": statistics.median(
                        bare / own for bare, own in zip(times["bare"], times[c], strict=True)
                    )
                    for c in TURN[1:]
                }
                | {f"{c} ms/token": 1000 * median[c] / options.max_tokens for c in TURN}
            )
            say_row(rows[-1])
        ours.send(None)
        engine.join()
    summary = {f"{c}_c{r['concurrency']}": r[f"{c} share"] for c in TURN[1:] for r in rows}
    if alone := [row for row in rows if row["concurrency"] == 1]:
        summary["added_ms_c1"] = alone[0]["http ms/token"] - alone[0]["bare ms/token"]
    publish(
        f"Cluster path against the bare engine, {options.cpus} core(s)", rows, summary, options.json
    )


if __name__ == "__main__":
    main()
