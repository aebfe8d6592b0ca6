"""What an engine tells of its prefix cache against what the cache has: real engines, tiny model."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from scheduler.policy import StepPolicy
from scheduler.prefix_index import PrefixDelta, PrefixIndex, pack, unpack
from scheduler.request import Request
from tests.workers.engine_process import EngineProcesses
from tests.workers.planned_engine import CLIENT, write_tokenizer
from tests.workers.tiny_models import MAX_MODEL_LEN, VOCAB_SIZE, write_checkpoint
from workers.config import EngineConfig, WorkerConfig
from workers.engine_request import EngineRequest

BLOCK = 32
BLOCK_BYTES = 2 * 2 * 2 * 32 * BLOCK * 4
"""Layers, keys and values, heads, size of a head, tokens, bytes."""
CONFIG = WorkerConfig(
    calibrate_at_start=False,
    kv_cache_format="float32",  # as many blocks on every CPU
    engine=EngineConfig(
        dtype="float32",
        max_num_seqs=6,
        max_num_batched_tokens=96,
        max_model_len=MAX_MODEL_LEN,
        kv_cache_gib=24 * BLOCK_BYTES / 2**30,
        block_size=BLOCK,
    ),
)
"""So few blocks that requests are preempted and cached blocks evicted."""


def make_prompts(draw: random.Random, num: int) -> list[list[int]]:
    """Prompts of which many begin alike, and many are a whole number of blocks."""
    stem = [draw.randrange(3, VOCAB_SIZE) for _ in range(6 * BLOCK)]
    return [
        [
            *stem[: BLOCK * draw.randrange(5)],
            *(draw.randrange(3, VOCAB_SIZE) for _ in range(draw.choice((0, 1, 20, BLOCK, 70)))),
        ]
        or stem[:BLOCK]
        for _ in range(num)
    ]


def core_request(name: str, prompt: Sequence[int], max_tokens: int, **others: Any) -> Any:
    """A request in vLLM's form."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    sampling = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "detokenize": False}
    return EngineCoreRequest(
        **{
            "request_id": name,
            "prompt_token_ids": list(prompt),
            "mm_features": None,
            "sampling_params": SamplingParams(**sampling | others.pop("sampling", {})),
            "pooling_params": None,
            "arrival_time": 0.0,
            "lora_request": None,
            "cache_salt": None,
            "data_parallel_rank": None,
        }
        | others
    )


def add(engine: Any, request: Any) -> None:
    """Add a request as it comes to a worker: decoded."""
    num_tokens = len(request.prompt_token_ids)
    ours = Request(request.request_id, num_tokens, request.sampling_params.max_tokens)
    engine.add_request(EngineRequest(ours, engine._encode(request)), CLIENT)


def cached(engine: Any) -> dict[int, int]:
    """Number of copies of each block in vLLM's prefix cache."""
    blocks = engine.core.scheduler.kv_cache_manager.block_pool.blocks
    copies: dict[int, int] = {}
    for block in blocks:
        if block.block_hash is not None:
            key = int.from_bytes(block.block_hash[:-4][-8:], "big")
            copies[key] = copies.get(key, 0) + 1
    return copies


def indexed(index: PrefixIndex) -> set[int]:
    """The blocks that the worker has."""
    worker = index._workers.get("w")
    return {
        block
        for table in index._tables
        for block, holders in table.items()
        if worker and holders & worker.bit
    }


@dataclass
class Watched:
    """What was seen while an engine ran."""

    num_steps: int = 0
    num_wrong: int = 0
    """Steps after which the index was not what the cache had."""
    num_removed: int = 0
    most_copies: int = 0
    num_preemptions: int = 0
    num_idle_wrong: int = 0
    snapshot_is_replay: bool = False
    num_snapshots: int = 0


