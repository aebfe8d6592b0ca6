"""The index of prefix caches at the size of a large cluster: time of a query, memory of a block.

    python -m tests.bench.prefix_index --json prefix_index.json

A thousand workers have a million different blocks, on one core: prompts that all workers have,
some to other depths than others, and sessions of which a few workers have all or a part. A query is
what placing a request asks: how much of its prompt each worker has, and then which of all workers
has least to do, what it has counted off. Queries of each kind are drawn at random; `mixed` is half
sessions, a quarter of each hot kind and misses. A report is the delta of a worker, with as many
blocks as 0.25 s of prefill bring; while a worker is forgotten, reports also clear its blocks. Keys
of the summary: `queries_per_s` and `p99_ms` of the mixed queries, `block_bytes`, `report_ms` and
`snapshot_ms` as medians, and `cleared_ms`, the longest report while workers are forgotten.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scheduler.prefix_index import PrefixDelta, PrefixIndex, pack
from tests.bench.report import make_parser, publish, say, say_row

FORMAT = "sha256/0/32/model"
NUM_BLOCKS_OF_PROMPT = (64, 256)
NUM_HOT = 10
"""Prompts that all workers have."""
REPORT_BLOCKS = 64
"""Blocks stored and removed in a report: 2,048 tokens of 32 in a block."""
SNAPSHOT_BLOCKS = 30_000
MIXED = ("session", "session", "hot", "hot, uneven", "miss", "session")


@dataclass(frozen=True, slots=True)
class Cluster:
    """An index, and the prompts in it by kind and number of blocks."""

    index: PrefixIndex
    workers: list[str]
    prompts: dict[tuple[str, int], list[bytes]]
    loads: dict[str, float]


def make_cluster(num_workers: int, num_blocks: int, draw: random.Random) -> Cluster:
    """Fill an index by snapshots, one of each worker."""
    workers = [f"worker-{number:04}" for number in range(num_workers)]
    held: dict[str, list[int]] = {worker: [] for worker in workers}
    prompts: dict[tuple[str, int], list[bytes]] = {}

    def chain(length: int) -> list[int]:
        return [draw.getrandbits(64) for _ in range(length)]

    for length in NUM_BLOCKS_OF_PROMPT:
        hot = [chain(length) for _ in range(NUM_HOT)]
        uneven = [chain(length) for _ in range(NUM_HOT)]
        for worker in workers:
            for prompt in hot:
                held[worker] += prompt
            for prompt in uneven:
                held[worker] += prompt[: draw.randrange(length + 1)]
        prompts["hot", length] = [pack(prompt) for prompt in hot]
        prompts["hot, uneven", length] = [pack(prompt) for prompt in uneven]
        prompts["miss", length] = [pack(chain(length)) for _ in range(1000)]
        prompts["session", length] = []
    rest = num_blocks
    while rest > 0:
        length = draw.choice(NUM_BLOCKS_OF_PROMPT)
        prompt = chain(length)
        owners = draw.sample(workers, draw.choice((1, 1, 1, 2, 3)))
        held[owners[0]] += prompt
        for worker in owners[1:]:
            held[worker] += prompt[: draw.randrange(1, length + 1)]
        prompts["session", length].append(pack(prompt))
        rest -= length
    index = PrefixIndex()
    for worker, blocks in held.items():
        assert index.apply(worker, PrefixDelta("1", 1, FORMAT, pack(blocks), snapshot=True))
    loads = {worker: draw.random() for worker in workers}
    return Cluster(index, workers, prompts, loads)


def choose(cluster: Cluster, prompt: bytes) -> str:
    """The worker with least to do, if it has all that the index says."""
    num_blocks = len(prompt) // 8
    found = cluster.index.match(prompt, cluster.workers, FORMAT)
    loads = cluster.loads
    best, least = "", float("inf")
    for worker in cluster.workers:
        todo = loads[worker] + (num_blocks - found.get(worker, 0)) * 0.01
        if todo < least:
            best, least = worker, todo
    return best


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def figures(times: list[float]) -> dict[str, Any]:
    """Median and 99th percentile in milliseconds, and calls per second."""
    return {
        "median ms": 1e3 * statistics.median(times),
        "p99 ms": 1e3 * statistics.quantiles(times, n=100)[98],
        "longest ms": 1e3 * max(times),
        "per s": len(times) / sum(times),
    }


def measure_queries(cluster: Cluster, num: int, draw: random.Random) -> list[dict[str, Any]]:
    """Figures of each kind of query, and of all mixed."""
    rows = []
    kinds = [[key] for key in cluster.prompts]
    kinds.append([(kind, length) for kind in MIXED for length in NUM_BLOCKS_OF_PROMPT])
    for keys in kinds:
        asked = [draw.choice(cluster.prompts[draw.choice(keys)]) for _ in range(num)]
        matches = [
            timed(lambda one=one: cluster.index.match(one, cluster.workers, FORMAT))  # type: ignore[misc]
            for one in asked
        ]
        times = [timed(lambda one=one: choose(cluster, one)) for one in asked]  # type: ignore[misc]
        name, length = keys[0] if len(keys) == 1 else ("mixed", "64, 256")
        rows.append(
            {"prompt": name, "blocks": length, "match ms": 1e3 * statistics.median(matches)}
            | figures(times)
        )
        say_row(rows[-1])
    return rows


def measure_reports(cluster: Cluster, num: int, draw: random.Random) -> dict[str, float | bool]:
    """Times of reports, of snapshots, and of reports while workers are forgotten."""
    seqs = dict.fromkeys(cluster.workers, 1)
    brought: dict[str, bytes] = {}

    def report(worker: str) -> float:
        stored = pack(draw.getrandbits(64) for _ in range(REPORT_BLOCKS))
        seqs[worker] += 1
        delta = PrefixDelta("1", seqs[worker], FORMAT, stored, brought.get(worker, b""))
        brought[worker] = stored
        return timed(lambda: cluster.index.apply(worker, delta))

    def snapshot(worker: str) -> float:
        blocks = pack(draw.getrandbits(64) for _ in range(SNAPSHOT_BLOCKS))
        seqs[worker] += 1
        delta = PrefixDelta("1", seqs[worker], FORMAT, blocks, snapshot=True)
        return timed(lambda: cluster.index.apply(worker, delta))

    reports = [report(draw.choice(cluster.workers)) for _ in range(num)]
    gone, kept = cluster.workers[:5], cluster.workers[5:]
    snapshots = [snapshot(worker) for worker in kept[:5]]
    forgotten = [timed(lambda one=one: cluster.index.forget(one)) for one in gone]  # type: ignore[misc]
    clearing = [report(draw.choice(kept)) for _ in range(1000)]
    return {
        "report_ms": 1e3 * statistics.median(reports),
        "snapshot_ms": 1e3 * statistics.median(snapshots),
        "forget_ms": 1e3 * max(forgotten),
        "cleared_ms": 1e3 * max(clearing),
    }


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="different blocks")
    parser.add_argument("--queries", type=int, default=5000, help="queries of each kind")
    options = parser.parse_args()
    draw = random.Random(0)
    cluster = make_cluster(options.workers, options.blocks, draw)
    index = cluster.index
    num_held = sum(index.num_blocks_of(worker) for worker in cluster.workers)
    say(f"{index.num_blocks} different blocks, {num_held} with those that several have")
    rows = measure_queries(cluster, options.queries, draw)
    summary: dict[str, float | bool] = {
        "queries_per_s": rows[-1]["per s"],
        "p99_ms": rows[-1]["p99 ms"],
        "num_blocks": index.num_blocks,
        "num_held": num_held,
    }
    summary |= measure_reports(cluster, options.queries, draw)
    summary["block_bytes"] = block_bytes(index)
    publish("The index of prefix caches, one core", rows, summary, options.json)


def block_bytes(index: PrefixIndex) -> float:
    """Memory of a block: tables, hashes, and sets of workers, of which many are one object."""
    tables = index._tables
    sets = {id(holders): holders for table in tables for holders in table.values()}
    parts = (tables, (block for table in tables for block in table), sets.values())
    return sum(sys.getsizeof(one) for part in parts for one in part) / index.num_blocks


if __name__ == "__main__":
    main()
