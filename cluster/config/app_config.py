"""The app's config: strict, and checked before anything starts."""

import ast
import dataclasses
import difflib
import functools
import importlib.util
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from cluster.config.auth import AuthConfig, TenantConfig, check_tenants
from cluster.config.nodes import NodesConfig
from cluster.config.observe import LogConfig, TracingConfig
from cluster.config.placement import PlacementConfig
from cluster.config.routes import EXTRA_PATHS
from cluster.config.scaling import scaling_settings
from cluster.config.slo import SloConfig
from cluster.errors import ConfigError
from cluster.keys import DEFAULT_TENANT
from cluster.models.default_model import DEFAULT_MODEL
from scheduler.scaling import ScalingSettings
from workers.config import DraftConfig, EngineConfig, WorkerConfig
from workers.sockets import check_ports

MIN_UNREAD_BYTES = 128 << 10
"""Twice what a client takes before its proxy tells the ingress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressConfig:
    """The HTTP front end."""

    __pydantic_config__ = {"extra": "forbid"}

    max_request_bytes: int = 8 << 20
    """Maximum size of a request body, which may take 25 times as much memory while it is read; a
    larger one is answered with 413."""
    body_timeout_s: float = 60.0
    """Time, in seconds, in which the body of a request must have come; later it is answered with
    408."""
    max_n: int = 128
    """Maximum number of sequences (`n`) of one request."""
    placement_timeout_s: float = 60.0
    """Time, in seconds, that a request waits while no worker takes it, for example until one that
    died is replaced; then it is answered with 503."""
    max_prompt_tokens: int | None = None
    """Maximum number of tokens of a prompt; null: as many as the model's context has."""
    max_output_tokens: int | None = None
    """Maximum of `max_tokens`, and its default; null: what the prompt leaves of the context."""
    max_list_length: int = 1024
    """Maximum length of `stop`, `stop_token_ids`, `bad_words` and `logit_bias`."""
    max_sequences: int = 1024
    """Maximum number of sequences of one call at a time: of all its prompts, `n` for each."""
    max_total_logprobs: int = 1_000_000
    """Maximum number of log probabilities in an answer, about 0.5 kB each: of the prompts and,
    unless streamed, of `max_tokens` tokens, in all sequences."""
    max_unread_bytes: int = 1 << 20
    """Maximum size of what waits for the client of one stream that does not read it, on the way and
    again as tokens; before that, its requests leave their workers until it reads on."""
    unread_timeout_s: float = 60.0
    """Time, in seconds, for which a client with `max_unread_bytes` on the way may take nothing;
    then its stream ends with an error."""
    tool_call_parser: str | None = "hermes"
    """vLLM's parser for the model's tool calls; null: no automatic tool choice."""
    reasoning_parser: str | None = None
    """vLLM's parser for the reasoning of models that show it; null: none."""
    chat_template: str | None = None
    """File with a chat template; null: the checkpoint's own."""
    allowed_origins: tuple[str, ...] = ()
    """Web sites whose pages may call the API, such as `https://chat.example.com`; `*`: all."""
    routes: tuple[str, ...] = ()
    """Paths of routes to serve in addition to the usual ones, such as `/generative_scoring`."""
    extra_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's OpenAI server, under vLLM's names."""

    def __post_init__(self) -> None:
        for path in self.routes:
            if path not in EXTRA_PATHS:
                raise ValueError(
                    f"routes: {path!r} cannot be switched on; choose from {', '.join(EXTRA_PATHS)}"
                )
        limits = ("request_bytes", "n", "sequences", "total_logprobs", "list_length")
        times = ("placement_timeout_s", "unread_timeout_s", "body_timeout_s")
        for name in (*times, *(f"max_{limit}" for limit in limits)):
            if not getattr(self, name) > 0:  # NaN is not positive either
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive")
        for name in ("max_prompt_tokens", "max_output_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be positive, or null")
        if self.max_unread_bytes < MIN_UNREAD_BYTES:
            raise ValueError(
                f"max_unread_bytes ({self.max_unread_bytes}) must be at least {MIN_UNREAD_BYTES}: "
                "proxies tell no more often what was read"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AppConfig:
    """Everything under `args` of the app in a Serve config file."""

    __pydantic_config__ = {"extra": "forbid"}

    model: str = DEFAULT_MODEL
    """Model to serve: the default model's name, a local directory, or a Hugging Face hub id."""
    served_model_name: str | None = None
    """Name of the model in the API; null: the value of `model`."""
    num_workers: int = 1
    """Number of worker replicas."""
    autoscaling: dict[str, Any] | None = None
    """Ray Serve's `autoscaling_config` for the workers; it replaces `num_workers`. Unless it has a
    `policy` or `target_ongoing_requests`, the GlobalScheduler decides on their number, from
    `min_replicas` to `max_replicas`, so that `target_attainment` (0.95) of the requests meet their
    targets; fewer workers must have been enough for `downscale_delay_s` (600)."""
    num_ingresses: int = 1
    """Number of ingress replicas."""
    drain_timeout_s: float = 600.0
    """Time that a replica which is to stop has for finishing its requests, in seconds."""
    wait_for_device: bool = False
    """Whether to start even if no node has the device or the labels yet, for clusters that grow on
    demand."""
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    draft: DraftConfig | None = None
    """Draft workers in addition to the workers; null: no drafts."""
    ingress: IngressConfig = field(default_factory=IngressConfig)
    auth: AuthConfig = field(default_factory=AuthConfig)
    tenants: dict[str, TenantConfig] = field(default_factory=dict)
    """Those who share the app, by name; each API key is one tenant's. `default` is the tenant of
    keys that name none, and of callers without a key."""
    slo: SloConfig = field(default_factory=SloConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    nodes: NodesConfig = field(default_factory=NodesConfig)
    stream_ports: tuple[int, int] | None = None
    """First and last of the TCP ports at which ingresses and draft workers take the streams of
    tokens and drafts, each at one on its node; null: any free port."""
    metrics: bool = True
    """Whether to export metrics to Prometheus and to keep the latest steps, which `xyserve steps`
    and `xyserve explain` show."""
    logs: LogConfig = field(default_factory=LogConfig)
    tracing: TracingConfig | None = None
    """Export of OpenTelemetry spans; null: no spans."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "num_ingresses"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if not self.drain_timeout_s >= 0:
            raise ValueError(f"drain_timeout_s ({self.drain_timeout_s}) must not be negative")
        self._check_autoscaling()
        check_ports(self.stream_ports)
        check_tenants(self.tenants)
        if self.draft and self.worker.step_policy.name == "vllm":
            raise ValueError(
                "draft needs one of our worker.step_policy names, which decide how many drafts are "
                "verified in each step; vllm's scheduler takes none from draft workers"
            )
        if self.placement.stage_policy and (name := self.worker.step_policy.name) != "hybrid":
            raise ValueError(
                f"placement.stage_policy needs the worker.step_policy name hybrid: {name} knows no "
                "share of prefills"
            )
        if self.draft and "head" in self.draft.drafters and self.worker.tensor_parallel_size > 1:
            raise ValueError(
                "the drafter head needs worker.tensor_parallel_size: 1, as it reads the states of "
                "a model in one process"
            )
        if self.draft and "speculative_config" in self.worker.engine.extra_args:
            raise ValueError(
                "draft and worker.engine.extra_args.speculative_config exclude each other: drafts "
                "come either from draft workers or from vLLM"
            )
        _check_names(
            "worker.engine.extra_args",
            self.worker.engine.extra_args,
            _vllm_fields("vllm.engine.arg_utils", "EngineArgs", "AsyncEngineArgs"),
        )
        _check_names(
            "ingress.extra_args",
            self.ingress.extra_args,
            _vllm_fields("vllm.entrypoints.launchers.cli_args", "BaseFrontendArgs", "FrontendArgs"),
        )

    def _check_autoscaling(self) -> None:
        for name, autoscaling in (
            ("autoscaling", self.autoscaling),
            ("draft.autoscaling", self.draft.autoscaling if self.draft else None),
        ):
            try:
                scaling_settings(autoscaling)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    @property
    def worker_scaling(self) -> ScalingSettings | None:
        """How the GlobalScheduler decides on the number of workers; None if it does not.

        It measures work by our step scheduler's profile.
        """
        has_profile = self.worker.step_policy.name != "vllm"
        return scaling_settings(self.autoscaling) if has_profile else None

    @property
    def draft_scaling(self) -> ScalingSettings | None:
        """How the GlobalScheduler decides on the number of draft workers; None if it does not."""
        return scaling_settings(self.draft.autoscaling) if self.draft else None

    @property
    def all_tenants(self) -> dict[str, TenantConfig]:
        """The configured tenants and the default one, by name."""
        return {DEFAULT_TENANT: TenantConfig()} | self.tenants

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        return self.served_model_name or self.model


def parse_args(args: dict[str, Any]) -> AppConfig:
    """Parse the config in `args`; ConfigError names each wrong key, its value and the remedy."""
    try:
        return pydantic.TypeAdapter(AppConfig).validate_python(args)
    except pydantic.ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None


def _explain(problem: Any) -> str:
    """Describe a problem that pydantic found, in one line."""
    *parents, key = problem["loc"] or ("args",)
    where = ".".join(str(part) for part in (*parents, key))
    if problem["type"] == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(_config_at(parents))]
        hint = _did_you_mean(key, known) or f"; known keys: {', '.join(sorted(known))}"
        return f"{where}: unknown key{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if problem["loc"] else message
    return f"{where}: {message[0].lower()}{message[1:]}, not {problem['input']!r}"


def _config_at(loc: list[str]) -> Any:
    """The config class at a location in the tree."""
    cls: Any = AppConfig
    for name in loc:
        is_mapping = typing.get_origin(cls) is dict
        cls = typing.get_args(cls)[1] if is_mapping else typing.get_type_hints(cls)[name]
        if type(None) in typing.get_args(cls):  # optional
            cls = typing.get_args(cls)[0]
    return cls


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


_OWN_KEYS = {
    "model": "model",
    "served_model_name": "served_model_name",
    "kv_cache_memory_bytes": "worker.engine.kv_cache_gib",
    "tool_call_parser": "ingress.tool_call_parser",
    "reasoning_parser": "ingress.reasoning_parser",
    "chat_template": "ingress.chat_template",
    "api_key": "auth.keys_file",
    "allowed_origins": "ingress.allowed_origins",
    **{f.name: f"worker.engine.{f.name}" for f in dataclasses.fields(EngineConfig)},
}
"""Our own keys for some of vLLM's arguments."""


def _check_names(where: str, args: dict[str, Any], known: frozenset[str]) -> None:
    for name in args:
        if name in _OWN_KEYS:
            raise ValueError(f"{where}.{name}: use {_OWN_KEYS[name]} instead")
        if known and name not in known:
            hint = _did_you_mean(name, known)
            raise ValueError(f"{where}.{name}: vLLM has no such argument{hint}")


@functools.cache
def _vllm_fields(module: str, *classes: str) -> frozenset[str]:
    """Field names of vLLM's argument classes, read from its source: importing takes 10 s."""
    package = importlib.util.find_spec(module.partition(".")[0])
    if package is None or not package.submodule_search_locations:
        return frozenset()
    path = Path(package.submodule_search_locations[0]).parent / (module.replace(".", "/") + ".py")
    return frozenset(
        item.target.id
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    )
