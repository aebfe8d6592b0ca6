"""Quotas at an ingress: with the real account, and with one that does not answer."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
from ray.exceptions import ActorDiedError

from cluster.config.auth import TenantConfig
from cluster.errors import RequestRefused
from cluster.ingress import tenants as tenants_module
from cluster.ingress.tenants import Tenants
from cluster.placement.global_scheduler import GlobalScheduler
from scheduler.quota import Draw, Grant

CONFIGS = {
    "one": TenantConfig(max_concurrency=1),
    "slow": TenantConfig(requests_per_minute=1),
    "tokens": TenantConfig(tokens_per_minute=6000),
    "free": TenantConfig(),
}


class Accounts:
    """The GlobalScheduler's accounts, which may be out of reach."""

    def __init__(self) -> None:
        self.fault: Callable[[], None] = lambda: None
        self.num_draws = 0
        self.restart()

    def restart(self) -> None:
        quotas = {name: config.quota for name, config in CONFIGS.items()}
        self._scheduler = GlobalScheduler(quotas=quotas)

    async def draw(self, ingress_id: str, draws: dict[str, Draw]) -> dict[str, Grant]:
        self.num_draws += 1
        await asyncio.sleep(0)
        self.fault()
        return await self._scheduler.draw(ingress_id, draws)


@pytest.fixture
def accounts() -> Accounts:
    return Accounts()


@contextlib.contextmanager
def refused(words: str) -> Iterator[None]:
    with pytest.raises(RequestRefused, match=words) as error:
        yield
    assert error.value.status == 429
    assert error.value.retry_after_s > 0


async def test_a_call_beyond_a_quota_is_refused_until_another_has_ended(accounts: Accounts) -> None:
    first = Tenants(CONFIGS, accounts.draw, "a", 2)
    second = Tenants(CONFIGS, accounts.draw, "b", 2)

    async with first.calling("one"):
        with refused("tenants.one.max_concurrency is 1"):
            async with second.calling("one"):
                pytest.fail("it was let in")
    for _ in range(3):
        await asyncio.sleep(0.06)
        async with second.calling("one"):
            pass
        await asyncio.sleep(0.06)
        async with first.calling("one"):
            pass


async def test_a_call_that_fails_has_ended_too(accounts: Accounts) -> None:
    tenants = Tenants(CONFIGS, accounts.draw, "a", 1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with tenants.calling("one"):
                raise ZeroDivisionError
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), tenants.calling("one"):
                await asyncio.sleep(60)
    async with tenants.calling("one"):
        pass


async def test_requests_are_counted_over_all_ingresses(accounts: Accounts) -> None:
    first = Tenants(CONFIGS, accounts.draw, "a", 2)
    second = Tenants(CONFIGS, accounts.draw, "b", 2)
    async with first.calling("slow"):
        pass
    for tenants in (first, second):
        with refused("tenants.slow.requests_per_minute is 1"):
            async with tenants.calling("slow"):
                pytest.fail("it was let in")


async def test_tokens_count_when_the_call_has_ended(accounts: Accounts) -> None:
    tenants = Tenants(CONFIGS, accounts.draw, "a", 1)
    async with tenants.calling("tokens") as usage:
        usage.num_tokens = 2000
    with refused("tenants.tokens.tokens_per_minute is 6000") as _:
        async with tenants.calling("tokens"):
            pytest.fail("it was let in")


async def test_a_tenant_without_quotas_asks_nobody(accounts: Accounts) -> None:
    tenants = Tenants(CONFIGS, accounts.draw, "a", 1)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(100):
            await stack.enter_async_context(tenants.calling("free"))
    assert accounts.num_draws == 0


async def test_a_flood_is_refused_without_asking_each_time(accounts: Accounts) -> None:
    tenants = Tenants(CONFIGS, accounts.draw, "a", 1)

    async def call() -> None:
        async with tenants.calling("one"):
            await asyncio.sleep(0.3)

    results = await asyncio.gather(*(call() for _ in range(500)), return_exceptions=True)

    assert sum(isinstance(result, RequestRefused) for result in results) == 499
    assert accounts.num_draws < 10


@pytest.mark.parametrize("fault", ["dies", "hangs"])
async def test_an_ingress_goes_on_while_the_account_cannot_be_reached(
    fault: str, accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants_module, "DRAW_TIMEOUT_S", 0.05)
    tenants = Tenants(CONFIGS, accounts.draw if fault == "dies" else Hanging().draw, "a", 1)
    if fault == "dies":

        def die() -> None:
            raise ActorDiedError

        accounts.fault = die

    async with tenants.calling("one"):
        with refused("tenants.one.max_concurrency is 1"):
            async with tenants.calling("one"):
                pytest.fail("it was let in")
    async with tenants.calling("tokens"):
        pass


class Hanging:
    """Accounts that do not answer."""

    async def draw(self, ingress_id: str, draws: dict[str, Draw]) -> dict[str, Grant]:
        await asyncio.sleep(3600)
        raise AssertionError


async def test_an_account_that_starts_again_knows_what_was_used(accounts: Accounts) -> None:
    tenants = Tenants(CONFIGS, accounts.draw, "a", 1)
    async with tenants.calling("slow"), tenants.calling("one"):
        accounts.restart()
        await asyncio.sleep(0.6)  # a draw of its own
        other = Tenants(CONFIGS, accounts.draw, "b", 1)
        for name in ("slow", "one"):
            with refused(f"tenants.{name}"):
                async with other.calling(name):
                    pytest.fail("it was let in")


async def test_a_quiet_ingress_keeps_nothing_from_the_others(accounts: Accounts) -> None:
    tenants = Tenants(CONFIGS, accounts.draw, "a", 1)
    for name in CONFIGS:
        async with tenants.calling(name):
            pass
    give_up_s = time.monotonic() + 10
    before = -1
    while accounts.num_draws != before:  # it asks no more
        assert time.monotonic() < give_up_s
        before = accounts.num_draws
        await asyncio.sleep(1.2)
