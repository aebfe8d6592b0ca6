"""The end-to-end tests of the API on several nodes: a program, the long form of a test.

    python -m tests.nodes.api [arguments of pytest]

They run on the head, as a user's programs would, with the workers on two other nodes.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.nodes.network import missing
from tests.nodes.ray_nodes import ROOT, RayNodes, ray_nodes

FILES = ("test_openai_api.py", "test_handle.py", "test_bad_input.py", "test_disconnect.py")


def run_tests(
    nodes: RayNodes, files: Sequence[str], *args: str
) -> "subprocess.CompletedProcess[str]":
    """Run pytest on the head, on files of tests/e2e and with these arguments."""
    server = nodes.server.folder / "server.json"
    nodes.server.write(server)
    return nodes.run(
        nodes.head,
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={ROOT}"),
        *(f"--config-file={ROOT}/pyproject.toml", f"--server={server}", *args),
        *(str(ROOT / "tests/e2e" / file) for file in files),
    )


def main() -> None:
    """Run them all; exit as pytest does."""
    if reason := missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder, ray_nodes(Path(folder), 2) as nodes:
        done = run_tests(nodes, FILES, *sys.argv[1:])
    print(done.stdout)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
