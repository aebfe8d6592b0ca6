"""Engines that find their packed weights in a file: the same bits, and never those of others."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.workers.engine_process import (
    Batch,
    EngineFailed,
    EngineProcesses,
    Output,
    _run_batch,
)
from tests.workers.tiny_models import write_checkpoint
from workers.config import EngineConfig, WorkerConfig
from workers.kernels.gemm import Weight

BATCH = Batch([[7], [*range(3, 60)], [*range(200, 300)]])
Home = dict[str, str]
"""The environment that says where files are kept."""
Result = tuple[list[Output], int, list[str]]
"""Outputs, how many weights were found in the file, and the files that there are then."""


def config(hf_overrides: dict[str, Any] | None = None, **changed: Any) -> WorkerConfig:
    engine = EngineConfig(
        max_num_seqs=8,
        max_num_batched_tokens=512,
        kv_cache_gib=0.02,
        extra_args={"skip_tokenizer_init": True, "hf_overrides": hf_overrides or {}},
    )
    return WorkerConfig(engine=engine, **changed)


def start(model: str, config: WorkerConfig, meanwhile: Callable[[], None] | None = None) -> Result:
    """Start an engine as a worker does, let it answer, and end it."""
    from vllm.v1.engine.llm_engine import LLMEngine

    from workers.engine.vllm_engine import engine_args
    from workers.home import home

    engine = LLMEngine.from_engine_args(engine_args(model, config))
    kernels: Any = engine.vllm_config.quant_config
    weights = kernels.packed_weights
    if meanwhile:
        meanwhile()
    num_found = weights.num_found
    weights.finish()
    outputs, _ = _run_batch(engine, BATCH)
    folder = home() / "packed"
    files = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return outputs, num_found, sorted(files)


def start_while_another_writes(model: str, config: WorkerConfig) -> Result:
    """Start an engine whose file is being written by another process."""
    import fcntl

    from workers.home import home

    lock_file = home() / "packed" / f"{kept_name(model)}.lock"
    lock_file.parent.mkdir(parents=True)
    with lock_file.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return start(model, config)


def kept_name(model: str) -> str:
    from workers.plugin.vllm_linear import formats_of
    from workers.plugin.vllm_packed_weights import _path

    return _path(Path(model), str(formats_of({}))).name


def touch(model: str) -> None:
    os.utime(Path(model) / "config.json")


@pytest.fixture
def model(processes: EngineProcesses, tmp_path: Path) -> str:
    folder = tmp_path / "llama"
    processes.call(write_checkpoint, "llama", folder)
    return str(folder)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return {"XYSERVE_HOME": str(tmp_path / "home")}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma2", "bloom"])
@pytest.mark.parametrize("weight_format", ["auto", "int4"])
def test_a_later_start_finds_the_weights_and_answers_with_the_same_bits(
    processes: EngineProcesses, tmp_path: Path, home: Home, name: str, weight_format: str
) -> None:
    folder = tmp_path / name
    processes.call(write_checkpoint, name, folder)
    of_format = config(weight_format=weight_format)

    unkept = processes.call(
        start, str(folder), config(weight_format=weight_format, keep_packed_weights=False), env=home
    )
    first = processes.call(start, str(folder), of_format, env=home)
    second = processes.call(start, str(folder), of_format, env=home)

    assert unkept[1:] == (0, [])
    assert first[1] == 0
    assert second[1] > 4
    assert first[2] == second[2]
    assert len(first[2]) == 2  # the file and its lock
    assert unkept[0] == first[0] == second[0]


def test_another_checkpoint_in_the_same_place_is_packed_anew(
    processes: EngineProcesses, model: str, home: Home, tmp_path: Path
) -> None:
    """Even one with the same names, sizes and times of change."""
    old = processes.call(start, model, config(), env=home)
    file = Path(model) / "model.safetensors"
    before = file.stat()
    processes.call(change_weights, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)

    new = processes.call(start, model, config(), env=home)
    again = processes.call(start, model, config(), env=home)
    elsewhere = {"XYSERVE_HOME": str(tmp_path / "elsewhere")}
    expected = processes.call(start, model, config(), env=elsewhere)

    assert new[1] == 0
    assert again[1] > 4
    assert new[0] == again[0] == expected[0]
    assert new[0] != old[0]
    assert new[2] == old[2]  # in the place of the old ones


def change_weights(file: Path) -> None:
    """Halve the weights of one layer, in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"] /= 2
    save_file(tensors, file.with_suffix(".new"), {"format": "pt"})
    shutil.copyfile(file.with_suffix(".new"), file)
    file.with_suffix(".new").unlink()


