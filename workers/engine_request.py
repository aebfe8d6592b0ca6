"""A request on its way to an engine, as every hop between the client and vLLM passes it on."""

import dataclasses
from dataclasses import dataclass

from scheduler.fair_shares import yielding
from scheduler.request import Request


@dataclass(frozen=True, slots=True)
class Grammar:
    """What structured output or tools hold the tokens of a request to."""

    kind: str
    """Name of one of vLLM's `StructuredOutputOptions`."""
    spec: str


@dataclass(frozen=True, slots=True)
class Progress:
    """What the attempts at a request have given so far; a new one goes on behind it."""

    output_token_ids: tuple[int, ...]
    """At least one."""
    first_token_s: float
    """Wall-clock time."""
    last_token_s: float


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request as scheduling sees it and as its engine does, in one value."""

    request: Request
    core: list[bytes]
    """vLLM's `EngineCoreRequest`, encoded once per request. The engine ignores the id and client in
    it: it uses the id of `request` and the client of the call."""
    progress: Progress | None = None
    """None for one that begins."""
    grammar: Grammar | None = None
    """Grammar in `core`, which is compiled before the engine sees the request."""

    def for_attempt(
        self,
        attempt_id: str,
        progress: Progress | None = None,
        num_engine_deaths: int = 0,
        num_attempts: int = 0,
    ) -> "EngineRequest":
        """This request under the id of one attempt, with what came of those before it."""
        request = dataclasses.replace(
            self.request,
            request_id=attempt_id,
            num_engine_deaths=num_engine_deaths,
            num_attempts=num_attempts,
            num_prior_tokens=len(progress.output_token_ids) if progress else 0,
        )
        return dataclasses.replace(self, request=request, progress=progress)

    def for_worker(self, yields: bool = False) -> "EngineRequest":
        """This request without what only placement needs, as it `yields` or does not."""
        request = yielding(self.request.without_hashes(), yields)
        return dataclasses.replace(self, request=request)
