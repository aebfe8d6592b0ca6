"""One app on three nodes for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.nodes.network import missing
from tests.nodes.ray_nodes import RayNodes, ray_nodes

NUM_WORKER_NODES = 2


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    if reason := missing():
        pytest.skip(reason)
    with ray_nodes(tmp_path_factory.mktemp("nodes"), NUM_WORKER_NODES) as nodes:
        yield nodes
