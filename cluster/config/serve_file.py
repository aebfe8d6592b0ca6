"""Serve config files: the only reader of YAML."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.config.app_config import AppConfig, parse_args
from cluster.errors import ConfigError

IMPORT_PATH = "cluster.app:build_app"


@dataclass(frozen=True, slots=True)
class ServeFile:
    """A Serve config file with one app of ours in it."""

    app_name: str
    route_prefix: str
    host: str
    port: int
    config: AppConfig
    raw: dict[str, Any]
    """The file as Serve takes it."""

    @property
    def url(self) -> str:
        """The app's address on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}{self.route_prefix.rstrip('/')}"


def read_serve_file(path: Path) -> ServeFile:
    """Read and check a file for `serve deploy`; ConfigError says what is wrong with it."""
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; deploy/local.yaml is an example") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    raw = raw if isinstance(raw, dict) else {}
    apps = raw.get("applications")
    apps = apps if isinstance(apps, list) else []
    ours = [a for a in apps if isinstance(a, dict) and a.get("import_path") == IMPORT_PATH]
    if len(ours) != 1:
        raise ConfigError(
            f"{path}: needs exactly one entry under `applications` with "
            f"`import_path: {IMPORT_PATH}`, found {len(ours)}"
        )
    app, http = ours[0], raw.get("http_options") or {}
    if not isinstance(http, dict):
        raise ConfigError(f"{path}: http_options must be a mapping, not {http!r}")
    args = app.get("args")
    try:
        config = parse_args({} if args is None else args)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return ServeFile(
        app_name=app.get("name", "default"),
        route_prefix=app.get("route_prefix", "/"),
        host=http.get("host", "127.0.0.1"),
        port=http.get("port", 8000),
        config=config,
        raw=raw,
    )
