"""What `xyserve up` refuses before it starts anything, and the CPUs that it gives to Ray."""

import os
from pathlib import Path

import pytest
from rich.console import Console

from cluster.cli.checks import Finding
from cluster.cli.launch import _num_cpus, launch
from cluster.errors import ConfigError
from tests.test_imports import ROOT


@pytest.mark.parametrize("name", ["cluster.py", "cluster/__init__.py"])
def test_a_folder_whose_files_ray_would_take_for_ours_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError) as raised:
        launch(ROOT / "deploy" / "local.yaml", demo=False, temp_dir=None, console=Console())

    assert str(raised.value) == (
        f"{tmp_path / name} shadows XY-Serve's package in the processes of Ray that start here: "
        "rename it, or start in another folder"
    )


def test_ray_counts_each_core_twice_unless_the_app_wants_more_than_there_are() -> None:
    enough, too_few = Finding("cores", "ok", ""), Finding("cores", "warn", "")

    assert _num_cpus([enough]) == 2 * len(os.sched_getaffinity(0))
    assert _num_cpus([too_few]) is None
