"""`make test-npu` runs these files in .venv-ascend, and `make test-ascend` test_platform.py in
.venv-npu, which has torch_npu; `make test` none of them."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.workers.engine_process import EngineProcesses
from workers.config import EMULATED, NPU_VARIABLE

if "XYSERVE_TRITON" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
elif find_spec("torch_npu") is None:
    collect_ignore = ["test_platform.py"]


@pytest.fixture(scope="session")
def npu_processes() -> Iterator[EngineProcesses]:
    """Processes in which vLLM finds an emulated NPU.

    Not `processes`: pytest takes these files for part of the same folder as those of tests/workers.
    """
    os.environ[NPU_VARIABLE] = EMULATED
    processes = EngineProcesses()
    del os.environ[NPU_VARIABLE]
    yield processes
    processes.close()