def watch(model: str, config: WorkerConfig, seed: int) -> Watched:
    """Run requests, and compare after each step; then reset the cache of the idle engine."""
    from workers.engine.vllm_engine import VllmEngine

    engine: Any = VllmEngine(model, config)
    draw = random.Random(seed)
    index, seen = PrefixIndex(), Watched()
    joined: PrefixDelta | None = None
    late = PrefixIndex()
    requests: dict[str, Any] = {}

    def compare() -> bool:
        """Take a delta, and compare two indexes: of each delta, and of several joined."""
        nonlocal joined
        delta = engine.take_prefix()
        seen.num_removed += len(delta.removed) // 8
        seen.num_snapshots += delta.snapshot
        expected = cached(engine)
        seen.most_copies = max([seen.most_copies, *expected.values()])
        applied = index.apply("w", delta)
        joined = joined.then(delta) if joined else delta
        if draw.random() < 0.3:
            applied = late.apply("w", joined) and indexed(late) == expected.keys() and applied
            joined = None
        return not (applied and indexed(index) == expected.keys())

    compare()
    prompts = make_prompts(draw, 60)
    while prompts or engine.has_requests():
        while prompts and (draw.random() < 0.5 or not engine.has_requests()):
            name = str(len(prompts))
            add(engine, core_request(name, prompts.pop(), draw.choice((1, 8, 40, 90))))
            requests[name] = engine.core.scheduler.requests[name]
        if draw.random() < 0.05 and requests:
            engine.abort_requests([draw.choice(list(requests))])
        engine.step()
        seen.num_steps += 1
        seen.num_wrong += compare()
    seen.num_preemptions = sum(request.num_preemptions for request in requests.values())
    engine.resync_prefix()
    snapshot = engine.take_prefix()
    replayed = indexed(index)
    seen.snapshot_is_replay = snapshot.snapshot and set(unpack(snapshot.stored)) == replayed
    index.apply("w", snapshot)
    joined = joined.then(snapshot) if joined else snapshot
    assert engine.core.reset_prefix_cache()
    for _ in range(2):  # no step in between
        seen.num_idle_wrong += compare()
    add(engine, core_request("after", [5] * 70, 1))
    engine.step()
    seen.num_idle_wrong += compare() or len(indexed(index)) != 2
    return seen


@pytest.mark.parametrize("policy", ["hybrid", "vllm"])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_index_is_the_cache_after_every_step(
    processes: EngineProcesses, tiny_llama: Path, policy: Any, seed: int
) -> None:
    config = replace(CONFIG, step_policy=StepPolicy(name=policy))

    seen: Watched = processes.call(watch, str(tiny_llama), config, seed)

    assert (seen.num_wrong, seen.num_idle_wrong, seen.snapshot_is_replay) == (0, 0, True)
    assert seen.num_snapshots == 2  # the first, and after the reset
    assert seen.num_removed > 20
    assert seen.most_copies > 1
    assert seen.num_preemptions > 0


