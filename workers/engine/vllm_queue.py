"""vLLM's waiting queue, able to show only the requests that a step admits."""

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.request import Request as VllmRequest


class PlannedQueue(RequestQueue):
    """vLLM's waiting queue; inside `showing(...)`, only the given requests can be popped.

    `len` and iteration always cover the whole queue, in vLLM's order.
    """

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._by_priority = policy == SchedulingPolicy.PRIORITY
        self._requests: list[VllmRequest] = []
        self._selection: deque[VllmRequest] | None = None

    @contextmanager
    def showing(self, requests: Iterable[VllmRequest]) -> Iterator[None]:
        """Show only these of its requests, in the given order."""
        self._selection = deque(requests)
        try:
            yield
        finally:
            self._selection = None

    def add_request(self, request: VllmRequest) -> None:
        """Add a request to the end, or by its priority."""
        if self._by_priority:
            insort(self._requests, request)
        else:
            self._requests.append(request)

    def prepend_request(self, request: VllmRequest) -> None:
        """Add a request to the front, or by its priority."""
        if self._by_priority:
            insort(self._requests, request)
        else:
            self._requests.insert(0, request)

    def prepend_requests(self, requests: Iterable[VllmRequest]) -> None:
        """Add one request after the other to the front, or by their priorities."""
        for request in requests:
            self.prepend_request(request)

    def peek_request(self) -> VllmRequest:
        """The request that `pop_request` would take."""
        return (self._requests if self._selection is None else self._selection)[0]

    def pop_request(self) -> VllmRequest:
        """Take the first request."""
        if self._selection is None:
            return self._requests.pop(0)
        request = self._selection.popleft()
        self._requests.remove(request)
        return request

    def remove_request(self, request: VllmRequest) -> None:
        """Remove one request; ValueError if it is not there."""
        self._requests.remove(request)

    def remove_requests(self, requests: Iterable[VllmRequest]) -> None:
        """Remove each of `requests` that is there."""
        leaving = set(requests)
        self._requests = [request for request in self._requests if request not in leaving]

    def __bool__(self) -> bool:
        return bool(self._requests if self._selection is None else self._selection)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[VllmRequest]:
        return iter(self._requests)
