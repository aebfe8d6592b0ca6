"""The table of bounds in cluster/README.md: its figures are those of the code, and they hold."""

import ast
import gc
import math
import random
import re
import tracemalloc
from array import array
from collections.abc import Callable, Iterator

import pytest

from cluster.config.app_config import AppConfig
from cluster.observe.request_history import Attempt, Refusal, RequestHistory, RequestRecord
from cluster.placement import global_scheduler
from cluster.placement.global_scheduler import GlobalScheduler
from scheduler.output_length import MAX_BYTES as MAX_LENGTHS_BYTES
from scheduler.output_length import MAX_KINDS, OutputLengths
from scheduler.prefill_queue import Forecast
from scheduler.prefix_index import PrefixDelta, PrefixIndex, pack
from scheduler.request import Request, Slo
from scheduler.task import BatchPlan, Deferral, Reason, Stage, StageTask, StepReport
from tests.test_imports import ROOT
from workers import timeline
from workers.config import DraftConfig
from workers.latest import Latest
from workers.reports import WorkerReport
from workers.step_history import StepHistory
from workers.timeline import Timeline

UNITS = {"kB": 1000, "MB": 10**6, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "s": 1, "": 1}


def rows() -> list[tuple[str, str]]:
    """Bound and place of each row of the table."""
    text = (ROOT / "cluster" / "README.md").read_text()
    table = text.split("## What is bounded")[1].split("\n## ")[0]
    found = re.findall(r"^\| (?!what|-)[^|]+ \| [^|]+ \| ([^|]+) \| ([^|]+) \|$", table, re.M)
    assert len(found) > 8
    return found


def value_of(place: str) -> float | None:
    """What a constant of our sources, or a key of the config, is by default."""
    if constant := re.fullmatch(r"`([\w/]+\.py)`: `(\w+)`", place):
        path, name = constant.groups()
        for node in ast.parse((ROOT / path).read_text()).body:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    names = [one.id for one in ast.walk(target) if isinstance(one, ast.Name)]
                    if name in names:
                        return float(eval(compile(ast.Expression(node.value), path, "eval")))
        raise AssertionError(f"{path} has no {name}")
    if key := re.fullmatch(r"`([\w.]+)`", place):
        found: object = AppConfig(draft=DraftConfig())
        for part in key.group(1).split("."):
            found = getattr(found, part)
        assert isinstance(found, int | float)
        return float(found)
    return None


@pytest.mark.parametrize(("bound", "place"), rows())
def test_the_table_says_what_the_code_says(bound: str, place: str) -> None:
    if (value := value_of(place)) is None:
        assert place.startswith("Ray's") or place == "nothing to set"
        return
    number, unit = re.match(r"(?:twice )?([\d,.]+) ?(\w*)", bound).groups()  # type: ignore[union-attr]
    assert float(number.replace(",", "")) * UNITS.get(unit, 1) == value


BOUND = 1 << 20
"""A smaller bound, under which the same estimates must hold."""


def ids(length: int) -> Iterator[str]:
    """Ids that share no memory."""
    for number in range(10**9):
        yield f"{number:0{length}}"


