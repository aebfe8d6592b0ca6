"""The processes of an app on this machine, with the memory and descriptors that each holds."""

import re
from contextlib import suppress
from dataclasses import dataclass

import psutil

MIB = 1 << 20


@dataclass(frozen=True)
class Usage:
    """What one process holds."""

    memory_bytes: int
    """Resident, without what it shares with others."""
    num_fds: int


class AppProcesses:
    """The replicas and the proxy of the app behind a port, and Ray's processes on its node."""

    def __init__(self, port: int) -> None:
        [proxy] = {
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
            and getattr(connection.laddr, "port", 0) == port
            and connection.pid
        }
        raylet = psutil.Process(proxy).parent()
        assert raylet is not None
        self._raylet = raylet
        self.names: dict[int, str] = {proxy: "proxy", raylet.pid: "raylet"}
        up = raylet.parent()
        for process in [*raylet.children(), *(up.children() if up else ())]:
            if name := _name(process):
                self.names.setdefault(process.pid, f"{name} {process.pid}")

    def usage(self) -> dict[str, Usage]:
        """What each holds now, by name; those that have ended are left out."""
        found = {}
        for pid, name in self.names.items():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                memory = process.memory_info()
                found[name] = Usage(memory.rss - memory.shared, process.num_fds())
        return found


def _name(process: psutil.Process) -> str:
    title = " ".join(process.cmdline())
    if replica := re.match(r"ray::ServeReplica:\w+:(\w+)", title):
        return replica.group(1)
    if actor := re.match(r"ray::(ServeController|ProxyActor)", title):
        return actor.group(1)
    return "gcs_server" if "gcs_server" in title else ""
