"""API keys: what is kept of them, and who finds them again."""

import os
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.keys import (
    KEY,
    ApiKey,
    Keyring,
    Right,
    edited_keys,
    expiry,
    find_key,
    new_key,
    read_keys,
)

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def add(path: Path, tenant: str = "acme", *rights: Right) -> tuple[str, ApiKey]:
    text, key = new_key(tenant, rights or (Right.INFER,), None)
    with edited_keys(path) as keys:
        keys[key.id] = key
    return text, key


def test_a_key_is_found_by_its_text_and_kept_as_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    text, key = add(path, "acme", Right.INFER, Right.METRICS)
    add(path, "other")

    assert find_key(read_keys(path), text) == key
    assert KEY.fullmatch(text)
    assert text[14:] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-1] + ("a" if text[-1] != "a" else "b"),
        lambda text: text + "a",
        lambda text: text.upper(),
        lambda text: "xy-0123456789" + text[13:],
        lambda text: text[:14],
        lambda text: f" {text}",
        lambda text: f"{text}\n",
        lambda text: "",
        lambda text: "none",
        lambda text: "\udcff" * 50,
        lambda text: "x" * 10**6,
    ],
)
def test_what_is_not_the_whole_key_is_none(change: object, tmp_path: Path) -> None:
    assert callable(change)
    text, _ = add(tmp_path / "keys")

    assert find_key(read_keys(tmp_path / "keys"), change(text)) is None


def test_keys_differ_in_all_that_is_secret() -> None:
    texts = {new_key("a", (), None)[0] for _ in range(1000)}

    assert len({text[14:] for text in texts}) == len({text[:13] for text in texts}) == 1000


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("12h", NOW + timedelta(hours=12)),
        ("90d", NOW + timedelta(days=90)),
        ("4w", NOW + timedelta(weeks=4)),
        ("2030-01-31", datetime(2030, 1, 31, tzinfo=UTC)),
        ("2030-01-31T12:00+01:00", datetime(2030, 1, 31, 11, tzinfo=UTC)),
    ],
)
def test_an_end_is_a_duration_or_a_date(text: str, end: datetime) -> None:
    assert expiry(text, NOW) == end
    key = new_key("a", (), end)[1]
    assert (key.is_expired(end - timedelta(seconds=1)), key.is_expired(end)) == (False, True)


@pytest.mark.parametrize("text", ["", "soon", "10", "5m", "-3d", "2029-12-31", "2030-13-01"])
def test_what_is_no_end_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no time: write|has passed"):
        expiry(text, NOW)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "it is no text"),
        (b"- xy-secret\n- [", "no YAML, at line 2"),
        (b"{}", "list"),
        (b"- {id: x}", "0.sha256"),
        (b"- {id: x, sha256: y, created: 2030-01-01, rights: [all]}", "0.rights.0"),
        (b"- {id: x, sha256: y, created: 2030-01-01, key: xy-secret}", "0.key"),
    ],
)
def test_a_file_that_is_none_of_keys_is_refused_without_what_it_holds(
    content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_bytes(content)

    with pytest.raises(ConfigError) as refused:
        read_keys(tmp_path / "keys")
    assert words in str(refused.value)
    assert "xy-secret" not in str(refused.value)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory; make it by `xyserve keys"):
        Keyring(tmp_path / "keys")


def test_a_keyring_follows_its_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    first, _ = add(path)
    ring = Keyring(path)

    second, key = add(path, "other")
    assert (ring.refresh(), ring.refresh()) == (True, False)
    assert (ring.find(second), ring.tenants(), ring.num_keys) == (key, {"acme", "other"}, 2)
    with edited_keys(path) as keys:
        del keys[key.id]
    ring.refresh()
    assert (ring.find(second), ring.find(first) is not None) == (None, True)


def test_a_keyring_keeps_its_keys_while_the_file_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    text, _ = add(path)
    ring = Keyring(path)
    content = path.read_text()

    for spoil in (lambda: path.write_text("- nonsense"), path.unlink):
        spoil()
        with pytest.raises(ConfigError):
            ring.refresh()
        assert ring.find(text)
        assert not ring.refresh()  # it says so once
    path.write_text(content)
    assert ring.refresh()


def test_a_secret_that_is_mounted_changes_by_a_link(tmp_path: Path) -> None:
    versions = [tmp_path / "1", tmp_path / "2"]
    texts = [add(version / "keys")[0] for version in versions]
    (tmp_path / "now").symlink_to(versions[0])
    ring = Keyring(tmp_path / "now" / "keys")

    (tmp_path / "next").symlink_to(versions[1])
    os.replace(tmp_path / "next", tmp_path / "now")

    assert ring.refresh()
    assert (ring.find(texts[0]), ring.find(texts[1]) is not None) == (None, True)


def test_editors_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    threads = [threading.Thread(target=add, args=(path, f"t{number}")) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert Keyring(path).tenants() == {f"t{number}" for number in range(10)}
