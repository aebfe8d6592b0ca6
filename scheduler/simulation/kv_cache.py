"""The KV cache of one simulated worker, counted in blocks, with its cached prefixes."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.prefix_index import PrefixDelta, pack


class KvCacheFull(Exception):
    """Too few blocks are free or can be evicted."""


@dataclass(slots=True)
class Holding:
    """The part of the cache that one request holds."""

    keys: Sequence[int] = ()
    """Ids of the whole entries of its prompt; each stands for all tokens up to the entry's end."""
    entry_tokens: int = 0
    """Tokens in an entry; a multiple of the block size."""
    num_own_blocks: int = 0
    """Blocks that no other request can hit."""
    shared: list[int] = field(default_factory=list)
    """Keys of its entries that other requests can hit."""
    num_noted: int = 0
    """Number of leading keys whose entries were computed or hit."""


@dataclass(slots=True)
class _Entry:
    num_blocks: int
    num_holders: int = 1


class KvCache:
    """Counts blocks; entries that no request holds stay cached until their blocks are needed.

    An entry spans the fewest blocks that make up whole hash blocks of the trace. It can be hit as
    soon as the step that computes it is over. Entries are evicted in the order of their release,
    those of one request from the end of its prompt.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_evictions = 0
        self._num_unused = num_blocks
        self._num_idle = 0
        """Blocks of entries that no request holds."""
        self._entries: dict[int, _Entry] = {}
        self._stored: dict[int, None] = {}
        """Entries that have come since the last delta; a key is in one of both at most."""
        self._removed: dict[int, None] = {}
        self._seq = 0
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that are unused or can be evicted."""
        return self._num_unused + self._num_idle

    def entry_tokens(self, hash_block_size: int) -> int:
        """Tokens in an entry, if hashes stand for so many; 0 if there are none."""
        return math.lcm(hash_block_size, self.block_size)

    def holding(
        self, hash_ids: Sequence[int], hash_block_size: int, num_prompt_tokens: int
    ) -> Holding:
        """An empty holding for a prompt with these ids of blocks of `hash_block_size` tokens."""
        if not hash_ids or not hash_block_size:
            return Holding()
        entry_tokens = self.entry_tokens(hash_block_size)
        stride = entry_tokens // hash_block_size
        keys = hash_ids[stride - 1 :: stride][: num_prompt_tokens // entry_tokens]
        return Holding(keys, entry_tokens)

    def num_hit_tokens(self, holding: Holding, num_tokens: int) -> int:
        """Leading cached tokens of the prompt; fewer than `num_tokens`: one has to be computed."""
        if not holding.keys:
            return 0
        max_hits = (num_tokens - 1) // holding.entry_tokens
        num_hits = 0
        for key in holding.keys[:max_hits]:
            if key not in self._entries:
                break
            num_hits += 1
        return num_hits * holding.entry_tokens

    def take_hits(self, holding: Holding, num_tokens: int) -> None:
        """Hold the entries of the first `num_tokens` tokens, as counted by `num_hit_tokens`."""
        if not num_tokens:
            return
        holding.num_noted = num_tokens // holding.entry_tokens
        for key in holding.keys[: holding.num_noted]:
            entry = self._entries[key]
            if entry.num_holders == 0:
                del self._idle[key]
                self._num_idle -= entry.num_blocks
            entry.num_holders += 1
            holding.shared.append(key)

    def grow(self, holding: Holding, num_blocks: int) -> None:
        """Add blocks, evicting idle entries if need be; a negative number gives blocks back.

        KvCacheFull if there are too few.
        """
        while self._num_unused < num_blocks:
            if not self._idle:
                raise KvCacheFull(f"{num_blocks} blocks requested, {self._num_unused} free")
            key, _ = self._idle.popitem(last=False)
            evicted = self._entries.pop(key).num_blocks
            if key in self._stored:
                del self._stored[key]
            else:
                self._removed[key] = None
            self._num_idle -= evicted
            self._num_unused += evicted
            self.num_evictions += 1
        self._num_unused -= num_blocks
        holding.num_own_blocks += num_blocks

    def publish(self, holding: Holding, num_computed_tokens: int) -> None:
        """Let others hit the entries within the first `num_computed_tokens` tokens."""
        if holding.num_noted == len(holding.keys):
            return
        num_whole = num_computed_tokens // holding.entry_tokens
        num_blocks = holding.entry_tokens // self.block_size
        for key in holding.keys[holding.num_noted : num_whole]:
            # An entry that another request computed meanwhile is kept twice, as in vLLM.
            if key not in self._entries:
                self._entries[key] = _Entry(num_blocks)
                if key in self._removed:
                    del self._removed[key]
                else:
                    self._stored[key] = None
                holding.num_own_blocks -= num_blocks
                holding.shared.append(key)
        holding.num_noted = max(holding.num_noted, min(num_whole, len(holding.keys)))

    def release(self, holding: Holding) -> None:
        """Give all blocks back; entries that can be hit stay cached until evicted."""
        self._num_unused += holding.num_own_blocks
        holding.num_own_blocks = 0
        for key in reversed(holding.shared):
            entry = self._entries[key]
            entry.num_holders -= 1
            if entry.num_holders == 0:
                self._idle[key] = None
                self._num_idle += entry.num_blocks
        holding.shared.clear()
        holding.num_noted = 0

    def take_delta(self, format: str) -> PrefixDelta | None:
        """What has changed since the last delta, the first of which is a snapshot; None if nothing
        has."""
        if self._seq and not (self._stored or self._removed):
            return None
        self._seq += 1
        delta = PrefixDelta(
            "", self._seq, format, pack(self._stored), pack(self._removed), self._seq == 1
        )
        self._stored, self._removed = {}, {}
        return delta

    def num_shared_blocks(self, holding: Holding) -> int:
        """Blocks that a release would not free, as other requests hold them too."""
        entries = (self._entries[key] for key in holding.shared)
        return sum(entry.num_blocks for entry in entries if entry.num_holders > 1)
