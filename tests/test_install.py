"""The installer: where it finds torch, what it says when it does not, and vLLM's metadata."""

import base64
import functools
import hashlib
import http.server
import subprocess
import sys
import threading
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from tests.programs import load_script

NO_HASH = f"--hash=sha256:{'0' * 64}"
CPU, CUDA = "2.13.0+cpu", "2.13.0"


@pytest.fixture
def install() -> Any:
    return load_script("install")


class Index:
    """A package index on a port of its own, which remembers what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked = asked = []  # type: list[str]
        self._folder = folder

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                asked.append(self.path)

        (folder / "simple").mkdir(parents=True)
        handler = functools.partial(Handler, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/simple"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def add_torch(self, version: str, sha256: str = "") -> str:
        """Publish a small wheel, and pin it; `sha256` is what the index says about it."""
        page = self._folder / "simple" / "torch"
        page.mkdir(exist_ok=True)
        wheel = page / f"torch-{version}-py3-none-any.whl"
        info = f"torch-{version}.dist-info"
        files = {
            "torch/__init__.py": f"__version__ = {version!r}\n",
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(f"{name},{_digest(text)},{len(text)}\n" for name, text in files.items())
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in (files | {f"{info}/RECORD": record}).items():
                archive.writestr(name, text)
        fragment = f"#sha256={sha256}" if sha256 else ""
        (page / "index.html").write_text(f'<a href="{wheel.name}{fragment}">{wheel.name}</a>')
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        return f"torch=={version} {NO_HASH} --hash=sha256:{digest}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _digest(text: str) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
    return f"sha256={digest.decode().rstrip('=')}"


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    """The index of this machine."""
    index = Index(tmp_path / "index")
    yield index
    index.close()


@pytest.fixture
def of_torch(tmp_path: Path) -> Iterator[Index]:
    """PyTorch's own index."""
    index = Index(tmp_path / "of torch")
    yield index
    index.close()


