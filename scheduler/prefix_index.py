"""Which worker has which blocks of prompts in its KV cache, as the workers report it."""

import sys
from array import array
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from scheduler.request import Request

MAX_BYTES = 768 << 20
"""Memory of an index; what would exceed it is left out, and counted."""
BLOCK_BYTES = 128
"""Memory of a block but for who has it: key and slot of a table that may just have grown."""
HASH_BYTES = 8
FEW = 8
"""Workers up to which bits are listed one by one."""
NUM_TABLES = 64
"""Tables of blocks, by the last bits of their hashes: no step of growing or clearing one takes
long."""
MIN_SWEPT = 1024
"""Blocks from which a delta clears workers that are gone, and no more than one table beyond."""


@dataclass(frozen=True, slots=True)
class PrefixDelta:
    """What has changed in the prefix cache of one worker.

    A block is known by the last 8 bytes of vLLM's hash of it and all before it, big-endian.
    """

    incarnation: str
    """One life of the engine; its deltas are numbered from 1."""
    seq: int
    format: str
    """What its hashes are of, `function/seed/block size/model`: equal hashes of another format are
    other blocks."""
    stored: bytes
    """Hashes of blocks that it did not have before, one after another."""
    removed: bytes = b""
    """Hashes of blocks that it has no longer."""
    snapshot: bool = False
    """Whether `stored` is all that it has."""
    num_joined: int = 1
    """Deltas that this one stands for; the first was `seq - num_joined + 1`. 0: it has no change,
    and `seq` is that of the delta before."""

    @property
    def num_hashes(self) -> int:
        """Number of hashes in it."""
        return (len(self.stored) + len(self.removed)) // HASH_BYTES

    def settled(self) -> "PrefixDelta":
        """A delta without changes that follows this one: it shows whether this one has arrived."""
        return replace(self, stored=b"", removed=b"", snapshot=False, num_joined=0)

    def then(self, later: "PrefixDelta") -> "PrefixDelta":
        """This delta and the next one, in one; `later` alone if there is another between them."""
        last = later.incarnation, later.seq - later.num_joined
        if later.snapshot or last != (self.incarnation, self.seq):
            return later
        stored, removed = unpack(self.stored), unpack(self.removed)
        stored_later, removed_later = unpack(later.stored), unpack(later.removed)
        return replace(
            later,
            stored=pack([*_without(stored, removed_later), *_without(stored_later, removed)]),
            removed=b""
            if self.snapshot
            else pack([*_without(removed, stored_later), *_without(removed_later, stored)]),
            snapshot=self.snapshot,
            num_joined=self.num_joined + later.num_joined,
        )


def block_size_of(format: str) -> int:
    """Tokens of a block of a format; 0 if it is none."""
    _, _, size, *_ = [*format.split("/", 3), "", "", ""]
    return int(size) if size.isdecimal() else 0


def pack(hashes: Iterable[int]) -> bytes:
    """Hashes as bytes, as they travel."""
    values = array("Q", hashes)
    if sys.byteorder == "little":
        values.byteswap()
    return values.tobytes()


def unpack(packed: bytes) -> "array[int]":
    """The hashes of a run of bytes; ValueError if it is not one."""
    values = array("Q", packed)
    if sys.byteorder == "little":
        values.byteswap()
    return values


def _without(hashes: Iterable[int], others: Iterable[int]) -> list[int]:
    gone = set(others)
    return [block for block in hashes if block not in gone]


@dataclass(slots=True)
class _Worker:
    slot: int
    incarnation: str
    seq: int
    format: str
    num_blocks: int = 0
    num_left_out: int = 0
    """Blocks that it has and the index has no room for."""
    expected: dict[int, int] = field(default_factory=dict)
    """Blocks that it does not have yet, with the number of its requests that will compute them."""

    @property
    def bit(self) -> int:
        return 1 << self.slot


