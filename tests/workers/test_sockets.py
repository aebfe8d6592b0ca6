import asyncio
import random
import socket
from collections.abc import Iterator

import pytest
import zmq

from tests.workers.fake_clock import FakeClock
from workers import sockets
from workers.sockets import MAX_PART_BYTES

HOST = "127.0.0.1"


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


def two_free_ports() -> tuple[int, int]:
    """Neighbours, so that they are a range."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind((HOST, 0))
            port = one.getsockname()[1]
            try:
                other.bind((HOST, port + 1))
            except (OSError, OverflowError):
                continue
            return port, port + 1


def test_a_socket_listens_at_the_first_port_of_its_range_that_is_free(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    ports = two_free_ports()

    listening = [sockets.listen(context, HOST, {}, ports) for _ in range(2)]

    assert [endpoint for _, endpoint, _ in listening] == [f"tcp://{HOST}:{port}" for port in ports]


def test_a_range_without_a_free_port_is_an_error_that_names_it(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    first, _ = two_free_ports()
    message = f"{first} to {first}.* is free on {HOST}: widen"
    with socket.create_server((HOST, first)), pytest.raises(OSError, match=message):
        sockets.listen(context, HOST, {}, (first, first))


@pytest.mark.parametrize("ports", [(0, 5), (6, 5), (5, 65536)])
def test_a_range_that_is_none_is_refused(ports: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"stream_ports .* must be the first and the last"):
        sockets.check_ports(ports)


@pytest.mark.parametrize(
    ("endpoint", "host_and_port"),
    [("tcp://10.0.0.1:20000", ("10.0.0.1", 20000)), ("tcp://[fd00::1]:5", ("fd00::1", 5))],
)
def test_an_endpoint_has_a_host_and_a_port(endpoint: str, host_and_port: tuple[str, int]) -> None:
    assert sockets.host_and_port(endpoint) == host_and_port


async def test_a_socket_that_listens_has_no_fault(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    listening, endpoint, _ = sockets.listen(context, HOST, {})

    assert not listening.closed
    assert await sockets.fault(endpoint) == ""


async def test_a_socket_that_does_not_encrypt_is_a_fault(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    plain = context.socket(zmq.ROUTER)
    port = plain.bind_to_random_port(f"tcp://{HOST}")

    assert await sockets.fault(f"tcp://{HOST}:{port}") == (
        "it does not encrypt (CURVE): another version of the app"
    )


def test_a_zeromq_that_cannot_encrypt_is_an_error_with_its_remedy(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zmq, "has", lambda capability: capability != "curve")

    with pytest.raises(RuntimeError, match=r"without CURVE.* `pip install --force-reinstall"):
        sockets.listen(context, HOST, {})


@pytest.mark.parametrize("num_bytes", [0, 1, MAX_PART_BYTES, MAX_PART_BYTES + 1, 1_000_000])
def test_a_message_arrives_whole_however_many_parts_it_is_sent_in(
    context: zmq.Context[zmq.Socket[bytes]], num_bytes: int
) -> None:
    listening, endpoint, public_key = sockets.listen(context, HOST, {})
    sender = sockets.connect(context, endpoint, public_key, {})
    message = random.Random(num_bytes).randbytes(num_bytes)

    assert sockets.send(sender, message)
    assert listening.poll(30_000)
    name, *parts = listening.recv_multipart()
    assert max(map(len, parts)) <= MAX_PART_BYTES
    assert sockets.joined(parts) == message

    assert sockets.send(listening, message, name)
    assert sender.poll(30_000)
    assert sockets.joined(sender.recv_multipart()) == message


def test_dropped_messages_are_logged_once_in_an_interval_with_their_number(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    monkeypatch.setattr("workers.sockets.time.monotonic", clock)
    dropped = sockets.Dropped("tcp://host:1")
    for _ in range(3):
        dropped.add("another token")
    clock.now += sockets.LOG_INTERVAL_S
    dropped.add(ValueError("x" * 1000))

    assert dropped.count == 4
    logged = [(line.__dict__["num_messages"], line.__dict__["reason"]) for line in caplog.records]
    assert logged == [
        (1, "'another token'"),
        (3, repr(ValueError("x" * 1000))[: sockets.MAX_REASON_LEN]),
    ]


async def test_nobody_at_an_endpoint_is_a_fault() -> None:
    with socket.create_server((HOST, 0)) as closed:
        port = closed.getsockname()[1]

    assert await sockets.fault(f"tcp://{HOST}:{port}") == "Connection refused"


@pytest.mark.parametrize(
    ("says", "fault"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "another program answers there"),
        (b"", "it closes the connection"),
    ],
)
async def test_another_program_at_an_endpoint_is_a_fault(says: bytes, fault: str) -> None:
    def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        writer.close()

    server = await asyncio.start_server(answer, HOST, 0)
    port = server.sockets[0].getsockname()[1]

    assert await sockets.fault(f"tcp://{HOST}:{port}") == fault

    server.close()
    await server.wait_closed()
