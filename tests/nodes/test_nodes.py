"""An app whose workers are on other nodes than its front, and what links and nodes do to it."""

import time
from collections import defaultdict

import httpx
import pytest

from tests.nodes.api import run_tests
from tests.nodes.load import Load, Stream
from tests.nodes.ray_nodes import STREAM_PORTS, RayNodes, open_ports

pytestmark = pytest.mark.timeout(900)  # the first one starts the cluster

NUM_STREAMS = 8
CUT_S = 20.0
"""Time for which a link is cut: longer than a stream's heartbeats, shorter than Ray's patience."""
API_TESTS = (
    "test_a_chat_is_answered",
    "test_a_chat_streams_the_same_answer_and_its_usage",
    "test_an_answer_follows_a_json_schema",
    "test_several_choices_stream_side_by_side",
    "test_twenty_requests_at_once_get_each_its_own_answer",
    "test_streams_give_the_same_answers_piece_by_piece",
    "test_the_asynchronous_twins_give_the_same_answers",
)
"""Those that `make test` runs; `python -m tests.nodes.api` runs all."""


@pytest.fixture(scope="session")
def unbroken(nodes: RayNodes) -> list[Stream]:
    """The streams as they are when nothing happens."""
    return Load(nodes.server.url, NUM_STREAMS).ended()


def test_each_actor_runs_on_a_node_of_its_labels(nodes: RayNodes) -> None:
    found = defaultdict(set)
    for replica in nodes.replicas():
        found[replica.deployment].add(replica.address)

    front = {nodes.head.address}
    assert found == {
        "Ingress": front,
        "GlobalScheduler": front,
        "DraftWorker": front,
        "Worker": {host.address for host in nodes.others},
    }


def test_the_sockets_of_the_app_listen_on_the_address_of_their_node(nodes: RayNodes) -> None:
    first, last = STREAM_PORTS
    found = {at for host in nodes.hosts for at in host.listening() if first <= at[1] <= last}

    # The ingress and the draft worker.
    assert found == {(nodes.head.address, first), (nodes.head.address, first + 1)}


def test_the_api_and_the_handle_work_with_workers_on_other_nodes(nodes: RayNodes) -> None:
    files = ("test_openai_api.py", "test_handle.py")

    done = run_tests(nodes, files, "-q", "-k", " or ".join(API_TESTS))

    assert done.returncode == 0, done.stdout
    assert f"{len(API_TESTS) + 1} passed" in done.stdout  # one of them twice


def test_doctor_finds_every_stream_open(nodes: RayNodes) -> None:
    status, words = nodes.examine_links()

    # Two workers, each to the ingress and to the draft worker.
    assert "4 streams between replicas are open." in words
    assert status == 0, words


def test_doctor_names_the_streams_that_a_firewall_closes(nodes: RayNodes) -> None:
    ports = open_ports(is_head=True)
    first, last = STREAM_PORTS
    nodes.head.close_ports([port for port in ports if port != f"{first}-{last}"])
    try:
        status, words = nodes.examine_links()
    finally:
        nodes.head.close_ports(ports)

    head, sender = nodes.head.address, nodes.others[0].address
    assert f"on {sender} cannot reach {head} port {first}, where" in words
    assert f"open TCP ports {first} to {last} on {head} for {sender}" in words
    assert "4 failed" in words
    assert status == 1


def test_a_link_that_delays_and_loses_gives_the_same_bytes(
    nodes: RayNodes, unbroken: list[Stream]
) -> None:
    with nodes.others[0].weather(delay_s=0.05, loss=0.05):
        assert Load(nodes.server.url, NUM_STREAMS).ended() == unbroken


def test_a_link_that_is_cut_and_healed_loses_and_doubles_nothing(
    nodes: RayNodes, unbroken: list[Stream]
) -> None:
    before = nodes.replicas()
    load = Load(nodes.server.url, NUM_STREAMS)
    load.wait_until_begun()

    with nodes.others[0].cut_off():
        # These begin while it is cut, and have no other worker than those that there are.
        later = Load(nodes.server.url, NUM_STREAMS)
        time.sleep(CUT_S)

    assert load.ended() == unbroken
    assert later.ended() == unbroken
    nodes.wait_until_healed()
    assert nodes.replicas() == before


def test_a_node_that_is_killed_loses_and_doubles_nothing(
    nodes: RayNodes, unbroken: list[Stream]
) -> None:
    load = Load(nodes.server.url, NUM_STREAMS)
    load.wait_until_begun()

    with nodes.others[0].cut_off():  # nobody is told, as when its power goes
        nodes.others[0].kill()
        assert load.ended() == unbroken
        assert Load(nodes.server.url, NUM_STREAMS).ended() == unbroken
        assert httpx.get(f"{nodes.server.url}/health", timeout=30).status_code == 200

    nodes.start(nodes.others[0])
