"""What a cut link and a killed node cost the streams: a program, the long form of a test.

    python -m tests.nodes.outages [cut SECONDS ... | kill]

Eight streams run on two nodes, and one of the nodes is cut off or killed.
"""

import sys
import tempfile
import time
from pathlib import Path

from tests.nodes.load import Load, Stream
from tests.nodes.network import missing
from tests.nodes.ray_nodes import RayNodes, ray_nodes

NUM_STREAMS = 8
CUTS_S = (5.0, 20.0, 40.0, 90.0)


def cut(nodes: RayNodes, unbroken: list[Stream], seconds: float) -> None:
    """Cut one node off and heal the link, with streams before and after the cut."""
    before, host = nodes.replicas(), nodes.others[0]
    load = Load(nodes.server.url, NUM_STREAMS)
    load.wait_until_begun()
    with host.cut_off():
        later = Load(nodes.server.url, NUM_STREAMS)
        time.sleep(seconds)
    show(f"cut for {seconds:g} s, streams begun before", load.ended(), unbroken)
    show(f"cut for {seconds:g} s, streams begun during", later.ended(), unbroken)
    if host.pids_of("raylet"):
        nodes.wait_until_healed()
        print("replicas are the same:", nodes.replicas() == before, flush=True)
    else:
        print("Ray has given the node up", flush=True)
        host.kill()
        rejoin(nodes)


def kill(nodes: RayNodes, unbroken: list[Stream]) -> None:
    """Kill one node, without a word to the others, and let it join again."""
    load = Load(nodes.server.url, NUM_STREAMS)
    load.wait_until_begun()
    with nodes.others[0].cut_off():
        nodes.others[0].kill()
        show("node killed", load.ended(), unbroken)
        show(
            "node killed, streams begun after",
            Load(nodes.server.url, NUM_STREAMS).ended(),
            unbroken,
        )
    rejoin(nodes)


def rejoin(nodes: RayNodes) -> None:
    """Start Ray again on a node that was lost."""
    began_s = time.monotonic()
    nodes.start(nodes.others[0])
    nodes.wait_until_running(len(nodes.others))
    print(f"all workers run {time.monotonic() - began_s:.0f} s after the node is back", flush=True)


def show(what: str, streams: list[Stream], unbroken: list[Stream]) -> None:
    """Print what became of the streams."""
    num_equal = sum(stream == other for stream, other in zip(streams, unbroken, strict=True))
    errors = sorted({stream.error for stream in streams if stream.error})
    pauses = sorted(stream.longest_pause_s for stream in streams)
    print(
        f"{what}: {num_equal} of {len(streams)} streams equal; longest pause: median "
        f"{pauses[len(pauses) // 2]:.1f} s, maximum {pauses[-1]:.1f} s {errors or ''}",
        flush=True,
    )


def main() -> None:
    """Run what the command line names, by default all."""
    if reason := missing():
        sys.exit(reason)
    what, *seconds = sys.argv[1:] or ["all"]
    with tempfile.TemporaryDirectory() as folder, ray_nodes(Path(folder), 2) as nodes:
        unbroken = Load(nodes.server.url, NUM_STREAMS).ended()
        show("nothing happens", Load(nodes.server.url, NUM_STREAMS).ended(), unbroken)
        if what in ("all", "cut"):
            for each in map(float, seconds or CUTS_S):
                cut(nodes, unbroken, each)
        if what in ("all", "kill"):
            kill(nodes, unbroken)


if __name__ == "__main__":
    main()
