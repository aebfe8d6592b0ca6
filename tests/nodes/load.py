"""Streams that run while something happens to a node, and what their clients got."""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterator
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
    began: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)
    """Set at its first token, and at its end."""

    def run(self, client: openai.OpenAI, max_tokens: int) -> None:
        """Read it to its end. Every second one samples, with a seed of its own."""
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


@contextlib.contextmanager
def streaming(
    url: str, num_streams: int, max_tokens: int = MAX_TOKENS, first: int = 0
) -> Iterator[Callable[[], list[Stream]]]:
    """Streams, all of which have begun; gives what waits for their end and returns them."""
    streams = [Stream(first + number) for number in range(num_streams)]
    with (
        openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
        ) as client,
        concurrent.futures.ThreadPoolExecutor(num_streams) as pool,
    ):
        running = [pool.submit(stream.run, client, max_tokens) for stream in streams]

        def ended() -> list[Stream]:
            for future in running:
                future.result()
            return streams

        for stream in streams:
            stream.began.wait(TIMEOUT_S)
        yield ended
