"""The steps that an engine is measured with, as spans of tokens on its seats."""

import itertools
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from scheduler.task import Limits

MIN_SEAT_LEN = 8
MIXED_SEED = 0


class SeatSpan(NamedTuple):
    """Query tokens of the request on a seat."""

    seat: int
    num_computed_tokens: int
    """Tokens in the KV cache before the step."""
    num_tokens: int


ScriptStep = tuple[SeatSpan, ...]


@dataclass(frozen=True, slots=True)
class Seats:
    """Dummy requests, each with its share of the KV cache."""

    lens: tuple[int, ...]
    """Tokens that each seat has room for, in descending order."""
    max_num_batched_tokens: int

    @classmethod
    def within(cls, limits: Limits, num_free_blocks: int, max_model_len: int) -> "Seats":
        """As many as may run; seat `i` gets `1 / (i + 1)` of the first seat's share.

        So there are long contexts, and the contexts of every batch fill much of the KV cache.
        """
        block_size = limits.kv_block_size
        count = max(1, min(limits.max_num_seqs, num_free_blocks // 2))
        first_share = (num_free_blocks - count) / sum(1 / (seat + 1) for seat in range(count))
        # A token is left for the output that vLLM keeps room for.
        max_len = max_model_len - 2
        lens = [
            min(max(1, int(first_share / (seat + 1))) * block_size, max_len)
            for seat in range(count)
        ]
        return cls(
            tuple(seat_len for seat_len in lens if seat_len >= min(MIN_SEAT_LEN, max_len)),
            limits.max_num_batched_tokens,
        )

    def span(self, seat: int, num_tokens: int, share: float) -> SeatSpan:
        """Tokens of a seat, after `share` of the context that it has room for."""
        return SeatSpan(seat, int(share * (self.lens[seat] - num_tokens)), num_tokens)

    def decodes(self, count: int, share: float) -> ScriptStep:
        """One token of each of the first `count` seats."""
        return tuple(self.span(seat, 1, share) for seat in range(count))

    def prefill(self, num_tokens: int, share: float) -> ScriptStep:
        """Tokens of one prompt."""
        return (self.span(0, num_tokens, share),)

    def prompts(self, count: int, num_tokens: int) -> ScriptStep:
        """The first tokens of several prompts."""
        return tuple(self.span(seat, num_tokens, 0) for seat in range(count))

    def mixed(self, random: Random, max_chunk: int) -> ScriptStep:
        """Decodes at random contexts, usually with chunks of one or two prompts."""
        free = random.sample(range(len(self.lens)), random.randint(1, len(self.lens)))
        left = self.max_num_batched_tokens
        chunks = []
        for _ in range(min(random.choice([0, 1, 1, 2]), len(free), left - 1)):
            seat = min(free)  # the roomiest
            free.remove(seat)
            largest = min(max_chunk, self.lens[seat], left - 1)
            num_tokens = int(2 ** random.uniform(0, largest.bit_length()))
            chunks.append(self.span(seat, min(max(num_tokens, 1), largest), random.random()))
            left -= chunks[-1].num_tokens
        decodes = (self.span(seat, 1, random.random()) for seat in free[:left])
        return (*decodes, *chunks)


def script(seats: Seats, depth: str) -> list[list[ScriptStep]]:
    """Series of steps to fit, each from short to long, so that it can be broken off."""
    full = depth == "full"
    largest = min(seats.max_num_batched_tokens, seats.lens[0])
    batches = _sizes(min(len(seats.lens), seats.max_num_batched_tokens), between=full)
    chunks = _sizes(largest)[2:] or [largest]  # one or two tokens are decodes, too
    contexts = (0.0, 0.5, 1.0) if full else (0.05, 1.0)
    random = Random(MIXED_SEED)
    series = [[seats.decodes(count, share) for count in batches] for share in contexts]
    series.append([seats.prefill(size, 0.0) for size in chunks])
    series.append([seats.prefill(size, 1.0) for size in (chunks if full else chunks[::2])])
    for size in (8, 32) if full else (16,):
        counts = [
            count
            for count in _sizes(len(seats.lens))[1:]
            if size <= seats.lens[count - 1] and count * size <= seats.max_num_batched_tokens
        ]
        series.append([seats.prompts(count, size) for count in counts])
    mixed = (seats.mixed(random, 256 if full else 64) for _ in range(48 if full else 10))
    series.append(sorted(mixed, key=num_tokens))
    # A step that belongs to several series is measured once.
    seen: set[ScriptStep] = set()
    for index, steps in enumerate(series):
        series[index] = [step for step in dict.fromkeys(steps) if step not in seen]
        seen.update(steps)
    return series


def num_tokens(step: ScriptStep) -> int:
    """Query tokens of the step."""
    return sum(span.num_tokens for span in step)


def _sizes(largest: int, *, between: bool = False) -> list[int]:
    """Powers of two below `largest`, and `largest`; also the sizes half way `between` them."""
    powers = [1 << power for power in range(largest.bit_length())]
    halves = [size * 3 // 2 for size in powers[1:]] if between else []
    return sorted({size for size in itertools.chain(powers, halves) if size < largest} | {largest})
