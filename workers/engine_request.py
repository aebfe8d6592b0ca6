"""A request on its way to an engine, as every hop between the client and vLLM passes it on."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.request import Request


@dataclass(frozen=True, slots=True)
class Grammar:
    """What structured output or tools hold the tokens of a request to."""

    kind: str
    """Name of one of vLLM's `StructuredOutputOptions`."""
    spec: str


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request as scheduling sees it and as its engine does, in one value."""

    request: Request
    core: list[bytes]
    """vLLM's `EngineCoreRequest`, encoded once per request. The engine ignores the id and client in
    it: it uses the id of `request` and the client of the call."""
    output_token_ids: tuple[int, ...] = ()
    """Tokens that earlier attempts at the request produced."""
    grammar: Grammar | None = None
    """Grammar in `core`, which is compiled before the engine sees the request."""

    def for_attempt(
        self, attempt_id: str, output_token_ids: Iterable[int] = (), num_engine_deaths: int = 0
    ) -> "EngineRequest":
        """This request under the id of one attempt, with what came of those before it."""
        return EngineRequest(
            dataclasses.replace(
                self.request, request_id=attempt_id, num_engine_deaths=num_engine_deaths
            ),
            self.core,
            tuple(output_token_ids),
            self.grammar,
        )
