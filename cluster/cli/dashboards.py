"""`xyserve dashboards`: the dashboards as pictures."""

import time
from pathlib import Path
from typing import Annotated

import typer

MAX_POINTS = 240
"""Points in one line of a chart; more would be closer than a pixel."""


def dashboards(
    prometheus: Annotated[
        str, typer.Option(help="Address of the Prometheus that scrapes the cluster.")
    ] = "http://127.0.0.1:9090",
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the pictures; created if missing.")
    ] = Path("dashboards"),
    minutes: Annotated[float, typer.Option(min=0.1, help="How far back to show.")] = 15.0,
) -> None:
    """Draw the dashboards as PNG files, from Prometheus and without Grafana.

    Prometheus must be running with deploy/prometheus.yml.

    Example: xyserve dashboards --minutes 60 --out pictures
    """
    # Matplotlib and httpx would make every other command start more slowly.
    from cluster.observe.dashboards.pages import DASHBOARDS
    from cluster.observe.dashboards.plots import draw, fetch
    from cluster.observe.dashboards.prometheus import Period, Prometheus

    end_s = time.time()
    step_s = max(1.0, minutes * 60 / MAX_POINTS)
    rate_interval = f"{max(60, round(2 * step_s))}s"
    period = Period(end_s - minutes * 60, end_s, step_s, rate_interval)
    with Prometheus(prometheus) as server:
        for dashboard in DASHBOARDS:
            curves = fetch(server, dashboard, period)
            out.mkdir(parents=True, exist_ok=True)
            path = out / f"{dashboard.uid.removeprefix('xyserve-')}.png"
            draw(dashboard, curves, period, path)
            typer.echo(f"wrote {path}")
