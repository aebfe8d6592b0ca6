"""The command line `xyserve`.

A command's file imports what takes long to import inside the command, so that `xyserve --help`
and the other commands start quickly.
"""

from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console

from cluster.cli.calibrate import calibrate
from cluster.cli.dashboards import dashboards
from cluster.cli.doctor import doctor
from cluster.cli.draft_head import draft_head_app
from cluster.cli.explain import explain
from cluster.cli.generate import generate
from cluster.cli.keys import keys_app
from cluster.cli.model import model_app
from cluster.cli.replay import replay
from cluster.cli.simulate import simulate
from cluster.cli.status import status
from cluster.cli.steps import steps
from cluster.cli.trace import trace
from cluster.cli.up import up
from cluster.config.observe import LogConfig
from cluster.errors import XYServeError
from cluster.observe.logs import set_up_logs

app = typer.Typer(
    help="Serve large language models from a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Start with `xyserve up deploy/local.yaml`, then use any OpenAI client.",
)
for command in (
    up,
    status,
    generate,
    steps,
    explain,
    trace,
    dashboards,
    doctor,
    calibrate,
    simulate,
    replay,
):
    app.command()(command)
app.add_typer(keys_app, name="keys")
app.add_typer(model_app, name="model")
app.add_typer(draft_head_app, name="draft-head")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"xyserve {version('xyserve')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; an error that the user can fix is one line, not a traceback."""
    set_up_logs(LogConfig(level="warning"))
    try:
        app()
    except (XYServeError, ConnectionError, TimeoutError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
