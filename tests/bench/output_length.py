"""How well output lengths are predicted on real traces, against what is known without learning.

    python -m tests.bench.output_length --json output_length.json

Each request of a trace is predicted when it arrives, and learned from when it has ended, at
`--tpot` seconds a token. `max_tokens`, which the traces do not say, is 4096, or the length of the
output where that is longer; `global mean` is the mean of all requests that have ended by then.
ServeGen's clients are tenants; other traces have one tenant. The first `WARM_UP` requests are not
counted: nothing is known yet. What ends first is short: after a start, long outputs are learned
last, and the sooner the trace is over, the more so.

An error is the mean of |ln(predicted / real)|: 0.69 is a factor of two. `mean` and `median` are
those of the learned lengths. `bias` is that of the sum of the means, `coverage` the share of the
requests that are not longer than `high`, and `high/real` the tokens that would be kept free by it
over those that were needed. `remaining` is the error of the tokens still to come of a request that
has given half of its tokens.

Keys of the summary: `TRACE_gain` is the error of the better of the two baselines over that of
`median`; `predict_us` and `observe_us` are medians of the time of one call.
"""

import heapq
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from scheduler.output_length import OutputLengths
from scheduler.simulation.arrivals import Arrival, first_requests, with_max_tokens
from scheduler.simulation.traces import read_trace
from tests.bench.report import make_parser, publish, say_row
from tests.workload import find_trace, has_traces

TRACES = {
    "azure_2023_conv": None,
    "azure_2023_code": None,
    "mooncake_conversation": None,
    "mooncake_synthetic": None,
    "servegen_m_small_arrivals": 5.0,
    "servegen_m_mid_day1_arrivals": 5.0,
    "servegen_deepseek_r1_arrivals": 5.0,
}
"""Traces, with the requests per second of those that have no times."""
MAX_TOKENS = 4096
WARM_UP = 100


def read(trace: str, count: int) -> list[Arrival]:
    """The first requests of a trace, with limits and tenants."""
    rate_rps = TRACES[trace]
    duration_s = 600.0 if rate_rps is None else 1.5 * count / rate_rps
    found = read_trace(find_trace(trace), rate_rps=rate_rps, duration_s=duration_s)
    found = with_max_tokens(first_requests(found, count), MAX_TOKENS)
    return [replace(a, request=replace(a.request, tenant=tenant_of(a))) for a in found]


def tenant_of(arrival: Arrival) -> str:
    """The client of a request of ServeGen; empty for other traces."""
    return arrival.request.request_id.partition("-client-")[2]


def in_order(arrivals: list[Arrival], tpot_s: float) -> Iterator[tuple[bool, Arrival]]:
    """Each request twice, in order of time: when it arrives, and (True) when it has ended."""
    running: list[tuple[float, int]] = []
    for index, arrival in enumerate(arrivals):
        while running and running[0][0] <= arrival.arrival_s:
            yield True, arrivals[heapq.heappop(running)[1]]
        yield False, arrival
        ended_s = arrival.arrival_s + tpot_s * arrival.num_output_tokens
        heapq.heappush(running, (ended_s, index))


def log_error(predicted: list[float], real: list[float]) -> float:
    """The mean of |ln(predicted / real)|."""
    return statistics.mean(abs(math.log(p / r)) for p, r in zip(predicted, real, strict=True))


def evaluate(arrivals: list[Arrival], tpot_s: float, times: dict[str, list[float]]) -> Any:
    """The figures of one trace."""
    lengths = OutputLengths()
    real: list[float] = []
    predicted: dict[str, list[float]] = {}
    remaining: list[float] = []
    num_seen, num_tokens = 0, 0

    def timed(call: str, work: Callable[..., Any], *values: Any) -> Any:
        began_s = time.perf_counter()
        result = work(*values)
        times.setdefault(call, []).append(time.perf_counter() - began_s)
        return result

    for ended, arrival in in_order(arrivals, tpot_s):
        request, num_output = arrival.request, arrival.num_output_tokens
        if ended:
            timed("observe", lengths.observe, request, num_output)
            num_seen += 1
            num_tokens += num_output
            continue
        if num_seen < WARM_UP:
            continue
        length = timed("predict", lengths.predict, request)
        real.append(num_output)
        for name, value in (
            ("max_tokens", request.max_tokens),
            ("global mean", num_tokens / num_seen),
            ("mean", length.mean),
            ("median", length.median),
            ("high", length.high),
        ):
            predicted.setdefault(name, []).append(value)
        if half := num_output // 2:
            rest = lengths.remaining(request, half)
            remaining.append(abs(math.log(rest / (num_output - half))))
    high = predicted.pop("high")
    return {
        "requests": len(real),
        "kinds": len(lengths),
        **{name: log_error(values, real) for name, values in predicted.items()},
        "bias": sum(predicted["mean"]) / sum(real) - 1,
        "coverage": statistics.mean(r <= math.ceil(h) for r, h in zip(real, high, strict=True)),
        "high/real": sum(high) / sum(real),
        "remaining": statistics.mean(remaining),
    }


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--requests", type=int, default=12_000, help="of each trace, at most")
    parser.add_argument("--tpot", type=float, default=0.03)
    options = parser.parse_args()
    if not has_traces():
        raise SystemExit("needs the traces; see tests/README.md, Data")
    times: dict[str, list[float]] = {}
    rows = []
    for trace in TRACES:
        figures = evaluate(read(trace, options.requests), options.tpot, times)
        rows.append({"trace": trace.removesuffix("_arrivals"), **figures})
        say_row(rows[-1])
    summary = {
        f"{row['trace']}_gain": min(row["max_tokens"], row["global mean"]) / row["median"]
        for row in rows
    } | {f"{call}_us": 1e6 * statistics.median(took) for call, took in times.items()}
    publish("Error of predicted output lengths", rows, summary, options.json)


if __name__ == "__main__":
    main()
