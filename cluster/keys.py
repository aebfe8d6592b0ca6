"""API keys: made, kept as hashes in a file, and recognised."""

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

import pydantic
import yaml
from filelock import FileLock

from cluster.errors import ConfigError

DEFAULT_TENANT = "default"
"""The tenant of keys that name none, and of callers without a key."""
ID_BYTES, SECRET_BYTES = 5, 32
"""Random bytes of a key's id, which is no secret, and of its secret. Nobody guesses 256 bits, so
that one round of SHA-256 hides them."""
KEY = re.compile(r"xy-([0-9a-f]{10})-[A-Za-z0-9_-]{43}")
HEADER = "# API keys as hashes, written by `xyserve keys`; ingresses read changes within seconds.\n"
DURATION = re.compile(r"(\d+)([hdw])")
HOURS = {"h": 1, "d": 24, "w": 24 * 7}


class Right(StrEnum):
    """What a key lets its bearer do."""

    INFER = "infer"
    """Use the API."""
    METRICS = "metrics"
    """Read the metrics."""
    ADMIN = "admin"
    """All of it, and go before others by a negative `priority`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """What is kept of a key."""

    __pydantic_config__ = {"extra": "forbid"}

    id: str
    """Part of the key by which it is found and named; no secret."""
    sha256: str
    """Hash of the whole key, in hexadecimal."""
    tenant: str = DEFAULT_TENANT
    rights: tuple[Right, ...] = (Right.INFER,)
    created: datetime
    expires: datetime | None = None
    """Time from which it is no longer valid."""

    def is_expired(self, now: datetime) -> bool:
        """Whether its time is over."""
        return self.expires is not None and now >= self.expires


def new_key(tenant: str, rights: Iterable[Right], expires: datetime | None) -> tuple[str, ApiKey]:
    """A new key, to be shown once, and what is kept of it."""
    key_id = secrets.token_hex(ID_BYTES)
    text = f"xy-{key_id}-{secrets.token_urlsafe(SECRET_BYTES)}"
    now = datetime.now(UTC).replace(microsecond=0)
    kept = ApiKey(
        id=key_id,
        sha256=_hash(text),
        tenant=tenant,
        rights=tuple(rights),
        created=now,
        expires=expires,
    )
    return text, kept


def find_key(keys: dict[str, ApiKey], text: str) -> ApiKey | None:
    """The key that `text` is, by its id and, in constant time, its hash."""
    match = KEY.fullmatch(text)
    kept = keys.get(match[1]) if match else None
    is_right = hmac.compare_digest(_hash(text), kept.sha256 if kept else "0" * 64)
    return kept if is_right else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def expiry(text: str, now: datetime) -> datetime:
    """The time that a user writes as a duration (`12h`, `90d`, `4w`) or a date; ValueError if it is
    neither or has passed."""
    if match := DURATION.fullmatch(text):
        return now.replace(microsecond=0) + timedelta(hours=int(match[1]) * HOURS[match[2]])
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        form = "write 12h, 90d, 4w or a date such as 2030-01-31"
        raise ValueError(f"{text!r} is no time: {form}") from None
    if (found := found if found.tzinfo else found.replace(tzinfo=UTC)) <= now:
        raise ValueError(f"{text!r} has passed")
    return found


def read_keys(path: Path) -> dict[str, ApiKey]:
    """The keys in a file, by id; ConfigError says what is wrong with it."""
    try:
        found = yaml.safe_load(path.read_text())
        keys = pydantic.TypeAdapter(list[ApiKey]).validate_python([] if found is None else found)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; make it by `xyserve keys add`") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: it is no text") from None
    except yaml.YAMLError as error:
        # Here and below without what is there: a careless user may have put keys in it.
        mark = getattr(error, "problem_mark", None)
        where = f", at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}: no YAML{where}") from None
    except pydantic.ValidationError as error:
        places = (".".join(map(str, one["loc"])) + f": {one['msg']}" for one in error.errors())
        raise ConfigError(f"{path}: {'; '.join(places)}") from None
    return {key.id: key for key in keys}


@contextlib.contextmanager
def edited_keys(path: Path) -> Iterator[dict[str, ApiKey]]:
    """The keys in a file, to be changed; written at once as a whole, by one editor at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        keys = read_keys(path) if path.exists() else {}
        yield keys
        dumped = pydantic.TypeAdapter(list[ApiKey]).dump_python(list(keys.values()), mode="json")
        text = HEADER + yaml.safe_dump(dumped, sort_keys=False)
        # In its folder: a rename replaces it at once. Readable by its owner only.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
            os.fsync(file.fileno())
        Path(file.name).replace(path)


class Keyring:
    """The keys of a file, read again when it changes."""

    def __init__(self, path: Path) -> None:
        """ConfigError if the file cannot be read now; later the last good keys stay."""
        self._path = path
        self._seen = _signature(path)
        self._keys = read_keys(path)

    @property
    def num_keys(self) -> int:
        """How many there are; with none nobody is let in."""
        return len(self._keys)

    def find(self, text: str) -> ApiKey | None:
        """The key that `text` is."""
        return find_key(self._keys, text)

    def tenants(self) -> set[str]:
        """The tenants of all keys."""
        return {key.tenant for key in self._keys.values()}

    def refresh(self) -> bool:
        """Read the file if it has changed; whether it has. ConfigError if it cannot be read."""
        if (found := _signature(self._path)) == self._seen:
            return False
        self._seen = found
        self._keys = read_keys(self._path)
        return True


def _signature(path: Path) -> tuple[int, ...]:
    """Changes with the file; a mounted secret changes by a link that leads elsewhere."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size