class PrefixIndex:
    """For each block, the set of workers that have it, as the bits of an integer.

    It is as exact as the latest delta of each worker. A delta that is not the next one after the
    last is ignored, as all are that follow it, until the worker has sent a snapshot: what came too
    late or never cannot leave a block behind. Of a worker that is gone, or has sent a new snapshot,
    the old bits are without meaning at once, and are cleared a few with each delta.

    Memory has a bound. Once half of it is used, a worker adds blocks that no other has only while
    it has fewer than its share of the other half, and nobody does when all is used. What is left
    out are the latest blocks of a snapshot, so that the beginnings of prompts are kept; when there
    is room again, a new snapshot is wanted.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._tables: list[dict[int, int]] = [{} for _ in range(NUM_TABLES)]
        """Workers that have a block, by its hash; bits are numbers of slots."""
        self._workers: dict[str, _Worker] = {}
        self._names: list[str] = []
        """Worker of each slot."""
        self._free: list[int] = []
        self._gone = 0
        """Slots whose bits are without meaning."""
        self._swept_slots = 0
        """Those of them that are being cleared, from the first `_num_to_sweep` tables."""
        self._num_to_sweep = 0
        self._slots_of: dict[str, int] = {}
        """Slots of the workers with one format."""
        self.num_format_mismatches = 0
        """Workers whose blocks could not be compared with those of a request, over all requests."""
        self.num_resyncs = 0
        """Deltas that were ignored, for want of one before them or of room."""

    def apply(self, worker_id: str, delta: PrefixDelta) -> bool:
        """Take what a worker reports; False if it is to send a snapshot."""
        self._sweep()
        worker = self._workers.get(worker_id)
        if delta.snapshot:
            if worker and worker.incarnation == delta.incarnation and delta.seq <= worker.seq:
                return True  # it has been overtaken
            self.forget(worker_id)
            expected = worker.expected if worker and worker.format == delta.format else {}
            worker = self._add(worker_id, delta)
        elif worker is None or not _follows(worker, delta) or self._has_room_again(worker):
            self.num_resyncs += 1
            return False
        worker.seq = delta.seq
        self._remove(worker, unpack(delta.removed))
        self._store(worker, unpack(delta.stored))
        if delta.snapshot:
            self._expect(worker, expected)
        return True

    def expect(self, worker_id: str, request: Request) -> None:
        """Count the blocks of a request that was placed on a worker as its own already.

        So requests with one new prefix that come together go to one worker.
        """
        worker = self._workers.get(worker_id)
        if worker and worker.format == request.prefix_format:
            self._expect(worker, dict.fromkeys(unpack(request.block_hashes), 1))

    def _expect(self, worker: _Worker, blocks: dict[int, int]) -> None:
        """Count blocks as a worker's own, each with the number of requests that will compute it."""
        expected, bit, room = worker.expected, worker.bit, self._room(worker)
        for block, num_requests in blocks.items():
            table = self._tables[block % NUM_TABLES]
            others = table.get(block, 0)
            if block in expected:
                expected[block] += num_requests
            elif not others & bit and (others or room > 0):
                expected[block] = num_requests
                table[block] = others | bit
                room -= not others

    def settle(self, worker_id: str, request: Request) -> None:
        """No longer expect the blocks of a request, which it has computed or never will."""
        if (worker := self._workers.get(worker_id)) is None or not worker.expected:
            return
        for block in unpack(request.block_hashes):
            num_requests = worker.expected.get(block, 0)
            if num_requests > 1:
                worker.expected[block] = num_requests - 1
            elif num_requests:
                del worker.expected[block]
                self._clear(worker, block)

    def _clear(self, worker: _Worker, block: int) -> None:
        table = self._tables[block % NUM_TABLES]
        others = table.get(block, 0) & ~worker.bit
        if others:
            table[block] = others
        else:
            table.pop(block, None)

    def forget(self, worker_id: str) -> None:
        """Forget a worker that is gone; unknown ones are ignored."""
        if (worker := self._workers.pop(worker_id, None)) is None:
            return
        self._gone |= worker.bit
        self._slots_of[worker.format] &= ~worker.bit
        if not self._slots_of[worker.format]:
            del self._slots_of[worker.format]

    def match(self, hashes: bytes, worker_ids: Collection[str], format: str) -> dict[str, int]:
        """How many of a prompt's first blocks each of these workers has, if it has any.

        `hashes` are those of the prompt's full blocks in order. A worker of another format counts
        as one that has none, and in `num_format_mismatches`.
        """
        if not hashes:
            return {}
        self._count_mismatches(worker_ids, format)
        have_all = self._slots_of.get(format, 0)
        if len(worker_ids) <= FEW:
            have_all &= self._bits_of(worker_ids)
        found: dict[str, int] = {}
        num_blocks = 0
        tables = self._tables
        for block in unpack(hashes):
            still = tables[block % NUM_TABLES].get(block, 0) & have_all
            if still != have_all:
                if num_blocks:
                    self._note(found, have_all ^ still, num_blocks)
                have_all = still
                if not still:
                    break
            num_blocks += 1
        self._note(found, have_all, num_blocks)
        return {worker_id: found[worker_id] for worker_id in worker_ids if worker_id in found}

    @property
    def num_blocks(self) -> int:
        """Different blocks, those included that only workers had which are gone."""
        return sum(map(len, self._tables))

    @property
    def max_blocks(self) -> int:
        """Different blocks for which there is room, if many workers have each."""
        return self._max_bytes // (BLOCK_BYTES + sys.getsizeof(1 << len(self._names)))

    @property
    def num_bytes(self) -> int:
        """Memory that the blocks take at most."""
        return self.num_blocks * (BLOCK_BYTES + sys.getsizeof(1 << len(self._names)))

    @property
    def formats(self) -> dict[str, int]:
        """Number of workers of each format."""
        return {format: slots.bit_count() for format, slots in self._slots_of.items()}

    def format_of(self, worker_id: str) -> str:
        """Format of one worker; empty if it is not known."""
        worker = self._workers.get(worker_id)
        return worker.format if worker else ""

    def num_blocks_of(self, worker_id: str) -> int:
        """Blocks of one worker; 0 if it is not known."""
        worker = self._workers.get(worker_id)
        return worker.num_blocks if worker else 0

    def num_left_out_of(self, worker_id: str) -> int:
        """Blocks that one worker has and that are left out for want of room."""
        worker = self._workers.get(worker_id)
        return worker.num_left_out if worker else 0

    def _add(self, worker_id: str, delta: PrefixDelta) -> _Worker:
        if self._free:
            slot = self._free.pop()
            self._names[slot] = worker_id
        else:
            slot = len(self._names)
            self._names.append(worker_id)
        worker = _Worker(slot, delta.incarnation, delta.seq, delta.format)
        self._workers[worker_id] = worker
        self._slots_of[delta.format] = self._slots_of.get(delta.format, 0) | worker.bit
        return worker

    def _store(self, worker: _Worker, hashes: Iterable[int]) -> None:
        tables, bit, room = self._tables, worker.bit, self._room(worker)
        num_stored = 0
        before = after = bit
        for block in hashes:
            holders = tables[block % NUM_TABLES]
            others = holders.get(block)
            if others is None:
                if room <= 0:
                    worker.num_left_out += 1
                    continue
                room -= 1
                holders[block] = bit  # all blocks that only it has share one object
            elif others & bit:
                num_stored += worker.expected.pop(block, None) is not None
                continue
            else:
                # Most blocks of a chain have the same holders, and share one object too.
                if others != before:
                    before, after = others, others | bit
                holders[block] = after
            num_stored += 1
        worker.num_blocks += num_stored

    def _room(self, worker: _Worker) -> int:
        """How many blocks that nobody has a worker may add."""
        max_blocks = self.max_blocks
        share = max_blocks // 2 // len(self._workers)
        up_to_half = max_blocks // 2 - self.num_blocks
        return min(max_blocks - self.num_blocks, max(up_to_half, share - worker.num_blocks))

    def _has_room_again(self, worker: _Worker) -> bool:
        """Whether a worker of which blocks are left out could now have most of them indexed."""
        return worker.num_left_out > 0 and self._room(worker) >= max(
            worker.num_left_out, worker.num_blocks // 10
        )

    def _remove(self, worker: _Worker, hashes: Iterable[int]) -> None:
        tables, bit = self._tables, worker.bit
        for block in hashes:
            holders = tables[block % NUM_TABLES]
            others = holders.get(block, 0)
            if not others & bit:
                worker.num_left_out -= worker.num_left_out > 0
                continue
            if block in worker.expected:
                continue
            worker.num_blocks -= 1
            if others == bit:
                del holders[block]
            else:
                holders[block] = others ^ bit

    def _sweep(self) -> None:
        """Clear the bits of workers that are gone, from some of the blocks."""
        if not self._swept_slots:
            if not self._gone:
                return
            self._swept_slots, self._num_to_sweep = self._gone, NUM_TABLES
        num_swept, kept = 0, ~self._swept_slots
        while self._num_to_sweep and num_swept < MIN_SWEPT:
            self._num_to_sweep -= 1
            table = self._tables[self._num_to_sweep]
            num_swept += len(table)
            for block, holders in list(table.items()):
                if not holders & kept:
                    del table[block]
                elif holders & self._swept_slots:
                    table[block] = holders & kept
        if not self._num_to_sweep:
            self._free.extend(_bits(self._swept_slots))
            self._gone &= kept
            self._swept_slots = 0

    def _bits_of(self, worker_ids: Iterable[str]) -> int:
        bits = 0
        for worker_id in worker_ids:
            if worker := self._workers.get(worker_id):
                bits |= worker.bit
        return bits

    def _note(self, found: dict[str, int], slots: int, num_blocks: int) -> None:
        """Note that these workers have so many of the first blocks."""
        names = self._names
        if slots.bit_count() > FEW:
            found.update(dict.fromkeys(map(names.__getitem__, _bits(slots)), num_blocks))
            return
        while slots:
            lowest = slots & -slots
            found[names[lowest.bit_length() - 1]] = num_blocks
            slots ^= lowest

    def _count_mismatches(self, worker_ids: Iterable[str], format: str) -> None:
        if self._slots_of.keys() <= {format}:
            return
        for worker_id in worker_ids:
            worker = self._workers.get(worker_id)
            self.num_format_mismatches += worker is not None and worker.format != format


def _follows(worker: _Worker, delta: PrefixDelta) -> bool:
    """Whether a delta is the next one of its worker."""
    last = worker.incarnation, worker.format, worker.seq
    return last == (delta.incarnation, delta.format, delta.seq - delta.num_joined)


def _bits(mask: int) -> list[int]:
    """The numbers of the bits that are set."""
    octets = np.frombuffer(mask.to_bytes(-(-mask.bit_length() // 8), "little"), np.uint8)
    return np.unpackbits(octets, bitorder="little").nonzero()[0].tolist()  # type: ignore[no-any-return]
