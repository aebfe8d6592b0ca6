"""The clients, each with its version and what its job does."""

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    PYTHON = "pip"
    NODE = "npm"
    PROJECT = "make install"


@dataclass(frozen=True)
class Client:
    """A client, whose job is the file `name` in this folder."""

    name: str
    title: str
    packages: tuple[str, ...]
    """What is installed, with versions; the first one is the client."""
    job: str
    kind: Kind = Kind.PYTHON
    takes_torch: bool = False
    """Needs torch, and takes the project's: the one of the package index brings 4 GB of CUDA."""

    @property
    def file(self) -> str:
        return f"{self.name}{'.mjs' if self.kind is Kind.NODE else '.py'}"

    @property
    def version(self) -> str:
        return self.packages[0].replace("==", "@").rpartition("@")[2]


NODE = "22.23.3"
ZOD = "zod@4.6.7"

CLIENTS = (
    Client(
        "openai_python",
        "openai (Python)",
        ("openai==3.57.0",),
        "chat, stream, tools, parsed classes, responses, log probabilities, text, coroutines, "
        "timeout and cancel, errors, headers, models",
    ),
    Client(
        "openai_node",
        "openai (Node)",
        ("openai@7.59.0", ZOD),
        "chat, stream, tools, zod, responses, abort, errors, headers, models",
        Kind.NODE,
    ),
    Client(
        "vercel_ai",
        "Vercel AI SDK",
        ("ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", "@ai-sdk/openai@4.0.118", ZOD),
        "by three providers: text, stream, tool round trip, streamed tool call, objects, abort, "
        "errors",
        Kind.NODE,
    ),
    Client(
        "langchain",
        "LangChain",
        ("langchain==1.5.2", "langchain-openai==1.7.4"),
        "chain, stream, batch, bound tools, agent, structured output, responses, coroutines, "
        "cancel, errors, log probabilities",
    ),
    Client(
        "llama_index",
        "LlamaIndex",
        ("llama-index-core==0.14.25", "llama-index-llms-openai-like==0.8.1"),
        "chat, stream, text, structured output, tools, agent, coroutines, cancel, errors",
    ),
    Client(
        "litellm",
        "litellm",
        ("litellm==1.110.2",),
        "by two providers: chat, stream, tools, structured output, text, responses, Anthropic "
        "bridge, coroutines, cancel, errors",
    ),
    Client(
        "instructor",
        "instructor",
        ("instructor==1.17.0",),
        "classes in three modes, partial objects, coroutines, errors",
    ),
    Client(
        "pydantic_ai",
        "pydantic-ai",
        ("pydantic-ai-slim[openai]==2.68.0",),
        "by chat and responses: agent, stream, typed output in three modes, tool; history, "
        "coroutines, cancel, errors",
    ),
    Client(
        "openai_agents",
        "openai-agents",
        ("openai-agents==0.24.0",),
        "by chat and responses: agent, stream, typed output, tool, errors; handoff, session, "
        "coroutines, cancel",
    ),
    Client(
        "anthropic",
        "anthropic (Python)",
        ("anthropic==2.14.0",),
        "messages, stream, tools, token count, stop sequence, coroutines, cancel, errors, models",
    ),
    Client(
        "lm_eval",
        "lm-eval",
        ("lm_eval[api]==0.4.13",),
        "ranked choices by log probabilities with the server's tokenizer, answers in a chat",
    ),
    Client(
        "vllm_bench",
        "`vllm bench serve`",
        ("vllm==0.32.0",),
        "a benchmark by each of its three APIs",
        Kind.PROJECT,
    ),
    Client(
        "guidellm",
        "guidellm",
        ("guidellm==0.8.1",),
        "a benchmark by chat and by text",
        takes_torch=True,
    ),
)
