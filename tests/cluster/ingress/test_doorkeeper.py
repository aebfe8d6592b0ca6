"""Who calls, by their key or, where there are no keys, by the place they call from."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.auth import AuthConfig, is_loopback
from cluster.ingress.auth import CallerRefused, Doorkeeper
from cluster.keys import Keyring, Right, edited_keys, new_key


def scope_of(path: str = "/v1/models", client: str | None = "127.0.0.1", **headers: str) -> Any:
    named = {"host": "localhost:8000"} | headers
    return {
        "type": "http",
        "method": "GET",
        "path": path,
        "client": client and (client, 1),
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in named.items()],
    }


WITHOUT_KEYS = Doorkeeper(AuthConfig(), ["default"])


@pytest.mark.parametrize(
    "scope",
    [
        scope_of(),
        scope_of(client="127.8.8.8"),
        scope_of(client="::1", host="[::1]:8000"),
        scope_of(client="::ffff:127.0.0.1"),
        scope_of(host="127.0.0.1"),
        scope_of(host="LOCALHOST:8000"),
        scope_of(origin="http://localhost:3000"),
        scope_of(authorization="Bearer none"),
        scope_of("/health", "10.0.0.9", host="a.example", x_forwarded_for="10.0.0.1"),
    ],
)
def test_without_keys_programs_of_the_same_machine_are_served(scope: Any) -> None:
    WITHOUT_KEYS.admit(scope)


@pytest.mark.parametrize(
    ("scope", "why"),
    [
        (scope_of(client="10.0.0.9"), "you call from 10.0.0.9"),
        (scope_of(client="2001:db8::1"), "you call from 2001:db8::1"),
        (scope_of(client=None), "you call from an unknown address"),
        (
            scope_of(x_forwarded_for="127.0.0.1"),
            "through a proxy, which has sent `x-forwarded-for`",
        ),
        (scope_of(forwarded="for=1.2.3.4"), "through a proxy, which has sent `forwarded`"),
        (scope_of(via="1.1 front"), "through a proxy, which has sent `via`"),
        (scope_of(host="rebound.example:8000"), "you call rebound.example, and not localhost"),
        (scope_of(host="127.0.0.1.evil.example"), "you call 127.0.0.1.evil.example, and not"),
        (scope_of(host=""), "you call no host"),
        (scope_of(host="[::1"), "you call no host"),
        (scope_of(origin="http://[localhost"), "from a page of http://[localhost"),
        (scope_of(origin="https://evil.example"), "from a page of https://evil.example"),
        (scope_of(origin="null"), "from a page of null"),
    ],
)
def test_without_keys_nobody_else_is(scope: Any, why: str) -> None:
    with pytest.raises(CallerRefused) as refused:
        WITHOUT_KEYS.admit(scope)
    assert refused.value.status == 403
    assert why in str(refused.value)
    assert "xyserve keys add" in str(refused.value)


def test_a_file_without_keys_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("")
    doorkeeper = Doorkeeper(AuthConfig(), ["default"], Keyring(tmp_path / "keys"))

    for scope in (scope_of(), scope_of(authorization="Bearer none")):
        with pytest.raises(CallerRefused) as refused:
            doorkeeper.admit(scope)
        assert refused.value.status == 401


def test_whoever_shows_no_key_has_the_rights_that_the_config_gives(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    wrong, (text, key) = new_key("free", (), None)[0], new_key("free", (Right.INFER,), None)
    with edited_keys(path) as keys:
        keys[key.id] = key
    auth = AuthConfig(keys_file=str(path), anonymous=(Right.METRICS,))
    doorkeeper = Doorkeeper(auth, ["default", "free"], Keyring(path))

    assert doorkeeper.admit(scope_of("/metrics", "10.0.0.9")).tenant == "default"
    with pytest.raises(CallerRefused, match="callers without a key have not the right `infer`"):
        doorkeeper.admit(scope_of(client="10.0.0.9"))
    # A word that some client must send is no key, and a wrong key is not taken for one.
    assert doorkeeper.admit(scope_of("/metrics", authorization="Bearer none")).rights == (
        Right.METRICS,
    )
    with pytest.raises(CallerRefused, match="this is no API key"):
        doorkeeper.admit(scope_of("/metrics", authorization=f"Bearer {wrong}"))
    shown = f"Bearer {text}"
    assert doorkeeper.admit(scope_of(client="10.0.0.9", authorization=shown)).tenant == "free"


@given(st.binary(max_size=200))
def test_no_bytes_are_a_key(shown: bytes) -> None:
    ring: Any = NoKeys()
    doorkeeper = Doorkeeper(AuthConfig(), ["default"], ring)
    scope = scope_of()
    for name in (b"authorization", b"x-api-key"):
        with pytest.raises(CallerRefused):
            doorkeeper.admit(scope | {"headers": [(name, b"Bearer " + shown), (name, shown)]})


class NoKeys:
    """A keyring of an empty file."""

    def find(self, text: str) -> None:
        assert isinstance(text, str)


@pytest.mark.parametrize(
    "host", ["", "a", "0.0.0.0", "1.2.3.4", "localhost.evil.example", "0x7f.1"]
)
def test_other_hosts_are_no_loopback(host: str) -> None:
    assert not is_loopback(host)
