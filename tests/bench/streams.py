"""What it costs that token streams are encrypted, on two cores: CURVE against the same without.

    python -m tests.bench.streams --json streams.json

A sender in this process sends the outputs of steps, as vLLM encodes them, to a receiver in another,
by `workers/token_stream.py`. `outputs` is the number of requests of which a message has a token,
`bytes` its size. `plain` and `curve` take turns with the same messages:

messages/s: as fast as both ends can, with at most 256 messages unacknowledged
µs: processor time per message of both ends and all their threads, acknowledgements included
round trip: median µs from a message that is sent alone to its acknowledgement

`%` is what CURVE adds to the processor time, of the step whose outputs they are: one that decodes
so many requests of 500 tokens, on a core of a CPU with SmolLM2-135M (measured), and on an H200 with
Llama-3-8B (modelled). Most of it is spent beside the step, in ZeroMQ's threads.

Keys of the summary: `speed_N`, messages/s with CURVE over those without; `added_us_N`;
`added_round_trip_us_N`; `percent_cpu_N`, `percent_h200_N`; `is_hidden`, whether messages could be
found on the wire without CURVE and not with it.
"""

import asyncio
import multiprocessing
import os
import select
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import msgspec
import zmq

from scheduler.simulation.device import read_device
from tests.bench.report import make_parser, publish, say_row
from workers import sockets
from workers.token_stream import StreamAddress, StreamReceiver, StreamSender

HOST = "127.0.0.1"
SIZES = (1, 8, 32, 128)
CONTEXT_LEN = 500
WINDOW = 256
CONTESTANTS = ("plain", "curve")
DEVICES = {"cpu": "cpu-avx512-smollm2-135m", "h200": "h200-llama-3-8b"}
Rounds = list[dict[str, dict[str, float]]]
"""Of each round, the figures of each contestant."""
MARK = b"a prompt that nobody else is to read"


@contextmanager
def lock_of(contestant: str) -> Iterator[None]:
    """Within it, sockets are made as this contestant makes them."""
    if contestant == "curve":
        yield
        return

    def unlocked(_: bytes) -> sockets.Options:
        return sockets.LIMITS

    with patch.multiple(sockets, _server_lock=unlocked, _client_lock=unlocked):
        yield


def receive(pipe: Connection, contestant: str) -> None:
    """A receiver: what it is asked for, its processor time and the digest of what came since."""

    async def run() -> None:
        with lock_of(contestant):
            receiver = StreamReceiver(HOST)
        pipe.send(receiver.address)
        digest = sha256()
        while True:
            frames = await receiver.receive()
            if frames == [b"report"]:
                pipe.send((time.process_time(), digest.hexdigest()))
                digest = sha256()
            else:
                digest.update(b"".join(frames))

    asyncio.run(run())


class Contestant:
    """A sender and its receiver."""

    def __init__(self, name: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=receive, args=(theirs, name), daemon=True)
        self._process.start()
        self.name = name
        self.address: StreamAddress = self._pipe.recv()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sender = self.connect(self.address)

    def connect(self, address: StreamAddress) -> StreamSender:
        """A sender to this address."""
        with lock_of(self.name):
            return StreamSender(self._context, address)

    def report(self) -> tuple[float, str]:
        """The receiver's processor time, and the digest of what came since the last report."""
        self.sender.send([b"report"], time.monotonic())
        while not self._pipe.poll(0.001):
            self.sender.poll(time.monotonic())
        self.settle()
        cpu_s, digest = self._pipe.recv()
        return float(cpu_s), str(digest)

    def settle(self, window: int = 1) -> None:
        """Wait until fewer than `window` messages are unacknowledged."""
        while len(self.sender._unacked) >= window:
            self.sender.poll(time.monotonic())

    def close(self) -> None:
        """End both."""
        self.sender.close()
        self._context.destroy(linger=0)
        self._process.kill()
        self._process.join()


