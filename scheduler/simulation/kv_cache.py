"""The KV cache of one simulated worker, counted in blocks, with the prefixes it remembers."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


class KvCacheFull(Exception):
    """More blocks were asked for than are free or can be freed."""


@dataclass(slots=True)
class Holding:
    """What one request holds of the cache."""

    keys: Sequence[int] = ()
    """Of each whole entry of its prompt the id, which stands for all tokens up to its end."""
    entry_tokens: int = 0
    """Tokens of one entry; a multiple of the block size."""
    num_own_blocks: int = 0
    """Blocks that nobody else can use."""
    shared: list[int] = field(default_factory=list)
    """Keys of the entries that it holds together with others, or that others may come to hold."""
    num_noted: int = 0
    """Leading keys whose entries were computed or hit."""


@dataclass(slots=True)
class _Entry:
    num_blocks: int
    num_holders: int = 1


class KvCache:
    """Counts blocks; entries of prefixes that nobody holds are kept until their room is needed.

    An entry is as many blocks as make up whole hash blocks of the trace. It can be hit as soon as
    the step that computes it is over. The entry that was let go first is evicted first, of one
    request the last of its prompt.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_evictions = 0
        self._num_unused = num_blocks
        self._num_idle = 0
        """Blocks of entries that nobody holds."""
        self._entries: dict[int, _Entry] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that are unused or can be."""
        return self._num_unused + self._num_idle

    def holding(
        self, hash_ids: Sequence[int], hash_block_size: int, num_prompt_tokens: int
    ) -> Holding:
        """An empty holding for a prompt whose hash blocks of so many tokens have these ids."""
        if not hash_ids or not hash_block_size:
            return Holding()
        entry_tokens = math.lcm(hash_block_size, self.block_size)
        stride = entry_tokens // hash_block_size
        keys = hash_ids[stride - 1 :: stride][: num_prompt_tokens // entry_tokens]
        return Holding(keys, entry_tokens)

    def num_hit_tokens(self, holding: Holding, num_tokens: int) -> int:
        """Leading tokens of the prompt that are in the cache; one of `num_tokens` is left over."""
        if not holding.keys:
            return 0
        most = (num_tokens - 1) // holding.entry_tokens
        num_hits = 0
        for key in holding.keys[:most]:
            if key not in self._entries:
                break
            num_hits += 1
        return num_hits * holding.entry_tokens

    def take_hits(self, holding: Holding, num_tokens: int) -> None:
        """Hold the first `num_tokens` tokens, which were found by `num_hit_tokens`."""
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
        """Add blocks, for which idle entries are evicted; fewer than none gives some back.

        KvCacheFull if there are not so many.
        """
        while self._num_unused < num_blocks:
            if not self._idle:
                raise KvCacheFull(f"{num_blocks} blocks asked for, {self._num_unused} free")
            key, _ = self._idle.popitem(last=False)
            evicted = self._entries.pop(key).num_blocks
            self._num_idle -= evicted
            self._num_unused += evicted
            self.num_evictions += 1
        self._num_unused -= num_blocks
        holding.num_own_blocks += num_blocks

    def publish(self, holding: Holding, num_computed_tokens: int) -> None:
        """Let others hit the entries that lie within the first `num_computed_tokens` tokens."""
        if holding.num_noted == len(holding.keys):
            return
        num_whole = num_computed_tokens // holding.entry_tokens
        num_blocks = holding.entry_tokens // self.block_size
        for key in holding.keys[holding.num_noted : num_whole]:
            # What another has computed meanwhile stays twice, as in vLLM.
            if key not in self._entries:
                self._entries[key] = _Entry(num_blocks)
                holding.num_own_blocks -= num_blocks
                holding.shared.append(key)
        holding.num_noted = max(holding.num_noted, min(num_whole, len(holding.keys)))

    def release(self, holding: Holding) -> None:
        """Give all back; what can be hit stays until its room is needed."""
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

    def num_shared_blocks(self, holding: Holding) -> int:
        """Blocks of the holding that would not get free with it, because others hold them too."""
        entries = (self._entries[key] for key in holding.shared)
        return sum(entry.num_blocks for entry in entries if entry.num_holders > 1)
