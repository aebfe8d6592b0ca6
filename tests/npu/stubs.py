"""Empty stand-ins for CANN's libraries, so that torch_npu can be imported where there is no NPU.

Every function returns 0: enough for imports, schemas and tensors without memory, and nothing more.
"""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = ("hccl", "graph", "ge_runner", "ascendcl", "acl_op_compiler", "acl_tdt_channel")
A_NAME = re.compile(r"[A-Za-z]\w*")
NOT_CANNS = re.compile(r"_?Py|__")


def symbols(library: Path, kind: str) -> set[str]:
    """The `defined` or `undefined` symbols of a shared library, weak ones left out."""
    listing = subprocess.run(
        ["nm", "-D", f"--{kind}-only", library], capture_output=True, text=True
    )
    rows = [line.split() for line in listing.stdout.splitlines()]
    return {row[-1].partition("@")[0] for row in rows if len(row) > 1 and row[-2] not in "wv"}


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    assert spec
    assert spec.origin
    return Path(spec.origin).parent


def write_stubs(folder: Path) -> None:
    """Compile the libraries that torch_npu looks for into `folder`."""
    torch_npu, torch = map(folder_of, ("torch_npu", "torch"))
    ours = [*torch_npu.glob("lib/*.so"), *torch_npu.glob("_C*.so")]
    system = [
        path
        for name in ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1")
        for path in (*Path("/lib").glob(f"*/{name}"), *Path("/usr/lib").glob(f"*/{name}"))
    ]
    others = [*torch.glob("lib/*.so*"), *ours, *system]
    known = {symbol for path in others for symbol in symbols(path, "defined")}
    missing = {symbol for path in ours for symbol in symbols(path, "undefined")} - known
    names = sorted(s for s in missing if A_NAME.fullmatch(s) and not NOT_CANNS.match(s))
    folder.mkdir(exist_ok=True)
    for library in LIBRARIES:
        source = folder / f"{library}.c"
        functions = names if library == "ascendcl" else [f"stub_{library}"]
        source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in functions))
        options = ["-shared", "-fPIC", "-w", "-fno-builtin"]
        target = folder / f"lib{library}.so"
        subprocess.run(["gcc", *options, "-o", str(target), str(source)], check=True)


if __name__ == "__main__":
    write_stubs(Path(sys.argv[1]))
