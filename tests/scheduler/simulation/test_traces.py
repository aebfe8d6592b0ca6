import gzip
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from scheduler.policy import StepPolicy
from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.traces import read_trace
from scheduler.step_planner import StepPlanner
from tests.scheduler.scenes import LIMITS, cost_model, decoding, view, waiting
from tests.workload import find_trace, has_traces

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(
    f"2023-11-16 {time},{num_input},{num_output}"
    for time, num_input, num_output in (
        ("18:15:46.6805900", 374, 44),
        ("18:15:50.9951690", 396, 109),
        ("18:16:00.0000000", 0, 0),
    )
)


def write(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def mooncake(path: Path) -> Path:
    return write(
        path,
        (
            {
                "timestamp": 3000 * (index // 5),
                "input_length": 600 + index,
                "output_length": 20,
                "hash_ids": [0, index],
            }
            for index in range(50)
        ),
    )


def sessions(path: Path) -> Path:
    return write(
        path,
        (
            {
                "suite": "web",
                "session_id": session,
                "call": call,
                "timestamp": 2000 * call,
                "input_length": 100 * (call + 1),
                "output_length": 7,
                "hash_ids": [*range(call + 1)],
            }
            for session in ("a", "b")
            for call in range(3)
        ),
    )


def servegen(folder: Path, family: str = "Gamma", shape: float = 0.5) -> Path:
    path = folder / "x_arrivals.csv"
    path.write_text(
        "client,window_start_s,rate_rps,iat_cv,family,shape,scale\n"
        f"0,0,1.0,1,{family},{shape},1\n"
        f"0,600,30.0,1,{family},{shape},1\n"
        f"1,600,10.0,1,,,\n"
        f"2,600,99.0,1,,,\n"
        f"0,1200,15.0,1,{family},{shape},1\n"
    )
    write(
        folder / "x_lengths.jsonl.gz",
        (
            {
                "client": client,
                "window_start_s": 0,
                "input_tokens": [[100 + client, 0.5], [200 + client, 0.5]],
                "output_tokens": [[10, 1.0]],
            }
            for client in (0, 1)
        ),
    )
    return path


def by_id(arrivals: list[Arrival]) -> dict[str, Arrival]:
    return {arrival.request.request_id: arrival for arrival in arrivals}


def test_azure_times_begin_with_the_first_request(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)

    arrivals = read_trace(path)

    assert [a.arrival_s for a in arrivals] == pytest.approx([0.0, 4.314579, 13.31941])
    assert [a.request.num_prompt_tokens for a in arrivals] == [374, 396, 1]
    assert [a.num_output_tokens for a in arrivals] == [44, 109, 1]
    assert [a.request.max_tokens for a in arrivals] == [44, 109, 1]
    assert {a.after for a in arrivals} == {None}


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_mooncake_requests_are_spread_inside_their_step(ending: str, tmp_path: Path) -> None:
    path = mooncake(tmp_path / f"m.{ending}")

    arrivals = read_trace(path, seed=1)

    times = [a.arrival_s for a in arrivals]
    assert times == sorted(times)
    assert len(set(times)) == 50
    for arrival in arrivals:
        step = (arrival.request.num_prompt_tokens - 600) // 5
        assert 3 * step <= arrival.arrival_s < 3 * (step + 1)
        assert arrival.hash_block_size == 512
        assert len(arrival.hash_ids) == 2
    assert read_trace(path, seed=1) == arrivals
    assert read_trace(path, seed=2) != arrivals


def test_exact_times_are_kept(tmp_path: Path) -> None:
    row = {"input_length": 5, "output_length": 5, "hash_ids": [1]}
    path = write(tmp_path / "m.jsonl", ({"timestamp": 10 * i, **row} for i in range(9)))

    assert [a.arrival_s for a in read_trace(path)] == pytest.approx([i / 100 for i in range(9)])


def test_calls_of_a_session_follow_each_other(tmp_path: Path) -> None:
    arrivals = by_id(read_trace(sessions(tmp_path / "s.jsonl"), rate_rps=0.5))

    assert arrivals["a-0"].after is None
    assert 0 < arrivals["a-0"].arrival_s < arrivals["b-0"].arrival_s
    assert (arrivals["a-1"].after, arrivals["a-1"].arrival_s) == ("a-0", 2.0)
    assert (arrivals["b-2"].after, arrivals["b-2"].arrival_s) == ("b-1", 2.0)
    assert arrivals["b-2"].hash_ids == (0, 1, 2)
    assert arrivals["b-2"].hash_block_size == 64
    assert arrivals["b-2"].request.slo_class == "web"


@pytest.mark.parametrize(("family", "shape"), [("Gamma", 0.5), ("Weibull", 0.7), ("", 1.0)])
def test_servegen_clients_keep_their_shares(family: str, shape: float, tmp_path: Path) -> None:
    path = servegen(tmp_path, family, shape)

    arrivals = read_trace(path, rate_rps=8.0, duration_s=600)

    times = [a.arrival_s for a in arrivals]
    of_client_1 = [a for a in arrivals if a.request.num_prompt_tokens in (101, 201)]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < 600
    assert len(arrivals) == pytest.approx(8 * 600, rel=0.15)
    assert len(of_client_1) == pytest.approx(len(arrivals) / 4, rel=0.15)  # 10 of 40 requests/s
    assert statistics.mean(a.request.num_prompt_tokens < 150 for a in arrivals) == pytest.approx(
        0.5, abs=0.05
    )
    assert read_trace(path, rate_rps=8.0, duration_s=600) == arrivals


def test_servegen_continues_with_the_next_window(tmp_path: Path) -> None:
    arrivals = read_trace(servegen(tmp_path), rate_rps=8.0, duration_s=1200)

    later = [a for a in arrivals if a.arrival_s >= 600]
    assert len(later) == pytest.approx(8 * 600 * 15 / 40, rel=0.2)


def test_a_recorded_run_is_read_as_it_was(tmp_path: Path) -> None:
    rows = [
        {"arrival_s": 1.5, "input_length": 10, "output_length": 3, "class": "chat"},
        {"arrival_s": 0.5, "input_length": 20, "output_length": 4, "max_tokens": 9,
         "request_id": "x"},
    ]  # fmt: skip

    first, second = read_trace(write(tmp_path / "run.jsonl", rows))

    assert (first.request.request_id, first.arrival_s, first.request.max_tokens) == ("x", 0.5, 9)
    assert (second.request.slo_class, second.num_output_tokens) == ("chat", 3)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "", "the file is empty"),
        (
            "x.csv",
            "a,b\n1,2\n",
            r"x\.csv:1: unknown trace format, with a, b; known are agent sessions, ",
        ),
        ("x.jsonl", '{"a": 1}\n', r"x\.jsonl:1: unknown trace format, with a"),
        ("x.jsonl", '{"arrival_s": 0, "input_length": 1}\n', "1: 'output_length' is missing"),
        ("x.jsonl", "{\n", r"x\.jsonl:1: .*correct or remove the line"),
        ("x.csv", AZURE + "\nx,1,1", r"x\.csv:5: .*correct or remove the line"),
        ("x.csv", AZURE + "\n2023-11-16 18:15:46,,1", r"x\.csv:5: .*correct or remove the line"),
        ("x.csv", AZURE + "\n2023-11-16 18:15:46,-1,1", "negative length"),
        ("x.jsonl", '{"client": 0, "input_tokens": []}\n', r"name its \*_arrivals\.csv"),
        ("x_arrivals.csv", "client,window_start_s,rate_rps,family,shape\n", "x_lengths"),
        ("x.jsonl.gz", "plain", "cannot be read"),
    ],
)
def test_an_error_names_file_and_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)

    with pytest.raises(ValueError, match=message):
        read_trace(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.csv: no such file"):
        read_trace(tmp_path / "gone.csv")


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_to_draw_at_is_positive(rate: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        read_trace("any.csv", rate_rps=rate)


@pytest.mark.skipif(not has_traces(), reason="needs the full data sets")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("azure_2023_code", 6521),
        ("azure_2023_conv", 12340),
        ("mooncake_conversation", 5719),
        ("mooncake_synthetic", 1925),
        ("agent_prefix", 679),
        ("servegen_deepseek_r1_arrivals", None),
        ("servegen_m_mid_day1_arrivals", None),
        ("servegen_m_small_arrivals", None),
    ],
)
def test_the_published_traces_can_be_read(name: str, count: int | None) -> None:
    arrivals = read_trace(find_trace(name), rate_rps=2.0, duration_s=300)

    assert len({a.request.request_id for a in arrivals}) == len(arrivals)
    assert all(a.request.num_prompt_tokens > 0 and a.num_output_tokens > 0 for a in arrivals)
    if count is not None:
        assert len(arrivals) == count
    else:
        assert 100 < len(arrivals) < 3000


def test_the_requests_of_a_workers_decisions_can_be_simulated(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    running = decoding("a", num_prompt_tokens=100, num_output_tokens=5, arrival_s=3.0)
    queued = waiting("b", 70, arrival_s=4.5)
    scene = view([running], [queued])
    planner = StepPlanner(LIMITS, StepPolicy(), cost_model())
    with path.open("w") as file:
        planner.record(file)
        step = planner.begin(scene, planner.plan(scene, 5.0), 5.0)
        planner.end(step, 0.1, {})
        planner.finish("a", 9)

    first, second = read_trace(path)

    assert (first.arrival_s, second.arrival_s) == (0, 1.5)
    assert (first.request.num_prompt_tokens, second.request.num_prompt_tokens) == (100, 70)
    assert first.num_output_tokens == 9
