"""`xyserve trace`: record what the workers and draft workers of a running app do."""

import time
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import Address, AppName, fail, show_progress
from cluster.observe.chrome_trace import chrome_trace, hidden_share, split

POLL_S = 0.1
"""Time between two updates of the progress bar."""


def trace(
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to record.")] = 10.0,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("trace.json"),
    app_name: AppName = "xyserve",
    address: Address = None,
) -> None:
    """Record a Chrome trace of what the workers and draft workers of a running app do.

    The trace has a track for the steps of each worker, one for the drafting of each draft worker,
    and two for each request. Send requests while it records.

    Example: xyserve trace --seconds 5 --out trace.json
    """
    # Importing Ray takes seconds.
    from cluster.client import XYServe

    if not out.parent.is_dir():
        raise fail(f"--out ({out}): there is no folder {out.parent}")
    with XYServe.connect(address, app_name) as handle:
        began_s = time.time()
        with show_progress() as show:
            while (past_s := time.time() - began_s) < seconds:
                show(f"Recording for {seconds:g} s", past_s, seconds)
                time.sleep(min(POLL_S, seconds - past_s))
        timelines = handle.spans(began_s)
    worker_spans, draft_spans = split(timelines)
    if not worker_spans:
        raise fail(
            "no steps were recorded: either no worker took one (send requests while this "
            "command records), or step_policy.name is vllm, whose steps are not kept"
        )
    try:
        out.write_text(chrome_trace(timelines))
    except OSError as error:
        raise fail(f"cannot write {out} ({error})") from error
    typer.echo(f"{len(worker_spans)} steps and {len(draft_spans)} drafting spans in {out}")
    if draft_spans:
        share = hidden_share(draft_spans, worker_spans)
        typer.echo(f"{share:.0%} of the drafting time was hidden behind steps")
    typer.echo("Open it at https://ui.perfetto.dev or, in Chrome, at chrome://tracing")