def test_a_damaged_file_is_packed_anew(
    processes: EngineProcesses, model: str, home: Home, tmp_path: Path
) -> None:
    first = processes.call(start, model, config(), env=home)
    [file] = (tmp_path / "home" / "packed").glob("*.weights")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)

    second = processes.call(start, model, config(), env=home)
    third = processes.call(start, model, config(), env=home)

    assert (first[1], second[1]) == (0, 0)
    assert third[1] > 4
    assert first[0] == second[0] == third[0]


def test_a_checkpoint_that_changes_while_it_is_loaded_is_refused(
    processes: EngineProcesses, model: str, home: Home
) -> None:
    """Half of the weights would be of one checkpoint, half of the other."""
    processes.call(start, model, config(), env=home)
    with pytest.raises(EngineFailed, match=r"CheckpointChanged: the files in .* changed while"):
        processes.call(start_and_touch, model, config(), env=home)


def test_a_checkpoint_that_changes_while_it_is_packed_is_not_kept(
    processes: EngineProcesses, model: str, home: Home
) -> None:
    assert processes.call(start_and_touch, model, config(), env=home)[1:] == (0, [])


def start_and_touch(model: str, config: WorkerConfig) -> Result:
    return start(model, config, lambda: touch(model))


def test_while_another_worker_writes_the_weights_are_packed_and_not_kept(
    processes: EngineProcesses, model: str, home: Home
) -> None:
    first = processes.call(start_while_another_writes, model, config(), env=home)
    second = processes.call(start, model, config(), env=home)
    third = processes.call(start, model, config(), env=home)

    assert (first[1], second[1]) == (0, 0)
    assert third[1] > 4
    assert first[0] == second[0] == third[0]


def test_a_home_that_takes_no_files_costs_only_time(processes: EngineProcesses, model: str) -> None:
    home = {"XYSERVE_HOME": "/proc/xyserve"}
    first, second = (processes.call(start, model, config(), env=home) for _ in range(2))

    assert (first[1:], second[1:]) == ((0, []), (0, []))
    assert first[0] == second[0]


def test_an_engine_of_another_format_or_config_packs_its_own(
    processes: EngineProcesses, model: str, home: Home
) -> None:
    processes.call(start, model, config(), env=home)
    others = [config(weight_format="int8"), config({"rms_norm_eps": 1e-3})]

    assert [processes.call(start, model, other, env=home)[1] for other in others] == [0, 0]


def names_kept(names: Sequence[str]) -> list[str]:
    """Names in the file if layers of these names are packed."""
    from workers.plugin.vllm_packed_weights import PackedWeights

    config: Any = SimpleNamespace(model_config=SimpleNamespace(model="nowhere"))
    weights = PackedWeights(config, "auto", keep=False)
    weight = Weight.pack(np.ones((4, 4), np.float32))
    for name in names:
        weights.add(name, weight)
    return list(weights.kept())


def test_layers_that_a_name_does_not_tell_apart_are_not_kept(processes: EngineProcesses) -> None:
    names = ("a", "b", "", "c", "b", "", "b")

    assert processes.call(names_kept, names) == ["a", "c"]
