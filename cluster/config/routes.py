"""The routes of the HTTP API: those always there, those that the config switches on, and the right
that each asks for."""

import functools
import re
from dataclasses import dataclass

from cluster.keys import Right

INFER, METRICS = Right.INFER, Right.METRICS
OPEN = None
"""The right of a route that tells everybody the little that it tells."""
BROWSED = ("/docs", "/redoc", "/openapi.json")
"""Routes that people open in a browser, which asks them for a key."""


@dataclass(frozen=True, slots=True)
class Route:
    """One route."""

    methods: str
    path: str
    meaning: str
    right: Right | None

    def is_at(self, path: str) -> bool:
        """Whether it is what is asked for at a path."""
        pattern = re.sub(r"\\{\w+\\}", ".*", re.escape(self.path))
        return re.fullmatch(pattern, path, re.DOTALL) is not None


ROUTES = (
    Route("POST", "/v1/chat/completions", "OpenAI's chat API", INFER),
    Route("POST", "/v1/completions", "OpenAI's completions API", INFER),
    Route("POST", "/v1/responses", "OpenAI's Responses API, of which nothing is kept", INFER),
    Route("POST", "/v1/messages", "Anthropic's Messages API", INFER),
    Route(
        "POST", "/v1/messages/count_tokens", "the number of tokens of such a conversation", INFER
    ),
    Route("GET", "/v1/models", "the model", INFER),
    Route("GET", "/v1/models/{model_id}", "the same by its name", INFER),
    Route("POST", "/tokenize", "the token ids of a text or a conversation", INFER),
    Route("POST", "/detokenize", "the text of token ids", INFER),
    Route(
        "GET", "/tokenizer_info", "what clients with a tokenizer of their own need to know", INFER
    ),
    Route("GET", "/health", "200 while a worker is there, otherwise 503", OPEN),
    Route("GET", "/version", "vLLM's version", INFER),
    Route("GET", "/metrics", "the metrics of the whole app, unless `metrics` is false", METRICS),
    Route("GET", "/docs", "all routes with their parameters, to read and to try", INFER),
    Route("GET", "/redoc", "the same on one page", INFER),
    Route("GET", "/openapi.json", "the same for programs", INFER),
)
"""Routes that are always there."""

EXTRA_ROUTES = (
    Route("POST", "/generative_scoring", "vLLM's scores of items, by the next token", INFER),
    Route("POST", "/v1/chat/completions/batch", "vLLM's chat API for several conversations", INFER),
    Route("POST", "/inference/v1/generate", "vLLM's API of token ids", INFER),
    Route("POST", "/v1/chat/completions/render", "the prompt that a chat becomes", INFER),
    Route("POST", "/v1/completions/render", "the prompt that a completion becomes", INFER),
    Route("POST", "/invocations", "chat or completion, as SageMaker calls it", INFER),
    Route("GET, POST", "/ping", "/health, as SageMaker calls it", OPEN),
    Route("GET", "/load", "requests under way at this replica", METRICS),
)
"""Routes that are there if the config names them in `ingress.routes`."""

EXTRA_PATHS = tuple(route.path for route in EXTRA_ROUTES)


@functools.lru_cache(maxsize=1024)
def right_at(path: str) -> Right | None:
    """The right that a call of a path asks for; that of an unknown one is the least there is, as
    there is nothing to guard."""
    rights = (route.right for route in ROUTES + EXTRA_ROUTES if route.is_at(path))
    return next(rights, INFER)


def table() -> str:
    """All routes as a Markdown table."""
    rows = [(route, "always") for route in ROUTES]
    rows += [(route, "if `ingress.routes` names it") for route in EXTRA_ROUTES]
    return "| route | what it is | right | there |\n|---|---|---|---|\n" + "".join(
        f"| `{route.methods} {route.path}` | {route.meaning} "
        f"| {f'`{route.right}`' if route.right else 'none'} | {there} |\n"
        for route, there in rows
    )
