"""The tenants' quotas at one ingress: a call is admitted or refused before anything else."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.config.auth import TenantConfig
from cluster.errors import RequestRefused
from scheduler.placement import RefusalReason, Refused
from scheduler.purse import Purse
from scheduler.quota import Draw, Grant

logger = logging.getLogger(__name__)

DRAW_TIMEOUT_S = 1.0
"""Time that the GlobalScheduler has to answer; then this ingress goes on within its shares."""
ALONE_S = 1.0
"""Time after which the GlobalScheduler is asked again."""
DRAW_EVERY_S = 0.5
"""Period at which what is left in a purse goes back, and what will be needed is drawn."""

DrawFrom = Callable[[str, dict[str, Draw]], Awaitable[dict[str, Grant]]]
"""Draws from tenants' accounts, for the ingress of this id."""


@dataclass(slots=True)
class Usage:
    """What a call has used."""

    num_tokens: int = 0
    """Prompt and output tokens."""


@dataclass(slots=True)
class _Tenant:
    config: TenantConfig
    purse: Purse
    drawing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Tenants:
    """Admits the calls of tenants with quotas; used from one event loop."""

    def __init__(
        self,
        configs: Mapping[str, TenantConfig],
        draw: DrawFrom,
        ingress_id: str,
        num_ingresses: int,
    ) -> None:
        now = time.monotonic()
        self._draw_from = draw
        self._ingress_id = ingress_id
        self._tenants = {
            name: _Tenant(config, Purse(config.quota, num_ingresses, now))
            for name, config in configs.items()
            if config.quota.is_bounded
        }
        self._alone_until_s = now
        self._drawing: asyncio.Task[None] | None = None
        self._settling: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def calling(self, name: str) -> AsyncIterator[Usage]:
        """Admit a call of a tenant until the block ends, with what it has used.

        RequestRefused if one of the tenant's quotas is used up.
        """
        usage = Usage()
        if (tenant := self._tenants.get(name)) is None:
            yield usage
            return
        charged = await self._admit(name, tenant)
        began_s = time.monotonic()
        try:
            yield usage
        finally:
            tenant.purse.settle(charged, usage.num_tokens, time.monotonic() - began_s)
            if tenant.purse.hoards:
                task = asyncio.create_task(self._put_back(name, tenant))
                self._settling.add(task)
                task.add_done_callback(self._settling.discard)

    async def _admit(self, name: str, tenant: _Tenant) -> float:
        """The tokens that a call is charged in advance."""
        if self._drawing is None:
            self._drawing = asyncio.create_task(self._draw_all())
        purse = tenant.purse
        while (charged := purse.admit()) is None:
            if shortage := purse.shortage(time.monotonic()):
                quota = f"tenants.{name}.{tenant.config.explain(shortage.lacking)}"
                raise RequestRefused(Refused(RefusalReason.QUOTA, shortage.retry_after_s, quota))
            async with tenant.drawing:
                if not (purse.pays or purse.shortage(time.monotonic())):
                    await self._draw({name: tenant}, has_call=True)
        return charged

    async def _put_back(self, name: str, tenant: _Tenant) -> None:
        async with tenant.drawing:
            if tenant.purse.hoards:
                await self._draw({name: tenant})

    async def _draw_all(self) -> None:
        """Keep purses filled while calls come, and empty while none do."""
        while True:
            await asyncio.sleep(DRAW_EVERY_S)
            used = {name: one for name, one in self._tenants.items() if not one.purse.is_empty}
            async with contextlib.AsyncExitStack() as stack:
                for tenant in used.values():
                    await stack.enter_async_context(tenant.drawing)
                if used:
                    await self._draw(used)

    async def _draw(self, tenants: Mapping[str, _Tenant], has_call: bool = False) -> None:
        """Put back what these tenants' purses have, and fill those that are in use."""
        now = time.monotonic()
        if now >= self._alone_until_s:
            draws = {name: tenant.purse.draw(has_call, now) for name, tenant in tenants.items()}
            try:
                async with asyncio.timeout(DRAW_TIMEOUT_S):
                    grants = await self._draw_from(self._ingress_id, draws)
            except (RayError, RayServeException, TimeoutError) as error:
                logger.warning("no quotas from the GlobalScheduler", extra={"error": repr(error)})
                now = time.monotonic()
                self._alone_until_s = now + ALONE_S
            else:
                for name, grant in grants.items():
                    tenants[name].purse.take(grant, time.monotonic())
                return
        for tenant in tenants.values():
            tenant.purse.refill(now)


async def _draw_nothing(_: str, draws: dict[str, Draw]) -> dict[str, Grant]:
    raise AssertionError(f"there are no quotas for {', '.join(draws)}")


NO_QUOTAS = Tenants({}, _draw_nothing, "", 1)
"""Of an app whose tenants may use all that there is."""
