"""The command `xyserve simulate`: policies compared on a trace, on any number of workers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

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
from scheduler.simulation.device import DeviceProfile, device_names, read_device
from scheduler.simulation.simulated_worker import SimulationError
from scheduler.simulation.simulator import SimulationConfig, SimulationResult, Speculation
from scheduler.simulation.simulator import simulate as run
from scheduler.simulation.summary import Summary
from scheduler.simulation.traces import read_trace

POLICIES = tuple(name for name in get_args(get_type_hints(StepPolicy)["name"]) if name != "vllm")
"""The step schedulers of our own; vLLM's decides live only."""


class BadSimulation(XYServeError, ValueError):
    """What was to be simulated cannot be."""

    status = 400


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation of those that are compared."""

    policy: str
    load: float
    offered_rps: float
    """Requests per second that came."""
    result: SimulationResult

    @property
    def label(self) -> str:
        """What tells it from the others."""
        return self.policy if self.load == 1 else f"{self.policy} x{self.load:g}"


def _list_devices(wanted: bool) -> None:
    if not wanted:
        return
    table = Table("device", "from", "KV tokens", "source", title="Device profiles")
    for name in device_names():
        profile = read_device(name)
        kind = "modelled" if profile.modelled else "measured"
        table.add_row(name, kind, f"{profile.num_kv_tokens:,}", profile.source)
    Console().print(table)
    raise typer.Exit


def simulate(
    trace: Annotated[Path, typer.Argument(help="A trace of requests; see above.")],
    device: Annotated[
        str, typer.Option(help="Profile of a worker: a name of --list-devices, or a .json file.")
    ] = "h200-llama-3-8b",
    workers: Annotated[int, typer.Option(min=1, help="Number of workers.")] = 1,
    policy: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(POLICIES)}; may be given several times; all by default."),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a step; hybrid needs none.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="How many times as fast the requests come as in the trace; sessions "
            "and ServeGen: how many per second."
        ),
    ] = None,
    load: Annotated[
        str, typer.Option(help="Factors of the rate, such as 0.5,1,2: each is simulated.")
    ] = "1",
    ttft_ms: Annotated[
        float | None, typer.Option(min=0, help="Target of the time to first token.")
    ] = None,
    tpot_ms: Annotated[
        float | None, typer.Option(min=0, help="Target of the time per token after it.")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0, help="Seconds of the trace that are taken.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests of the trace that are taken.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="What each request asks for; its own output if not given."),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Cut longer requests; by default to the KV cache.")
    ] = None,
    drafts: Annotated[int, typer.Option(min=0, help="Drafts at hand for each next token.")] = 0,
    acceptance: Annotated[
        float, typer.Option(min=0, max=1, help="Chance that a draft is accepted.")
    ] = 0.7,
    noise: Annotated[
        float, typer.Option(min=0, help="Spread of step times about the predicted ones.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of all that is drawn at random.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures, request by request.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Folder for plots; made if it is not there.")
    ] = None,
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

    The schedulers are those that run live; only the time of a step comes from
    a profile of the device instead of the device. The same arguments always
    give the same figures. Good are the requests that met both of their targets.

    TRACE is one of Azure's (.csv), Mooncake's or LMCache's agent sessions
    (.jsonl), ServeGen's (*_arrivals.csv), or your own: JSON lines of
    arrival_s, input_length, output_length and, if you like, class. Any may be
    compressed (.gz).

    Example: xyserve simulate azure_2023_conv.csv --workers 8 --duration 300
    --ttft-ms 500 --tpot-ms 30

    Goodput against load, with plots: xyserve simulate azure_2023_conv.csv
    --policy hybrid --policy static --ttft-ms 500 --tpot-ms 30 --duration 120
    --load 0.5,1,2 --plot plots
    """
    loads = _loads(load)
    names = policy or list(POLICIES)
    for name in names:
        if name not in POLICIES:
            raise BadSimulation(f"no policy {name!r}; use one of {', '.join(POLICIES)}")
    if plot is not None:
        _make_folder(plot)
    try:
        profile = read_device(device)
        arrivals = _arrivals(
            trace, profile, rate=rate, seed=seed, duration_s=duration, count=requests,
            max_tokens=max_tokens, max_model_len=max_model_len,
            slo=Slo(*(math.inf if ms is None else ms / 1e3 for ms in (ttft_ms, tpot_ms))),
        )  # fmt: skip
        speculation = None
        if drafts:
            speculation = Speculation(num_drafts=drafts, acceptance_rate=acceptance)
        runs = []
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
            for name in names:
                for factor in loads:
                    bar = bars.add_task(f"{name} x{factor:g}", total=1.0)
                    scaled = scale_rate(arrivals, factor)
                    result = run(
                        scaled,
                        profile,
                        SimulationConfig(
                            policy=StepPolicy(name=name, budget=budget),  # type: ignore[arg-type]
                            num_workers=workers,
                            speculation=speculation,
                            noise=noise,
                            seed=seed,
                            log_steps=plot is not None,
                        ),
                        on_progress=partial(_update, bars, bar),
                    )
                    bars.update(bar, completed=1.0)
                    runs.append(Run(name, factor, _offered_rps(scaled, result), result))
    except (ValueError, SimulationError) as error:
        raise BadSimulation(str(error)) from error
    _show(runs, profile, workers, len(arrivals))
    if json_file is not None:
        _write_json(json_file, runs, profile, workers)
    if plot is not None:
        _plot(plot, runs)


