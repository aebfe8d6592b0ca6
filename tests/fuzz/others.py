"""Clients that stream one known answer again and again, whatever else comes in."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

TIMEOUT_S = 300
NUM_OTHERS = 2


class Others:
    """Clients that stream one known answer again and again while the requests come in."""

    def __init__(self, url: str, model: str) -> None:
        self._url = f"{url}/v1/completions"
        self._body = {"model": model, "prompt": "One, two, three,", "temperature": 0}
        self._body |= {"max_tokens": 30, "stream": True}
        self._known = self._stream()
        self._done = threading.Event()
        self.num_streams = 0
        self.faults: list[str] = []

    @contextmanager
    def streaming(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._repeat) for _ in range(NUM_OTHERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._done.set()
            for thread in threads:
                thread.join()

    def _repeat(self) -> None:
        while not self._done.is_set():
            try:
                answer = self._stream()
            except (httpx.HTTPError, KeyError, ValueError) as error:
                self.faults.append(f"another client's stream broke: {error!r}")
            else:
                if answer != self._known:
                    self.faults.append(f"another client got {answer!r}, not {self._known!r}")
            self.num_streams += 1

    def _stream(self) -> str:
        text = ""
        with httpx.stream("POST", self._url, json=self._body, timeout=TIMEOUT_S) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return text
                if line:
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        raise ValueError(f"it ended without [DONE] after {text!r}")
