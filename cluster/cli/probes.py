"""What `xyserve doctor` looks at: this machine's software, hardware, ports and model files."""

import errno
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Literal

import httpx
import psutil

from cluster.cli.checks import (
    PACKAGES,
    Finding,
    Port,
    check_accelerators,
    check_callers,
    check_cann,
    check_compiler,
    check_cores,
    check_disk,
    check_draft_head,
    check_http_port,
    check_instruction_set,
    check_kernels,
    check_memory,
    check_model,
    check_no_vllm_ascend,
    check_python,
    check_ray,
    check_ray_port,
    check_ray_token,
    check_shared_memory,
    check_stream_ports,
    check_torch,
    check_torch_companions,
    check_torch_npu,
    check_triton_ascend,
    check_vllm,
)
from cluster.config.auth import AuthConfig
from cluster.config.serve_file import ServeFile
from cluster.errors import ConfigError
from cluster.keys import read_keys
from cluster.models.default_model import DEFAULT_MODEL
from cluster.models.model import find_model, weights_bytes
from workers.config import DeviceName
from workers.home import home


def examine(serve_file: ServeFile) -> list[Finding]:
    """Check this machine for `serve_file`; takes less than two seconds and changes nothing."""
    model = find_model(serve_file.config.model)
    return [
        *_examine_software(serve_file.config.worker.device),
        *_examine_hardware(serve_file, model),
        *_examine_ports(serve_file),
        check_callers(serve_file.host, serve_file.config.auth, _find_keys(serve_file.config.auth)),
        *_examine_model(serve_file, model),
    ]


