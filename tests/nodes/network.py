"""Network namespaces of one machine, as hosts on one switch that nothing else is connected to.

Host 0 is this machine itself, on the switch too. The addresses are of 198.18.0.0/15, which is set
aside for tests of networks (RFC 2544).
"""

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NAME = re.compile(r"xy([0-9a-f]+)[a-z][0-9]*")
"""Namespaces, bridges and links of ours, with the pid of their maker in hex."""
PACKAGES = {"ip": "iproute2", "nft": "nftables"}
"""Packages by the command in them that is used here."""
SWITCH_MAC = "02:00:00:00:00:fe"
"""Address of this machine on the switch, of those that anybody may use."""
SIOCETHTOOL = 0x8946
OFFLOADS = (0x15, 0x17, 0x19, 0x1F, 0x24, 0x2C)
"""The commands that set what a network card may leave to the next one: checksums (rx, tx), and to
cut data into frames (sg, tso, gso, gro)."""


@dataclass(frozen=True)
class Host:
    """A namespace with an address of its own."""

    name: str
    address: str
    link: str
    """Our end of its link to the switch."""
    switch: str

    def command(self, *args: str) -> list[str]:
        """The command line of a program that runs on this host."""
        return ["ip", "netns", "exec", self.name, *args]

    def pids(self) -> list[int]:
        """All processes of this host."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.name).split()]

    def pids_of(self, program: str) -> list[int]:
        """Those that run a program of this name."""
        found = []
        for pid in self.pids():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == program:
                    found.append(pid)
        return found

    def kill(self) -> None:
        """End all its processes at once, as a loss of power does."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def listening(self) -> set[tuple[str, int]]:
        """Addresses and ports at which its processes listen."""
        ends = [line.split()[3].rpartition(":") for line in self._sockets("--listening")]
        return {(address.strip("[]"), int(port)) for address, _, port in ends}

    def _sockets(self, *which: str) -> list[str]:
        """Its TCP sockets: state, bytes received and not read, bytes to be acknowledged, ends."""
        options = ("--tcp", "--numeric", "--no-header")
        return _run(*self.command("ss", *options, *which)).splitlines()

    def has_unsent(self) -> bool:
        """Whether a connection of its processes waits for data to be acknowledged."""
        open_ones = [line.split() for line in self._sockets() if line.startswith("ESTAB")]
        return any(int(num_unsent) for _, _, num_unsent, *_ in open_ones)

    def close_ports(self, open_ports: Sequence[str]) -> None:
        """Let in only what connects to these ports, or ranges such as `1-5`; lose all else."""
        rules = [
            "add table inet firewall",
            "delete table inet firewall",  # the rules before these
            "table inet firewall {",
            "chain input {",
            "type filter hook input priority 0",
            'iifname "eth0" ct state established,related accept',
            f'iifname "eth0" tcp dport {{ {", ".join(open_ports)} }} accept',
            'iifname "eth0" meta l4proto tcp drop',
            "}",
            "}",
        ]
        command = self.command("nft", "-f", "-")
        subprocess.run(command, input="\n".join(rules) + "\n", text=True, check=True)

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """Lose everything on its link, in silence: no host is told."""
        _run("ip", "link", "set", self.link, "nomaster")
        try:
            yield
        finally:
            _run("ip", "link", "set", self.link, "master", self.switch)

    @contextlib.contextmanager
    def weather(self, delay_s: float, loss: float) -> Iterator[None]:
        """Delay each frame on its link, either way, and lose a share of them."""
        netem = ("netem", "delay", f"{delay_s * 1e3:g}ms", "loss", f"{loss * 100:g}%")
        ours = ["tc", "qdisc", "add", "dev", self.link, "root", *netem]
        if shutil.which("tc") and subprocess.run(ours, capture_output=True).returncode == 0:
            yield from self._netem(netem)
        else:
            yield from self._relayed(delay_s, loss)

    def _netem(self, netem: tuple[str, ...]) -> Iterator[None]:
        """In the kernel, which has it already on our end of the link."""
        qdisc = ("tc", "-n", self.name, "qdisc")
        _run(*qdisc, "add", "dev", "eth0", "root", *netem)
        try:
            yield
        finally:
            _run(*qdisc, "del", "dev", "eth0", "root")
            _run("tc", "qdisc", "del", "dev", self.link, "root")

    def _relayed(self, delay_s: float, loss: float) -> Iterator[None]:
        """For kernels without netem: a program between its link and the switch."""
        near, far = f"{self.link}r", f"{self.link}s"
        _run("ip", "link", "add", near, "type", "veth", "peer", "name", far)
        try:
            for link in (near, far):
                forbid_offloads(link)
                _run("ip", "link", "set", link, "up")
            relay = subprocess.Popen(
                [
                    sys.executable,
                    *("-m", "tests.nodes.relay", self.link, near, str(delay_s), str(loss)),
                ],
                stdout=subprocess.PIPE,
            )
            assert relay.stdout is not None
            relay.stdout.readline()  # it listens
            _run("ip", "link", "set", self.link, "nomaster")
            _run("ip", "link", "set", far, "master", self.switch)
            try:
                yield
                assert relay.poll() is None, "the relay has ended"
            finally:
                relay.kill()
                relay.wait()
                relay.stdout.close()
                _run("ip", "link", "set", self.link, "master", self.switch)
        finally:
            _run("ip", "link", "del", near)


