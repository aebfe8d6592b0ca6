"""The routes of the HTTP API: those always there, and those that the config switches on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Route:
    """One route."""

    methods: str
    path: str
    meaning: str


ROUTES = (
    Route("POST", "/v1/chat/completions", "OpenAI's chat API"),
    Route("POST", "/v1/completions", "OpenAI's completions API"),
    Route("POST", "/v1/responses", "OpenAI's Responses API, of which nothing is kept"),
    Route("POST", "/v1/messages", "Anthropic's Messages API"),
    Route("POST", "/v1/messages/count_tokens", "the number of tokens of such a conversation"),
    Route("GET", "/v1/models", "the model"),
    Route("GET", "/v1/models/{model_id}", "the same by its name"),
    Route("POST", "/tokenize", "the token ids of a text or a conversation"),
    Route("POST", "/detokenize", "the text of token ids"),
    Route("GET", "/tokenizer_info", "what clients with a tokenizer of their own need to know"),
    Route("GET", "/health", "200 while a worker is there, otherwise 503"),
    Route("GET", "/version", "vLLM's version"),
    Route("GET", "/metrics", "the metrics of the whole app, unless `metrics` is false"),
    Route("GET", "/docs", "all routes with their parameters, to read and to try"),
    Route("GET", "/redoc", "the same on one page"),
    Route("GET", "/openapi.json", "the same for programs"),
)
"""Routes that are always there."""

EXTRA_ROUTES = (
    Route("POST", "/generative_scoring", "vLLM's scores of items, by the next token"),
    Route("POST", "/v1/chat/completions/batch", "vLLM's chat API for several conversations"),
    Route("POST", "/inference/v1/generate", "vLLM's API of token ids"),
    Route("POST", "/v1/chat/completions/render", "the prompt that a chat becomes"),
    Route("POST", "/v1/completions/render", "the prompt that a completion becomes"),
    Route("POST", "/invocations", "chat or completion, as SageMaker calls it"),
    Route("GET, POST", "/ping", "/health, as SageMaker calls it"),
    Route("GET", "/load", "requests under way at this replica"),
)
"""Routes that are there if the config names them in `ingress.routes`."""

EXTRA_PATHS = tuple(route.path for route in EXTRA_ROUTES)


def table() -> str:
    """All routes as a Markdown table."""
    rows = [(route, "always") for route in ROUTES]
    rows += [(route, "if `ingress.routes` names it") for route in EXTRA_ROUTES]
    return "| route | what it is | there |\n|---|---|---|\n" + "".join(
        f"| `{route.methods} {route.path}` | {route.meaning} | {there} |\n" for route, there in rows
    )