def growth(fill: Callable[[], object]) -> int:
    """Bytes that are held after `fill` by what it returns."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = fill()
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
        assert kept is not None
        return after - before
    finally:
        tracemalloc.stop()


def requests(id_len: int, num_tokens: int) -> RequestHistory:
    history = RequestHistory(BOUND)
    for request_id in ids(id_len):
        record = RequestRecord(Request(request_id, 1, 1, slo=Slo(1.0, 0.1)), 1.5 + len(request_id))
        record.call_id = request_id[:-1]
        began_s = 2.5 + len(request_id)
        forecast = Forecast(1000 + len(request_id), began_s + 1, began_s + 2)
        record.attempts.append(
            Attempt(f"{request_id}.0", began_s, "", forecast, began_s + 3, began_s + 4, 1001)
        )
        history.add(record)
        record.output_token_ids = array("I", range(num_tokens))
        record.outcome, record.error = "error", f"it failed {request_id}"
        history.settle(record)
        if history._records.get(first(id_len)) is None:
            return history
    raise AssertionError


def first(length: int) -> str:
    """The first id of a length."""
    return next(ids(length))


def refusals(id_len: int) -> RequestHistory:
    history = RequestHistory(BOUND)
    for call_id in ids(id_len):
        history.add(Refusal(call_id, 1.5 + len(call_id), 400, f"a message {call_id}"))
        if history._records.get(first(id_len)) is None:
            return history
    raise AssertionError


async def placements(id_len: int) -> GlobalScheduler:
    scheduler = GlobalScheduler()
    for worker in ("a", "b"):
        await scheduler.report(WorkerReport(worker, {}, {}, False))
    for number, request_id in enumerate(ids(id_len)):
        await scheduler.place(Request(request_id, 1, 1), ["a", "b"])
        for worker in ("a", "b"):
            await scheduler.report(WorkerReport(worker, {}, {request_id: None}, False))
        if number and not await scheduler.placements([first(id_len)]):
            return scheduler
    raise AssertionError


def steps(num_requests: int, id_len: int) -> StepHistory:
    history = StepHistory(BOUND)
    names = ids(id_len)
    for number in range(10**9):
        own = [next(names) for _ in range(num_requests)]
        half = num_requests // 2
        tasks = tuple(StageTask(name, Stage.DECODE, 1, 300 + number, True) for name in own[half:])
        deferred = tuple(Deferral(name, Reason.TIME) for name in own[:half])
        plan = BatchPlan(tasks, deferred, (), predicted_s=number / 7, limit_s=math.inf)
        history.add(
            StepReport(
                step=number + 300,
                began_s=number / 3,
                plan=plan,
                tasks=tuple(StageTask(*task) for task in tasks),
                measured_s=number / 11,
                decided_s=number / 13,
                num_new_tokens=dict.fromkeys(own[half:], 1),
                num_flops=number / 17,
                num_bytes=number / 19,
                queued_s=tuple(("standard", number / 23 + place) for place in range(len(tasks))),
            )
        )
        if history._steps[0].step > 300:
            return history
    raise AssertionError


def spans(num_requests: int, id_len: int) -> Timeline:
    kept = Timeline()
    names = ids(id_len)
    for number in range(10_000 // num_requests):
        own = {next(names): 300 + number for _ in range(num_requests)}
        kept.add("draft", number / 3, number / 7, own)
    return kept


@pytest.mark.parametrize(
    "fill",
    [
        *(lambda n=n, t=t: requests(n, t) for n, t in ((40, 0), (550, 0), (40, 5000))),
        *(lambda n=n: refusals(n) for n in (32, 512)),
        *(lambda r=r, n=n: steps(r, n) for r, n in ((2, 45), (32, 45), (8, 560))),
    ],
)
def test_a_history_takes_what_it_says(fill: Callable[[], object]) -> None:
    assert BOUND / 3 < growth(fill) < BOUND


@pytest.mark.parametrize(("num_requests", "id_len"), [(1, 45), (32, 45), (8, 560)])
def test_the_spans_take_what_they_say(
    monkeypatch: pytest.MonkeyPatch, num_requests: int, id_len: int
) -> None:
    monkeypatch.setattr(timeline, "MAX_BYTES", BOUND)

    assert BOUND / 3 < growth(lambda: spans(num_requests, id_len)) < BOUND


def kinds(tenant_len: int) -> OutputLengths:
    lengths = OutputLengths()
    names = ids(tenant_len)
    while len(lengths) < MAX_KINDS:
        lengths.observe(Request("r", 100, 200, tenant=next(names)), 50)
    return lengths


@pytest.mark.parametrize("tenant_len", [20, 500])
def test_the_lengths_of_outputs_take_what_they_say(tenant_len: int) -> None:
    found = growth(lambda: kinds(tenant_len))

    assert MAX_LENGTHS_BYTES / 3 < found < MAX_LENGTHS_BYTES


@pytest.mark.parametrize("id_len", [45, 560])
async def test_placements_take_what_they_say(monkeypatch: pytest.MonkeyPatch, id_len: int) -> None:
    monkeypatch.setattr(global_scheduler, "MAX_PLACEMENTS_BYTES", BOUND)
    gc.collect()
    tracemalloc.start()
    try:
        kept = await placements(id_len)
        gc.collect()
        found = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()

    assert kept is not None
    assert BOUND / 3 < found < BOUND


def prefix_index(num_workers: int) -> PrefixIndex:
    """Fill an index with blocks that no two workers have alike, and some that all have."""
    draw = random.Random(0)
    index = PrefixIndex(BOUND)
    own = 2 * BOUND // 128 // num_workers
    shared = [draw.getrandbits(64) for _ in range(BOUND // 400)]
    for number in range(num_workers):
        some = draw.sample(shared, len(shared) // 2)
        blocks = pack([*some, *(draw.getrandbits(64) for _ in range(own))])
        index.apply(f"w{number}", PrefixDelta("1", 1, "format", blocks, snapshot=True))
    return index


@pytest.mark.parametrize("num_workers", [1, 40, 300])
def test_the_prefix_index_takes_what_it_says(num_workers: int) -> None:
    assert BOUND / 4 < growth(lambda: prefix_index(num_workers)) < BOUND


def test_the_latest_stay_within_their_bytes() -> None:
    latest: Latest[list[int]] = Latest(3000)
    first, second, third = [1], [2], [3]
    for key, value in (("a", first), ("b", second), ("c", third)):
        latest.add(key, value, 500)
    assert [key for key, _ in latest.items()] == ["a", "b", "c"]

    latest.resize("b", second, 1500)
    assert [key for key, _ in latest.items()] == ["b", "c"]
    latest.resize("b", first, 1)  # another value had the key
    latest.resize("d", first, 1)
    latest.add("b", third, 500)
    assert list(latest.items()) == [("c", third), ("b", third)]
    assert latest.get("a") is None
    assert latest.num_bytes == 2 * (500 + 300 + 1)
    latest.add("e", first, 10_000)  # more than there is room for
    assert list(latest.items()) == []
