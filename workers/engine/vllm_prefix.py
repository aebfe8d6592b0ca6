"""What an engine's prefix cache holds, as its cache events tell it."""

import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    EventPublisher,
    KVEventBatch,
)
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, get_block_hash, get_group_id
from vllm.v1.engine.core import EngineCore

from scheduler.prefix_index import HASH_BYTES, PrefixDelta, pack

MAX_CHANGES = 4096
"""Changes after which a report is due before its time."""
KEPT_KINDS = ("full_attention", "mla_attention")
"""Kinds of groups of layers that need all blocks of a prompt, so that a hit is a prefix of it."""


class PrefixLog(EventPublisher):
    """Takes the cache events of an engine, and gives them as deltas.

    An event is about one copy of a block, of which the cache may have several: equal prompts
    compute and store their last block again. What counts is the first copy and the last.
    """

    def __init__(self, core: EngineCore) -> None:
        """Use it if `refusal(core)` is empty."""
        super().__init__()
        scheduler: Any = core.scheduler
        self._manager = scheduler.kv_cache_manager
        self._group = _group_of(self._manager.kv_cache_event_metadata)
        self._medium = self._manager.block_pool.medium
        self._format = prefix_format(core.vllm_config, scheduler.hash_block_size)
        self._incarnation = secrets.token_hex(4)
        self._seq = 0
        self._snapshot_is_due = True
        self._copies: dict[int, int] = {}
        """Number of copies in the cache, by hash."""
        self._stored: dict[int, None] = {}
        """Changes since the last delta, in order; a hash is in one of both at most."""
        self._removed: dict[int, None] = {}
        self._next = scheduler.kv_event_publisher
        scheduler.kv_event_publisher = self

    def publish(self, events: EventBatch) -> None:
        """Take the events of a step."""
        for event in events.events:
            if isinstance(event, AllBlocksCleared):
                self.resync()
            elif event.group_idx == self._group and event.medium == self._medium:
                if isinstance(event, BlockStored):
                    self._store(_as_ints(event.block_hashes))
                elif isinstance(event, BlockRemoved):
                    self._remove(_as_ints(event.block_hashes))
        self._next.publish(events)

    def shutdown(self) -> None:
        """End the publisher that the config asks for."""
        self._next.shutdown()

    def get_publisher_config(self) -> Any:
        """Config of that publisher."""
        return self._next.get_publisher_config()

    @property
    def is_due(self) -> bool:
        """Whether there is so much to tell that a report should not wait."""
        return len(self._stored) + len(self._removed) >= MAX_CHANGES

    def resync(self) -> None:
        """Make the next delta a snapshot."""
        self._snapshot_is_due = True

    def take(self) -> PrefixDelta:
        """What has changed since the last call; without changes it only says that."""
        # vLLM publishes within steps only, and an idle engine makes none.
        if events := self._manager.take_events():
            self.publish(KVEventBatch(ts=time.time(), events=events))
        is_snapshot = self._snapshot_is_due
        if is_snapshot:
            self._copies, self._removed = self._in_cache(), {}
            self._stored = dict.fromkeys(self._copies)
        num_deltas = int(bool(is_snapshot or self._stored or self._removed))
        self._seq += num_deltas
        delta = PrefixDelta(
            self._incarnation,
            self._seq,
            self._format,
            pack(self._stored),
            pack(self._removed),
            is_snapshot,
            num_deltas,
        )
        self._stored, self._removed, self._snapshot_is_due = {}, {}, False
        return delta

    def _store(self, hashes: Sequence[int]) -> None:
        copies, stored, removed = self._copies, self._stored, self._removed
        for block in hashes:
            if num := copies.get(block):
                copies[block] = num + 1
                continue
            copies[block] = 1
            if block in removed:
                del removed[block]
            else:
                stored[block] = None

    def _remove(self, hashes: Sequence[int]) -> None:
        copies, stored, removed = self._copies, self._stored, self._removed
        for block in hashes:
            num = copies.get(block, 0)
            if num > 1:
                copies[block] = num - 1
            elif num:
                del copies[block]
                if block in stored:
                    del stored[block]
                else:
                    removed[block] = None

    def _in_cache(self) -> dict[int, int]:
        """Number of copies of each block in the cache, beginnings of prompts first."""
        cached: dict[BlockHashWithGroupId, Any] = (
            self._manager.block_pool.cached_block_hash_to_block._cache
        )
        return {
            int.from_bytes(get_block_hash(key)[-HASH_BYTES:], "big"): (
                len(blocks) if isinstance(blocks, dict) else 1
            )
            for key, blocks in cached.items()
            if get_group_id(key) == self._group
        }


def refusal(core: EngineCore) -> str:
    """Why nothing can be told of the engine's prefix cache; empty if it can."""
    scheduler: Any = core.scheduler
    manager = scheduler.kv_cache_manager
    if not core.vllm_config.cache_config.enable_prefix_caching:
        return "prefix caching is off"
    if not manager.block_pool.enable_kv_cache_events:
        return "kv_events_config switches cache events off"
    if (group := _group_of(manager.kv_cache_event_metadata)) is None:
        return "no group of layers keeps all blocks of a prompt"
    spec = manager.kv_cache_config.kv_cache_groups[group].kv_cache_spec
    if spec.block_size != scheduler.hash_block_size:
        return (
            f"blocks have {spec.block_size} tokens, and hashes are of {scheduler.hash_block_size}"
        )
    return ""


def prefix_format(vllm_config: VllmConfig, block_size: int) -> str:
    """What hashes of blocks are of, once `init_none_hash` was called in this process.

    The function and its seed, the number of tokens, and the model without its folder, which may
    differ from node to node.
    """
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    seed = kv_cache_utils.NONE_HASH[:HASH_BYTES].hex()
    model = vllm_config.model_config.model
    name = Path(model).name if Path(model).is_absolute() else model
    revision = vllm_config.model_config.revision
    return f"{algorithm}/{seed}/{block_size}/{name}" + (f"@{revision}" if revision else "")


def _group_of(metadata: Sequence[tuple[str, Any]]) -> int | None:
    """The first group of layers whose hits are prefixes; None if there is none."""
    return next((n for n, (kind, _) in enumerate(metadata) if kind in KEPT_KINDS), None)


def _as_ints(hashes: Sequence[Any]) -> Sequence[int]:
    """Hashes of an event, which are bytes if VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES is 0."""
    if hashes and isinstance(hashes[0], bytes):
        return [int.from_bytes(one[-HASH_BYTES:], "big") for one in hashes]
    return hashes
