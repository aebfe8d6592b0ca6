import fcntl
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from workers.kernels.gemm import Weight, linear
from workers.kernels.weights_file import kernels_key, read_weights, write_weights

pytestmark = pytest.mark.usefixtures("isa", "one_thread")

KEY = "the checkpoint"
WRITE_FOR_EVER = """
import sys
from pathlib import Path
from tests.workers.kernels.test_weights_file import KEY, make
from workers.kernels import native
from workers.kernels.weights_file import write_weights
native.use_isa(sys.argv[2])
weights = [make(seed) for seed in (1, 2)]
print("begun", flush=True)
while True:
    for each in weights:
        write_weights(Path(sys.argv[1]), KEY, each)
"""


def make(seed: int) -> dict[str, Weight]:
    """Weights of all formats, with odd shapes, one of them gate and up."""
    random = np.random.default_rng(seed)

    def values(n: int, k: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        floats = random.standard_normal((n, k), dtype=np.float32)
        return (floats.view(np.uint32) & 0xFFFF0000).view(np.float32)

    return {
        **{form: Weight.pack(values(33, 65), form) for form in ("bf16", "fp32", "int8", "int4")},
        "gate_up": Weight.pack(values(70, 64), "bf16", gate_up=True),
    }


def bits(weights: Mapping[str, Weight]) -> dict[str, tuple[object, ...]]:
    """All there is to weights."""
    return {
        name: (
            *(weight.n, weight.k, weight.format, weight.gate_up),
            *(array.tobytes() for array in weight.arrays()),
        )
        for name, weight in weights.items()
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "model.weights"


def test_what_is_read_is_what_was_written(file: Path) -> None:
    weights = make(0)

    assert write_weights(file, KEY, weights)
    read = read_weights(file, KEY)

    assert bits(read) == bits(weights)
    for name, weight in weights.items():
        x = np.random.default_rng(1).standard_normal((5, weight.k), dtype=np.float32)
        assert linear(x, read[name]).tobytes() == linear(x, weight).tobytes()


def test_weights_of_another_key_are_not_read(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_weights(file, KEY) == {}
    write_weights(file, "another checkpoint", make(0))
    assert read_weights(file, KEY) == {}
    assert caplog.messages == []


def test_later_weights_replace_earlier_ones(file: Path) -> None:
    write_weights(file, KEY, make(1))
    write_weights(file, KEY, make(2))

    assert bits(read_weights(file, KEY)) == bits(make(2))


def test_the_key_of_the_kernels_tells_instruction_sets_apart(isa: str) -> None:
    digest, of = kernels_key()

    assert (len(digest), of) == (64, isa)


def test_a_file_that_is_cut_off_anywhere_is_refused(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_weights(file, KEY, make(0))
    whole = file.read_bytes()
    refused = []
    for size in (*range(0, 40), 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        caplog.clear()
        refused.append(read_weights(file, KEY) == {} and len(caplog.messages) == 1)

    assert all(refused)


def test_a_file_with_a_wrong_bit_anywhere_is_refused(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_weights(file, KEY, make(0))
    whole = file.read_bytes()
    random = np.random.default_rng(0)
    refused = []
    for position in (*range(0, 60), *random.integers(0, len(whole), 100), len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(random.integers(8))
        file.write_bytes(damaged)
        caplog.clear()
        refused.append(read_weights(file, KEY) == {} and len(caplog.messages) == 1)

    assert all(refused)


@pytest.mark.parametrize("content", [b"", b"\0" * 100_000, b"GGUF" * 1000])
def test_a_foreign_file_is_refused_and_replaced(
    file: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    file.parent.mkdir()
    file.write_bytes(content)

    assert read_weights(file, KEY) == {}
    assert caplog.messages == ["packed weights cannot be used; they are packed again"]
    assert write_weights(file, KEY, make(0))
    assert bits(read_weights(file, KEY)) == bits(make(0))


def test_one_process_at_a_time_writes(file: Path) -> None:
    write_weights(file, KEY, make(1))
    with file.with_name(f"{file.name}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not write_weights(file, KEY, make(2))

    assert bits(read_weights(file, KEY)) == bits(make(1))
    assert write_weights(file, KEY, make(2))


def test_readers_see_one_state_or_another_while_writers_are_killed(
    file: Path, isa: str, caplog: pytest.LogCaptureFixture
) -> None:
    states = [bits(make(1)), bits(make(2))]
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOR_EVER, str(file), isa], stdout=subprocess.PIPE
        )
        assert writer.stdout
        assert writer.stdout.readline() == b"begun\n"
        give_up_s = time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < give_up_s
        assert all(bits(read_weights(file, KEY)) in states for _ in range(50))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert bits(read_weights(file, KEY)) in states

    assert caplog.messages == []
    assert write_weights(file, KEY, make(0))
    assert sorted(path.name for path in file.parent.iterdir()) == [
        file.name,
        f"{file.name}.lock",
    ]


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow larger, as with a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_leaves_the_earlier_weights_and_no_part(file: Path) -> None:
    write_weights(file, KEY, make(1))
    with full_disk(5000), pytest.raises(OSError, match="too large"):
        write_weights(file, KEY, make(2))

    assert bits(read_weights(file, KEY)) == bits(make(1))
    assert not list(file.parent.glob("*.partial"))


def test_a_folder_that_takes_no_file_is_an_os_error() -> None:
    with pytest.raises(OSError, match="/proc/"):
        write_weights(Path(f"/proc/{os.getpid()}/packed/model.weights"), KEY, make(0))


def test_a_file_that_cannot_be_read_is_reported(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.mkdir(parents=True)

    with caplog.at_level(logging.WARNING):
        assert read_weights(file, KEY) == {}
    assert len(caplog.messages) == 1
