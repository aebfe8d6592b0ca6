"""Prompts go where they are cached, also after the GlobalScheduler has died."""

import asyncio
import itertools
import secrets

import pytest
from ray import serve

from cluster.client import XYServe
from cluster.observe.explanation import Explanation
from cluster.observe.explanation_text import describe
from cluster.observe.request_history import Attempt
from cluster.placement.prefix_watch import PrefixStats
from tests.e2e.conftest import Server, wait_for_calm, wait_for_placed
from tests.e2e.test_draft_worker import wait_until
from tests.e2e.test_lost_parts import is_back, kill

LONG = 120
"""Words of a prompt, each of them two tokens or more."""
NAMES = itertools.count()


def new_prompt() -> str:
    """A long prompt that begins like no other."""
    return " ".join(secrets.token_hex(2) for _ in range(LONG))


def ask(handle: XYServe, prompt: str) -> tuple[str, Attempt, str]:
    """Where a request went, what became of it, and how that is explained."""
    request_id = f"placed-{next(NAMES)}-{secrets.token_hex(4)}"
    handle.generate(prompt, max_tokens=4, temperature=0, request_id=request_id)
    [explanation] = handle.explain(request_id)
    assert isinstance(explanation, Explanation)
    [attempt], [trace] = explanation.record.attempts, explanation.attempt_traces
    assert trace.placement
    return trace.placement.chosen.worker_id, attempt, "\n".join(describe(explanation))


@pytest.fixture(scope="module")
def cached(server: Server, handle: XYServe) -> dict[str, str]:
    """A prompt that is cached on each of the two workers, by the worker."""
    wait_for_calm()
    found: dict[str, str] = {}

    async def both() -> None:
        """Two at once go to two workers."""
        prompts = [new_prompt(), new_prompt()]
        ids = [f"placed-{next(NAMES)}-{secrets.token_hex(4)}" for _ in prompts]
        calls = [
            handle.generate_async(prompt, max_tokens=60, ignore_eos=True, request_id=request_id)
            for prompt, request_id in zip(prompts, ids, strict=True)
        ]
        await asyncio.gather(*calls)
        for prompt, request_id in zip(prompts, ids, strict=True):
            [explanation] = await asyncio.to_thread(handle.explain, request_id)
            assert isinstance(explanation, Explanation)
            placement = explanation.attempt_traces[0].placement
            assert placement
            found[placement.chosen.worker_id] = prompt

    for _ in range(5):  # on a busy machine one worker may seem so much faster that it gets both
        asyncio.run(both())
        if len(found) == 2:
            return found
    raise AssertionError("two prompts at once always went to one worker")


def num_told() -> int:
    """Workers of which the GlobalScheduler knows what is cached."""
    scheduler = serve.get_deployment_handle("GlobalScheduler", "xyserve")
    stats: PrefixStats = scheduler.prefix_stats.remote().result()
    return stats.num_workers


def check_they_go_where_they_are(handle: XYServe, cached: dict[str, str]) -> None:
    """Each prompt goes to the worker that has it, and is found there as predicted."""
    wait_for_placed(0, 0)
    for worker_id, prompt in [*cached.items(), *reversed(cached.items())]:
        chosen, attempt, text = ask(handle, prompt)
        assert chosen == worker_id, text
        assert attempt.forecast, text
        assert attempt.forecast.num_cached_tokens >= LONG, text
        assert attempt.num_cached_tokens == attempt.forecast.num_cached_tokens, text


def test_a_prompt_goes_to_the_worker_that_has_it(handle: XYServe, cached: dict[str, str]) -> None:
    check_they_go_where_they_are(handle, cached)


def test_what_was_predicted_is_explained_beside_what_came(
    handle: XYServe, cached: dict[str, str]
) -> None:
    worker_id, prompt = next(iter(cached.items()))

    _, attempt, text = ask(handle, prompt)

    assert f"placed on {worker_id}" in text
    assert "most of its prompt that is cached anywhere is cached there" in text
    assert f"{attempt.num_cached_tokens} of its tokens found cached" in text


def test_it_still_does_when_the_global_scheduler_has_died_and_nothing_fails(
    server: Server, handle: XYServe, cached: dict[str, str]
) -> None:
    lost = kill(server, "GlobalScheduler")

    # Requests go on meanwhile, where chance sends them, and none fails.
    for _ in range(3):
        assert handle.generate(new_prompt(), max_tokens=2).choices
    wait_until(lambda: is_back(server, "GlobalScheduler", lost) and num_told() == 2)
    check_they_go_where_they_are(handle, cached)