def _update(bars: Progress, bar: TaskID, share: float) -> None:
    bars.update(bar, completed=share)


def _loads(text: str) -> list[float]:
    try:
        loads = [float(part) for part in text.split(",")]
    except ValueError:
        loads = []
    if not loads or not all(0 < load < math.inf for load in loads):
        raise BadSimulation(f"--load {text} must be positive numbers, such as 0.5,1,2")
    return loads


def _arrivals(
    trace: Path,
    profile: DeviceProfile,
    *,
    rate: float | None,
    seed: int,
    duration_s: float | None,
    count: int | None,
    max_tokens: int | None,
    max_model_len: int | None,
    slo: Slo,
) -> list[Arrival]:
    """The trace as it is simulated at load 1."""
    arrivals, is_scaled = _read(trace, rate, duration_s, seed)
    if rate is not None and not is_scaled:
        arrivals = scale_rate(arrivals, rate)
    if duration_s is not None:
        arrivals = first_seconds(arrivals, duration_s)
    if count is not None:
        arrivals = first_requests(arrivals, count)
    if not arrivals:
        raise BadSimulation(f"{trace}: nothing is left of it; take a longer --duration")
    if max_tokens is not None:
        arrivals = with_max_tokens(arrivals, max_tokens)
    return with_slo(clip_lengths(arrivals, max_model_len or profile.num_kv_tokens), slo)


def _read(
    trace: Path, rate: float | None, duration_s: float | None, seed: int
) -> tuple[list[Arrival], bool]:
    """The arrivals, and whether `rate` is in them already: some traces have no times."""
    arrivals = read_trace(trace, rate_rps=rate, duration_s=duration_s or 600.0, seed=seed)
    drawn = trace.name.split(".gz")[0].endswith("_arrivals.csv")
    return arrivals, drawn or any(arrival.after for arrival in arrivals)


def _offered_rps(arrivals: list[Arrival], result: SimulationResult) -> float:
    """Requests per second that came; of closed sessions, those that were served."""
    if any(arrival.after for arrival in arrivals):
        return result.summary.requests_per_s
    times = [arrival.arrival_s for arrival in arrivals]
    span_s = max(times) - min(times)
    return len(times) / span_s if span_s else float(len(times))


