"""An event loop in a thread of its own, for an object that other threads share."""

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from cluster.errors import HandleClosed

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines for any thread and any other event loop, until it is closed.

    HandleClosed is raised for work that comes later, for work that it cuts short, and in a fork of
    its process, which has no such thread.
    """

    def __init__(self, name: str) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        """Held to start work and to close, so that no work starts behind the end of the loop."""
        self._is_closed = False
        runner = asyncio.Runner()
        self._loop = runner.get_loop()
        self._thread = threading.Thread(target=_run, args=(runner,), name=name, daemon=True)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; an exception here, as by Ctrl-C, cancels it."""
        future = self._start(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            self.check_usable()
            raise
        except BaseException:
            future.cancel()
            raise

    async def wait_async(self, work: Coroutine[Any, Any, T]) -> T:
        """`wait` in another event loop."""
        try:
            return await asyncio.wrap_future(self._start(work))
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and not task.cancelling():
                self.check_usable()
            raise

    def call(self, function: Callable[[], None]) -> None:
        """Let the loop call `function` soon; a closed loop does not."""
        with self._lock:
            if not self._is_closed and self._pid == os.getpid():
                self._loop.call_soon_threadsafe(function)

    def check_usable(self) -> None:
        """Raise HandleClosed if it cannot be used any longer, or not here."""
        if self._is_closed:
            raise HandleClosed("this handle is closed; make another with `XYServe.connect`")
        if self._pid != os.getpid():
            raise HandleClosed(
                f"this handle belongs to the process {self._pid}, and a fork of it needs its own: "
                "make one with `XYServe.connect`"
            )

    def close(self) -> None:
        """Cancel what runs, and wait for its end."""
        self._stop()
        if self._pid == os.getpid():
            self._thread.join()

    def __del__(self) -> None:
        self._stop()

    def _start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        with self._lock:
            try:
                self.check_usable()
            except HandleClosed:
                work.close()
                raise
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _stop(self) -> None:
        if self._pid != os.getpid():
            return  # what wakes the loop is shared with the process that it runs in
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._loop.call_soon_threadsafe(self._loop.stop)


def _run(runner: asyncio.Runner) -> None:
    with runner:  # at its end, it cancels what is left
        runner.get_loop().run_forever()