def turn(contestant: Contestant, frames: list[bytes], num_messages: int) -> dict[str, float]:
    """Send messages as fast as they are taken, and then some one by one; raises if one differs."""
    theirs_s, _ = contestant.report()
    ours_s, began_s = time.process_time(), time.perf_counter()
    for _ in range(num_messages):
        contestant.settle(WINDOW)
        contestant.sender.send(frames, time.monotonic())
    contestant.settle()
    seconds, ours_s = time.perf_counter() - began_s, time.process_time() - ours_s
    ended_s, digest = contestant.report()
    assert digest == sha256(b"".join(frames) * num_messages).hexdigest(), "a message differs"
    trips = []
    for _ in range(num_messages // 10):
        sent_s = time.perf_counter()
        contestant.sender.send(frames, time.monotonic())
        contestant.settle()
        trips.append(time.perf_counter() - sent_s)
    return {
        "rate": num_messages / seconds,
        "cpu_us": 1e6 * (ours_s + ended_s - theirs_s) / num_messages,
        "trip_us": 1e6 * statistics.median(trips),
    }


def outputs_of(num_requests: int) -> list[bytes]:
    """What a step that decoded so many requests sends."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    from workers.engine.vllm_engine import encoder

    outputs = [
        EngineCoreOutput(f"chatcmpl-{number:032x}-0", [17 * number % 49_152])
        for number in range(num_requests)
    ]
    return encoder()(EngineCoreOutputs(outputs=outputs, timestamp=time.monotonic()))


def step_s(device: str, num_requests: int) -> float:
    """How long a step takes that decodes so many requests."""
    cost_model = read_device(device).cost_model
    shape = cost_model.shape()
    for _ in range(num_requests):
        shape.add(1, CONTEXT_LEN, 1)
    return cost_model.predict(shape)


def is_readable(contestant: Contestant) -> bool:
    """Whether a message can be found in the bytes that go to the receiver."""
    seen = bytearray()
    with socket.create_server((HOST, 0)) as server:

        def carry() -> None:
            with (
                server.accept()[0] as near,
                socket.create_connection(sockets.host_and_port(contestant.address.endpoint)) as far,
            ):
                ends = {near: far, far: near}
                while True:
                    for side in select.select([near, far], [], [])[0]:
                        if not (data := side.recv(1 << 16)):
                            return
                        seen.extend(data)
                        ends[side].sendall(data)

        relay = threading.Thread(target=carry)
        relay.start()
        endpoint = f"tcp://{HOST}:{server.getsockname()[1]}"
        sender = contestant.connect(msgspec.structs.replace(contestant.address, endpoint=endpoint))
        sender.send([MARK], time.monotonic())
        while not sender.is_idle():
            sender.poll(time.monotonic())
        sender.close()
        relay.join()
    contestant.report()
    return MARK in seen


def measure(contestants: list[Contestant], options: Any) -> list[dict[str, Any]]:
    """A row for each size."""
    rows = []
    for size in SIZES:
        frames = outputs_of(size)
        rounds: Rounds = []
        for number in range(options.rounds + 1):
            order = contestants if number % 2 else contestants[::-1]
            rounds.append({c.name: turn(c, frames, options.messages) for c in order})
        del rounds[0]  # to warm up

        def median(key: str, name: str, rounds: Rounds = rounds) -> float:
            return statistics.median(one[name][key] for one in rounds)

        def added(key: str, rounds: Rounds = rounds) -> float:
            return statistics.median(one["curve"][key] - one["plain"][key] for one in rounds)

        steps = {name: step_s(device, size) for name, device in DEVICES.items()}
        rows.append(
            {
                "outputs": size,
                "bytes": sum(map(len, frames)),
                **{f"{c} messages/s": median("rate", c) for c in CONTESTANTS},
                "speed": statistics.median(
                    one["curve"]["rate"] / one["plain"]["rate"] for one in rounds
                ),
                **{f"{c} µs": median("cpu_us", c) for c in CONTESTANTS},
                "added µs": added("cpu_us"),
                **{f"{c} round trip": median("trip_us", c) for c in CONTESTANTS},
                "added round trip": added("trip_us"),
                **{f"% of {n}": added("cpu_us") / 1e4 / seconds for n, seconds in steps.items()},
            }
        )
        say_row(rows[-1])
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contestant")
    parser.add_argument("--messages", type=int, default=2000, help="messages of a turn")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    contestants = [Contestant(name) for name in CONTESTANTS]
    readable = {contestant.name: is_readable(contestant) for contestant in contestants}
    rows = measure(contestants, options)
    for contestant in contestants:
        contestant.close()
    summary: dict[str, float | bool] = {
        "is_hidden": readable["plain"] and not readable["curve"],
        **{f"speed_{row['outputs']}": row["speed"] for row in rows},
        **{f"added_us_{row['outputs']}": row["added µs"] for row in rows},
        **{f"added_round_trip_us_{row['outputs']}": row["added round trip"] for row in rows},
        **{f"percent_{d}_{row['outputs']}": row[f"% of {d}"] for d in DEVICES for row in rows},
    }
    publish("Encryption of token streams", rows, summary, options.json)


if __name__ == "__main__":
    main()