def _show(runs: list[Run], profile: DeviceProfile, num_workers: int, num_requests: int) -> None:
    """Print the runs: side by side, or one below the other where there are several loads."""
    kind = "modelled" if profile.modelled else "measured"
    title = f"{num_requests} requests on {num_workers} x {profile.name} ({kind})"
    if len({run.load for run in runs}) > 1:
        table = Table("policy", *SHORT_ROWS, title=title)
        for run in runs:
            table.add_row(run.label, *(ROWS[row](run) for row in SHORT_ROWS))
    else:
        table = Table("", *(run.label for run in runs), title=title)
        for row, cell in ROWS.items():
            table.add_row(row, *map(cell, runs))
    console = Console()
    console.print(table)
    classes = sorted({name for run in runs for name in run.result.by_class})
    if classes:
        shares = Table("class", *(run.label for run in runs), title="Share within both targets")
        for name in classes:
            cells = (f"{run.result.by_class[name].attainment:.1%}" for run in runs)
            shares.add_row(name or "none", *cells)
        console.print(shares)


Cell = Callable[[Run], str]
"""What a row of the table shows of a run."""


def _number(figure: str, form: str) -> Cell:
    return lambda run: format(getattr(run.result.summary, figure), form)


def _ms(part: str, figure: str) -> Cell:
    return lambda run: f"{getattr(getattr(run.result.summary, part), figure) * 1e3:,.1f}"


ROWS: dict[str, Cell] = {
    "requests/s offered": lambda run: f"{run.offered_rps:.2f}",
    "requests/s": _number("requests_per_s", ".2f"),
    "good requests/s": _number("goodput_rps", ".2f"),
    "within both targets": _number("attainment", ".1%"),
    "within TTFT": _number("ttft_attainment", ".1%"),
    "within TPOT": _number("tpot_attainment", ".1%"),
    **{
        f"{name} {figure}, ms": _ms(part, figure)
        for name, part in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("end to end", "e2e_s"))
        for figure in ("mean", "p50", "p90", "p99")
    },
    "output tokens/s": _number("output_tokens_per_s", ",.0f"),
    "makespan, s": _number("makespan_s", ",.1f"),
    "busy": _number("utilisation", ".1%"),
    "requests in a step": _number("mean_batch", ".1f"),
    "tokens in a step": _number("mean_step_tokens", ".1f"),
    "preemptions": _number("num_preemptions", "d"),
    "prompt from cache": _number("prefix_hit_share", ".1%"),
}
SHORT_ROWS = (
    "requests/s offered",
    "good requests/s",
    "within both targets",
    "TTFT p50, ms",
    "TTFT p99, ms",
    "TPOT p50, ms",
    "TPOT p99, ms",
    "busy",
)


def _write_json(path: Path, runs: list[Run], profile: DeviceProfile, num_workers: int) -> None:
    state = {
        "device": profile.name,
        "device_source": profile.source,
        "modelled": profile.modelled,
        "num_workers": num_workers,
        "runs": [
            {"load": run.load, "offered_rps": run.offered_rps, **run.result.to_dict()}
            for run in runs
        ],
    }
    try:
        path.write_text(json.dumps(state, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise BadSimulation(f"cannot write {path} ({error}); name another file") from error
    typer.echo(f"Figures: {path}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSimulation(f"cannot make {path} ({error}); name another folder") from error


def _plot(folder: Path, runs: list[Run]) -> None:
    from cluster.cli.simulation_plots import plot_goodput, plot_latencies, plot_timeline

    written = [folder / "latencies.png"]
    plot_latencies({run.label: run.result for run in runs}, written[0])
    for one in runs:
        worker_id, steps = next(iter(one.result.steps.items()))
        written.append(folder / f"timeline-{one.label.replace(' ', '-')}.png")
        plot_timeline(steps, written[-1], f"{one.label}, {worker_id}")
    if len({run.load for run in runs}) > 1:
        points: dict[str, list[tuple[float, float, float]]] = {}
        for one in sorted(runs, key=lambda run: run.load):
            summary: Summary = one.result.summary
            point = (one.offered_rps, summary.goodput_rps, summary.attainment)
            points.setdefault(one.policy, []).append(point)
        written.append(folder / "goodput.png")
        plot_goodput(points, written[-1])
    typer.echo("Plots: " + ", ".join(map(str, written)))
