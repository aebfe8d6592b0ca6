"""`make test-npu` runs these files in .venv-ascend; `make test` none of them."""

import os
from collections.abc import Iterator

import pytest

from tests.workers.engine_process import EngineProcesses
from workers.config import EMULATED, NPU_VARIABLE

if "XYSERVE_TRITON" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def processes() -> Iterator[EngineProcesses]:
    """Processes in which vLLM finds an emulated NPU."""
    os.environ[NPU_VARIABLE] = EMULATED
    processes = EngineProcesses()
    del os.environ[NPU_VARIABLE]
    yield processes
    processes.close()
