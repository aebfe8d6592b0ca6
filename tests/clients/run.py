"""Clients of the ecosystem, each doing a realistic job with a running server.

Each client gets an environment of its own (below .venv-clients/, from PyPI and npm; about 3 GB for
all, kept for the next run) and one job, a file next to this one. They run one after another. A job
passes when all of its tests do, and when it leaves no request behind.

  python -m tests.clients.run                            start a server, run every job
  python -m tests.clients.run --only langchain litellm   only some
  python -m tests.clients.run --url http://127.0.0.1:8000   with a server that runs already
  python -m tests.clients.run --write                    put the results into tests/README.md
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import CalledProcessError, TimeoutExpired
from xml.etree import ElementTree

import httpx

from tests.clients.clients import CLIENTS, Client
from tests.clients.environment import Environment
from tests.test_imports import ROOT

README = ROOT / "tests" / "README.md"
BEGIN, END = "<!-- the results of the clients begin -->\n", "<!-- and end -->\n"
IDLE_TIMEOUT_S = 60


@dataclass(frozen=True)
class Result:
    """What came of one client's job."""

    client: Client
    num_passed: int
    num_tests: int
    faults: tuple[str, ...]
    seconds: float

    @property
    def words(self) -> str:
        return f"{self.num_passed} of {self.num_tests}"


class Target:
    """The server that the jobs talk to."""

    def __init__(self, url: str, ray_address: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._ray_address = ray_address
        [model] = httpx.get(f"{self.url}/v1/models", timeout=60).raise_for_status().json()["data"]
        self.env = os.environ | {
            "XYSERVE_URL": self.url,
            "XYSERVE_MODEL": model["id"],
            "XYSERVE_MODEL_FOLDER": model["root"],
        }

    def faults(self) -> list[str]:
        """What is wrong with the server after a job."""
        if (status := httpx.get(f"{self.url}/health", timeout=60).status_code) != 200:
            return [f"/health answers {status}"]
        if self._ray_address and (left := self._num_left()):
            return [f"{left} requests run on after their client has gone"]
        return []

    def _num_left(self) -> int:
        """Live requests, once a job's last aborts have had their time."""
        from cluster.client import XYServe

        with XYServe.connect(self._ray_address) as handle:
            give_up_s = time.monotonic() + IDLE_TIMEOUT_S
            while (left := handle.status().num_live_requests) and time.monotonic() < give_up_s:
                time.sleep(0.5)
        return left


@contextmanager
def own_server() -> Iterator[Target]:
    """A server as `make serve` starts it, on free ports, with a Ray of its own."""
    import yaml

    from tests.e2e.conftest import free_port, running

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "app.yaml"
        document = yaml.safe_load((ROOT / "deploy" / "local.yaml").read_text())
        document["http_options"]["port"] = free_port()
        config.write_text(yaml.safe_dump(document))
        with running(config) as server:
            yield Target(server.url, server.ray_address)


def run_job(client: Client, target: Target, timeout_s: float, keep: bool) -> Result:
    """Make the client's environment, run its job and read what came of it."""
    environment = Environment(client)
    begin_s = time.monotonic()
    num_passed = num_tests = 0
    faults: list[str] = []
    try:
        environment.make()
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            environment.run(report, target.env, timeout_s)
            num_passed, num_tests, faults = read_report(report)
    except (CalledProcessError, OSError) as error:
        faults = [f"not installed: {error}"]
    except TimeoutExpired:
        faults = [f"not done after {timeout_s:.0f} s"]
    if not keep:
        environment.delete()
    faults += target.faults()
    return Result(client, num_passed, num_tests, tuple(faults), time.monotonic() - begin_s)


def read_report(report: Path) -> tuple[int, int, list[str]]:
    """Of a report in JUnit's form: how many tests passed, how many there are, the others' names."""
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    wrong = {"failure", "error", "skipped"}
    others = [str(case.get("name")) for case in cases if wrong & {child.tag for child in case}]
    return len(cases) - len(others), len(cases), others if cases else ["no test was run"]


def rows(words: dict[str, str]) -> str:
    """The table of all clients, with the results in these words."""
    lines = ["| client | version | its job | passed |", "|---|---|---|---|"]
    lines += [
        f"| {client.title} | {client.version} | {client.job} | {words[client.name]} |"
        for client in CLIENTS
    ]
    return "\n".join(lines) + "\n"


def publish(results: Sequence[Result], write: bool) -> list[str]:
    """Compare the table in the README with the results, or write it; what differs."""
    before, begin, rest = README.read_text().partition(BEGIN)
    old, end, after = rest.partition(END)
    words = {result.client.name: result.words for result in results}
    if words.keys() != {client.name for client in CLIENTS}:
        return []
    if write:
        README.write_text(f"{before}{begin}\n{rows(words)}\n{end}{after}")
        return []
    wrong = "tests/README.md has other clients or results; --write replaces its table"
    return [wrong] if old.strip() != rows(words).strip() else []


def main() -> None:
    """Run the jobs and say what came of them."""
    names = [client.name for client in CLIENTS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.clients.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    each = f"jobs to run, of: {', '.join(names)}"
    add("--only", nargs="+", choices=names, default=names, metavar="NAME", help=each)
    add("--url", help="a running server; without it one is started")
    add("--timeout", type=float, default=900, help="seconds for one job (%(default)s)")
    add("--delete", action="store_true", help="delete each environment after its job")
    add("--write", action="store_true", help="write the table in tests/README.md")
    add("--json", type=Path, help="file for the results")
    options = parser.parse_args()

    chosen = [client for client in CLIENTS if client.name in options.only]
    results = []
    with nullcontext(Target(options.url)) if options.url else own_server() as target:
        for number, client in enumerate(chosen, 1):
            print(f"\n[{number}/{len(chosen)}] {client.title}: {client.job}", flush=True)
            results.append(run_job(client, target, options.timeout, keep=not options.delete))
        faults = [f"{each.client.name}: {fault}" for each in results for fault in each.faults]
        faults += publish(results, options.write)
        print()
        for result in results:
            print(f"{result.client.title:20} {result.words:>9} {result.seconds:6.0f} s")
        print("\n".join(faults) or "Every job passed.")
        if options.json:
            options.json.write_text(json.dumps([asdict(each) for each in results], default=str))
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
