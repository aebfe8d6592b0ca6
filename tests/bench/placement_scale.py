"""The GlobalScheduler at the size of a large cluster: time of a placement, whatever it asks.

    python -m tests.bench.placement_scale --json placement_scale.json

A thousand workers have a million different blocks, as in `prefix_index`, each a queue of prompts
and some that decode. Requests are placed one after another by `GlobalScheduler.place`, called in
this process, on one core: half are of sessions, a quarter of prompts that all workers have, a
quarter new. Between them the workers report, as many for each placement as they would if each
reported every `--report-interval` seconds while `--rate` requests come in a second: what they still
have, what has ended, what has changed in their caches. Keys of the summary: `placements_per_s` and
`p99_ms` of `place` alone, `reports_per_s` and `report_p99_ms` of `report`, `busy_share`, the part
of a core that both take at that rate, and `memory_mb` of the GlobalScheduler with its index.
"""

import asyncio
import os
import random
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import psutil

from cluster.placement.global_scheduler import GlobalScheduler
from scheduler.placement import Placed
from scheduler.prefill_queue import PrefillCost, QueuedPrefill, QueueReport
from scheduler.prefix_index import PrefixDelta, pack
from scheduler.request import Request, Slo
from tests.bench.prefix_index import FORMAT, MIXED, NUM_BLOCKS_OF_PROMPT, Cluster, make_cluster
from tests.bench.report import make_parser, publish, say
from workers.reports import WorkerReport

BLOCK = 32
COST = PrefillCost(token_s=1e-4, pair_s=1e-9)
NUM_DECODES = 64
NUM_QUEUED = 6
"""Prompts on a worker that have no token yet, on average."""
SLO = Slo(ttft_s=2.0, tpot_s=0.1)
SWEPT_BLOCKS = 64
"""Blocks that a report brings, and takes."""


@dataclass(slots=True)
class SimpleWorker:
    """What one worker says of itself."""

    worker_id: str
    seq: int = 1
    queued: deque[tuple[str, int]] = field(default_factory=deque)
    """Request and its prompt tokens."""
    decoding: deque[str] = field(default_factory=deque)
    brought: bytes = b""

    def report(self, draw: random.Random) -> WorkerReport:
        """Some prompts are done, and some requests."""
        finished = []
        while len(self.queued) > NUM_QUEUED:
            self.decoding.append(self.queued.popleft()[0])
        while len(self.decoding) > NUM_DECODES:
            finished.append(self.decoding.popleft())
        stored = pack(draw.getrandbits(64) for _ in range(SWEPT_BLOCKS))
        self.seq += 1
        delta = PrefixDelta("1", self.seq, FORMAT, stored, self.brought)
        self.brought = stored
        queue = QueueReport(
            {name: QueuedPrefill(num // 2, num, 1.0) for name, num in self.queued},
            COST,
            len(self.decoding),
            0.03,
            0.1,
            100_000,
            400_000,
        )
        outstanding = dict.fromkeys([name for name, _ in self.queued], 1000)
        outstanding |= dict.fromkeys(self.decoding, 300)
        return WorkerReport(
            self.worker_id,
            outstanding,
            dict.fromkeys(finished, 100),
            False,
            prefix=delta,
            queue=queue,
        )


async def fill(scheduler: GlobalScheduler, cluster: Cluster) -> dict[str, SimpleWorker]:
    """Have all workers report for the first time; the index is the cluster's."""
    scheduler._fleet.index = cluster.index
    workers = {worker_id: SimpleWorker(worker_id) for worker_id in cluster.workers}
    for worker in workers.values():
        worker.decoding.extend(f"{worker.worker_id} {n}" for n in range(NUM_DECODES))
        worker.queued.extend((f"{worker.worker_id} p{n}", 2000) for n in range(NUM_QUEUED))
    return workers


async def run(cluster: Cluster, options: Any, draw: random.Random) -> dict[str, list[float]]:
    """Seconds of each placement and of each report."""
    scheduler = GlobalScheduler(max_num_seqs=256)
    workers = await fill(scheduler, cluster)
    for worker in workers.values():
        await scheduler.report(worker.report(draw))
    kinds = [(kind, length) for kind in MIXED for length in NUM_BLOCKS_OF_PROMPT]
    order = deque(cluster.workers)
    due, reports_per_placement = 0.0, len(workers) / options.report_interval / options.rate
    times: dict[str, list[float]] = {"place": [], "report": []}
    for number in range(options.requests):
        prompt = draw.choice(cluster.prompts[draw.choice(kinds)])
        request = Request(
            f"request-{number:08}-0123456789abcdef",
            len(prompt) // 8 * BLOCK + 1,
            300,
            slo=SLO,
            block_hashes=prompt,
            prefix_format=FORMAT,
        )
        began_s = time.perf_counter()
        answer = await scheduler.place(request, cluster.workers)
        times["place"].append(time.perf_counter() - began_s)
        assert isinstance(answer, Placed)
        workers[answer.worker_id].queued.append((request.request_id, request.num_prompt_tokens))
        due += reports_per_placement
        while due >= 1:
            due -= 1
            order.rotate(1)
            report = workers[order[0]].report(draw)
            began_s = time.perf_counter()
            await scheduler.report(report)
            times["report"].append(time.perf_counter() - began_s)
    return times


def figures(times: list[float]) -> dict[str, Any]:
    """Milliseconds, and calls per second."""
    return {
        "median ms": 1e3 * statistics.median(times),
        "p99 ms": 1e3 * statistics.quantiles(times, n=100)[98],
        "longest ms": 1e3 * max(times),
        "per s": len(times) / sum(times),
    }


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="different blocks")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=500.0, help="requests per second")
    parser.add_argument("--report-interval", type=float, default=1.0, help="seconds")
    options = parser.parse_args()
    draw = random.Random(0)
    before = psutil.Process(os.getpid()).memory_info().rss
    cluster = make_cluster(options.workers, options.blocks, draw)
    say(f"{cluster.index.num_blocks} different blocks on {options.workers} workers")
    times = asyncio.run(run(cluster, options, draw))
    memory = psutil.Process(os.getpid()).memory_info().rss - before
    placed, reported = figures(times["place"]), figures(times["report"])
    lasting_s = options.requests / options.rate
    summary = {
        "placements_per_s": placed["per s"],
        "p99_ms": placed["p99 ms"],
        "reports_per_s": reported["per s"],
        "report_p99_ms": reported["p99 ms"],
        "busy_share": sum(times["place"] + times["report"]) / lasting_s,
        "memory_mb": memory / 2**20,
        "index_mb": cluster.index.num_bytes / 2**20,
    }
    rows = [{"call": "place"} | placed, {"call": "report"} | reported]
    publish("Placement at the size of a large cluster, one core", rows, summary, options.json)


if __name__ == "__main__":
    main()
