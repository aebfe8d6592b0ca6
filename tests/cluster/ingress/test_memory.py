import subprocess
import sys

GROWS_AND_FREES = """
import time
import psutil
from cluster.ingress.memory import give_back_memory

me = psutil.Process()
if {watched}:
    give_back_memory()
del bytearray(b"x" * (30 << 20))[:]  # the C library then takes large blocks from its heap too
before = me.memory_info().rss
large, small = [], []
for _ in range(150):
    large.append(bytearray(b"x" * (1 << 20)))
    small.append(bytearray(b"x" * 20_000))  # stay, between the others
peak = me.memory_info().rss - before
del large
give_up_s = time.monotonic() + (60 if {watched} else 5)
while (after := me.memory_info().rss - before) > 40 << 20 and time.monotonic() < give_up_s:
    time.sleep(0.2)
print(peak >> 20, after >> 20)
"""


def figures(watched: bool) -> tuple[int, int]:
    """Growth of a process in MB at its peak and after it has freed all."""
    code = GROWS_AND_FREES.format(watched=watched)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, after = map(int, done.stdout.split())
    return peak, after


def test_what_a_process_has_freed_is_given_back() -> None:
    peak, after = figures(watched=True)

    assert peak > 140
    assert after <= 40  # it does not look at less than 32 MB


def test_otherwise_it_is_kept() -> None:
    """The test above would show nothing if the C library gave it back by itself."""
    _, after = figures(watched=False)

    assert after > 60
