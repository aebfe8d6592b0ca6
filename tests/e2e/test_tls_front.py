"""The fronts of deploy/tls before the real app, with keys: an OpenAI client streams through TLS."""

import time
import urllib.parse
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.deploy.fronts import KINDS, Front, running
from tests.e2e.conftest import ANSWER_TIMEOUT_S, MODEL
from tests.e2e.locked import LockedServer, serving_with_keys

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LockedServer]:
    with serving_with_keys(tmp_path_factory.mktemp("locked")) as locked:
        yield locked


@pytest.fixture(scope="module")
def key(locked: LockedServer) -> str:
    """Of a tenant that may make one call at a time."""
    key = locked.add("single")
    locked.wait_for_status(key, 200)
    return key


@pytest.fixture(scope="module", params=KINDS)
def front(
    locked: LockedServer, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    port = urllib.parse.urlsplit(locked.server.url).port
    assert port is not None
    with running(request.param, tmp_path_factory.mktemp("front"), port) as front:
        yield front


@pytest.fixture
def tls_client(front: Front, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{front.url}/v1",
        api_key=key,
        max_retries=0,
        timeout=ANSWER_TIMEOUT_S,
        http_client=openai.DefaultHttpxClient(verify=front.context(), trust_env=False),
    ) as client:
        yield client


def test_an_openai_client_streams_through_tls(
    locked: LockedServer, key: str, tls_client: openai.OpenAI
) -> None:
    def stream(asked: openai.OpenAI) -> str:
        chunks = asked.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=16, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)

    assert stream(tls_client) == stream(locked.client(key)) != ""


def test_leaving_a_stream_through_tls_ends_its_call(tls_client: openai.OpenAI) -> None:
    stream = tls_client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    with pytest.raises(openai.RateLimitError):
        tls_client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1)

    stream.close()

    give_up_s = time.monotonic() + 20  # the whole answer takes longer
    while True:
        try:
            tls_client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1)
            break
        except openai.RateLimitError:
            assert time.monotonic() < give_up_s
            time.sleep(0.2)


def test_the_errors_of_the_app_come_through_tls(tls_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        tls_client.completions.create(model="unknown", prompt=PROMPT)

    assert "unknown" in raised.value.message


def test_who_has_no_key_is_refused_through_tls(front: Front) -> None:
    answer = httpx.get(f"{front.url}/v1/models", verify=front.context(), trust_env=False)

    assert answer.status_code == 401


def test_metrics_do_not_come_through_tls(front: Front) -> None:
    answer = httpx.get(f"{front.url}/metrics", verify=front.context(), trust_env=False)

    assert answer.status_code == 404
