import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from scheduler.cost_model import CostModel
from scheduler.request import Request
from scheduler.task import Limits
from tests.workers.engine_process import EngineProcesses
from tests.workers.tiny_models import MAX_MODEL_LEN, VOCAB_SIZE, write_checkpoint
from workers.config import EngineConfig, WorkerConfig
from workers.engine_request import EngineRequest
from workers.profiling.engine_profile import (
    Checked,
    EngineProfile,
    load_or_measure,
    load_profile,
    profile_key,
    profile_path,
    save_profile,
)
from workers.profiling.profile_script import Seats, num_tokens, script
from workers.reports import Peaks
from workers.token_stream import StreamAddress

CONFIG = WorkerConfig(
    engine=EngineConfig(
        max_num_seqs=8,
        max_num_batched_tokens=256,
        kv_cache_gib=0.02,
        block_size=32,
        extra_args={"skip_tokenizer_init": True},
    )
)

PROFILE = EngineProfile(
    cost_model=CostModel([0.01, 0.001, 0, 0, 0, 0], token_knots=(0,), sample_knots=(0,)).to_dict(),
    peaks=Peaks(9e10, 1e10),
    depth="full",
    num_kv_blocks=100,
    kv_block_size=32,
    num_steps=3,
    took_s=1.0,
    error=0.01,
    checked=(Checked(3, 100, 1000, 0.2, 0.25),),
)


@dataclass(frozen=True, slots=True)
class Start:
    """What a started engine is like, and what it then generates."""

    cost_model: dict[str, Any]
    num_live: int
    num_blocks: int
    num_free_blocks: int
    num_cached_tokens: int
    """Prompt tokens found by prefix caching, over all requests."""
    num_hidden_steps: int
    tokens: list[list[int]]
    profile_s: float | None
    peaks: Peaks | None
    temp_files: list[str]
    """Files that it has in the temp folder while it lives, as after it was killed."""


