"""What telling of the prefix cache costs an engine: the same steps with cache events and without.

    python -m tests.bench.prefix_events --json prefix_events.json

The default model on one core with our kernels, and with so few blocks that each prompt evicts those
of another. In each round the same prompts are prefilled and decoded with events and without, each
first in turn; the tokens must be the same. With events the engine also tells what has changed every
0.25 s, as in a report. Figures are of processor time: other processes do not count. Then vLLM's
block pool alone stores and evicts blocks, with our log behind it and without events. Keys of the
summary: `cost` is the share of an engine's time, mean over the rounds, and `error` its standard
error; `added_us_N` the time that a block of N tokens adds when it is stored and evicted.
"""

import os
import statistics
import time
from types import SimpleNamespace
from typing import Any

from cluster.models.default_model import DEFAULT_MODEL
from cluster.models.model import resolve_model
from tests.bench.report import make_parser, publish, say, say_row
from tests.workers.planned_engine import Job, add_job
from workers.config import EngineConfig, WorkerConfig

NUM_PROMPTS, PROMPT_LEN, MAX_TOKENS = 6, 512, 48
REPORT_S = 0.25
POOL_BLOCKS, POOL_ROUNDS = 64, 200
BLOCK_SIZES = (16, 32, 128)


def prompts(round_: int) -> list[list[int]]:
    """The prompts of one round; none is in the cache."""
    return [
        [
            1000 + (round_ * 7919 + number * 104_729 + place * place * 31) % 40_000
            for place in range(PROMPT_LEN)
        ]
        for number in range(NUM_PROMPTS)
    ]


def turn(engine: Any, round_: int, told: bool) -> tuple[float, list[list[int]]]:
    """Processor seconds of a round's prompts, and their tokens."""
    pool = engine.core.scheduler.kv_cache_manager.block_pool
    assert engine.core.reset_prefix_cache()
    engine.take_prefix()
    pool.enable_kv_cache_events = told
    names = [f"{round_}-{told}-{number}" for number in range(NUM_PROMPTS)]
    began_s, reported_s = time.process_time(), time.monotonic()
    for name, prompt in zip(names, prompts(round_), strict=True):
        add_job(engine, name, Job(prompt, max_tokens=MAX_TOKENS))
    requests = [engine.core.scheduler.requests[name] for name in names]
    while engine.has_requests():
        engine.step()
        if told and (engine.prefix_is_due() or time.monotonic() - reported_s >= REPORT_S):
            reported_s = time.monotonic()
            engine.take_prefix()
    took_s = time.process_time() - began_s
    pool.enable_kv_cache_events = True
    return took_s, [list(request.output_token_ids) for request in requests]


def pool_us(block_size: int, told: bool) -> float:
    """Microseconds in which vLLM's pool stores a block in place of another."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    from workers.engine.vllm_prefix import PrefixLog

    init_none_hash(sha256)
    hasher = get_request_block_hasher(block_size, sha256)
    pool = BlockPool(POOL_BLOCKS + 1, True, block_size, enable_kv_cache_events=told)
    manager = SimpleNamespace(
        block_pool=pool,
        take_events=pool.take_events,
        kv_cache_event_metadata=(("full_attention", None),),
    )
    scheduler = SimpleNamespace(
        kv_cache_manager=manager,
        hash_block_size=block_size,
        kv_event_publisher=SimpleNamespace(publish=lambda events: None),
    )
    config = SimpleNamespace(
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256"),
        model_config=SimpleNamespace(model="model", revision=None),
    )
    core: Any = SimpleNamespace(scheduler=scheduler, vllm_config=config)
    log = PrefixLog(core) if told else None
    took_s = 0.0
    for number in range(POOL_ROUNDS):
        ids = [number * 100_003 + place for place in range(POOL_BLOCKS * block_size)]
        params = SamplingParams(max_tokens=1)
        request = Request(str(number), ids, params, None, block_hasher=hasher)
        began_s = time.process_time()
        blocks = pool.get_new_blocks(POOL_BLOCKS)
        pool.cache_full_blocks(request, blocks, 0, POOL_BLOCKS, block_size, 0)
        if log:
            assert log.take().num_hashes in (POOL_BLOCKS, 2 * POOL_BLOCKS)
        took_s += time.process_time() - began_s
        pool.free_blocks(blocks)
    return took_s / POOL_ROUNDS / POOL_BLOCKS * 1e6


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--block-size", type=int, default=32)
    options = parser.parse_args()
    config = WorkerConfig(
        calibrate_at_start=False,
        engine=EngineConfig(
            dtype="float32",
            max_num_seqs=NUM_PROMPTS,
            max_model_len=1024,
            kv_cache_gib=0.2,
            block_size=options.block_size,
        ),
    )
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    os.environ.update(config.env)
    from workers.profiling.vllm_calibrated_engine import make_engine

    engine: Any = make_engine(resolve_model(DEFAULT_MODEL), config, None)
    turn(engine, 0, told=True)
    costs, rows = [], []
    for round_ in range(1, options.rounds + 1):
        order = (True, False) if round_ % 2 else (False, True)
        ran = {told: turn(engine, round_, told) for told in order}
        if ran[True][1] != ran[False][1]:
            raise SystemExit("the tokens differ")
        costs.append(1 - ran[False][0] / ran[True][0])
        say(f"round {round_}: {ran[True][0]:.3f} s with, {ran[False][0]:.3f} s without")
    summary: dict[str, float | bool] = {
        "cost": statistics.mean(costs),
        "median_cost": statistics.median(costs),
        "error": statistics.stdev(costs) / len(costs) ** 0.5,
    }
    for size in BLOCK_SIZES:
        times = {
            told: statistics.median(pool_us(size, told) for _ in range(5)) for told in (False, True)
        }
        rows.append({"block size": size, "without us": times[False], "with us": times[True]})
        summary[f"added_us_{size}"] = times[True] - times[False]
        say_row(rows[-1])
    publish("Storing and evicting a block, with events and without", rows, summary, options.json)


if __name__ == "__main__":
    main()
