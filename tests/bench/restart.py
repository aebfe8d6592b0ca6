"""How long a worker that was killed is gone, by phase, in one tree of sources or several in turns.

    python -m tests.bench.restart --tree ../before --tree . --json restart.json

Each tree serves an app with one worker, all at the same time. In each round the worker of one after
another is killed, and a request that is sent right afterwards waits for its successor. `noticed` is
the time from the death to the successor's process, `first_token` to the request's first token.
Between them are the phases that a worker logs, in seconds; a tree from before it did has none.
`cpu` is the processor time of the successor's process up to then, `memory` its resident memory in
MB.
"""

import asyncio
import os
import re
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import openai
import psutil

from tests.bench.memory import MB
from tests.bench.report import make_parser, publish, say, say_row
from tests.e2e.conftest import MODEL, WORKER, Server, serving
from workers.start import StartPhase

POLL_S = 0.02
STARTED = re.compile(r"worker started.*")
PHASE = re.compile(r"\b(\w+)_s=([\d.]+)")


class App:
    """A running app of one tree."""

    def __init__(self, tree: Path, server: Server) -> None:
        self.tree = tree
        self._server = server

    def workers(self) -> set[int]:
        """Process ids of its workers."""
        return {pid for pid, name in self._server.replicas().items() if name == "Worker"}

    def phases(self, pid: int) -> dict[str, float]:
        """What a worker logged of its start; empty if it does not."""
        logs = self._server.ray_folder / "session_latest" / "logs"
        [log] = logs.glob(f"worker-*-{pid}.err")
        lines = STARTED.findall(log.read_text())
        return {name: float(took) for name, took in PHASE.findall(lines[-1])} if lines else {}

    def client(self) -> openai.AsyncOpenAI:
        """A client without retries of its own."""
        return openai.AsyncOpenAI(
            base_url=f"{self._server.url}/v1", api_key="none", max_retries=0, timeout=600
        )


@contextmanager
def serving_tree(tree: Path) -> Iterator[App]:
    """An app of the sources in `tree` with one worker."""
    with mock.patch.dict(os.environ, PYTHONPATH=str(tree)), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(serving(folder, num_workers=1, worker=WORKER))
        yield App(tree, server)


async def first_token(client: openai.AsyncOpenAI) -> float:
    """When a request's first token arrives."""
    answer = await client.completions.create(
        model=MODEL, prompt="Once", max_tokens=2, temperature=0, stream=True
    )
    times = [time.time() async for _ in answer]
    return times[0]


async def restart(app: App) -> dict[str, Any]:
    """Kill the worker; the figures of its successor."""
    async with app.client() as client:
        await first_token(client)
        [old] = app.workers()
        os.kill(old, signal.SIGKILL)
        killed_s = time.time()
        arrived_s = await first_token(client)
    [new] = app.workers() - {old}
    process = psutil.Process(new)
    used = process.cpu_times()
    phases = app.phases(new)
    return {
        "tree": app.tree.name,
        "first_token": arrived_s - killed_s,
        "noticed": process.create_time() - killed_s,
        **{phase.value: phases.get(phase, float("nan")) for phase in StartPhase},
        "cpu": used.user + used.system,
        "memory": process.memory_info().rss / MB,
    }


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--tree", type=Path, action="append", help="sources; default: these")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    trees = [tree.resolve() for tree in options.tree or [Path()]]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        apps = []
        for tree in trees:
            say(f"starting {tree}")
            apps.append(stack.enter_context(serving_tree(tree)))
        for _ in range(options.rounds):
            for app in apps:
                rows.append(asyncio.run(restart(app)))
                say_row(rows[-1])
        summary = {
            f"{tree.name}: {name}": statistics.median(
                row[name] for row in rows if row["tree"] == tree.name
            )
            for tree in trees
            for name in rows[0]
            if name != "tree"
        }
        publish("From a worker's death to its successor's first token", rows, summary, options.json)


if __name__ == "__main__":
    main()
