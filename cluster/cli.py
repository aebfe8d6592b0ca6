"""The command line `xyserve`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.errors import XYServeError
from cluster.model_cli import model_app

app = typer.Typer(
    help="Serve large language models from a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Start with `xyserve up deploy/local.yaml`, then talk to it with any OpenAI client.",
)
app.add_typer(model_app, name="model")

DEFAULT_CONFIG = Path("deploy/local.yaml")

Config = Annotated[Path, typer.Argument(help="A Serve config file.")]
Address = Annotated[
    str | None, typer.Option(help="Address of the Ray cluster; this machine's if not given.")
]
AppName = Annotated[str, typer.Option("--app", help="Name of the app in its config file.")]


@app.command()
def up(
    config: Config = DEFAULT_CONFIG,
    demo: Annotated[bool, typer.Option(help="Ask one question when it is up.")] = True,
    temp_dir: Annotated[
        Path | None, typer.Option(help="Folder for Ray's files and logs, instead of /tmp/ray.")
    ] = None,
) -> None:
    """Start Ray and the app of CONFIG on this machine, and serve until Ctrl-C.

    On a Ray cluster that runs already, use `serve deploy CONFIG` instead.
    """
    from cluster.up import up as run

    run(config, demo=demo, temp_dir=temp_dir, console=Console())


@app.command()
def status(app_name: AppName = "xyserve", address: Address = None) -> None:
    """Show the workers of a running app and what they are doing."""
    from cluster.client import XYServe

    with XYServe.connect(address, app_name) as handle:
        state = handle.status()
    table = Table(
        "worker", "pid", "cores", "run", "wait", "tokens to do", "KV", "memory", "steps",
        title=f"{app_name}: {state.model}",
    )  # fmt: skip
    for worker in state.workers:
        table.add_row(
            worker.worker_id + (" (draining)" if worker.draining else ""),
            str(worker.pid),
            ",".join(map(str, worker.cpus)) or "any",
            str(worker.num_running),
            str(worker.num_waiting),
            str(worker.num_outstanding_tokens),
            f"{worker.kv_cache_usage:.0%}",
            f"{worker.memory_bytes / 2**30:.1f} GiB",
            str(worker.num_steps),
        )
    Console().print(table)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model; `-` reads stdin.")],
    raw: Annotated[bool, typer.Option(help="Continue the text itself, without a chat.")] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.0,
    timeout_s: Annotated[float | None, typer.Option(help="Give up after this long.")] = None,
    app_name: AppName = "xyserve",
    address: Address = None,
) -> None:
    """Stream one answer from a running app through the client handle.

    Example: xyserve generate "Why is the sky blue?" --max-tokens 100
    """
    from cluster.client import XYServe

    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    params = {"max_tokens": max_tokens, "temperature": temperature, "timeout_s": timeout_s}
    with XYServe.connect(address, app_name) as handle:
        if raw:
            for completion in handle.stream(text, **params):
                typer.echo(completion.choices[0].text, nl=False)
        else:
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": text})
            for chunk in handle.stream(messages, **params):
                typer.echo(chunk.choices[0].delta.content or "", nl=False)
    typer.echo()


@app.command()
def doctor(config: Config = DEFAULT_CONFIG) -> None:
    """Check that this machine can serve CONFIG, with a remedy for each thing found."""
    from cluster.config import read_serve_file
    from cluster.doctor import examine, print_findings

    if not print_findings(examine(read_serve_file(config)), Console()):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; errors the user can mend are one line, not a traceback."""
    try:
        app()
    except (XYServeError, ConnectionError, TimeoutError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
