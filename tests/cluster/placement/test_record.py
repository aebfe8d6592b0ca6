import asyncio
import dataclasses
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.placement.global_scheduler import GlobalScheduler
from cluster.placement.record import PlacementRecorder, is_record, read_events
from scheduler.admission import Admission
from scheduler.placement_replay import Decided, replay
from scheduler.prefill_queue import PrefillCost, QueuedPrefill, QueueReport
from scheduler.prefix_index import PrefixDelta, pack
from scheduler.request import Request, Slo
from workers.reports import WorkerReport

FORMAT = "test//32"
COST = PrefillCost(0.001, 1e-8, is_measured=True)


class Cluster:
    """Workers that report at random, and a GlobalScheduler that writes a record."""

    def __init__(self, path: Path, seed: int) -> None:
        self.random = Random(seed)
        self.now = 100.0
        self.recorder = PlacementRecorder(path)
        self.scheduler = GlobalScheduler(
            lambda: self.now, admission=Admission(), recorder=self.recorder
        )
        self.seqs = dict.fromkeys([f"w{number}" for number in range(5)], 0)
        self.num_requests = 0

    async def happens(self) -> None:
        """Anything that may."""
        self.now += self.random.expovariate(5.0)
        worker_id = self.random.choice(list(self.seqs))
        match self.random.choices(["place", "report", "bury"], [6, 4, 0.05])[0]:
            case "place":
                await self.scheduler.place(self.request(), list(self.seqs))
            case "report":
                await self.scheduler.report(self.report(worker_id))
            case "bury":
                await self.scheduler.bury(worker_id, "killed")

    def request(self) -> Request:
        """One that shares its beginning with others."""
        self.num_requests += 1
        blocks = [self.random.randrange(4) * 1000 + depth for depth in range(20)]
        num_tokens = self.random.randrange(1, 4000)
        return Request(
            f"r{self.num_requests}",
            num_tokens,
            100,
            slo=Slo(ttft_s=self.random.choice([0.5, 3.0, 20.0])),
            block_hashes=pack(blocks[: num_tokens // 32]),
            prefix_format=FORMAT,
        )

    def report(self, worker_id: str) -> WorkerReport:
        """Some requests that wait, and some blocks that came or went, now and then with a gap."""
        random = self.random
        self.seqs[worker_id] += random.choices([1, 2], [20, 1])[0]
        seq = self.seqs[worker_id]
        ids = [f"r{random.randrange(self.num_requests + 1)}" for _ in range(3)]
        queue = QueueReport(
            {name: QueuedPrefill(random.randrange(1, 3000), 3000, random.random()) for name in ids},
            COST,
        )
        blocks = [random.randrange(4) * 1000 + random.randrange(20) for _ in range(10)]
        delta = PrefixDelta("1", seq, FORMAT, pack(sorted(set(blocks))), snapshot=seq == 1)
        return WorkerReport(
            worker_id, dict.fromkeys(ids, 100), {}, False, prefix=delta, queue=queue
        )


async def written(path: Path, seed: int) -> int:
    """Write a record; returns the number of requests."""
    cluster = Cluster(path, seed)
    for _ in range(400):
        await cluster.happens()
    cluster.recorder.close()
    return cluster.num_requests


@pytest.mark.parametrize("seed", range(5))
def test_a_record_of_placements_replays_bit_equal(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "record"
    num_requests = asyncio.run(written(path, seed))

    pairs = list(replay(read_events(path)))

    assert len(pairs) == num_requests
    assert [recorded for recorded, _ in pairs] == [replayed for _, replayed in pairs]
    kinds = {(one.placement is None, one.refused is None) for one, _ in pairs}
    assert {(False, True), (False, False)} <= kinds


def test_what_is_not_as_it_was_decided_is_found(tmp_path: Path) -> None:
    path = tmp_path / "record"
    asyncio.run(written(path, 0))
    recorder = PlacementRecorder(tmp_path / "changed")
    for event in read_events(path):
        if isinstance(event, Decided) and event.request.request_id == "r9":
            recorder.write(_longer(event))
        else:
            recorder.write(event)
    recorder.close()

    assert CliRunner().invoke(app, ["replay", str(path)]).exit_code == 0
    changed = CliRunner().invoke(app, ["replay", str(tmp_path / "changed")])
    assert changed.exit_code == 1
    assert "first difference" in changed.output


def _longer(event: Decided) -> Decided:
    return dataclasses.replace(
        event, request=dataclasses.replace(event.request, num_prompt_tokens=9999)
    )


def test_a_record_whose_writer_was_killed_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "record"
    asyncio.run(written(path, 0))
    whole = list(read_events(path))

    path.write_bytes(path.read_bytes()[:-5])

    assert list(read_events(path)) == whole[:-1]


def test_another_file_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_text('{"format": "something"}\n')

    assert not is_record(path)
    with pytest.raises(ValueError, match="no record of placements"):
        list(read_events(path))
