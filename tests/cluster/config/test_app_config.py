from pathlib import Path
from typing import Any

import pytest

from cluster.config.app_config import AppConfig, IngressConfig, parse_args
from cluster.config.nodes import NodesConfig
from cluster.config.routes import EXTRA_PATHS
from cluster.config.scaling import autoscaling_of_serve
from cluster.config.serve_file import IMPORT_PATH, read_serve_file
from cluster.config.slo import SloClass, SloConfig
from cluster.errors import ConfigError
from scheduler.scaling import ScalingSettings
from workers.config import EngineConfig, WorkerConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a Serve config file and gives its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "app.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def error_of(args: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        parse_args(args)
    return str(refused.value)


def error_in(path: Path) -> str:
    """What is wrong with a file, without its path, which every such message begins with."""
    with pytest.raises(ConfigError) as refused:
        read_serve_file(path)
    assert str(refused.value).startswith(f"{path}: ")
    return str(refused.value).removeprefix(f"{path}: ")


def test_without_args_every_value_has_its_default() -> None:
    assert parse_args({}) == AppConfig()


def test_args_become_the_config_at_every_level() -> None:
    config = parse_args(
        {
            "model": "org/name",
            "num_workers": 2,
            "worker": {"device": "cuda", "engine": {"max_num_seqs": 4, "seed": 7}},
            "ingress": {"max_n": 3},
            "slo": {"default": "batch", "classes": {"night": {"ttft_ms": 60_000}}},
            "nodes": {"worker": {"tier": "back"}},
            "stream_ports": [20000, 20099],
        }
    )

    assert config == AppConfig(
        model="org/name",
        num_workers=2,
        worker=WorkerConfig(device="cuda", engine=EngineConfig(max_num_seqs=4, seed=7)),
        ingress=IngressConfig(max_n=3),
        slo=SloConfig(default="batch", classes={"night": SloClass(ttft_ms=60_000)}),
        nodes=NodesConfig(worker={"tier": "back"}),
        stream_ports=(20000, 20099),
    )


@pytest.mark.parametrize(("served_model_name", "name"), [(None, "org/m"), ("mine", "mine")])
def test_the_model_has_its_own_name_in_the_api_unless_another_is_given(
    served_model_name: str | None, name: str
) -> None:
    assert AppConfig(model="org/m", served_model_name=served_model_name).model_name == name


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ({"num_wokers": 2}, "num_wokers: unknown key; did you mean num_workers?"),
        ({"worker": {"cpu": 2}}, "worker.cpu: unknown key; did you mean cpus?"),
        (
            {"worker": {"engine": {"max_num_seq": 2}}},
            "worker.engine.max_num_seq: unknown key; did you mean max_num_seqs?",
        ),
        ({"ingress": {"max_N": 2}}, "ingress.max_N: unknown key; did you mean max_n?"),
        ({"slo": {"class": {}}}, "slo.class: unknown key; did you mean classes?"),
        (
            {"slo": {"classes": {"fast": {"ttft": 5}}}},
            "slo.classes.fast.ttft: unknown key; did you mean ttft_ms?",
        ),
        (
            {"worker": {"engine": {"extra_args": {"gpu_memory_utilisation": 0.5}}}},
            "worker.engine.extra_args.gpu_memory_utilisation: vLLM has no such argument; "
            "did you mean gpu_memory_utilization?",
        ),
        (
            {"ingress": {"extra_args": {"api_keys": ["secret"]}}},
            "ingress.extra_args.api_keys: vLLM has no such argument; did you mean api_key?",
        ),
    ],
)
def test_a_misspelt_key_is_named_with_the_one_that_was_meant(
    args: dict[str, Any], error: str
) -> None:
    assert error_of(args) == error


@pytest.mark.parametrize(
    ("autoscaling", "error"),
    [
        (
            {"min_replicas": 0},
            "min_replicas (0) must be at least 1 and at most max_replicas (1)",
        ),
        ({"max_replicas": "4"}, "max_replicas ('4') must be a number"),
        (
            {"max_replicas": 4, "target_attainment": 1.0},
            "target_attainment (1.0) must be between 0 and 1",
        ),
        ({"downscale_delay_s": -1}, "downscale_delay_s (-1) must not be negative"),
        (
            {"target_attainment": 0.9, "target_ongoing_requests": 8},
            "target_attainment is for our policy, and policy and target_ongoing_requests choose "
            "another one: leave one of them out",
        ),
    ],
)
def test_a_wrong_key_of_autoscaling_is_named(autoscaling: dict[str, Any], error: str) -> None:
    assert error_of({"autoscaling": autoscaling}) == f"autoscaling: {error}"
    drafts = {"draft": {"autoscaling": autoscaling}}
    assert error_of(drafts) == f"draft.autoscaling: {error}"


