"""What one costly grammar costs everybody else: the streams beside it, memory, and what is left.

    python -m tests.bench.grammars --url http://127.0.0.1:8000 --json grammars.json

Streams run on an app on this machine, for example by `make serve`. Request after request then asks
for a grammar, and its client leaves if there is no answer in time. `answer` is the status, or that
the client left, after `seconds`. `slower` is the time between two tokens of the streams meanwhile,
relative to that of the quiet seconds just before: the worst stream's, and of all. `memory` is the
growth of workers and their processes, in MB, some seconds later, and `left` their processes that
compile then.
"""

import asyncio
import statistics
import time
from collections.abc import Iterator
from typing import Any

import openai
import psutil

from tests.bench.memory import MB, SETTLE_S, replicas
from tests.bench.report import make_parser, publish, say_row

TEXT = {"type": "string"}
MANY = "(abc|def)?"


def closed(**properties: Any) -> dict[str, Any]:
    """The schema of an object with these properties."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and structured output of each request."""
    yield "a small schema", {"json": closed(city=TEXT, population={"type": "integer"})}
    for count in (200, 2000):
        yield f"regex {MANY} {count} times", {"regex": MANY * count}
    yield "regex (a{1,1000}){1,1000}", {"regex": "(a{1,1000}){1,1000}"}
    yield "regex ((a*)*)*", {"regex": "((a*)*)*"}
    for count in (2000, 20_000):
        yield f"{count:,} choices", {"choice": [f"choice {n} of many" for n in range(count)]}
    yield "a choice of 100 kB", {"choice": ["x y" * 33_333]}
    for count in (100, 2000):
        yield f"{count:,} properties", {"json": closed(**{f"p{n}": TEXT for n in range(count)})}
    yield "maxLength 1,000,000,000", {"json": TEXT | {"maxLength": 10**9}}
    yield "minItems 1,000,000", {"json": {"type": "array", "items": TEXT, "minItems": 10**6}}
    yield f"pattern {MANY} 2000 times", {"json": TEXT | {"pattern": MANY * 2000}}
    yield "a grammar with left recursion", {"grammar": 'root ::= root "a" | "a"'}


class Streams:
    """Streams without an end, and the times between their tokens."""

    def __init__(self, client: openai.AsyncOpenAI, model: str, count: int) -> None:
        self._client = client
        self._model = model
        self._gaps: list[list[float]] = [[] for _ in range(count)]
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(count)]

    def take(self) -> list[float]:
        """Mean seconds between two tokens of each stream since the last call."""
        means = [statistics.fmean(gaps) for gaps in self._gaps if gaps]
        for gaps in self._gaps:
            gaps.clear()
        return means

    def stop(self) -> None:
        """End them; the error of one that broke is raised."""
        for task in self._tasks:
            if task.done():
                task.result()
            task.cancel()

    async def _run(self, number: int) -> None:
        while True:
            last_s = None
            async for _ in await self._client.completions.create(
                model=self._model,
                prompt=f"Story {number}:",
                max_tokens=1500,
                temperature=1,
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                now_s = time.perf_counter()
                if last_s is not None:
                    self._gaps[number].append(now_s - last_s)
                last_s = now_s


async def ask(
    client: openai.AsyncOpenAI, model: str, outputs: dict[str, Any], patience_s: float
) -> str:
    """The status of the answer to a request for such output, or that the client left."""
    try:
        await client.completions.create(
            model=model,
            prompt="Answer:",
            max_tokens=8,
            temperature=0,
            timeout=patience_s,
            extra_body={"structured_outputs": outputs},
        )
    except openai.APITimeoutError:
        return "client left"
    except openai.APIStatusError as error:
        return str(error.status_code)
    return "200"


def below(workers: list[psutil.Process]) -> tuple[float, int]:
    """Memory in MB of workers and the processes below them, and the number of compilations."""
    children = [child for worker in workers for child in worker.children()]
    forks = [fork for child in children for fork in child.children()]
    total = sum(process.memory_info().rss for process in (*workers, *children, *forks))
    return total / MB, len(forks)


async def measure(options: Any) -> list[dict[str, Any]]:
    """A row for each case."""
    workers = replicas(int(options.url.rsplit(":", 1)[1].strip("/")))["worker"]
    rows = []
    async with openai.AsyncOpenAI(
        base_url=f"{options.url}/v1", api_key="none", max_retries=0, timeout=600
    ) as client:
        [model] = [card.id async for card in client.models.list()]
        await ask(client, model, {"json": closed(first=TEXT)}, 60)  # starts what is started late
        streams = Streams(client, model, options.streams)
        await asyncio.sleep(options.quiet)
        for name, outputs in cases():
            streams.take()
            await asyncio.sleep(options.quiet)
            memory, _ = below(workers)
            quiet = streams.take()
            began_s = time.perf_counter()
            answer = await ask(client, model, outputs, options.patience)
            seconds = time.perf_counter() - began_s
            await asyncio.sleep(max(0.0, 1.0 - seconds))  # too few tokens say nothing
            meanwhile = streams.take()
            await asyncio.sleep(SETTLE_S)
            after, left = below(workers)
            rows.append(
                {
                    "grammar": name,
                    "answer": answer,
                    "seconds": seconds,
                    "slower, worst": max(
                        now / before for now, before in zip(meanwhile, quiet, strict=True)
                    ),
                    "slower, all": statistics.fmean(meanwhile) / statistics.fmean(quiet),
                    "memory": after - memory,
                    "left": left,
                }
            )
            say_row(rows[-1])
        streams.stop()
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the app's address")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--quiet", type=float, default=5.0, help="quiet seconds before a case")
    parser.add_argument("--patience", type=float, default=8.0, help="seconds of a client")
    options = parser.parse_args()
    rows = asyncio.run(measure(options))
    summary = {
        "worst_of_all": max(row["slower, all"] for row in rows),
        "left": sum(row["left"] for row in rows),
    }
    publish("One costly grammar, and everybody else", rows, summary, options.json)


if __name__ == "__main__":
    main()
