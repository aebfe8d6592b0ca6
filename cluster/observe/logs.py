"""The logs of replicas: one line per event, with named fields, and limits on repeated events.

An event is a log call with a constant message, its variable parts in `extra`:
`logger.warning("request lost its worker", extra={"request_id": request_id})`.
"""

import json
import logging
import logging.handlers
import math
import re
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS, merge_record_extra
from pythonjsonlogger.json import JsonFormatter

from cluster.config.observe import LogConfig

SERVE = "ray.serve"
"""Serve's logger."""
PACKAGES = ("cluster", "workers", "scheduler")
"""Packages whose events are formatted here; libraries configure their own loggers."""

NO_FIELDS = (*RESERVED_ATTRS, "vllm_process_name")
"""Attributes that every log record has, and so not fields of an event; vLLM adds one."""

MAX_ALIKE, WINDOW_S = 5, 10.0
"""At most MAX_ALIKE equal events are logged in WINDOW_S seconds."""


def set_up_logs(config: LogConfig, **context: str) -> None:
    """Send the events of our packages to stderr, each with the fields of `context`.

    The root logger and those of libraries are left alone: vLLM and its dependencies configure
    them when they are imported.
    """
    formatter: logging.Formatter
    if config.format == "json":
        formatter = _JsonFormatter(
            "%(asctime)s %(levelname)s %(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "exc_info": "exception"},
            static_fields=context,
            reserved_attrs=NO_FIELDS,
        )
    else:
        formatter = _TextFormatter(context)
    formatter.converter = time.gmtime
    formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
    formatter.default_msec_format = "%s.%03dZ"
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    handler.addFilter(FloodFilter())
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(config.level.upper())
        logger.propagate = False


def keep_serves_logs() -> None:
    """Have Serve's own log of this replica outlive vLLM's import, which closes every handler.

    A closed one has no target. A controller of Serve that starts again asks each replica for the
    path of its log, and would stop those that answer with an error: all that imported vLLM.
    """
    for handler in logging.getLogger(SERVE).handlers:
        if isinstance(handler, logging.handlers.MemoryHandler):
            handler.close = handler.flush  # type: ignore[method-assign]


class _TextFormatter(logging.Formatter):
    """Time, level and message, then `key=value` as in logfmt; a traceback follows."""

    def __init__(self, context: dict[str, str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._context = context

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of an event."""
        fields = merge_record_extra(record, {}, NO_FIELDS) | self._context
        pairs = (f"{key}={quoted(value)}" for key, value in fields.items())
        return " ".join([super().formatMessage(record), *pairs])


class _JsonFormatter(JsonFormatter):
    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """The fields of an event, with what JSON lacks (infinity, NaN) as text."""
        return {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in log_data.items()
        }


def quoted(value: object) -> str:
    """A value as text, in JSON's quotes if it would be ambiguous without."""
    text = str(value)
    if text.isprintable() and re.fullmatch(r'[^ "=]+', text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


@dataclass(slots=True)
class _Kind:
    """Events that are equal except for their fields."""

    logged_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_ALIKE))
    """Times at which the last of them were logged."""
    num_left_out: int = 0
    """Events left out since then."""


class FloodFilter(logging.Filter):
    """Leaves out events that repeat too often; the next one logged counts them in `left_out`.

    Events are equal if they share logger, level and message, whatever their fields. At level
    debug nothing is left out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: defaultdict[tuple[str, int, str], _Kind] = defaultdict(_Kind)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log an event."""
        if record.levelno <= logging.DEBUG:
            return True
        with self._lock:
            now = self._clock()
            kind = self._kinds[record.name, record.levelno, str(record.msg)]
            if len(kind.logged_s) == MAX_ALIKE and now - kind.logged_s[0] < WINDOW_S:
                kind.num_left_out += 1
                return False
            kind.logged_s.append(now)  # drops the oldest
            if kind.num_left_out:
                record.__dict__["left_out"] = kind.num_left_out
                kind.num_left_out = 0
            return True
