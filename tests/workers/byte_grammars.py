"""A vocabulary of single bytes, and what a compiled grammar lets a sampler write with it."""

import random

import xgrammar

STOP = 256
TOKENIZER = xgrammar.TokenizerInfo(
    [bytes([value]) for value in range(256)] + [b"</s>"],
    xgrammar.VocabType.RAW,
    vocab_size=257,
    stop_token_ids=[STOP],
)
ENDS = frozenset(b'"]}')
"""Bytes that end what has begun, without which strings would be endless."""


def sample(grammar: xgrammar.CompiledGrammar, draw: random.Random, most: int = 400) -> str | None:
    """A random text in ASCII that matches a grammar; None if it does not end in `most` bytes."""
    matcher = xgrammar.GrammarMatcher(grammar)
    mask = xgrammar.allocate_token_bitmask(1, TOKENIZER.vocab_size)
    text = bytearray()
    while len(text) < most:
        matcher.fill_next_token_bitmask(mask)
        words = [int(word) for word in mask[0]]
        allowed = [
            token
            for token in (*range(32, 127), STOP)
            if words[token // 32] >> (token % 32) & 1 and token != 32
        ] or [32]
        ends = [token for token in allowed if token == STOP or token in ENDS]
        token = draw.choice(ends if ends and draw.random() < 0.4 else allowed)
        if token == STOP:
            return text.decode()
        assert matcher.accept_token(token)
        text.append(token)
    return None


def matches(grammar: xgrammar.CompiledGrammar, text: str) -> bool:
    """Whether a whole text matches a grammar."""
    matcher = xgrammar.GrammarMatcher(grammar)
    return all(map(matcher.accept_token, text.encode())) and matcher.accept_token(STOP)
