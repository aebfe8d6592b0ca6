"""What `xyserve doctor --links` looks at: whether the nodes of a running app reach each other."""

from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.cli.checks import Finding, Link, check_links
from cluster.config.serve_file import ServeFile
from cluster.errors import AppNotFound
from cluster.observe.replica import ReplicaLinks
from cluster.ray_cluster import join_ray_cluster

ASK_TIMEOUT_S = 20.0
"""Time that all replicas of a deployment have to answer; each tries its links for 3 s."""


def examine_links(serve_file: ServeFile, address: str | None) -> list[Finding]:
    """Let each replica of the running app try each stream that it has to send on.

    ConnectionError without a Ray cluster at `address`, AppNotFound without the app.
    """
    join_ray_cluster(address)
    app, has_drafts = serve_file.app_name, serve_file.config.draft is not None
    if app not in serve.status().applications:
        raise AppNotFound(f"no app {app!r} on this Ray cluster; deploy it, then check its links")
    ingresses, _ = _ask(app, "Ingress", [])
    draft_workers, silent_draft_workers = _ask(app, "DraftWorker", []) if has_drafts else ([], 0)
    listening = [replica.endpoint for replica in (*ingresses, *draft_workers)]
    workers, silent_workers = _ask(app, "Worker", listening)
    peers = [replica.endpoint for replica in draft_workers]
    draft_workers, _ = _ask(app, "DraftWorker", peers) if has_drafts else ([], 0)
    names = {replica.endpoint: replica.name for replica in (*ingresses, *draft_workers)}
    links = [
        Link(sender.name, sender.address, names[endpoint], endpoint, fault)
        for sender in (*workers, *draft_workers)
        for endpoint, fault in sender.faults.items()
    ]
    num_silent = silent_workers + silent_draft_workers
    return check_links(links, num_silent, serve_file.config.stream_ports)


def _ask(app: str, deployment: str, endpoints: Sequence[str]) -> tuple[list[ReplicaLinks], int]:
    """What each replica finds of these endpoints, and how many replicas do not answer."""
    handle: Any = serve.get_deployment_handle(deployment, app)
    try:
        answers = handle.broadcast("links", list(endpoints)).results(
            timeout_s=ASK_TIMEOUT_S, return_exceptions=True
        )
    except (RayError, RayServeException, TimeoutError):
        return [], 1
    found = [answer for answer in answers if isinstance(answer, ReplicaLinks)]
    return found, len(answers) - len(found)
