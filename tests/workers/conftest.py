"""What tests of engines share: one process that has imported vLLM, and one tiny model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workers.engine_process import EngineProcesses
from tests.workers.planned_engine import write_tokenizer
from tests.workers.tiny_models import write_checkpoint


@pytest.fixture(scope="session")
def processes() -> Iterator[EngineProcesses]:
    processes = EngineProcesses()
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def tiny_llama(processes: EngineProcesses, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    processes.call(write_checkpoint, "llama", folder)
    processes.call(write_tokenizer, folder)
    return folder
