"""Who calls, and whether they may."""

import asyncio
import base64
import binascii
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette._utils import get_route_path  # by which the router finds a route
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.config.auth import AuthConfig, is_loopback
from cluster.config.routes import BROWSED, right_at
from cluster.errors import ConfigError, RequestFailed
from cluster.ingress.error_answers import error_answer
from cluster.keys import DEFAULT_TENANT, KEY, Keyring, Right

logger = logging.getLogger(__name__)

CALLER = "xyserve.caller"
"""Where a request's scope has its caller."""
WATCH_S = 1.0
"""Period at which the file of the keys is looked at."""
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
"""Headers that a proxy adds, so that the caller is not who is connected."""
NO_KEY = (
    "no API key: send one as `Authorization: Bearer KEY` or `x-api-key: KEY`; the operator makes "
    "it by `xyserve keys add`"
)
WRONG_KEY = "this is no API key of this app"
NO_KEYS = (
    "this app has no API keys (auth.keys_file) and so answers programs on its own machine only; "
    "{why}. Make keys by `xyserve keys add`, or let everybody in by `auth.anonymous` in the config"
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call."""

    tenant: str = DEFAULT_TENANT
    rights: tuple[Right, ...] = (Right.ADMIN,)
    key_id: str = ""
    """Empty for one without a key."""

    def allows(self, right: Right) -> bool:
        """Whether the caller has a right."""
        return right in self.rights or Right.ADMIN in self.rights


TRUSTED = Caller()
"""A program on this machine, or one that can reach Ray."""


class CallerRefused(RequestFailed):
    """Whoever calls may not."""


class Doorkeeper:
    """Says who calls, by the key they show or the place they call from."""

    def __init__(
        self,
        config: AuthConfig,
        tenants: Collection[str],
        keyring: Keyring | None = None,
        allowed_origins: Collection[str] = (),
    ) -> None:
        """Without a `keyring` programs on this machine have all rights."""
        self._anonymous = config.anonymous
        self._tenants = tenants
        self._keyring = keyring
        self._origins = allowed_origins

    def admit(self, scope: Scope) -> Caller:
        """The caller of an HTTP request; CallerRefused if they may not make it."""
        path = get_route_path(scope)
        if (right := right_at(path)) is None:
            return Caller(rights=())
        caller = self._caller(scope, Headers(scope=scope), path)
        if not caller.allows(right):
            who = f"the key {caller.key_id} has" if caller.key_id else "callers without a key have"
            raise CallerRefused(f"{who} not the right `{right}`", HTTPStatus.FORBIDDEN)
        return caller

    def _caller(self, scope: Scope, headers: Headers, path: str) -> Caller:
        shown = shown_key(headers, scope["method"] == "GET" and path in BROWSED)
        has_form = KEY.fullmatch(shown) is not None
        if self._keyring is not None and shown and (has_form or not self._anonymous):
            return self._bearer(self._keyring, shown)
        if self._anonymous:  # also with any word that is no key: some clients must send one
            return Caller(rights=self._anonymous)
        if self._keyring is not None:
            raise CallerRefused(NO_KEY, HTTPStatus.UNAUTHORIZED)
        if why := self._comes_from_afar(scope, headers):
            raise CallerRefused(NO_KEYS.format(why=why), HTTPStatus.FORBIDDEN)
        return TRUSTED

    def _bearer(self, keyring: Keyring, shown: str) -> Caller:
        if (key := keyring.find(shown)) is None:
            raise CallerRefused(WRONG_KEY, HTTPStatus.UNAUTHORIZED)
        if key.is_expired(datetime.now(UTC)):
            raise CallerRefused(f"the key {key.id} has expired", HTTPStatus.UNAUTHORIZED)
        if key.tenant not in self._tenants:
            raise CallerRefused(
                f"the tenant of the key {key.id}, {key.tenant}, is not in `tenants` of the config",
                HTTPStatus.FORBIDDEN,
            )
        return Caller(key.tenant, key.rights, key.id)

    def _comes_from_afar(self, scope: Scope, headers: Mapping[str, str]) -> str:
        """Why the caller may be no program on this machine; empty if it is one."""
        address = (scope.get("client") or ("an unknown address",))[0]
        if not is_loopback(address):
            return f"you call from {address}"
        for name in FORWARDED:
            if name in headers:
                return f"you call through a proxy, which has sent `{name}`"
        host = _host_of(f"//{headers.get('host', '')}")
        if not is_loopback(host):  # a page on a name that leads here, in a browser on this machine
            return f"you call {host or 'no host'}, and not localhost"
        origin = headers.get("origin", "")
        is_allowed = not origin or bool({origin, "*"} & {*self._origins})
        if not is_allowed and not is_loopback(_host_of(origin)):
            return f"you call from a page of {origin}"
        return ""


def _host_of(url: str) -> str:
    """The host in a URL; empty if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def shown_key(headers: Mapping[str, str], from_browser: bool = False) -> str:
    """The key in a request's headers; a browser asks its user for a password and sends that."""
    scheme, _, text = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return text.strip()
    if scheme.lower() == "basic" and from_browser:
        try:
            return base64.b64decode(text.strip()).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return headers.get("x-api-key", "").strip()


async def watch(keyring: Keyring, tenants: Collection[str]) -> None:
    """Have a keyring follow its file."""
    while True:
        _warn_of_strangers(keyring, tenants)
        while not _refresh(keyring):
            await asyncio.sleep(WATCH_S)


def _refresh(keyring: Keyring) -> bool:
    try:
        if is_new := keyring.refresh():
            logger.info("the API keys have changed", extra={"num_keys": keyring.num_keys})
    except ConfigError as error:
        logger.error("the API keys of before remain", extra={"error": str(error)})
        return False
    return is_new


def _warn_of_strangers(keyring: Keyring, tenants: Collection[str]) -> None:
    if strangers := keyring.tenants() - {*tenants}:
        logger.warning(
            "keys are refused, because `tenants` of the config lacks their tenants",
            extra={"tenants": sorted(strangers)},
        )


class AuthorizedCalls:
    """Passes on what its caller may do, with the caller in the scope, and answers the rest."""

    def __init__(self, app: ASGIApp, doorkeeper: Doorkeeper) -> None:
        self._app = app
        self._doorkeeper = doorkeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there is no route for WebSockets
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            scope[CALLER] = self._doorkeeper.admit(scope)
        except CallerRefused as refusal:
            answer = error_answer(scope["path"], refusal.status, str(refusal))
            if refusal.status == HTTPStatus.UNAUTHORIZED:
                browsed = get_route_path(scope) in BROWSED
                answer.headers["www-authenticate"] = 'Basic realm="key"' if browsed else "Bearer"
            await answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)
