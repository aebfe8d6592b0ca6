"""The cost of observability: tokens/s with metrics, step history and logs, and without.

    python -m tests.bench.observability --json observability.json

Two apps of one worker each run on one Ray cluster, one with `metrics` on and all its logs, one
without. They take turns at the same prompts, each first checked to produce the same tokens; the
idle one leaves the machine to the other. For half of the rounds the apps swap their cores. With
`prometheus` on the path, one scrapes the cluster meanwhile, as in production. Keys of the summary:
`cost_cN` is the share of output tokens/s lost at concurrency N, mean over the pairs of turns, and
`error_cN` its standard error; `step_us` is the worker's own time for observing a step of 16
decodes, in microseconds.
"""

import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import ray
from ray import serve

from cluster.app import build_app
from cluster.config.app_config import parse_args
from cluster.observe.exporter import Exporter, WorkerMetrics
from scheduler.task import BatchPlan, Deferral, Reason, Stage, StageTask, StepReport
from tests.bench.overhead import ROUTE, by_http
from tests.bench.report import make_parser, publish, say
from tests.prometheus_server import DISCOVERY_FILE, prometheus_server
from tests.workload import questions
from workers.step_history import StepHistory

NUM_STEPS, STEPS_OF_A_REPORT = 20_000, 5
WATCHED, BARE = "watched", "bare"


def app_args(name: str, drafts: bool = False) -> dict[str, Any]:
    """Config of one contestant."""
    watch = (
        {"metrics": True, "logs": {"level": "info"}}
        if name == WATCHED
        else {"metrics": False, "logs": {"level": "error"}}
    )
    return watch | {
        "draft": {"drafters": ["suffix"]} if drafts else None,
        "worker": {"engine": {"dtype": "float32", "max_num_seqs": 32, "kv_cache_gib": 0.5}},
    }


@contextmanager
def cluster(port: int) -> Iterator[Path]:
    """A Ray cluster, and its folder."""
    with tempfile.TemporaryDirectory(prefix="xyb") as folder:
        ray.init(address="local", include_dashboard=True, log_to_driver=False, _temp_dir=folder)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        try:
            yield Path(folder)
        finally:
            serve.shutdown()
            ray.shutdown()


@contextmanager
def scraped(folder: Path) -> Iterator[None]:
    """A Prometheus that scrapes the cluster as in production, if it is installed."""
    if shutil.which("prometheus") is None:
        say("no prometheus on the path: nothing scrapes the cluster")
        yield
        return
    with prometheus_server(folder, folder / Path(DISCOVERY_FILE).name, "10s"):
        yield


@contextmanager
def apps(names: tuple[str, str], drafts: bool) -> Iterator[None]:
    """Both contestants, started one after the other, so that the first has the first core."""
    for name in names:
        serve.run(build_app(app_args(name, drafts)), name=name, route_prefix=f"/{name}")
    try:
        yield
    finally:
        for name in names:
            serve.delete(name)


async def turn(
    name: str, port: int, prompts: list[str], max_tokens: int
) -> tuple[float, list[list[int]]]:
    """Seconds and tokens of all prompts at once."""
    url = ROUTE.format(port=port).replace("/v1", f"/{name}/v1")
    model = parse_args(app_args(name)).model_name
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        return await by_http(client, model, prompts, max_tokens)


def step_us() -> float:
    """Microseconds that a worker takes to observe one step; in a process attached to Ray."""
    tasks = tuple(StageTask(f"r-{n}", Stage.DECODE, 1, 200 + n, True) for n in range(16))
    waits = tuple(Deferral(f"w-{n}", Reason.TIME) for n in range(4))
    plan = BatchPlan(tasks, waits, (), predicted_s=0.05, limit_s=0.08)
    watch, history = WorkerMetrics(Exporter("bench", enabled=True)), StepHistory()
    began_s = time.perf_counter()
    for number in range(NUM_STEPS):
        step = StepReport(
            step=number,
            began_s=0.0,
            plan=plan,
            tasks=tasks,
            measured_s=0.05,
            decided_s=0.001,
            num_new_tokens=dict.fromkeys((t.request_id for t in tasks), 1),
        )
        watch.add_step(step)
        history.add(step)
        if number % STEPS_OF_A_REPORT == 0:
            watch.export(None)
    return (time.perf_counter() - began_s) / NUM_STEPS * 1e6


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="pairs of turns on each core")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument(
        "--drafts", action="store_true", help="with draft workers, which add to the noise"
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--port", type=int, default=8124)
    options = parser.parse_args()
    seconds: dict[int, dict[str, list[float]]] = {
        concurrency: {WATCHED: [], BARE: []} for concurrency in options.concurrency
    }
    with ExitStack() as stack:
        folder = stack.enter_context(cluster(options.port))
        stack.enter_context(scraped(folder))
        summary: dict[str, float | bool] = {"step_us": step_us()}
        for names in ((WATCHED, BARE), (BARE, WATCHED)):
            with apps(names, options.drafts):
                for concurrency, of_apps in seconds.items():
                    prompts = questions(concurrency)

                    def run(name: str, prompts: list[str] = prompts) -> tuple[float, Any]:
                        return asyncio.run(turn(name, options.port, prompts, options.max_tokens))

                    if run(WATCHED)[1] != run(BARE)[1]:
                        raise SystemExit("the watched and the bare app differ in their tokens")
                    for index in range(options.rounds):
                        for name in names if index % 2 else names[::-1]:
                            of_apps[name].append(run(name)[0])
                    say(f"{names[0]} first, concurrency {concurrency}: done")
    rows = []
    for concurrency, of_apps in seconds.items():
        num_tokens = concurrency * options.max_tokens
        pairs = list(zip(of_apps[WATCHED], of_apps[BARE], strict=True))
        costs = [1 - bare / watched for watched, bare in pairs]
        cost, error = statistics.mean(costs), statistics.stdev(costs) / len(costs) ** 0.5
        summary |= {f"cost_c{concurrency}": cost, f"error_c{concurrency}": error}
        rows.append(
            {"concurrency": concurrency}
            | {
                f"{name} tok/s": num_tokens / statistics.median(own)
                for name, own in of_apps.items()
            }
            | {"cost": cost, "median cost": statistics.median(costs), "standard error": error}
        )
    publish("The cost of observability", rows, summary, options.json)


if __name__ == "__main__":
    main()
