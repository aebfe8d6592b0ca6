"""One app on three nodes for all tests of this folder."""

import os
from collections.abc import Iterator

import pytest

from tests.nodes.network import missing, missing_packages
from tests.nodes.ray_nodes import RayNodes, ray_nodes

NUM_WORKER_NODES = 2


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    if os.environ.get("CI") and (packages := missing_packages()):
        pytest.fail(f"CI has no {' and '.join(packages)}: .ci/run installs them", pytrace=False)
    if reason := missing():
        pytest.skip(reason)
    with ray_nodes(tmp_path_factory.mktemp("nodes"), NUM_WORKER_NODES) as nodes:
        yield nodes
