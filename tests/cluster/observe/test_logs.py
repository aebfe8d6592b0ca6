import ast
import json
import logging
import logging.config
import logging.handlers
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pythonjsonlogger.core import RESERVED_ATTRS

from cluster.config.observe import LogConfig
from cluster.observe.logs import (
    MAX_ALIKE,
    PACKAGES,
    WINDOW_S,
    FloodFilter,
    keep_serves_logs,
    quoted,
    set_up_logs,
)
from cluster.placement.global_scheduler import GlobalScheduler
from cluster.placement.worker_views import SILENT_AFTER_S
from scheduler.request import Request
from tests.workers.fake_clock import FakeClock
from workers.drafts.draft_stream import DraftWorkerAddress
from workers.reports import DraftWorkerReport, DraftWorkerStatus, WorkerReport
from workers.token_stream import StreamAddress

ROOT = Path(__file__).parents[3]
CONTEXT = {"app": "xyserve", "deployment": "Worker", "replica": "abc"}
JSON = LogConfig(format="json")
logger = logging.getLogger("workers.a_module")


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("", *PACKAGES)]
    before = [(own.handlers[:], own.level, own.propagate) for own in loggers]
    yield
    for own, (handlers, level, propagate) in zip(loggers, before, strict=True):
        own.handlers, own.propagate = handlers, propagate
        own.setLevel(level)


def test_serves_log_outlives_an_import_that_closes_all_handlers(tmp_path: Path) -> None:
    """As vLLM's does: what Serve's controller asks a replica for must be there after it."""
    serves = logging.getLogger("ray.serve")
    before = serves.handlers[:]
    target = logging.FileHandler(tmp_path / "serve.log")
    handler = logging.handlers.MemoryHandler(100, target=target)
    serves.handlers = [handler]
    try:
        keep_serves_logs()
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})

        assert handler.target is target
        serves.error("still here")
        handler.flush()
        assert (tmp_path / "serve.log").read_text() == "still here\n"
    finally:
        serves.handlers = before
        target.close()


def in_json(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The events on stderr; any line that is none fails the test."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    lines = capsys.readouterr().err.splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_an_event_in_text_is_one_line_with_its_fields_and_those_of_the_replica(
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_up_logs(LogConfig(), **CONTEXT)

    logger.warning("request lost its worker", extra={"request_id": "r-1", "num_tokens": 7})

    [line] = capsys.readouterr().err.splitlines()
    time, _, event = line.partition(" ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert event == (
        "WARNING request lost its worker request_id=r-1 num_tokens=7 "
        "app=xyserve deployment=Worker replica=abc"
    )


def test_an_event_in_json_is_one_object_with_its_fields_and_those_of_the_replica(
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_up_logs(JSON, **CONTEXT)

    logger.warning("request lost its worker", extra={"request_id": "r-1", "num_tokens": 7})

    [event] = in_json(capsys)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event.pop("time"))
    assert event == {
        "level": "WARNING",
        "message": "request lost its worker",
        "request_id": "r-1",
        "num_tokens": 7,
        **CONTEXT,
    }


@pytest.mark.parametrize("value", ['a "b"\nc', "\u2028\x85\x00", "\ud800", "é", "", "a=b"])
def test_no_value_breaks_a_line(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs(LogConfig())
    logger.error("failed", extra={"error": value})
    [line] = capsys.readouterr().err.splitlines()
    set_up_logs(JSON)
    logger.error("failed", extra={"error": value})
    [event] = in_json(capsys)

    assert line.endswith(f" ERROR failed error={quoted(value)}")
    assert event["error"] == value


@pytest.mark.parametrize("value", [float("inf"), float("nan"), ValueError("x"), {1, 2}, b"\xff"])
def test_what_json_does_not_know_is_written_as_text(
    value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logs(JSON)

    logger.info("event", extra={"value": value})

    [event] = in_json(capsys)
    assert isinstance(event["value"], str)


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), st.text()))
@settings(deadline=None)
def test_quoted_values_can_be_read_back(fields: dict[str, str]) -> None:
    line = " ".join(f"{key}={quoted(value)}" for key, value in fields.items())

    pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[^ "]+)(?: |$)', line)

    assert line.splitlines() == [line] * bool(line)
    assert fields == {
        key: json.loads(value) if value.startswith('"') else value for key, value in pairs
    }


def test_an_exception_is_a_part_of_its_event(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        try:
            raise ValueError("no such thing")
        except ValueError:
            logger.exception("the engine failed", extra={"worker": "w"})

    set_up_logs(LogConfig())
    fail()
    line, *traceback = capsys.readouterr().err.splitlines()
    set_up_logs(JSON)
    fail()
    [event] = in_json(capsys)

    assert line.endswith(" ERROR the engine failed worker=w")
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-1] == "ValueError: no such thing"
    assert event["exception"].splitlines()[-1] == "ValueError: no such thing"
    assert event["worker"] == "w"


def test_events_below_the_level_are_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs(LogConfig(format="json", level="warning"))

    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logger.log(level, "event")

    assert [event["level"] for event in in_json(capsys)] == ["WARNING", "ERROR"]


def test_setting_up_again_logs_no_event_twice(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    set_up_logs(JSON)
    set_up_logs(JSON)
    logging.getLogger().addHandler(logging.StreamHandler())

    logger.error("event")

    assert [event["message"] for event in in_json(capsys)] == ["event"]
    assert caplog.records == []


def test_libraries_that_set_up_logs_of_their_own_change_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_up_logs(JSON)
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "handlers": {"own": {"class": "logging.StreamHandler"}},
            "loggers": {"a_library": {"handlers": ["own"], "propagate": False}},
            "root": {"level": "ERROR", "handlers": ["own"]},
        }
    )

    logger.info("event")

    assert [event["message"] for event in in_json(capsys)] == ["event"]


