"""What is left of all tenants' quotas."""

from collections.abc import Mapping

from scheduler.quota import Account, Draw, Grant, Quota


class Accounts:
    """The accounts of all tenants, by name; one is opened at the first draw from it."""

    def __init__(self, quotas: Mapping[str, Quota]) -> None:
        self._quotas = quotas
        self._accounts: dict[str, Account] = {}

    def draw(self, ingress_id: str, draws: Mapping[str, Draw], now: float) -> dict[str, Grant]:
        """Lease parts of tenants' quotas to an ingress, in place of what it has left of others."""
        return {
            tenant: self._account(tenant, draw, now).draw(ingress_id, draw, now)
            for tenant, draw in draws.items()
        }

    def _account(self, tenant: str, draw: Draw, now: float) -> Account:
        if tenant not in self._accounts:
            self._accounts[tenant] = Account(self._quotas[tenant], draw.levels, now)
        return self._accounts[tenant]
