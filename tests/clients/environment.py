"""An environment for each client, from package registries only."""

import json
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from pathlib import Path

from tests.clients.clients import NODE, Client, Kind
from tests.test_imports import ROOT

HERE = Path(__file__).parent
FOLDER = ROOT / ".venv-clients"
PYTEST = "pytest==9.2.0"


class Environment:
    """The packages of one client, and how its job is run with them."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.folder = FOLDER / client.name
        self._note = self.folder / "packages.json"

    @property
    def is_made(self) -> bool:
        """Whether it has what the client needs now."""
        return self._note.exists() and json.loads(self._note.read_text()) == self._packages

    def make(self) -> None:
        """Install the packages, unless they are there."""
        if self.is_made:
            return
        self.delete()
        self.folder.mkdir(parents=True)
        if self.client.kind is Kind.NODE:
            options = ("--no-audit", "--no-fund", "--loglevel=error")
            command = ["npm", "install", *options, f"--prefix={self.folder}", *self._packages]
            subprocess.run(command, check=True)
        elif self.client.kind is Kind.PYTHON:
            venv.create(self.folder, with_pip=True, symlinks=True)
            if self.client.takes_torch:
                own = Path(sysconfig.get_path("purelib", vars={"base": str(self.folder)}))
                (own / "torch_of_the_project.pth").write_text(sysconfig.get_path("purelib"))
            pip = [
                self._python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-input",
                "--no-warn-conflicts",
            ]
            subprocess.run([*pip, *self._packages], check=True)
        self._note.write_text(json.dumps(self._packages))

    def delete(self) -> None:
        """Give the disk space back."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, report: Path, env: Mapping[str, str], timeout_s: float) -> None:
        """Run the job, which writes `report` in JUnit's form; how it ended stands there."""
        job = HERE / self.client.file
        if self.client.kind is Kind.NODE:
            # Node looks for packages beside the file that imports them.
            for file in (job, HERE / "job.mjs"):
                shutil.copy(file, self.folder)
            options = ["--test-reporter=spec", "--test-reporter-destination=stdout"]
            options += ["--test-reporter=junit", f"--test-reporter-destination={report}"]
            node = self.folder / "node_modules" / _node_package() / "bin" / "node"
            command = [str(node), "--test", *options, str(self.folder / job.name)]
        else:
            command = [self._python, "-m", "pytest", "-v", f"--junitxml={report}", str(job)]
        subprocess.run(command, cwd=ROOT, env=env, timeout=timeout_s)

    @property
    def _packages(self) -> list[str]:
        if self.client.kind is Kind.NODE:
            return [f"{_node_package()}@{NODE}", *self.client.packages]
        return [PYTEST, *self.client.packages]

    @property
    def _python(self) -> str:
        is_own = self.client.kind is Kind.PYTHON
        return str(self.folder / "bin" / "python") if is_own else sys.executable


def _node_package() -> str:
    """Node itself as a package: clients need a newer one than distributions have."""
    return f"node-linux-{'arm64' if platform.machine() == 'aarch64' else 'x64'}"
