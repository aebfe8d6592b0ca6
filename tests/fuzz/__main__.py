"""Inputs at random to every route of the API, and clients that break off, dawdle or vanish.

Requests come from the server's own OpenAPI schema (schemathesis), valid and not; from all sampling
parameters at once, with any body and headers (hypothesis); and from raw connections, many at once.
Meanwhile other clients stream an answer that is known.

  python -m tests.fuzz --inputs 10000 --seed 1 --json fuzz.json       a server of its own
  python -m tests.fuzz --url http://127.0.0.1:8000 --inputs 300 --only /v1/responses

The exit code is 1 if an input is answered with a 5xx that is no refusal with `Retry-After`, or has
its connection cut; if a stream does not end as its API says; if the other streams are not as
before; if requests are left, a process has ended, or memory or descriptors have grown. Each such
input is printed as it was sent.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import hypothesis

from tests.clients.run import Target, own_server
from tests.fuzz.answers import TIMEOUT_S, Fault, fault_of_case, fault_of_input
from tests.fuzz.others import Others
from tests.fuzz.parameters import VALID, Input, generated, inputs
from tests.fuzz.raw_clients import RawClients
from tests.fuzz.schema_cases import make_cases
from tests.processes import MIB, AppProcesses, Usage

NUM_AT_ONCE = 8
RAW_AT_ONCE = 500
RAW_SHARE = 10
"""One input in so many is a raw client."""
MAX_GROWTH_BYTES = 256 * MIB
"""Growth of a process's memory, after it has reached its usual size, that is a fault. The proxy and
the ingress go up and down by 160 MiB, which some forty bodies at a time take that are too large:
`tests.soak` sees smaller slopes."""
MAX_NEW_FDS = 16
SETTLE_S = 90.0
"""Time that a process has to give back descriptors."""


@dataclass
class Report:
    """What was sent, and what came of it."""

    seed: int
    num_inputs: int = 0
    num_streams_beside: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    warm: dict[str, Usage] = field(default_factory=dict)
    """What each process held after the first half of the inputs."""
    after: dict[str, Usage] = field(default_factory=dict)


class Fuzz:
    """Inputs to one server."""

    def __init__(self, url: str, model: str, seed: int, only: tuple[str, ...] = ()) -> None:
        self._url, self._model, self._only = url, model, only
        self._port = httpx.URL(url).port or 80
        self.report = Report(seed)

    def run(self, number: int, raw_at_once: int = RAW_AT_ONCE) -> Report:
        """Send about so many inputs; memory is looked at when the first half has had its effect."""
        began_s = time.monotonic()
        others = Others(self._url, self._model)
        processes = AppProcesses(self._port)
        seed = self.report.seed
        with others.streaming():
            self._send(number // 2, raw_at_once, seed)
            self.report.warm = processes.usage()
            self._send(number - number // 2, raw_at_once, seed + number)
        self.report.num_streams_beside = others.num_streams
        self.report.faults += others.faults
        self.report.after = self._settled(processes)
        self.report.faults += growth_faults(self.report.warm, self.report.after)
        self.report.seconds = time.monotonic() - began_s
        return self.report

    def _send(self, number: int, raw_at_once: int, seed: int) -> None:
        num_raw = number // RAW_SHARE
        num_schema = (number - num_raw) // 2
        # Before any is sent: hypothesis looks through the modules, of which threads import more.
        cases = list(make_cases(self._url, self._model, self._only, num_schema, seed))
        self._answer(partial(_tried, fault_of_case), cases)
        with httpx.Client(base_url=self._url, timeout=TIMEOUT_S) as client:
            self._answer(
                partial(_tried, partial(fault_of_input, client)),
                self._inputs(number - num_raw - num_schema, seed),
            )
        while num_raw > 0 and raw_at_once:
            clients = RawClients(self._url, self._model, seed + num_raw)
            asyncio.run(clients.run(raw_at_once))
            self._note(raw_at_once, clients.faults)
            num_raw -= raw_at_once

    def _answer(self, look: Any, sent: Iterable[Any]) -> None:
        with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            for fault in pool.map(look, sent):
                self._note(1, [str(fault)] if fault else [])

    def _note(self, num_inputs: int, faults: list[str]) -> None:
        self.report.num_inputs += num_inputs
        self.report.faults += faults
        for fault in faults:
            print(fault, flush=True)

    def _inputs(self, number: int, seed: int) -> Iterator[Input]:
        paths = [path for path in VALID if not self._only or path in self._only]
        for path in paths:
            yield from _drawn(path, self._model, -(-number // len(paths)), seed)

    def _settled(self, processes: AppProcesses) -> dict[str, Usage]:
        """What each process holds once descriptors have been given back."""
        give_up_s = time.monotonic() + SETTLE_S
        while True:
            found = processes.usage()
            faults = growth_faults(self.report.warm, found)
            if time.monotonic() > give_up_s or not any("descriptors" in one for one in faults):
                return found
            time.sleep(1.0)


def _tried(look: Any, sent: Any) -> Fault | None:
    try:
        found: Fault | None = look(sent)
    except Exception as error:  # any kind: the tools' own, for what they cannot send
        found = Fault(str(sent)[:2000], f"it could not be sent or read: {error!r}")
    return found


def growth_faults(before: dict[str, Usage], after: dict[str, Usage]) -> list[str]:
    """What has ended, and what holds more than it should."""
    found = [f"{name} has ended" for name in before.keys() - after.keys()]
    for name in before.keys() & after.keys():
        memory = after[name].memory_bytes - before[name].memory_bytes
        if memory > MAX_GROWTH_BYTES:
            found.append(f"the memory of {name} has grown by {memory / MIB:.0f} MiB")
        if (fds := after[name].num_fds - before[name].num_fds) > MAX_NEW_FDS:
            found.append(f"{name} has {fds} more descriptors")
    return found


def _drawn(path: str, model: str, number: int, seed: int) -> list[Input]:
    found: list[Input] = []

    @generated(number, seed)
    @hypothesis.given(given=inputs(path, model))
    def collect(given: Input) -> None:
        found.append(given)

    collect()
    return found


def table(report: Report) -> str:
    """A line for each process, with its memory and descriptors before and after."""
    lines = [f"{'process':28} {'MiB':>8} {'after':>8} {'fds':>6} {'after':>6}"]
    for name, warm in report.warm.items():
        if after := report.after.get(name):
            lines.append(
                f"{name:28} {warm.memory_bytes / MIB:8.1f} {after.memory_bytes / MIB:8.1f} "
                f"{warm.num_fds:6} {after.num_fds:6}"
            )
    return "\n".join(lines)


def main() -> None:
    """Send the inputs and say what was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--inputs", type=int, default=2000, help="about how many (%(default)s)")
    add("--seed", type=int, default=0, help="another one makes other inputs")
    add("--only", nargs="+", default=(), metavar="PATH", help="only these paths")
    add("--url", help="a server that runs on this machine; without it one is started")
    add("--json", type=Path, help="file for the report")
    options = parser.parse_args()

    with nullcontext(Target(options.url)) if options.url else own_server() as target:
        fuzz = Fuzz(target.url, target.env["XYSERVE_MODEL"], options.seed, tuple(options.only))
        report = fuzz.run(options.inputs)
        report.faults += target.faults()
    print(*report.faults, sep="\n")
    print(table(report))
    print(
        f"{report.num_inputs} inputs in {report.seconds:.0f} s, "
        f"{report.num_streams_beside} streams beside, {len(report.faults)} faults"
    )
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=1))
    raise SystemExit(bool(report.faults))


if __name__ == "__main__":
    main()
