"""What a running app holds of its machine: what is more after chaos than before is a leak."""

import contextlib
import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.util.state import list_actors

from cluster.ingress.protocol import AppStatus
from tests.e2e.conftest import Server

GROWS = ("logs", "metrics")
"""Folders of Ray's session in which it keeps something of each process that there was."""
SPARE_DESCRIPTORS = 25
"""Descriptors that a process may have more than before: connections that come and go."""
LOG_MONITOR = "python log_monitor.py"
"""Ray's, which keeps the logs of dead processes open until it has 200."""
MAX_LOGS = 200
MAX_ACTORS = 10_000


@dataclass(frozen=True, slots=True)
class Census:
    """One count of everything."""

    processes: Counter[str]
    """Processes of the app and of its Ray, by name; Ray's idle ones come and go."""
    actors: Counter[str]
    """Ray's live actors, by class."""
    ports: Counter[str]
    """Sockets that listen, by process."""
    descriptors: Counter[str]
    """Open descriptors, by process; the most of one process of each name."""
    files: Counter[str]
    """Files in the temp folders of the app and of its Ray, by their folder."""
    requests: Counter[str]
    """Requests on workers and ingresses, tokens outstanding, and KV blocks in use."""

    def leaks(self, after: "Census") -> list[str]:
        """What there is more of in a later count."""
        found = []
        for name in ("processes", "actors", "ports", "files", "requests"):
            before_count, after_count = getattr(self, name), getattr(after, name)
            more = after_count - before_count
            found += [
                f"{name}: {key} {before_count[key]} -> {after_count[key]}" for key in sorted(more)
            ]
        for key, num in sorted(after.descriptors.items()):
            spare = SPARE_DESCRIPTORS if key != LOG_MONITOR else MAX_LOGS
            if key in self.descriptors and num > self.descriptors[key] + spare:
                found.append(f"descriptors: {key} {self.descriptors[key]} -> {num}")
        return found


def census(server: Server) -> Census:
    """Count everything now."""
    processes: Counter[str] = Counter()
    ports: Counter[str] = Counter()
    descriptors: Counter[str] = Counter()
    for process in processes_of(server):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if (name := name_of(process)).startswith("ray::IDLE"):
                continue
            listening = [
                one for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN
            ]
            num_descriptors = process.num_fds()
            processes[name] += 1
            ports[name] += len(listening)
            descriptors[name] = max(descriptors[name], num_descriptors)
    return Census(
        processes,
        Counter(actor.class_name for actor in _actors(server)),
        ports,
        descriptors,
        _files(server),
        _requests(),
    )


def settled(server: Server, before: Census, timeout_s: float) -> Census:
    """A count without leaks, or the last one in `timeout_s`: what has just ended takes a moment."""
    give_up_s = time.monotonic() + timeout_s
    while (now := census(server)) and before.leaks(now) and time.monotonic() < give_up_s:
        time.sleep(2.0)
    return now


def processes_of(server: Server) -> list[psutil.Process]:
    """All that were started by the server, also those whose parent has died."""
    mark = f"TMPDIR={server.ray_folder}".encode()
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                # A process that has set its title may have lost its environment there.
                for one in (process, *process.children(recursive=True)):
                    found[one.pid] = one
    found.pop(os.getpid(), None)
    return list(found.values())


def name_of(process: psutil.Process) -> str:
    command = process.cmdline()
    title = " ".join(command)
    if replica := re.search(r"ServeReplica:xyserve:(\w+)", title):
        return replica[1]
    if title.startswith("ray::"):
        return title.partition(".")[0].partition(" ")[0]
    names = [Path(word).name for word in command if word and not word.startswith("-")]
    module = command[command.index("-m") + 1] if "-m" in command else ""
    return module or " ".join(names[:2]) or process.name()


def _actors(server: Server) -> list[Any]:
    found: list[Any] = list_actors(
        server.dashboard,
        filters=[("state", "!=", "DEAD")],
        limit=MAX_ACTORS,
        raise_on_missing_output=False,
    )
    return found


def _files(server: Server) -> Counter[str]:
    found: Counter[str] = Counter()
    for folder, folders, files in os.walk(server.ray_folder):
        place = Path(folder).relative_to(server.ray_folder)
        folders[:] = [name for name in folders if name not in GROWS]
        found[f"{place}/"] += len(files)
    return +found


def _requests() -> Counter[str]:
    found: Counter[str] = Counter()
    try:
        statuses: list[AppStatus] = (
            serve.get_app_handle("xyserve").broadcast("status").results(timeout_s=60)
        )
    except RayServeException:
        return found
    for status in statuses:
        found["live at an ingress"] += status.num_live_requests
    for worker in statuses[0].workers:
        found["running"] += worker.num_running
        found["waiting"] += worker.num_waiting
        found["outstanding tokens"] += worker.num_outstanding_tokens
        found["KV cache in use, per mille"] += round(1000 * worker.kv_cache_usage)
    return +found
