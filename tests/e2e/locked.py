"""A server with keys and tenants, for the tests and programs that need one."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai

from tests.e2e.conftest import ANSWER_TIMEOUT_S, Server, serving

PER_MINUTE = 60
TENANTS = {
    "acme": {},
    "private": {"private_cache": True},
    "bounded": {"requests_per_minute": PER_MINUTE},
    "single": {"max_concurrency": 1},
}
FOLLOWS_S = 10
"""Time in which ingresses know of a change of the keys, on a busy machine."""


@dataclass
class LockedServer:
    """A server with keys."""

    server: Server
    texts: list[str] = field(default_factory=list)
    """All keys that were ever made."""

    def keys(self, *args: str) -> str:
        """What `xyserve keys` prints."""
        command = [sys.executable, "-P", "-m", "cluster.cli.main", "keys", *args]
        done = subprocess.run([*command, str(self.server.config)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def add(self, tenant: str, *options: str) -> str:
        self.texts.append(self.keys("add", "--tenant", tenant, *options))
        return self.texts[-1]

    def client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.server.url}/v1", api_key=key, max_retries=0, timeout=ANSWER_TIMEOUT_S
        )

    def status(self, key: str, path: str = "/v1/models") -> int:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.get(self.server.url + path, headers=headers).status_code

    def wait_for_status(self, key: str, status: int) -> None:
        """Wait until both ingresses answer so."""
        give_up_s, in_a_row = time.monotonic() + FOLLOWS_S, 0
        while in_a_row < 20:
            assert time.monotonic() < give_up_s, f"not {status} everywhere"
            in_a_row = in_a_row + 1 if self.status(key) == status else 0


@contextmanager
def serving_with_keys(folder: Path, num_workers: int = 1) -> Iterator[LockedServer]:
    """A server of two ingresses, with a file for keys in `folder`."""
    keys_file = folder / "secret" / "keys"
    keys_file.parent.mkdir()
    keys_file.write_text("")
    with serving(
        folder,
        num_ingresses=2,
        num_workers=num_workers,
        draft=None,
        auth={"keys_file": str(keys_file)},
        tenants=TENANTS,
    ) as server:
        yield LockedServer(server)
