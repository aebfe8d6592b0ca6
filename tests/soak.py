"""Azure's conversation arrivals for minutes, scaled to the machine: errors, and slopes of memory.

  python -m tests.soak --minutes 20 --json soak.json        a server of its own
  python -m tests.soak --url http://127.0.0.1:8000 --minutes 5

Requests come as in the trace, with its lengths; their rate is so changed that they ask for a share
of what the machine can do (`--load`), which the first ones measure. Every answer must be whole. The
memory of each process of the app is sampled, and its slope is that of the last two thirds of the
run; the first third is for caches to fill. The exit code is 1 if an answer is wrong, a process
ends, or requests are left at the end.
"""

import argparse
import asyncio
import json
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer

from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.traces import read_trace
from tests.bench.report import machine
from tests.clients.run import Target, own_server
from tests.processes import MIB, AppProcesses, Usage
from tests.workload import find_trace, has_traces, prompts_of

TRACE = "azure_2023_conv"
NUM_MEASURED = 8
"""Requests at once that show what the machine can do."""
MAX_PROMPT_LEN, MAX_OUTPUT_LEN = 4000, 400
"""Lengths to which those of the trace are cut: so that they fit the model's context, and end."""
SAMPLE_S = 5.0
TIMEOUT_S = 600.0
FIRST_SHARE = 1 / 3
"""Part of the run that no slope is measured in."""


@dataclass
class Report:
    """What came of a run."""

    minutes: float
    load: float
    machine: dict[str, Any]
    rate_rps: float = 0.0
    num_requests: int = 0
    num_tokens: int = 0
    errors: list[str] = field(default_factory=list)
    ttft_s: dict[str, float] = field(default_factory=dict)
    samples: list[tuple[float, dict[str, Usage]]] = field(default_factory=list)
    """Seconds since the beginning, and what each process held."""


@dataclass(frozen=True)
class Slope:
    """How one process's memory has gone."""

    mib: float
    """Memory at the end."""
    mib_per_hour: float
    error: float
    """Its standard error: the noise of single samples."""
    num_fds: tuple[int, int]
    """Descriptors at the beginning and at the end of what is measured."""


class Soak:
    """A run against one server."""

    def __init__(self, url: str, model: str, tokenizer: Tokenizer, report: Report) -> None:
        self._client = httpx.AsyncClient(
            base_url=url, timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None)
        )
        self._model = model
        self._processes = AppProcesses(httpx.URL(url).port or 80)
        self._report = report
        self._ttfts: list[float] = []
        self._arrivals = read_trace(find_trace(TRACE))
        lengths = [min(one.request.num_prompt_tokens, MAX_PROMPT_LEN) for one in self._arrivals]
        self._prompts = prompts_of(tokenizer, lengths[:2000])

    async def run(self) -> None:
        """Measure, then send the arrivals until the time is up, and wait for the last answers."""
        async with self._client:
            began_s = time.monotonic()
            await asyncio.gather(*(self._ask(number) for number in range(NUM_MEASURED)))
            capacity_rps = NUM_MEASURED / (time.monotonic() - began_s)
            self._report.rate_rps = self._report.load * capacity_rps
            sampling = asyncio.create_task(self._sample())
            await self._send(self._report.minutes * 60)
            sampling.cancel()
        self._report.ttft_s = {
            "p50": statistics.median(self._ttfts),
            "p99": statistics.quantiles(self._ttfts, n=100)[98],
        }

    async def _send(self, seconds: float) -> None:
        arrivals = self._arrivals
        mean_s = (arrivals[-1].arrival_s - arrivals[0].arrival_s) / len(arrivals)
        stretch = 1 / self._report.rate_rps / mean_s
        began_s, asking = time.monotonic(), []
        for number, arrival in enumerate(arrivals[: len(self._prompts)]):
            due_s = began_s + (arrival.arrival_s - arrivals[0].arrival_s) * stretch
            if due_s > began_s + seconds:
                break
            await asyncio.sleep(due_s - time.monotonic())
            asking.append(asyncio.create_task(self._ask(number)))
        await asyncio.gather(*asking)

    async def _ask(self, number: int) -> None:
        arrival: Arrival = self._arrivals[number]
        num_tokens = min(max(arrival.num_output_tokens, 1), MAX_OUTPUT_LEN)
        body = {
            **{"model": self._model, "prompt": self._prompts[number], "temperature": 0},
            **{"max_tokens": num_tokens, "ignore_eos": True, "stream": True},
            "stream_options": {"include_usage": True},
        }
        self._report.num_requests += 1
        usage: dict[str, int] = {}
        began_s, first_s, done = time.monotonic(), 0.0, False
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    first_s = first_s or time.monotonic()
                    done = line == "data: [DONE]"
                    if line and not done:
                        usage = json.loads(line.removeprefix("data: ")).get("usage") or usage
                    if done:
                        break
        except (httpx.HTTPError, ValueError) as error:
            self._report.errors.append(f"request {number}: {error!r}")
            return
        if not done or usage.get("completion_tokens") != num_tokens:
            self._report.errors.append(f"request {number}: {usage}, not {num_tokens} tokens")
        self._report.num_tokens += num_tokens
        self._ttfts.append(first_s - began_s)

    async def _sample(self) -> None:
        began_s = time.monotonic()
        while True:
            usage = await asyncio.to_thread(self._processes.usage)
            self._report.samples.append((time.monotonic() - began_s, usage))
            await asyncio.sleep(SAMPLE_S)