def test_names_of_log_records_can_be_in_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    for config in (LogConfig(), JSON):
        set_up_logs(config, name="n", args="a", module="m", msg="x")
        logger.info("event")

    text, event = capsys.readouterr().err.splitlines()
    assert text.endswith(" INFO event name=n args=a module=m msg=x")
    assert json.loads(event)["message"] == "event"


def passed(
    flood: FloodFilter, message: str, count: int = 1, level: int = logging.INFO
) -> list[Any]:
    """The logged ones of a number of equal events, each as the number left out before it."""
    records = [
        logging.LogRecord("workers.x", level, "", 0, message, ({"number": number},), None)
        for number in range(count)
    ]
    return [vars(record).get("left_out", 0) for record in records if flood.filter(record)]


def test_the_first_of_repeated_events_are_logged() -> None:
    flood = FloodFilter(FakeClock(1000.0))

    assert passed(flood, "lost %s", 40) == [0] * MAX_ALIKE


def test_after_the_window_the_next_event_counts_those_left_out() -> None:
    clock = FakeClock(1000.0)
    flood = FloodFilter(clock)
    passed(flood, "lost", MAX_ALIKE + 37)

    clock.now += WINDOW_S
    later = passed(flood, "lost", 3)

    assert later == [37, 0, 0]


def test_in_no_window_more_are_logged_wherever_it_begins() -> None:
    clock = FakeClock(1000.0)
    flood = FloodFilter(clock)
    logged_s = []
    for _ in range(600):
        logged_s += [clock.now] * len(passed(flood, "lost"))
        clock.now += 0.1

    windows = zip(logged_s, logged_s[MAX_ALIKE:], strict=False)
    assert all(end - start >= WINDOW_S - 1e-6 for start, end in windows)
    assert 5 * MAX_ALIKE <= len(logged_s) <= 7 * MAX_ALIKE


def test_rare_events_are_all_logged() -> None:
    clock = FakeClock(1000.0)
    flood = FloodFilter(clock)
    for _ in range(20):
        assert passed(flood, "lost") == [0]
        clock.now += WINDOW_S / MAX_ALIKE


