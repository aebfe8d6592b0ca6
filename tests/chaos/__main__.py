"""Chaos on a server of its own; see `python -m tests.chaos --help`."""

import argparse
import asyncio
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import ray

from cluster.client import XYServe
from tests.chaos.chaos import Chaos, Settings, is_clean, to_json
from tests.chaos.kinds import KINDS, Call
from tests.chaos.monkey import WEIGHTS
from tests.e2e.conftest import serving

NUM_INGRESSES = 2
NUM_DRAFT_WORKERS = 2


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Send requests of all kinds to a server of two workers, two ingresses and two "
        "draft workers while these and the GlobalScheduler are killed, stopped and continued at "
        "random, one of each kind always staying. The exit code is 1 if a request was lost, "
        "answered twice, answered otherwise than on the calm server, or failed, or if anything "
        "was left behind.",
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the summary")
    parser.add_argument("--clients", type=int, default=6, help="requests at any time")
    parser.add_argument("--every", type=float, default=3.0, help="mean seconds between two hits")
    parser.add_argument("--kills", type=int, default=0, help="go on until so many have died")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--targets",
        default=",".join(WEIGHTS),
        help="kinds of replicas to hit; empty: none, as a check of the run itself",
    )
    parser.add_argument("--variants", type=int, default=2, help="prompts of each kind of request")
    parser.add_argument("--only", default="", help="names of kinds of requests, by commas")
    args = parser.parse_args()
    only = set(filter(None, args.only.split(",")))
    if unknown := only - {kind.name for kind in KINDS}:
        parser.error(f"no kinds of requests: {', '.join(sorted(unknown))}")
    targets = {name: WEIGHTS[name] for name in args.targets.split(",") if name}
    chosen = [kind for kind in KINDS if not only or kind.name in only]
    calls = [Call(kind, variant) for kind in chosen for variant in range(args.variants)]
    settings = Settings(60 * args.minutes, args.seed, args.clients, args.every, targets, args.kills)
    began_s = time.monotonic()

    def print_line(text: str) -> None:
        print(f"[{time.monotonic() - began_s:7.1f}] {text}", flush=True)

    print_line(f"starting a server for {len(chosen)} kinds of requests")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        server = stack.enter_context(
            serving(
                Path(folder),
                num_workers=args.workers,
                num_ingresses=NUM_INGRESSES,
                draft={"drafters": ["suffix"], "num_workers": NUM_DRAFT_WORKERS},
            )
        )
        stack.callback(ray.shutdown)  # before the server ends, or Ray ends this process
        handle = stack.enter_context(XYServe.connect(server.ray_address))
        print_line(f"serving at {server.url}; logs are in {server.ray_folder}")
        summary = asyncio.run(Chaos(server, handle, calls, print_line).run(settings))
    text = to_json(summary)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0 if is_clean(summary) else 1


if __name__ == "__main__":
    raise SystemExit(main())