def slopes(samples: list[tuple[float, dict[str, Usage]]]) -> dict[str, Slope]:
    """The slope of each process that lived through the run, by least squares."""
    used = samples[int(len(samples) * FIRST_SHARE) :]
    found = {}
    for name in set.intersection(*(set(usage) for _, usage in used)):
        times = [seconds / 3600 for seconds, _ in used]
        memory = [usage[name].memory_bytes / MIB for _, usage in used]
        slope, start = statistics.linear_regression(times, memory)
        residual = sum(
            (y - start - slope * x) ** 2 for x, y in zip(times, memory, strict=True)
        ) / max(len(used) - 2, 1)
        error = (residual / max(statistics.variance(times) * (len(used) - 1), 1e-12)) ** 0.5
        fds = used[0][1][name].num_fds, used[-1][1][name].num_fds
        found[name] = Slope(memory[-1], slope, error, fds)
    return dict(sorted(found.items()))


def ended(samples: list[tuple[float, dict[str, Usage]]]) -> list[str]:
    """The processes that have not lived through the run."""
    return sorted(set(samples[0][1]) - set(samples[-1][1]))


def main() -> None:
    """Run, and say what each process's memory did."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=20, help="how long (%(default)s)")
    add("--load", type=float, default=0.5, help="share of what the machine can do (%(default)s)")
    add("--url", help="a server that runs on this machine; without it one is started")
    add("--json", type=Path, help="file for the report")
    options = parser.parse_args()
    if not has_traces():
        raise SystemExit("Azure's trace is not there: set XYSERVE_DATA, see tests/README.md, Data")

    report = Report(options.minutes, options.load, machine())
    with nullcontext(Target(options.url)) if options.url else own_server() as target:
        tokenizer = Tokenizer.from_file(f"{target.env['XYSERVE_MODEL_FOLDER']}/tokenizer.json")
        asyncio.run(Soak(target.url, target.env["XYSERVE_MODEL"], tokenizer, report).run())
        report.errors += target.faults()
    report.errors += [f"{name} has ended" for name in ended(report.samples)]
    found = slopes(report.samples)
    print(f"{'process':28} {'MiB':>8} {'MiB/hour':>9} {'+-':>6} {'fds':>6} {'after':>6}")
    for name, slope in found.items():
        before, after = slope.num_fds
        print(
            f"{name:28} {slope.mib:8.1f} {slope.mib_per_hour:9.1f} {slope.error:6.1f} "
            f"{before:6} {after:6}"
        )
    print(*report.errors, sep="\n")
    print(
        f"{report.num_requests} requests, {report.num_tokens} tokens, {report.rate_rps:.2f} per "
        f"second, TTFT p50 {report.ttft_s['p50']:.2f} s, p99 {report.ttft_s['p99']:.2f} s, "
        f"{len(report.errors)} errors"
    )
    if options.json:
        document = asdict(report) | {"slopes": {name: asdict(one) for name, one in found.items()}}
        options.json.write_text(json.dumps(document, indent=1))
    raise SystemExit(bool(report.errors))


if __name__ == "__main__":
    main()