def test_our_policy_decides_on_the_number_of_workers_unless_another_one_is_asked_for() -> None:
    autoscaling = {"min_replicas": 2, "max_replicas": 4, "downscale_delay_s": 60}
    ours = parse_args({"autoscaling": autoscaling, "draft": {"autoscaling": {"max_replicas": 3}}})
    others = parse_args(
        {
            "autoscaling": autoscaling | {"target_ongoing_requests": 8},
            "draft": {"autoscaling": {"max_replicas": 3, "policy": {}}},
        }
    )
    unprofiled = parse_args(
        {"autoscaling": autoscaling, "worker": {"step_policy": {"name": "vllm"}}}
    )

    assert ours.worker_scaling == ScalingSettings(min_workers=2, max_workers=4, hold_s=60)
    assert ours.draft_scaling == ScalingSettings(max_workers=3)
    assert (others.worker_scaling, others.draft_scaling) == (None, None)
    assert (unprofiled.worker_scaling, parse_args({}).worker_scaling) == (None, None)


def test_serves_settings_are_passed_on_with_our_policy() -> None:
    own = {"max_replicas": 4, "initial_replicas": 2, "downscale_delay_s": 60}

    assert autoscaling_of_serve(own | {"target_attainment": 0.9}, "module:function") == {
        "max_replicas": 4,
        "initial_replicas": 2,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "policy": {"policy_function": "module:function"},
    }


def test_a_key_like_no_other_is_answered_with_the_keys_there_are() -> None:
    assert error_of({"worker": {"zzz": 1}}) == (
        "worker.zzz: unknown key; known keys: activation_format, calibrate_at_start, cpus, device, "
        "engine, grammars, keep_packed_weights, kernels, kv_cache_format, lm_head_format, "
        "prefix_index, record, report_interval_s, slow_timeout_s, step_policy, step_timeout_s, "
        "tensor_parallel_size, weight_format"
    )


def test_an_extra_argument_like_no_other_of_vllm_is_named() -> None:
    assert error_of({"ingress": {"extra_args": {"zzzzzz": 1}}}) == (
        "ingress.extra_args.zzzzzz: vLLM has no such argument"
    )


