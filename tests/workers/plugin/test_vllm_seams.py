"""vLLM as it is installed against the tables of seams: the report to read before an upgrade."""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from cluster.ingress import vllm_seams as front_end
from tests.test_seams import PATHS, ROOT
from workers.config import DeviceName, WorkerConfig
from workers.plugin import vllm_seams
from workers.seams import Seam, SeamBroken, Use, has_member

SEAMS = (*vllm_seams.VLLM.seams, *front_end.SEAMS)


@pytest.fixture
def another_version(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let vLLM be of another series, with the same members."""
    for module in (vllm_seams, front_end):
        module.check_seams.cache_clear()
    monkeypatch.setattr(metadata, "version", lambda package: "0.33.1")
    yield
    for module in (vllm_seams, front_end):
        module.check_seams.cache_clear()


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.use}-{seam}")
def test_vllm_has_what_we_use_of_it(seam: Seam) -> None:
    assert seam.fault() is None


@pytest.mark.parametrize("device", vllm_seams.SEAMS_OF)
def test_an_engine_and_a_front_end_may_start(device: DeviceName) -> None:
    vllm_seams.check_seams(device)
    front_end.check_seams()


def test_an_engine_does_not_start_on_another_version(another_version: None) -> None:
    from workers.engine.vllm_engine import VllmEngine

    with pytest.raises(SeamBroken, match=r"^vLLM 0\.33\.1 is installed, and .* for 0\.32\.0; inst"):
        VllmEngine("no/such-model", WorkerConfig())


def test_a_front_end_does_not_start_on_another_version(another_version: None) -> None:
    with pytest.raises(SeamBroken, match=r"^vLLM 0\.33\.1 is installed, and .* for 0\.32\.0; inst"):
        front_end.check_seams()


def test_a_seam_that_differs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.setattr(metadata, "version", lambda package: "0.32.1")
    monkeypatch.delattr(Scheduler, "_preempt_request")
    vllm_seams.check_seams.cache_clear()

    with pytest.raises(SeamBroken) as error:
        vllm_seams.check_seams("npu")
    assert str(error.value) == (
        "vLLM 0.32.1 is installed and differs from 0.32.0, which XY-Serve is written for: "
        "vllm.v1.core.sched.scheduler.Scheduler._preempt_request is gone; install vllm==0.32.0, on "
        "CPUs by `rm -rf .venv && make install`"
    )


def test_every_member_of_vllms_that_a_class_of_ours_overrides_is_in_a_table() -> None:
    assert [
        f"{cls.__name__} overrides {name}"
        for cls, own, theirs in derived()
        for name in sorted({name for base in own for name in vars(base)})
        if not name.startswith("__")
        and any(name in vars(base) for base in theirs)
        and not has_row(theirs, name, Use.OVERRIDDEN)
        and name not in MACHINERY
    ] == []


def test_every_member_of_vllms_that_a_class_of_ours_uses_on_itself_is_in_a_table() -> None:
    assert [
        f"{cls.__name__} uses self.{name}"
        for cls, own, theirs in derived()
        for name in sorted({name for base in own for name in used_on_self(base)})
        if not has_row(theirs, name) and any(has_member(base, name) for base in theirs)
    ] == []


MACHINERY = {"_abc_impl", "_is_protocol"}
ELSEWHERE = {"vllm_triton_*.py": "triton", "vllm_npu_[pw]*.py": "torch_npu"}
"""Modules that some files need, which the environments of `make test-npu` and `make test-ascend`
have; these tests run there too."""


def derived() -> Iterator[tuple[type, list[type], list[type]]]:
    """Each class of ours that derives from one of vLLM's, with its bases of ours and of vLLM's."""
    for path in PATHS:
        needs = [module for name, module in ELSEWHERE.items() if path.match(name)]
        if not path.match("vllm_*.py") or not all(map(find_spec, needs)):
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for cls in vars(importlib.import_module(name)).values():
            if isinstance(cls, type) and cls.__module__ == name:
                theirs = [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]
                own = [base for base in cls.__mro__ if is_ours(base)]
                if theirs:
                    yield cls, own, theirs


def is_ours(cls: type) -> bool:
    return Path(*cls.__module__.split(".")).parts[0] in ("cluster", "workers")


def used_on_self(cls: type) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")
        if not node.attr.startswith("__")
    }


def has_row(owners: list[type], member: str, use: Use | None = None) -> bool:
    names = {f"{owner.__module__}:{owner.__qualname__}" for owner in owners}
    return any(
        seam.member == member and seam.owner in names and use in (None, seam.use) for seam in SEAMS
    )
