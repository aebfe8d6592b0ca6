"""The hooks through which others follow the calls and requests of an ingress."""

from cluster.observe.request_history import Refusal, RequestRecord


class IngressObserver:
    """Called in the event loop of the ingress; this one does nothing."""

    def refused(self, refusal: Refusal) -> None:
        """A call was answered with an error before any request was made of it."""

    def began(self, record: RequestRecord) -> None:
        """A request began, in the context of its call."""

    def retried(self, record: RequestRecord, reason: str) -> None:
        """A request lost its worker and is placed again; `reason` is the error's name."""

    def ended(self, record: RequestRecord) -> None:
        """A request ended."""