def hash_in_both(model: str, config: WorkerConfig) -> dict[str, tuple[list[int], set[int]]]:
    """Hashes by an ingress, and what events tell after the request was scheduled, by its kind."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.request import LoRARequest

    from cluster.ingress.vllm_prefix import PrefixHashes
    from workers.engine.vllm_engine import VllmEngine

    engine: Any = VllmEngine(model, config)
    scheduler = engine.core.scheduler
    scheduler.lora_config = LoRAConfig(max_loras=1)
    hashes = PrefixHashes(engine.core.vllm_config)
    name = "/adapters/one"
    token_ids = list(range(3, 3 + 2 * BLOCK + 1))
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "salt": {"cache_salt": "of a tenant"},
        "lora": {"lora_request": LoRARequest("one", 1, "/adapters/one")},
        "lora of one string": {"lora_request": LoRARequest(name, 2, name)},
        "lora and salt": {"lora_request": LoRARequest("x", 3, "x"), "cache_salt": "x"},
    }
    assert engine.take_prefix().format == hashes.format
    found = {}
    for kind, others in kinds.items():
        request = core_request(kind, token_ids, 1, **others)
        add(engine, request)
        scheduler.schedule()  # no model runs: there are no such adapters
        told = set(unpack(engine.take_prefix().stored))
        found[kind] = list(unpack(hashes.of(request))), told
        engine.abort_requests([kind])
    return found


def test_an_ingress_hashes_prompts_as_the_workers_events_do(
    processes: EngineProcesses, tiny_llama: Path
) -> None:
    found = processes.call(hash_in_both, str(tiny_llama), CONFIG)

    assert {kind: set(ours) for kind, (ours, _) in found.items()} == {
        kind: told for kind, (_, told) in found.items()
    }
    assert all(len(ours) == 2 for ours, _ in found.values())
    assert len({block for ours, _ in found.values() for block in ours}) == 10


def hash_some(model: str, config: WorkerConfig) -> list[int]:
    """How many blocks an ingress hashes of some requests, and of more after it heard a format."""
    import torch

    from cluster.ingress.vllm_prefix import MAX_BLOCKS, PrefixHashes
    from workers.engine.vllm_engine import _vllm_config

    hashes = PrefixHashes(_vllm_config(model, config, None))

    def num(length: int, **others: Any) -> int:
        prompt = None if "prompt_embeds" in others else [7] * length
        request = core_request("r", prompt or [], 1, **others)
        request.prompt_token_ids = prompt
        return len(hashes.of(request)) // 8

    whole = num(96 * BLOCK * 100)
    assert whole == MAX_BLOCKS
    counts = [num(length) for length in (1, BLOCK, BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 1)]
    counts.append(num(100, sampling={"prompt_logprobs": 1}))
    counts.append(num(100, prompt_embeds=torch.zeros(100, 8)))
    algorithm, seed, _, name = hashes.format.split("/", 3)
    for strange in ("", "x", f"{algorithm}/{seed}/16/other", f"{algorithm}/00/16/{name}"):
        hashes.follow(strange)
        counts.append(num(100))
    hashes.follow(f"{algorithm}/{seed}/16/{name}")
    counts.append(num(100))
    assert hashes.format == f"{algorithm}/{seed}/16/{name}"
    return counts


def test_an_ingress_hashes_what_a_cache_can_give_in_blocks_of_the_workers(
    processes: EngineProcesses, tiny_llama: Path
) -> None:
    counts = processes.call(hash_some, str(tiny_llama), CONFIG)

    assert counts == [0, 0, 1, 4, 5, 0, 0, 3, 3, 3, 3, 6]


def look_up(model: str, config: WorkerConfig) -> tuple[int, list[int]]:
    """Prompt tokens found in the cache, and predicted by the index, of the same prompt again."""
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder

    from cluster.ingress.vllm_prefix import PrefixHashes
    from workers.engine.vllm_engine import VllmEngine

    engine: Any = VllmEngine(model, config)
    hashes, index = PrefixHashes(engine.core.vllm_config), PrefixIndex()
    decoder = MsgpackDecoder(EngineCoreOutputs)
    num_cached, predicted = 0, []
    for name in ("first", "again"):
        request = core_request(name, list(range(3, 3 + 4 * BLOCK)), 2)
        found = index.match(hashes.of(request), ["w"], hashes.format)
        predicted.append(BLOCK * found.get("w", 0))
        add(engine, request)
        while engine.has_requests():
            for output in engine.step()[0].values():
                for of_request in decoder.decode(output.frames).outputs:
                    if stats := of_request.prefill_stats:
                        num_cached = stats.num_cached_tokens
        assert index.apply("w", engine.take_prefix())
    return num_cached, predicted


def test_the_index_predicts_what_a_request_finds(
    processes: EngineProcesses, tiny_llama: Path
) -> None:
    assert processes.call(look_up, str(tiny_llama), CONFIG) == (3 * BLOCK, [0, 3 * BLOCK])


def told_by(model: str, config: WorkerConfig) -> tuple[str, bool]:
    """Why an engine tells nothing, and whether it does."""
    from workers.engine.vllm_engine import VllmEngine
    from workers.engine.vllm_prefix import refusal

    engine: Any = VllmEngine(model, config)
    engine.resync_prefix()
    assert not engine.prefix_is_due()
    return refusal(engine.core), engine.take_prefix() is not None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            replace(CONFIG, engine=replace(CONFIG.engine, enable_prefix_caching=False)),
            "prefix caching is off",
        ),
        (replace(CONFIG, prefix_index=False), "kv_events_config switches cache events off"),
    ],
    ids=["no prefix caching", "switched off"],
)
def test_an_engine_that_tells_nothing_says_why(
    processes: EngineProcesses, tiny_llama: Path, config: WorkerConfig, reason: str
) -> None:
    assert processes.call(told_by, str(tiny_llama), config) == (reason, False)


def test_a_model_whose_layers_all_forget_tokens_tells_nothing(
    processes: EngineProcesses, tmp_path: Path
) -> None:
    processes.call(write_checkpoint, "mistral", tmp_path / "mistral")
    processes.call(write_tokenizer, tmp_path / "mistral")

    told = processes.call(told_by, str(tmp_path / "mistral"), CONFIG)

    assert told == ("no group of layers keeps all blocks of a prompt", False)


def test_hashes_travel_as_they_are() -> None:
    assert list(unpack(pack([1, 2**64 - 1]))) == [1, 2**64 - 1]
    assert pack([1]) == bytes(7) + b"\1"