@dataclass(frozen=True)
class Network:
    """Hosts on one switch."""

    hosts: list[Host]
    here: str
    """The address of this machine on the switch."""


@contextlib.contextmanager
def network(num_hosts: int) -> Iterator[Network]:
    """A network of this many hosts; afterwards no process, namespace or link of it is left."""
    _remove_leftovers()
    tag, subnet = f"xy{os.getpid():x}", f"198.18.{os.getpid() % 256}"
    bridge = f"{tag}b"
    try:
        # Of its own it takes that of one of its links, and another one when that is cut.
        _run("ip", "link", "add", bridge, "address", SWITCH_MAC, "type", "bridge")
        _run("ip", "addr", "add", f"{subnet}.254/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        forbid_offloads(bridge)
        hosts = [_add_host(f"{tag}n{n}", f"{subnet}.{n}", bridge) for n in range(1, num_hosts + 1)]
        yield Network(hosts, f"{subnet}.254")
    finally:
        _remove(tag)


def _add_host(name: str, address: str, bridge: str) -> Host:
    host = Host(name, address, link=f"{name}l", switch=bridge)
    _run("ip", "netns", "add", name)
    _run("ip", "link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", name)
    _run("ip", "link", "set", host.link, "master", bridge, "up")
    _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
    for link in ("lo", "eth0"):
        _run("ip", "-n", name, "link", "set", link, "up")
    forbid_offloads(host.link)
    subprocess.run(host.command(sys.executable, "-m", "tests.nodes.network", "eth0"), check=True)
    return host


def missing() -> str:
    """What this machine lacks or forbids of a network of ours; empty if nothing."""
    if os.getuid() != 0:
        return "network namespaces need root"
    if packages := missing_packages():
        return f"network namespaces need {' and '.join(packages)}: apt-get install them"
    try:
        with network(1):
            return ""
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


def missing_packages() -> list[str]:
    """Packages that have the commands for a network, and are not installed."""
    return [package for command, package in PACKAGES.items() if not shutil.which(command)]


def forbid_offloads(link: str) -> None:
    """Let each frame on a link be whole, with its checksum, as on a cable."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for command in OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP16x", link.encode(), ctypes.addressof(value))
            with contextlib.suppress(OSError):  # not every kind of link has all of them
                fcntl.ioctl(control, SIOCETHTOOL, request)


def _remove_leftovers() -> None:
    """Remove what test runs have left that were killed."""
    names = set(os.listdir("/sys/class/net"))
    with contextlib.suppress(FileNotFoundError):
        names |= set(os.listdir("/run/netns"))
    for pid in {match[1] for name in names if (match := NAME.match(name))}:
        if not Path(f"/proc/{int(pid, 16)}").exists():
            _remove(f"xy{pid}")


def _remove(tag: str) -> None:
    """Remove all processes, namespaces and links whose names begin so."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir("/run/netns"):
            if name.startswith(f"{tag}n"):
                Host(name, "", "", "").kill()
                _run("ip", "netns", "del", name)
    for name in os.listdir("/sys/class/net"):
        if name.startswith(tag) and Path(f"/sys/class/net/{name}").exists():
            # The other end of one that was just removed goes by itself, a little later.
            subprocess.run(["ip", "link", "del", name], capture_output=True)


def _run(*args: str) -> str:
    return subprocess.run(args, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    forbid_offloads(sys.argv[1])
