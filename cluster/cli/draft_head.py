"""`xyserve draft-head`: train a draft head for a model, and show what a head contains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.cli.model import show_fetch
from cluster.cli.options import fail
from cluster.models.default_model import DEFAULT_MODEL, FetchError
from cluster.models.model import resolve_model
from workers.config import WorkerConfig

draft_head_app = typer.Typer(
    help="Train a draft head for a model, and show what a head contains.", no_args_is_help=True
)


@draft_head_app.command()
def train(
    prompts: Annotated[
        Path,
        typer.Option(
            help="A file with one prompt per line: plain text, or JSON with `prompt` or "
            "`messages`.",
            exists=True,
            dir_okay=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where to write the head.")],
    model: Annotated[
        str, typer.Option(help="The default model's name, or the folder of a checkpoint.")
    ] = DEFAULT_MODEL,
    num_tokens: Annotated[
        int, typer.Option(min=1000, help="Tokens that the model generates as training data.")
    ] = 400_000,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = 6,
    cpus: Annotated[int, typer.Option(min=1, help="Cores to use.")] = os.cpu_count() or 1,
    seed: int = 0,
) -> None:
    """Train a draft head: a small layer that predicts the model's next tokens.

    The model answers the prompts, and the head learns to predict the answers
    from the model's hidden states. Use prompts like those you will serve: about
    two thousand, with about a hundred of each kind. Answers in the file are
    ignored. With the defaults it takes about an hour on two cores: half for
    generating, half for training.

    The model must be llama-like, with its weights in safetensors.

    Example:

        xyserve draft-head train --prompts prompts.jsonl --out my-model.head.safetensors
    """
    # Loads the kernels' library; the other commands also work without it.
    from workers.profiling.calibrate import ENGINE_ENV

    try:
        with show_fetch() as progress:
            folder = resolve_model(model, progress)
    except (FetchError, OSError, ValueError) as error:
        raise fail(str(error)) from error
    if not Path(folder).is_dir():
        raise fail(f"--model ({model}) must be the folder of a checkpoint on this machine")
    options = {
        "model": folder, "prompts": str(prompts), "out": str(out),
        "num_tokens": num_tokens, "epochs": epochs, "cpus": cpus, "seed": seed,
    }  # fmt: skip
    # A separate process: torch reads its environment when it is imported.
    command = [
        sys.executable,
        "-m",
        "workers.drafters.training.vllm_head_training",
        json.dumps(options),
    ]
    env = os.environ | WorkerConfig(cpus=cpus).env | ENGINE_ENV
    if code := subprocess.run(command, env=env).returncode:
        raise fail(f"training ended with status {code}; see the error above")


@draft_head_app.command()
def info(
    file: Annotated[
        Path | None, typer.Argument(help="A draft head; default: the one of the default model.")
    ] = None,
) -> None:
    """Show which model a draft head is for, and how large it is.

    Example: xyserve draft-head info
    """
    # Loads the kernels' library; the other commands also work without it.
    from workers.drafters.draft_head import DEFAULT_HEAD, read_config

    file = file or DEFAULT_HEAD
    try:
        config = read_config(file)
        num_bytes = file.stat().st_size
    except (OSError, ValueError) as error:
        raise fail(str(error)) from error
    table = Table("", "", title=str(file), show_header=False)
    table.add_row("model", f"{config.target} ({config.vocab_size} tokens)")
    table.add_row("size", f"{num_bytes / 1e6:.1f} MB")
    table.add_row("predicts among", f"{config.num_guessed} tokens")
    table.add_row("hidden size", str(config.hidden_size))
    table.add_row("heads", f"{config.num_heads}, {config.num_kv_heads} for keys and values")
    table.add_row("attends to", f"the last {config.window} tokens")
    Console().print(table)
