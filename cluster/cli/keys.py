"""`xyserve keys`: make, list and revoke the API keys of an app."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.cli.options import DEFAULT_CONFIG, Config, fail, output_console
from cluster.config.auth import AuthConfig
from cluster.config.serve_file import ServeFile, read_serve_file
from cluster.keys import DEFAULT_TENANT, Right, edited_keys, expiry, new_key, read_keys

keys_app = typer.Typer(
    help="Make, list and revoke API keys. Ingresses follow within seconds, and streams go on.",
    no_args_is_help=True,
)


@keys_app.command()
def add(
    config: Config = DEFAULT_CONFIG,
    tenant: Annotated[
        str, typer.Option(help="Whose it is: one of `tenants` in CONFIG.")
    ] = DEFAULT_TENANT,
    right: Annotated[
        list[Right] | None,
        typer.Option(
            help="What it is for, several times for several: `infer`, `metrics` (of /metrics), or "
            "`admin` for both and for a negative `priority`."
        ),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            help="When it ends: 12h, 90d, 4w or a date such as 2030-01-31; never without."
        ),
    ] = None,
) -> None:
    """Make a key and print it, once: `auth.keys_file` of CONFIG keeps a hash.

    Example: xyserve keys add app.yaml --tenant acme --expires 90d
    """
    file, path = _read(config)
    if tenant not in file.config.all_tenants:
        known = ", ".join(sorted(file.config.all_tenants))
        raise fail(f"{config} has no tenant {tenant!r}, only {known}: add it to `tenants`")
    try:
        end = expiry(expires, datetime.now(UTC)) if expires else None
    except ValueError as error:
        raise fail(f"--expires: {error}") from None
    text, key = new_key(tenant, right or [Right.INFER], end)
    with edited_keys(path) as keys:
        keys[key.id] = key
    typer.echo(text)
    typer.echo(f"Added {key.id} to {path}. It is not shown again.", err=True)


@keys_app.command("list")
def list_(config: Config = DEFAULT_CONFIG) -> None:
    """Show the keys in `auth.keys_file` of CONFIG, without what makes them keys."""
    file, path = _read(config)
    table = Table("id", "tenant", "rights", "created", "expires", title=str(path))
    now = datetime.now(UTC)
    for key in read_keys(path).values():
        is_known = key.tenant in file.config.all_tenants
        table.add_row(
            key.id,
            key.tenant + ("" if is_known else " (not in the config)"),
            ", ".join(key.rights),
            f"{key.created:%Y-%m-%d}",
            (f"{key.expires:%Y-%m-%d %H:%M}" if key.expires else "never")
            + (" (expired)" if key.is_expired(now) else ""),
        )
    output_console(width=100).print(table)


@keys_app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The id that `xyserve keys list` shows.")],
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Delete a key from `auth.keys_file` of CONFIG; calls with it are refused within seconds."""
    _, path = _read(config)
    read_keys(path)  # that it is there
    with edited_keys(path) as keys:
        if keys.pop(key_id, None) is None:
            raise fail(f"{path} has no key {key_id!r}; its keys: {', '.join(keys) or 'none'}")
    typer.echo(f"Revoked {key_id}.")


def _read(config: Path) -> tuple[ServeFile, Path]:
    """A config file and the file of its keys."""
    file = read_serve_file(config)
    auth: AuthConfig = file.config.auth
    if auth.keys_file is None:
        raise fail(f"{config} names no `auth.keys_file`: add it, with an absolute path")
    return file, auth.path