def start_engine(model: str, config: WorkerConfig) -> Start:
    """Start an engine, look at it, and have it generate greedily."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder

    from workers.engine.vllm_engine import encoder
    from workers.profiling.vllm_calibrated_engine import make_engine

    tempfile.tempdir = os.environ["XDG_CACHE_HOME"]  # a new folder
    engine = make_engine(model, config)
    scheduler: Any = engine.core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    cost_model = scheduler.planner.cost_model.to_dict()
    before = len(scheduler.requests), pool.num_gpu_blocks, pool.get_num_free_blocks()
    encode, decode = encoder(), MsgpackDecoder(EngineCoreOutputs).decode
    client = StreamAddress("tcp://127.0.0.1:1", b"client", b"")
    random = Random(0)
    for index in range(5):
        prompt = random.choices(range(VOCAB_SIZE), k=40 * index + 3)
        request = EngineCoreRequest(
            request_id=str(index),
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        ours = Request(str(index), len(prompt), 12)
        engine.add_request(EngineRequest(ours, encode(request)), client)
    tokens: list[list[int]] = [[] for _ in range(5)]
    num_cached = 0
    while engine.has_requests():
        for output in engine.step()[0].values():
            for part in decode(output.frames).outputs:
                tokens[int(part.request_id)] += part.new_token_ids
                num_cached += part.prefill_stats.num_cached_tokens if part.prefill_stats else 0
    key = profile_key(model, config)
    profile = load_profile(key)
    return Start(
        cost_model,
        *before,
        num_cached,
        scheduler._num_steps,
        tokens,
        profile.took_s if profile else None,
        engine.peaks,
        [path.name for path in Path(tempfile.gettempdir()).iterdir() if path.is_file()],
    )


@pytest.fixture(scope="module")
def model(processes: EngineProcesses, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "llama"
    processes.call(write_checkpoint, "llama", folder)
    return str(folder)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, in place of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def start(processes: EngineProcesses, model: str, cache: Path, config: WorkerConfig) -> Start:
    env = {"XDG_CACHE_HOME": str(cache)}
    result: Start = processes.call(start_engine, model, config, env=env)
    return result


def test_a_killed_engine_leaves_no_temp_file(
    processes: EngineProcesses, model: str, cache: Path
) -> None:
    assert start(processes, model, cache, CONFIG).temp_files == []


def test_a_first_start_measures_the_engine_and_leaves_nothing_behind(
    processes: EngineProcesses, model: str, cache: Path
) -> None:
    plain = start(processes, model, cache, replace(CONFIG, calibrate_at_start=False))
    assert not list(cache.rglob("engine-*"))

    first = start(processes, model, cache, CONFIG)
    again = start(processes, model, cache, CONFIG)

    assert first.profile_s is not None
    assert first.profile_s < 15
    assert first.cost_model != plain.cost_model
    assert plain.peaks is None
    assert first.peaks is not None
    assert again.peaks == first.peaks
    shape = CostModel.from_dict(first.cost_model).shape().plus(100, 100, 1)
    assert 1e-5 < CostModel.from_dict(first.cost_model).predict(shape) < 1
    assert first.num_live == 0
    assert first.num_free_blocks == plain.num_free_blocks == first.num_blocks - 1
    assert first.num_cached_tokens == 0
    assert first.tokens == plain.tokens
    assert again.cost_model == first.cost_model
    assert again.num_hidden_steps == plain.num_hidden_steps  # so nothing was measured
    assert again.tokens == plain.tokens


def without_peaks(profile: dict[str, Any]) -> dict[str, Any]:
    """As it was kept before there were peaks."""
    return {name: value for name, value in profile.items() if name != "peaks"}


def test_what_is_kept_comes_back(model: str, cache: Path) -> None:
    key = profile_key(model, CONFIG)

    path = save_profile(key, PROFILE)

    assert path == profile_path(key)
    assert load_profile(key) == PROFILE
    assert [file for file in path.parent.iterdir() if file != path] == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: "{",
        lambda document: "[]",
        lambda document: json.dumps(document | {"key": {"model": "another"}}),
        lambda document: json.dumps(document | {"profile": {"depth": "full"}}),
        lambda document: json.dumps(document | {"profile": without_peaks(document["profile"])}),
        lambda document: json.dumps(
            document
            | {"profile": document["profile"] | {"peaks": {"flops_per_s": 0, "bytes_per_s": 1}}}
        ),
        lambda document: json.dumps(
            document | {"profile": document["profile"] | {"cost_model": {"weights": [-1.0] * 6}}}
        ),
    ],
)
def test_a_damaged_file_is_measured_again_with_a_warning(
    damage: Any, model: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = profile_key(model, CONFIG)
    path = save_profile(key, PROFILE)
    path.write_text(damage(json.loads(path.read_text())))
    brief = replace(PROFILE, depth="brief")

    assert load_or_measure(key, lambda: brief) == brief

    files = [
        vars(record)["file"] for record in caplog.records if "cannot be used" in record.message
    ]
    assert set(files) == {str(path)}
    assert load_profile(key) == brief


def test_of_two_that_start_side_by_side_one_measures_and_the_other_waits(
    model: str, cache: Path
) -> None:
    key = profile_key(model, CONFIG)
    measuring = []

    def measure() -> EngineProfile:
        measuring.append(time.monotonic())
        time.sleep(0.3)
        return PROFILE

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: load_or_measure(key, measure), range(2)))

    assert found == [PROFILE, PROFILE]
    assert len(measuring) == 1


def test_a_cache_folder_that_takes_no_file_costs_the_next_start_a_measurement(
    model: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))

    assert load_or_measure(profile_key(model, CONFIG), lambda: PROFILE) == PROFILE

    assert "the next start measures again" in caplog.text


def test_the_key_changes_with_all_that_changes_the_time_of_a_step(model: str, cache: Path) -> None:
    configs = [
        CONFIG,
        replace(CONFIG, cpus=2),
        replace(CONFIG, weight_format="int8"),
        replace(CONFIG, kernels="vllm"),
        replace(CONFIG, engine=replace(CONFIG.engine, block_size=16)),
        replace(CONFIG, engine=replace(CONFIG.engine, max_num_seqs=4)),
    ]
    paths = {profile_path(profile_key(model, config)) for config in configs}
    [weights] = Path(model).glob("*.safetensors")
    os.utime(weights, (1, 1))
    paths.add(profile_path(profile_key(model, CONFIG)))

    assert len(paths) == len(configs) + 1
    same = replace(CONFIG, step_timeout_s=1.0, calibrate_at_start=False)
    assert profile_path(profile_key(model, same)) in paths


LIMITS = [
    (Limits(32, 2048, 128, 181), 8192),
    (Limits(128, 2048, 128, 181), 8192),
    (Limits(8, 256, 32, 40), MAX_MODEL_LEN),
    (Limits(1, 16, 16, 3), 20),
    (Limits(4, 4, 16, 2), 64),
    (Limits(256, 8192, 16, 50_000), 32_768),
]


@pytest.mark.parametrize("depth", ["brief", "full"])
@pytest.mark.parametrize(("limits", "max_model_len"), LIMITS)
def test_every_step_of_the_script_fits_its_engine(
    limits: Limits, max_model_len: int, depth: str
) -> None:
    seats = Seats.within(limits, limits.num_kv_blocks, max_model_len)

    series = script(seats, depth)

    assert sum(map(limits.num_blocks, seats.lens)) <= limits.num_kv_blocks
    assert len(seats.lens) <= limits.max_num_seqs
    steps = [step for steps in series for step in steps]
    assert len(steps) == len(set(steps)) > 3
    for step in steps:
        assert 0 < num_tokens(step) <= limits.max_num_batched_tokens
        assert len({span.seat for span in step}) == len(step)
        for span in step:
            assert span.num_tokens > 0
            assert span.num_computed_tokens >= 0
            # So that nothing is sampled, one token of the prompt is left.
            assert span.num_computed_tokens + span.num_tokens <= seats.lens[span.seat]
            assert seats.lens[span.seat] + 1 < max_model_len