def test_events_of_another_message_or_level_are_not_hidden() -> None:
    flood = FloodFilter(FakeClock(1000.0))
    passed(flood, "lost", 40)

    assert passed(flood, "found") == [0]
    assert passed(flood, "lost", level=logging.ERROR) == [0]


def test_nothing_is_left_out_at_level_debug() -> None:
    assert len(passed(FloodFilter(FakeClock(1000.0)), "ended", 40, logging.DEBUG)) == 40


def test_every_event_of_many_threads_is_logged_or_counted() -> None:
    clock = FakeClock(1000.0)
    flood = FloodFilter(clock)
    logged: list[Any] = []
    threads = [
        threading.Thread(target=lambda: logged.extend(passed(flood, "lost", 500))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    clock.now += WINDOW_S
    logged += passed(flood, "lost")

    assert len(logged) == MAX_ALIKE + 1
    assert sum(logged) == 8 * 500 - MAX_ALIKE


def test_the_log_counts_what_the_filter_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = FakeClock(1000.0)
    set_up_logs(LogConfig())
    [handler] = logging.getLogger("workers").handlers
    handler.filters = [FloodFilter(clock)]

    for number in range(MAX_ALIKE + 4):
        logger.warning("lost", extra={"request_id": str(number)})
    clock.now += WINDOW_S
    logger.warning("lost", extra={"request_id": "last"})

    *first, last = capsys.readouterr().err.splitlines()
    assert len(first) == MAX_ALIKE
    assert last.endswith(" WARNING lost request_id=last left_out=4")


async def test_a_worker_is_logged_when_it_is_found_becomes_silent_and_is_heard_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = FakeClock(1000.0)
    scheduler = GlobalScheduler(clock)
    set_up_logs(JSON)

    for _ in range(2):
        await scheduler.report(WorkerReport("w", {}, {}, draining=False))
    clock.now += SILENT_AFTER_S + 1
    for number in range(2):
        request = Request(f"r{number}", num_prompt_tokens=1, max_tokens=1)
        await scheduler.place(request, ["w", "another"])
    for _ in range(2):
        await scheduler.report(WorkerReport("w", {}, {}, draining=False))

    events = in_json(capsys)
    assert [(event["level"], event["message"]) for event in events] == [
        ("INFO", "worker found"),
        ("WARNING", "worker is silent; does it hang?"),
        ("INFO", "worker heard again"),
    ]
    assert {event["worker"] for event in events} == {"w"}


async def test_a_draft_worker_is_logged_when_it_is_found(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scheduler = GlobalScheduler(FakeClock(1000.0))
    set_up_logs(JSON)
    address = DraftWorkerAddress("d", "incarnation", StreamAddress("tcp://host:1", b"token", b""))
    status = DraftWorkerStatus("d", 1, ("suffix",), 0, 0, 0.0, 0)

    for _ in range(2):
        await scheduler.report_draft_worker(DraftWorkerReport(address, status))

    [event] = in_json(capsys)
    assert (event["message"], event["draft_worker"]) == ("draft worker found", "d")


LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
TAKEN = {*RESERVED_ATTRS, "time", "level", "exception", "left_out", *CONTEXT}


def log_calls() -> Iterator[Any]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"), attr=attr)) if (
                        attr in LEVELS
                    ):
                        yield pytest.param(node, id=f"{path.relative_to(ROOT)}:{node.lineno}")


@pytest.mark.parametrize("call", list(log_calls()))
def test_each_log_call_has_a_constant_message_and_free_names_for_its_fields(call: ast.Call) -> None:
    extra = next((keyword.value for keyword in call.keywords if keyword.arg == "extra"), None)
    keys = extra.keys if isinstance(extra, ast.Dict) else []
    names = {ast.literal_eval(key) for key in keys if key}

    assert [type(arg) for arg in call.args] == [ast.Constant]
    assert names & TAKEN == set()
