"""Streams that run while something happens to a node, and what their clients got."""

import concurrent.futures
import threading
import time
from dataclasses import dataclass, field

import openai

from tests.e2e.conftest import MODEL

TIMEOUT_S = 240
MAX_TOKENS = 200


@dataclass
class Stream:
    """One stream as its client sees it."""

    number: int
    text: str = ""
    finish_reason: str | None = None
    error: str = ""
    num_tokens: int = 0
    """What its usage says."""
    longest_pause_s: float = field(default=0.0, compare=False)
    """Longest time between two of its chunks."""
    began: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)
    """Set at its first token, and at its end."""

    def run(self, client: openai.OpenAI, max_tokens: int) -> None:
        """Read it to its end. Every second one samples, with a seed of its own."""
        heard_s = time.monotonic()
        try:
            for chunk in client.completions.create(
                model=MODEL,
                prompt=f"Story number {self.number}. Once upon a time",
                max_tokens=max_tokens,
                temperature=self.number % 2,
                seed=self.number,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            ):
                now = time.monotonic()
                if self.began.is_set():
                    self.longest_pause_s = max(self.longest_pause_s, now - heard_s)
                heard_s = now
                for choice in chunk.choices:
                    self.text += choice.text
                    self.finish_reason = choice.finish_reason or self.finish_reason
                    self.began.set()
                if chunk.usage is not None:
                    self.num_tokens = chunk.usage.completion_tokens
        except openai.OpenAIError as error:
            self.error = repr(error)
        finally:
            self.began.set()


class Load:
    """Streams at the same time, which begin when this is made."""

    def __init__(self, url: str, num_streams: int, max_tokens: int = MAX_TOKENS) -> None:
        self._client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(num_streams)
        self._streams = [Stream(number) for number in range(num_streams)]
        self._running = [
            self._pool.submit(stream.run, self._client, max_tokens) for stream in self._streams
        ]

    def wait_until_begun(self) -> None:
        """Wait for the first token of each stream."""
        for stream in self._streams:
            stream.began.wait(TIMEOUT_S)

    def ended(self) -> list[Stream]:
        """Wait for the end of all streams, and return them."""
        with self._pool, self._client:
            for future in self._running:
                future.result()
        return self._streams
