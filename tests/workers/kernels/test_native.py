"""native.py: a library that was built from other sources than these is refused."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from workers.kernels import native

SIZES = [ctypes.sizeof(struct) for struct in native.STRUCTS]


@pytest.fixture(scope="module", autouse=True)
def isa() -> None:
    """Nothing here has to be run once for each instruction set."""


def test_every_declared_structure_is_compared_with_the_library() -> None:
    declared = [
        value
        for value in vars(native).values()
        if isinstance(value, type)
        and issubclass(value, ctypes.Structure)
        and value is not ctypes.Structure
    ]

    assert list(native.STRUCTS) == declared
    assert native.size_differences(ctypes.CDLL(str(native.LIBRARY))) == ""


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        (None, "it does not export xy_struct_sizes"),
        (SIZES[:-1], "8 structures, not 9"),
        ([SIZES[0] + 8, *SIZES[1:]], f"WeightStruct: {SIZES[0] + 8} bytes, not {SIZES[0]}"),
    ],
    ids=["from before there was a check", "a structure less", "a field more"],
)
def test_a_stale_library_is_refused_with_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int] | None, found: str
) -> None:
    monkeypatch.setattr(native, "LIBRARY", library_with(sizes, tmp_path))
    native._library.cache_clear()

    with pytest.raises(ImportError) as refused:
        native.kernels()
    assert str(refused.value) == (
        f"the native kernels in {native.LIBRARY} were built from other sources ({found}); build "
        "them with `make install`, or `python -m workers.kernels.build` in a checkout"
    )


def library_with(sizes: list[int] | None, folder: Path) -> Path:
    """Compile a library that says of its structures that they have these sizes."""
    numbers = "" if sizes is None else ", ".join(map(str, [*sizes, -1]))
    (folder / "stale.c").write_text(
        "int old;\n"
        if sizes is None
        else f"static int sizes[] = {{{numbers}}};\nint* xy_struct_sizes() {{ return sizes; }}\n"
    )
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    library = folder / "stale.so"
    command = [compiler, "-shared", "-fPIC", str(folder / "stale.c"), "-o", str(library)]
    subprocess.run(command, check=True)
    return library
