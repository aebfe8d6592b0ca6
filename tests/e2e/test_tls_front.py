"""The fronts of deploy/tls before the real app: an OpenAI client streams through TLS."""

import urllib.parse
from collections.abc import Iterator

import httpx
import openai
import pytest

from cluster.client import XYServe
from tests.deploy.fronts import KINDS, Front, running
from tests.e2e.conftest import ANSWER_TIMEOUT_S, MODEL, Server, wait_for_load

PROMPT = "Once upon a time"


@pytest.fixture(scope="module", params=KINDS)
def front(
    server: Server, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    port = urllib.parse.urlsplit(server.url).port
    assert port is not None
    with running(request.param, tmp_path_factory.mktemp("front"), port) as front:
        yield front


@pytest.fixture
def tls_client(front: Front) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{front.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=ANSWER_TIMEOUT_S,
        http_client=openai.DefaultHttpxClient(verify=front.context(), trust_env=False),
    ) as client:
        yield client


def test_an_openai_client_streams_through_tls(
    client: openai.OpenAI, tls_client: openai.OpenAI
) -> None:
    def stream(asked: openai.OpenAI) -> str:
        chunks = asked.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=16, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)

    assert stream(tls_client) == stream(client) != ""


def test_leaving_a_stream_through_tls_frees_its_slot(
    tls_client: openai.OpenAI, handle: XYServe
) -> None:
    wait_for_load(handle, num_running=0)
    stream = tls_client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    wait_for_load(handle, num_running=1)

    stream.close()

    wait_for_load(handle, num_running=0)


def test_the_errors_of_the_app_come_through_tls(tls_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        tls_client.completions.create(model="unknown", prompt=PROMPT)

    assert "unknown" in raised.value.message


def test_metrics_do_not_come_through_tls(front: Front) -> None:
    answer = httpx.get(f"{front.url}/metrics", verify=front.context(), trust_env=False)

    assert answer.status_code == 404