def test_extra_arguments_that_vllm_has_are_taken() -> None:
    engine = {"gpu_memory_utilization": 0.5, "enable_log_requests": True}
    config = parse_args(
        {
            "worker": {"engine": {"extra_args": engine}},
            "ingress": {"extra_args": {"enable_server_load_tracking": True}},
        }
    )

    assert (config.worker.engine.extra_args, config.ingress.extra_args) == (
        engine,
        {"enable_server_load_tracking": True},
    )


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ({"num_workers": 0}, "num_workers (0) must be at least 1"),
        ({"num_ingresses": -1}, "num_ingresses (-1) must be at least 1"),
        ({"drain_timeout_s": -1}, "drain_timeout_s (-1.0) must not be negative"),
        (
            {"stream_ports": [20099, 20000]},
            "stream_ports ([20099, 20000]) must be the first and the last of a range of ports, "
            "such as [20000, 20099]",
        ),
        (
            {"nodes": {"worker": {"tier": "in(a, b)"}}},
            "nodes: worker.tier ('in(a, b)') must be a label's value: letters, digits and ., _ or "
            "- between them",
        ),
        ({"ingress": {"max_n": 0}}, "ingress: max_n (0) must be positive"),
        (
            {"ingress": {"routes": ["/sleep"]}},
            "ingress: routes: '/sleep' cannot be switched on; choose from "
            + ", ".join(EXTRA_PATHS),
        ),
        (
            {"ingress": {"max_request_bytes": 0}},
            "ingress: max_request_bytes (0) must be positive",
        ),
        ({"worker": {"cpus": 0}}, "worker: cpus (0) must be positive"),
        ({"worker": {"step_timeout_s": 0}}, "worker: step_timeout_s (0.0) must be positive"),
        (
            {"worker": {"report_interval_s": -1}},
            "worker: report_interval_s (-1.0) must be positive",
        ),
        (
            {"worker": {"engine": {"max_num_seqs": 0}}},
            "worker.engine: max_num_seqs (0) must be positive",
        ),
        (
            {"worker": {"engine": {"kv_cache_gib": -1}}},
            "worker.engine: kv_cache_gib (-1.0) must be positive",
        ),
        (
            {"worker": {"engine": {"max_model_len": 1}}},
            "worker.engine: max_model_len (1) must be at least 2: one prompt token and one output "
            "token",
        ),
        (
            {"worker": {"engine": {"max_num_seqs": 9, "max_num_batched_tokens": 8}}},
            "worker.engine: max_num_batched_tokens (8) must be at least max_num_seqs (9), or a "
            "full decode batch would not fit",
        ),
        (
            {"slo": {"default": "fast", "classes": {"slow": {}}}},
            "slo: default (fast) is not a service class; use one of batch, interactive, slow, "
            "standard",
        ),
        (
            {"slo": {"classes": {"fast": {"ttft_ms": -1}}}},
            "slo.classes.fast: ttft_ms (-1.0) must be positive, or null for no target",
        ),
        (
            {"slo": {"classes": {"fast": {"tpot_ms": float("nan")}}}},
            "slo.classes.fast: tpot_ms (nan) must be positive, or null for no target",
        ),
        (
            {"slo": {"classes": {"fast": {"tpot_ms": 5e-324}}}},
            "slo.classes.fast: tpot_ms (5e-324) must be positive, or null for no target",
        ),
        (
            {"slo": {"classes": {"sehr schön": {}}}},
            "slo: classes: 'sehr schön' cannot name a class; use letters, digits and . _ -",
        ),
    ],
)
def test_a_value_out_of_range_is_named_with_the_range(args: dict[str, Any], error: str) -> None:
    assert error_of(args) == error


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ({"model": 5}, "model: input should be a valid string, not 5"),
        (
            {"slo": {"classes": {"fast": 5}}},
            "slo.classes.fast: input should be a dictionary or an instance of SloClass, not 5",
        ),
        (
            {"num_workers": "two"},
            "num_workers: input should be a valid integer, unable to parse string as an integer, "
            "not 'two'",
        ),
        (
            {"worker": {"cpus": 1.5}},
            "worker.cpus: input should be a valid integer, got a number with a fractional part, "
            "not 1.5",
        ),
        (
            {"worker": {"device": "gpu"}},
            "worker.device: input should be 'cpu', 'cuda', 'npu' or 'npu-emulated', not 'gpu'",
        ),
        (
            {"worker": {"weight_format": "int8", "kernels": "vllm"}},
            "worker: weight_format (int8) needs kernels: xyserve",
        ),
        (
            {"worker": {"activation_format": "bf16", "weight_format": "int8"}},
            "worker: activation_format (bf16) needs weight_format: auto, and this is int8; set it "
            "to int8, float32 or auto",
        ),
        (
            {"worker": {"activation_format": "int8"}},
            "worker: activation_format (int8) needs weight_format: int8 or int4",
        ),
        (
            {"worker": {"activation_format": "bf16", "device": "cuda"}},
            "worker: activation_format (bf16) needs device: cpu and kernels: xyserve",
        ),
        (
            {"worker": {"kv_cache_format": "bf16", "kernels": "vllm"}},
            "worker: kv_cache_format (bf16) needs device: cpu and kernels: xyserve",
        ),
        (
            {"worker": {"weight_format": "int4", "device": "cuda"}},
            "worker: weight_format (int4) needs device: cpu, and this is cuda",
        ),
        (
            {"worker": {"device": "npu", "kernels": "vllm"}},
            "worker: kernels (vllm) needs another device than npu: vLLM has no kernels for NPUs; "
            "leave it at xyserve",
        ),
        (
            {"worker": {"cpus": 3, "tensor_parallel_size": 2}},
            "worker: cpus (3) must be a multiple of tensor_parallel_size (2): each process gets as "
            "many cores",
        ),
        (
            {"worker": {"tensor_parallel_size": 0}},
            "worker: tensor_parallel_size (0) must be at least 1",
        ),
        (
            {"worker": {"engine": {"extra_args": {"tensor_parallel_size": 2}}}},
            "worker: engine.extra_args.tensor_parallel_size would leave Ray in the dark: set "
            "worker.tensor_parallel_size",
        ),
        (
            {
                "worker": {"cpus": 2, "tensor_parallel_size": 2},
                "draft": {"drafters": ["head"]},
            },
            "the drafter head needs worker.tensor_parallel_size: 1, as it reads the states of a "
            "model in one process",
        ),
        (
            {"worker": 5},
            "worker: input should be a dictionary or an instance of WorkerConfig, not 5",
        ),
        (
            {"ingress": {"extra_args": 5}},
            "ingress.extra_args: input should be a valid dictionary, not 5",
        ),
        ([], "args: input should be a dictionary or an instance of AppConfig, not []"),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_the_right_type(args: Any, error: str) -> None:
    assert error_of(args) == error


def test_all_mistakes_are_reported_at_once() -> None:
    assert error_of({"num_wokers": 2, "worker": {"cpus": "two", "engine": {"sede": 1}}}).split(
        "\n"
    ) == [
        "worker.cpus: input should be a valid integer, unable to parse string as an integer, not "
        "'two'",
        "worker.engine.sede: unknown key; did you mean seed?",
        "num_wokers: unknown key; did you mean num_workers?",
    ]


