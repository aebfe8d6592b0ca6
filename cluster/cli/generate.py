"""`xyserve generate`: one answer from a running app."""

from typing import Annotated

import typer

from cluster.cli.options import Address, AppName


def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model; `-` reads stdin.")],
    raw: Annotated[
        bool, typer.Option(help="Continue the text itself, without a chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.0,
    timeout_s: Annotated[float | None, typer.Option(help="Give up after this time.")] = None,
    app_name: AppName = "xyserve",
    address: Address = None,
) -> None:
    """Stream one answer from a running app, through the Python client.

    Example: xyserve generate "Why is the sky blue?" --max-tokens 100
    """
    # Importing Ray takes seconds.
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
