"""`xyserve explain`: what happened to one request."""

from typing import Annotated

import typer

from cluster.cli.options import Address, AppName, fail, output_console
from cluster.observe.explanation_text import describe, describe_refusal, steps_table
from cluster.observe.request_history import Refusal


def explain(
    request_id: Annotated[
        str, typer.Argument(help="The id of an answer, or its header x-request-id.")
    ],
    each: Annotated[
        bool, typer.Option("--each", help="One row for each step, instead of grouping alike ones.")
    ] = False,
    app_name: AppName = "xyserve",
    address: Address = None,
) -> None:
    """Explain a request: where it was placed and why, what it waited for, and each of its steps.

    Part of the id is enough. Each ingress keeps its latest 10,000 requests
    and refusals, each worker its latest 20,000 steps.

    Example: xyserve explain chatcmpl-0f3a --each
    """
    # Importing Ray takes seconds.
    from cluster.client import XYServe

    console = output_console(width=140)
    with XYServe.connect(address, app_name) as handle:
        found = handle.explain(request_id)
    if not found:
        raise fail(
            f"no ingress remembers a request {request_id!r}; give at least four characters of an "
            "answer's id (an ingress that has restarted since has forgotten it)"
        )
    for one in found:
        if isinstance(one, Refusal):
            lines, tables = describe_refusal(one), []
        else:
            lines = describe(one)
            all_steps = [steps for trace in one.attempt_traces for steps in trace.steps.values()]
            tables = [steps_table(own, one.record.arrived_s, each) for own in all_steps]
        console.print(*lines, sep="\n", markup=False, highlight=False)
        console.print(*tables, sep="\n")