def test_a_serve_file_is_read_with_its_address_and_config(write: Any) -> None:
    path = write(
        f"""
http_options: {{host: 0.0.0.0, port: 9000}}
applications:
  - {{name: other, import_path: other:app}}
  - {{name: llm, route_prefix: /llm/, import_path: {IMPORT_PATH}, args: {{num_workers: 2}}}}
"""
    )
    file = read_serve_file(path)

    assert (file.app_name, file.route_prefix, file.host, file.port, file.config) == (
        "llm",
        "/llm/",
        "0.0.0.0",
        9000,
        AppConfig(num_workers=2),
    )
    assert file.url == "http://127.0.0.1:9000/llm"


@pytest.mark.parametrize("args", ["", "args:", "args: {}"])
def test_what_a_serve_file_leaves_out_has_its_default(write: Any, args: str) -> None:
    file = read_serve_file(
        write(f"applications:\n  - import_path: {IMPORT_PATH}\n    {args}\nhttp_options:\n")
    )

    assert (file.app_name, file.url, file.config) == (
        "default",
        "http://127.0.0.1:8000",
        AppConfig(),
    )


def test_a_missing_file_is_named_with_one_to_start_from(tmp_path: Path) -> None:
    assert error_in(tmp_path / "none.yaml") == ("no such file; deploy/local.yaml is an example")


def test_a_folder_is_no_config_file(tmp_path: Path) -> None:
    assert error_in(tmp_path).startswith("cannot be read: ")


def test_a_file_that_is_not_text_is_no_config_file(write: Any) -> None:
    assert error_in(write(b"\xff\xfe\xfa")).startswith(("cannot be read: ", "not valid YAML: "))


def test_bad_yaml_is_reported_with_its_place(write: Any) -> None:
    error = error_in(write("applications: [\nmodel: }"))

    assert error.startswith("not valid YAML: ")
    assert "line 2, column 8" in error


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", 0),
        ("just a text", 0),
        ("[1, 2]", 0),
        ("applications:", 0),
        ("applications: 5", 0),
        ("applications: {import_path: cluster.app:build_app}", 0),
        ("applications: [5, {import_path: other:app}]", 0),
        (f"applications: [{{import_path: '{IMPORT_PATH}'}}, {{import_path: '{IMPORT_PATH}'}}]", 2),
    ],
)
def test_a_file_without_exactly_one_app_of_ours_is_refused(
    write: Any, content: str, found: int
) -> None:
    assert error_in(write(content)) == (
        "needs exactly one entry under `applications` with "
        f"`import_path: cluster.app:build_app`, found {found}"
    )


def test_http_options_must_be_a_mapping(write: Any) -> None:
    content = f"http_options: 8000\napplications: [{{import_path: '{IMPORT_PATH}'}}]"

    assert error_in(write(content)) == "http_options must be a mapping, not 8000"


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ("{num_wokers: 2}", "num_wokers: unknown key; did you mean num_workers?"),
        ("[]", "args: input should be a dictionary or an instance of AppConfig, not []"),
    ],
)
def test_wrong_args_in_a_file_are_reported_with_its_path(write: Any, args: str, error: str) -> None:
    content = f"applications: [{{import_path: '{IMPORT_PATH}', args: {args}}}]"

    assert error_in(write(content)) == error


@pytest.mark.parametrize("path", sorted((ROOT / "deploy").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_that_comes_with_the_project_is_valid(path: Path) -> None:
    assert read_serve_file(path).app_name == "xyserve"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"draft": {"drafter": ["suffix"]}}, "draft.drafter: unknown key; did you mean drafters?"),
        ({"draft": {"drafters": ["sufix"]}}, "draft.drafters.0: input should be"),
        ({"draft": {"drafters": []}}, "draft: drafters ([]) must name one or more"),
        ({"draft": {"num_workers": 0}}, "draft: num_workers (0) must be at least 1"),
        (
            {
                "placement": {"stage_policy": True},
                "worker": {"step_policy": {"name": "static"}},
            },
            "placement.stage_policy needs the worker.step_policy name hybrid: static knows no",
        ),
        (
            {"draft": {}, "worker": {"step_policy": {"name": "vllm"}}},
            "draft needs one of our worker.step_policy names",
        ),
        (
            {"draft": {}, "worker": {"engine": {"extra_args": {"speculative_config": {}}}}},
            "exclude each other",
        ),
    ],
)
def test_drafting_that_cannot_be_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_args(args)
    assert message in str(error.value)
