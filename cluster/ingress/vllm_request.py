"""A call of a client handle as vLLM's request; what it does not know is refused, not ignored."""

import difflib
import reprlib
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMClientError

from cluster.errors import RequestFailed
from cluster.ingress.protocol import PARAMETERS, TENANT, Api
from cluster.ingress.vllm_http import VALIDATOR_ERRORS, explain_validation

REQUESTS: dict[Api, type[ChatCompletionRequest] | type[CompletionRequest]] = {
    "chat": ChatCompletionRequest,
    "completion": CompletionRequest,
}

WITHOUT_EFFECT = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
}
"""Parameters of the OpenAI API that concern its operator's books and caches, not the answer: they
are accepted, as by HTTP."""


def read_request(
    api: Api, given: Mapping[str, Any], call_id: str, *, streamed: bool
) -> ChatCompletionRequest | CompletionRequest:
    """The request of a call with the parameters `given`; RequestFailed names the one at fault."""
    fields = REQUESTS[api].model_fields
    known = {*fields, *PARAMETERS, TENANT, "timeout_s"}  # the last is the handle's own
    for name in given:
        if name not in known | WITHOUT_EFFECT:
            nearest = difflib.get_close_matches(name, known, 1, cutoff=0.75)
            hint = f"did you mean {nearest[0]}?" if nearest else "/docs of the HTTP API has all"
            raise _refusal(f"there is no parameter {name[:80]}; {hint}")
    if given.get("stream") not in (None, streamed):
        raise _refusal(
            "stream: use the method `stream`, or `chat` and `generate` for a whole answer"
        )
    if not isinstance(traceparent := given.get(PARAMETERS.traceparent) or "", str):
        raise _refusal(f"{PARAMETERS.traceparent}: {reprlib.repr(traceparent)} is no text")
    if api == "chat" and not isinstance(messages := given.get("messages"), list):
        example = {"role": "user", "content": "Hello"}
        raise _refusal(f"messages: {reprlib.repr(messages)} is no list of messages like {example}")
    request = {name: given[name] for name in given if name in fields} | {"stream": streamed}
    if request.get(PARAMETERS.call_id) is None:
        request[PARAMETERS.call_id] = call_id
    try:
        return REQUESTS[api](**request)
    except ValidationError as error:
        raise _refusal(explain_validation(error.errors())[0]) from None
    except VLLMClientError as error:
        raise _refusal(str(error)) from None
    except (ValueError, TypeError, OverflowError, *VALIDATOR_ERRORS) as error:
        validator = traceback.extract_tb(error.__traceback__)[-1].name  # it names the parameter
        raise _refusal(f"a parameter has a wrong type: {error} ({validator})") from None


def _refusal(message: str) -> RequestFailed:
    return RequestFailed(message, HTTPStatus.BAD_REQUEST)
