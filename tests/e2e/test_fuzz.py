"""The short form of `python -m tests.fuzz`, against the server of the session."""

from cluster.client import XYServe
from tests.e2e.conftest import MODEL, Server, wait_for_load
from tests.fuzz.__main__ import Fuzz
from tests.fuzz.parameters import PARAMETERS

NUM_INPUTS, RAW_AT_ONCE = 240, 78
"""Some minute's worth; every kind of raw client six times."""


def test_nothing_that_comes_in_breaks_the_server_or_stays(server: Server, handle: XYServe) -> None:
    before = server.replicas(), server.tracebacks()

    report = Fuzz(server.url, MODEL, seed=0).run(NUM_INPUTS, RAW_AT_ONCE)

    assert report.faults == []
    assert report.num_inputs >= NUM_INPUTS
    wait_for_load(handle, num_running=0)
    assert (server.replicas(), server.tracebacks()) == before
    assert handle.status().num_live_requests == 0


def test_every_parameter_of_the_routes_that_generate_is_drawn() -> None:
    """So that a new one of vLLM's is not forgotten."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    known = {*PARAMETERS, *NO_SAMPLING}
    for request in (ChatCompletionRequest, CompletionRequest):
        assert sorted(request.model_fields.keys() - known) == []


NO_SAMPLING = {
    *("model", "messages", "prompt", "prompt_embeds", "documents", "chat_template"),
    *("mm_processor_kwargs", "media_io_kwargs", "mm_payload", "return_mm_kwargs", "cache_salt"),
}
"""What a request is about; schemathesis draws it."""
