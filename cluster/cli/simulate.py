"""`xyserve simulate`: policies compared on a trace, on any number of workers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import typer

from cluster.cli.options import show_progress
from cluster.cli.simulation_report import print_devices, print_runs, write_plots
from cluster.errors import XYServeError
from scheduler.policy import StepPolicy
from scheduler.request import Slo
from scheduler.simulation.arrivals import (
    Arrival,
    clip_lengths,
    first_requests,
    first_seconds,
    scale_rate,
    with_max_tokens,
    with_slo,
)
from scheduler.simulation.compare import compare, to_dict
from scheduler.simulation.device import read_device
from scheduler.simulation.simulated_worker import SimulationError
from scheduler.simulation.simulator import SimulationConfig, Speculation
from scheduler.simulation.traces import read_trace

POLICIES = tuple(name for name in get_args(get_type_hints(StepPolicy)["name"]) if name != "vllm")
"""Names of our own step schedulers; vLLM's runs live only."""
DEFAULT_DURATION_S = 600.0
"""Duration that is drawn from a trace of rates, which has no end of its own."""


class BadSimulation(XYServeError, ValueError):
    """The simulation asked for is not possible."""

    status = 400


def _list_devices(wanted: bool) -> None:
    if wanted:
        print_devices()
        raise typer.Exit


def simulate(
    trace: Annotated[Path, typer.Argument(help="A trace of requests; see above for its formats.")],
    device: Annotated[
        str, typer.Option(help="A device profile: a name from --list-devices, or a .json file.")
    ] = "h200-llama-3-8b",
    workers: Annotated[int, typer.Option(min=1, help="Number of workers.")] = 1,
    policy: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(POLICIES)}; may be repeated; default: all."),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens per step; hybrid needs none.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Factor on the trace's rate of arrivals; for sessions and ServeGen, the "
            "arrivals per second."
        ),
    ] = None,
    load: Annotated[
        str, typer.Option(help="Factors on the rate, such as 0.5,1,2: each is simulated.")
    ] = "1",
    ttft_ms: Annotated[
        float | None, typer.Option(min=0, help="Target for the time to first token.")
    ] = None,
    tpot_ms: Annotated[
        float | None, typer.Option(min=0, help="Target for the time per token after the first.")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0, help="Use the first seconds of the trace only.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Use the first requests of the trace only.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="max_tokens of each request; default: the length of its output."),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=2, help="Truncate longer requests; default: the KV cache."),
    ] = None,
    drafts: Annotated[int, typer.Option(min=0, help="Drafts available in each decode.")] = 0,
    acceptance: Annotated[
        float, typer.Option(min=0, max=1, help="Probability that a draft is accepted.")
    ] = 0.7,
    noise: Annotated[
        float, typer.Option(min=0, help="Spread of the step times around the predicted ones.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="File for all figures, request by request."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Folder for plots; created if missing.")] = None,
    list_devices: Annotated[
        bool,
        typer.Option(
            "--list-devices",
            is_eager=True,
            callback=_list_devices,
            help="Show the device profiles.",
        ),
    ] = False,
) -> None:
    """Compare schedulers on a trace, without an accelerator.

    The schedulers are the ones that run live; only the duration of a step
    comes from a profile of the device instead of the device itself. Equal
    arguments give equal figures. A request is good if it met both targets.

    TRACE is one of Azure's (.csv), Mooncake's or LMCache's agent sessions
    (.jsonl), ServeGen's (*_arrivals.csv), or your own: JSON lines of
    arrival_s, input_length, output_length and, optionally, class. Any may be
    compressed (.gz).

    Example: xyserve simulate azure_2023_conv.csv --workers 8 --duration 300
    --ttft-ms 500 --tpot-ms 30

    Goodput against load, with plots: xyserve simulate azure_2023_conv.csv
    --policy hybrid --policy static --ttft-ms 500 --tpot-ms 30 --duration 120
    --load 0.5,1,2 --plot plots
    """
    loads = _loads(load)
    try:
        policies = [_policy(name, budget) for name in policy or POLICIES]
        if plot is not None:
            _make_folder(plot)
        profile = read_device(device)
        arrivals = _arrivals(trace, rate, duration, requests, seed)
        if max_tokens is not None:
            arrivals = with_max_tokens(arrivals, max_tokens)
        arrivals = clip_lengths(arrivals, max_model_len or profile.num_kv_tokens)
        slo = Slo(*(math.inf if ms is None else ms / 1e3 for ms in (ttft_ms, tpot_ms)))
        arrivals = with_slo(arrivals, slo)
        speculation = None
        if drafts:
            speculation = Speculation(num_drafts=drafts, acceptance_rate=acceptance)
        with show_progress() as show:
            runs = compare(
                arrivals,
                profile,
                policies,
                loads,
                SimulationConfig(
                    num_workers=workers,
                    speculation=speculation,
                    noise=noise,
                    seed=seed,
                    log_steps=plot is not None,
                ),
                on_progress=lambda label, share: show(f"Simulating {label}", share, 1.0),
            )
    except (ValueError, SimulationError) as error:
        raise BadSimulation(str(error)) from error
    print_runs(runs, profile, workers, len(arrivals))
    if json_file is not None:
        figures = to_dict(runs, profile, workers)
        _write_text(json_file, json.dumps(figures, indent=1, allow_nan=False))
        typer.echo(f"Figures: {json_file}")
    if plot is not None:
        typer.echo("Plots: " + ", ".join(map(str, write_plots(plot, runs))))


def _policy(name: str, budget: int | None) -> StepPolicy:
    if name not in POLICIES:
        raise BadSimulation(f"no policy {name!r}; use one of {', '.join(POLICIES)}")
    return StepPolicy(name=name, budget=budget)  # type: ignore[arg-type]


def _loads(text: str) -> list[float]:
    try:
        loads = [float(part) for part in text.split(",")]
    except ValueError:
        loads = []
    if not loads or not all(0 < load < math.inf for load in loads):
        raise BadSimulation(f"--load {text} must be positive numbers, such as 0.5,1,2")
    return loads


def _arrivals(
    trace: Path, rate: float | None, duration_s: float | None, count: int | None, seed: int
) -> list[Arrival]:
    """The arrivals of the part of a trace that is simulated, at load 1."""
    arrivals = read_trace(
        trace, rate_rps=rate, duration_s=duration_s or DEFAULT_DURATION_S, seed=seed
    )
    # Traces of rates and of sessions have no times; theirs were drawn at `rate`.
    is_drawn = trace.name.split(".gz")[0].endswith("_arrivals.csv")
    if rate is not None and not is_drawn and not any(arrival.after for arrival in arrivals):
        arrivals = scale_rate(arrivals, rate)
    if duration_s is not None:
        arrivals = first_seconds(arrivals, duration_s)
    if count is not None:
        arrivals = first_requests(arrivals, count)
    if not arrivals:
        raise BadSimulation(f"{trace}: no requests left; use a longer --duration")
    return arrivals


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n")
    except OSError as error:
        raise BadSimulation(f"cannot write {path} ({error}); name another file") from error


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSimulation(f"cannot create {path} ({error}); name another folder") from error
