"""`xyserve status`: what the workers and draft workers of a running app are doing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from cluster.cli.options import Address, AppName, output_console

if TYPE_CHECKING:
    from cluster.ingress.protocol import AppStatus
    from workers.reports import DraftStats, DraftWorkerStatus, WorkerStatus


def status(app_name: AppName = "xyserve", address: Address = None) -> None:
    """Show the workers of a running app and what they are doing."""
    # Importing Ray takes seconds.
    from cluster.client import XYServe

    with XYServe.connect(address, app_name) as handle:
        state = handle.status()
    console = output_console(width=140)
    console.print(_workers_table(app_name, state))
    if state.scaling:
        console.print(f"Workers: {state.scaling}")
    if not state.is_serving:
        console.print("No worker takes requests: they wait until one does, or are refused.")
    if state.draft_workers:
        console.print(_draft_workers_table(state.draft_workers))


def _workers_table(app_name: str, state: AppStatus) -> Table:
    table = Table(
        "worker", "pid", "cores", "running", "waiting", "tokens left", "KV", "memory", "steps",
        "start",
        *(("acceptance", "tokens/decode") if state.draft_workers else ()),
        title=f"{app_name}: {state.model}",
    )  # fmt: skip
    for worker in state.workers:
        table.add_row(
            worker.worker_id + _state(worker),
            str(worker.pid),
            ",".join(map(str, worker.cpus)) or "any",
            str(worker.num_running),
            str(worker.num_waiting),
            str(worker.num_outstanding_tokens),
            f"{worker.kv_cache_usage:.0%}",
            f"{worker.memory_bytes / 2**30:.1f} GiB",
            str(worker.num_steps),
            f"{sum(phase.took_s for phase in worker.start.values()):.0f} s",
            *_draft_cells(worker.drafts),
        )
    return table


def _state(worker: WorkerStatus) -> str:
    words = [word for word in ("draining", "silent") if getattr(worker, word)]
    if worker.on_trial:
        words.append("on trial")
    if worker.slow:
        words.append(f"slow: {worker.slowness:.1f} times as predicted")
    policy = worker.policy
    if policy.prefill_share < 1:
        words.append(f"prefills in {policy.prefill_share:.0%} of a step: {policy.reason.text}")
    if policy.max_drafts is not None:
        words.append(f"at most {policy.max_drafts} drafts: {policy.reason.text}")
    return f" ({', '.join(words)})" if words else ""


def _draft_cells(drafts: DraftStats | None) -> tuple[str, ...]:
    if drafts is None:
        return ()
    if not drafts.counts.verified:
        return ("-", "-")
    return (f"{drafts.acceptance_rate:.0%}", f"{drafts.tokens_per_decode:.2f}")


def _draft_workers_table(draft_workers: list[DraftWorkerStatus]) -> Table:
    table = Table("draft worker", "pid", "drafters", "requests", "drafts", "busy", "memory")
    for worker in draft_workers:
        table.add_row(
            worker.draft_worker_id + (" (silent)" if worker.silent else ""),
            str(worker.pid),
            ", ".join(worker.drafters),
            str(worker.num_contexts),
            str(worker.num_drafts),
            f"{worker.busy_share:.0%}",
            f"{worker.memory_bytes / 2**30:.1f} GiB",
        )
    return table
