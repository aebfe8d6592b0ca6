"""A request on its way to an engine: what every station between the client and vLLM passes on."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.request import Request


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request as scheduling sees it and as its engine does, in one value."""

    request: Request
    core: list[bytes]
    """vLLM's `EngineCoreRequest`, encoded once per request. Its own id and client do not count: the
    engine takes the id of `request` and the client that it is called for."""
    output_token_ids: tuple[int, ...] = ()
    """Tokens that earlier attempts at the request produced."""

    def for_attempt(self, attempt_id: str, output_token_ids: Iterable[int] = ()) -> "EngineRequest":
        """The same request under the id of one attempt, with the tokens produced before it."""
        return EngineRequest(
            dataclasses.replace(self.request, request_id=attempt_id),
            self.core,
            tuple(output_token_ids),
        )