@pytest.fixture
def target(
    install: Any,
    index: Index,
    of_torch: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The folder that pip installs into, with these two indexes and no others."""
    folder = tmp_path / "target"
    command = [sys.executable, "-m", "pip", *install.PIP_INSTALL[3:], "--target", str(folder)]
    monkeypatch.setattr(install, "PIP_INSTALL", command)
    monkeypatch.setattr(install, "TORCH_INDEX", of_torch.url)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    settings = {"CONFIG_FILE": "/dev/null", "INDEX_URL": index.url, "RETRIES": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def installed(folder: Path) -> list[tuple[str, str]]:
    return [(each.name, each.version) for each in distributions(path=[str(folder)])]


def test_torch_comes_from_the_index_of_this_machine_if_it_has_a_cpu_build(
    install: Any, index: Index, of_torch: Index, target: Path
) -> None:
    install.install_torch(index.add_torch(CPU))

    assert installed(target) == [("torch", CPU)]
    assert of_torch.asked == []


@pytest.mark.parametrize("here", [None, CUDA])
@pytest.mark.parametrize("is_constrained", [False, True])  # then pip has other words
def test_torch_comes_from_pytorchs_index_if_this_machines_has_no_cpu_build(
    install: Any,
    index: Index,
    of_torch: Index,
    target: Path,
    here: str | None,
    is_constrained: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if here:
        index.add_torch(here)
    if is_constrained:
        (tmp_path / "constraints.txt").write_text("torch<=2.14.1\n")
        monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "constraints.txt"))

    install.install_torch(of_torch.add_torch(CPU))

    assert installed(target) == [("torch", CPU)]
    assert {path.split("/")[2] for path in of_torch.asked} == {"torch"}
    assert "torch 2.13.0+cpu, from PyTorch's own index ... " in capsys.readouterr().out


@pytest.mark.parametrize("of_torch_version", [None, CUDA])
def test_without_a_cpu_build_anywhere_the_remedies_are_named(
    install: Any, index: Index, of_torch: Index, target: Path, of_torch_version: str | None
) -> None:
    index.add_torch(CUDA)
    if of_torch_version:
        of_torch.add_torch(of_torch_version)

    with pytest.raises(SystemExit) as stopped:
        install.install_torch(f"torch=={CPU} {NO_HASH}")

    assert "nor PyTorch's gave torch==2.13.0+cpu" in str(stopped.value)
    assert "PIP_FIND_LINKS=FOLDER make install" in str(stopped.value)
    assert not target.exists()


@pytest.mark.parametrize("fault", ["no index", "no proxy"])
def test_without_a_network_it_says_so(
    install: Any, index: Index, of_torch: Index, target: Path, fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    index.close()
    if fault == "no index":
        of_torch.close()
    else:
        monkeypatch.setenv("PIP_PROXY", index.url)

    with pytest.raises(SystemExit) as stopped:
        install.install_torch(f"torch=={CPU} {NO_HASH}")

    assert "The package index could not be reached" in str(stopped.value)
    with pytest.raises(SystemExit) as stopped:
        install.install_pins("ray 2.60.0", f"ray==2.60.0 {NO_HASH}")
    assert "The package index could not be reached" in str(stopped.value)


def test_a_download_that_is_not_what_the_index_says_is_no_reason_to_go_elsewhere(
    install: Any, index: Index, of_torch: Index, target: Path
) -> None:
    index.add_torch(CPU, sha256="0" * 64)
    of_torch.add_torch(CPU)

    with pytest.raises(SystemExit) as stopped:
        install.install_torch(f"torch=={CPU} {NO_HASH}")

    assert "HASHES" in str(stopped.value)
    assert str(stopped.value).endswith(install.WRONG_FILE)
    assert of_torch.asked == []


def test_a_wheel_with_another_hash_than_its_pin_is_refused(
    install: Any, index: Index, of_torch: Index, target: Path
) -> None:
    pin = index.add_torch(CPU)
    of_torch.add_torch(CPU)
    other = pin.replace(pin[-4:], "0000")

    with pytest.raises(SystemExit) as stopped:
        install.install_torch(other)
    assert str(stopped.value).endswith(install.WRONG_FILE)
    with pytest.raises(SystemExit) as stopped:
        install.install_pins("torch", other)
    assert str(stopped.value).endswith(install.WRONG_FILE)

    assert of_torch.asked == []
    assert not target.exists()
    install.install_pins("torch", pin)
    assert installed(target) == [("torch", CPU)]


def test_a_pin_without_a_hash_is_refused(install: Any, index: Index, target: Path) -> None:
    index.add_torch(CPU)

    with pytest.raises(SystemExit) as stopped:
        install.install_pins("torch", f"torch=={CPU}")

    assert str(stopped.value).endswith(install.NO_HASH)
    assert not target.exists()


def test_every_pin_has_hashes_and_is_read_with_them(install: Any) -> None:
    pins = install.read_pins()

    assert [pin for pin in pins.values() if " --hash=sha256:" not in pin] == []
    assert all(name == install.words_of(pin).split()[0] for name, pin in pins.items())
    assert install.words_of(pins["intel-openmp"]) == "intel-openmp 2024.2.1"
    assert install.words_of(pins["torch"]) == "torch 2.13.0+cpu"


def test_vllm_has_metadata_of_its_own_that_pip_can_handle(install: Any, tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=True)
    [site_packages] = tmp_path.glob("lib/python*/site-packages")

    def pip(*arguments: str) -> str:
        command = [str(tmp_path / "bin" / "python"), "-m", "pip", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    for version in ("0.31.0", "0.32.0", "0.32.0"):
        install.write_vllm_metadata(site_packages, version)

    assert ("vllm", "0.32.0+cpu") in installed(site_packages)
    assert "vllm       0.32.0+cpu" in pip("list")
    assert "No broken requirements found." in pip("check")
    assert "vllm-0.32.0+cpu.dist-info/METADATA" in pip("show", "--files", "vllm")
    pip("uninstall", "--yes", "vllm")
    assert list(site_packages.glob("vllm*")) == []


def test_an_install_that_was_interrupted_keeps_vllms_metadata(
    install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_packages = tmp_path / "lib" / "python3.11" / "site-packages"
    (site_packages / "half-1.0.dist-info").mkdir(parents=True)
    install.write_vllm_metadata(site_packages, "0.32.0")
    monkeypatch.setattr(install, "VENV", tmp_path)

    install.forget_half_installed()

    assert [path.name for path in site_packages.iterdir()] == ["vllm-0.32.0+cpu.dist-info"]