def probe_port(host: str, port: int) -> Port:
    """Bind a port briefly; if it is taken, find out by which process."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            # As servers do, so that connections in TIME_WAIT do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return Port(port)
    except OverflowError as error:
        return Port(port, f"cannot be opened: {error}")
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return Port(port, f"cannot be opened on {host}: {error.strerror}")
    for connection in psutil.net_connections("tcp"):
        if connection.status != psutil.CONN_LISTEN or connection.laddr[1:] != (port,):
            continue
        try:
            process = psutil.Process(connection.pid or 0)
            name, command = process.name(), " ".join(process.cmdline())
        except psutil.Error:
            break
        is_ray = "ray::" in command or "/ray/" in command
        return Port(port, f"is taken by {name} (pid {process.pid})", is_ray)
    return Port(port, "is taken by a process of another user")


def serve_apps(url: str) -> list[str] | None:
    """The apps of the Ray Serve at `url`; None if nothing or something else answers."""
    try:
        response = httpx.get(httpx.URL(url).join("/-/routes"), timeout=0.5, trust_env=False)
        routes = response.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
    return sorted(map(str, routes.values())) if isinstance(routes, dict) else None


def _examine_software(device: DeviceName) -> list[Finding]:
    versions = _installed_versions()
    torch = versions.get("torch")
    compilers = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    findings = [
        check_python(sys.version_info[:2]),
        check_ray(versions.get("ray")),
        check_ray_token(os.environ.get("RAY_AUTH_MODE"), _has_ray_token()),
        check_vllm(versions, device),
        check_torch(torch, _torch_cuda(), device),
        check_compiler(next(filter(None, map(shutil.which, filter(None, compilers))), None)),
    ]
    if device == "npu":
        findings.append(check_no_vllm_ascend(versions.get("vllm-ascend")))
        findings.append(check_torch_npu(torch, versions.get("torch-npu")))
        findings.append(check_cann(_cann()))
    if device in ("npu", "npu-emulated"):
        findings.append(check_triton_ascend(versions, device))
    if device in ("cpu", "npu-emulated"):
        findings.append(check_torch_companions(versions))
    return findings


def _cann() -> Path | None:
    if home := os.environ.get("ASCEND_HOME_PATH"):
        return Path(home)
    installed = Path("/usr/local/Ascend/ascend-toolkit/latest")
    return installed if installed.is_dir() else None


def _examine_hardware(serve_file: ServeFile, model: Path | None) -> list[Finding]:
    config, worker = serve_file.config, serve_file.config.worker
    num_workers = config.num_workers
    if config.autoscaling:
        num_workers = config.autoscaling.get("max_replicas", 1)
    cores = len(os.sched_getaffinity(0))
    findings = [check_cores(num_workers, worker.cpus, cores, config.draft)]
    if worker.device == "cpu" or worker.device == "npu-emulated":
        # Our kernels keep the weights in the checkpoint's dtype, whatever dtype they compute in.
        dtype = "auto" if worker.uses_cpu_kernels else worker.engine.dtype
        weights = weights_bytes(model, dtype) if model else None
        available = psutil.virtual_memory().available
        findings = [
            check_instruction_set(platform.machine(), _cpu_flags()),
            *findings,
            check_memory(num_workers, weights, worker.engine.kv_cache_gib, available),
        ]
        if worker.uses_cpu_kernels:
            findings.insert(1, check_kernels(worker.weight_format, worker.activation_format))
    else:
        num_devices, num_each = _count_devices(worker.device), worker.tensor_parallel_size
        accelerators = check_accelerators(worker.device, num_devices, num_workers, num_each)
        findings.insert(0, accelerators)
    shared_memory = Path("/dev/shm")
    free_bytes = shutil.disk_usage(shared_memory).free if shared_memory.exists() else 0
    return [*findings, check_shared_memory(free_bytes)]


def _examine_ports(serve_file: ServeFile) -> list[Finding]:
    http = probe_port(serve_file.host, serve_file.port)
    config = serve_file.config
    num_listening = config.num_ingresses + (config.draft.num_workers if config.draft else 0)
    return [
        check_http_port(http, serve_apps(serve_file.url) if http.problem else None),
        check_ray_port("ray port", probe_port("127.0.0.1", 6379), "--port"),
        check_ray_port("ray dashboard", probe_port("127.0.0.1", 8265), "--dashboard-port"),
        check_stream_ports(config.stream_ports, num_listening),
    ]


def _find_keys(auth: AuthConfig) -> int | str:
    """How many API keys there are, or why they cannot be read."""
    try:
        return len(read_keys(auth.path)) if auth.keys_file else 0
    except ConfigError as error:
        return str(error)


def _examine_model(serve_file: ServeFile, model: Path | None) -> list[Finding]:
    findings = [check_model(serve_file.config.model, model)]
    if serve_file.config.model == DEFAULT_MODEL and model is None:
        folder = next(path for path in (home(), *home().parents) if path.exists())
        findings.append(check_disk(folder, shutil.disk_usage(folder).free))
    draft = serve_file.config.draft
    if draft and "head" in draft.drafters and model is not None:
        findings.append(check_draft_head(Path(draft.head) if draft.head else None, model))
    return findings


def _installed_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _has_ray_token() -> bool:
    """Whether Ray would find a token; importing Ray to ask it takes seconds."""
    file = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(file).is_file()


def _torch_cuda() -> str | None:
    """The CUDA version torch is built for, read from its source: importing torch takes seconds."""
    try:
        path = metadata.distribution("torch").locate_file("torch/version.py")
        found = re.search(r"^cuda\b.*= '(.+)'", Path(str(path)).read_text(), re.MULTILINE)
    except (metadata.PackageNotFoundError, OSError):
        return None
    return found[1] if found else None


def _cpu_flags() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split())
    return frozenset()


def _count_devices(device: Literal["cuda", "npu"]) -> int:
    name = {"cuda": "nvidia", "npu": "davinci"}[device]
    num_devices = len(list(Path("/dev").glob(f"{name}[0-9]*")))
    if num_devices or device == "npu" or not shutil.which("nvidia-smi"):
        return num_devices
    # WSL has GPUs but no such files.
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=1.5)
    except subprocess.TimeoutExpired:
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
