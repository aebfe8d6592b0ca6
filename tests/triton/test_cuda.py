"""The kernels, compiled for GPUs that are not there, within what one of their cores has."""

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.triton.shipped import ATTENTIONS, GEMMS, Attention, Gemm

CAPABILITIES = (80, 90, 100)
"""A100, H100 and H200, B200."""
MAX_SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory of a block, in bytes (CUDA C++ Programming Guide, table of technical
specifications)."""
MAX_STACK = {80: 512, 90: 512, 100: 1024}
"""Bytes of a thread's registers that do not fit and go to memory."""


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("shipped", [*GEMMS, *ATTENTIONS], ids=str)
def test_a_shipped_tile_compiles_to_machine_code_that_fits(
    shipped: Gemm | Attention, capability: int, tmp_path: Path
) -> None:
    usage = compiled(shipped, capability, tmp_path)

    assert usage.pop("shared") <= MAX_SHARED[capability]
    assert usage["REG"] <= 255
    assert usage["STACK"] <= MAX_STACK[capability]


def compiled(shipped: Gemm | Attention, capability: int, folder: Path) -> dict[str, int]:
    """What a form of a kernel uses."""
    names = shipped.kernel.arg_names
    constants = shipped.constants(is_npu=False)
    signature = {name: shipped.signature.get(name, "constexpr") for name in names}
    # As of a launch: pointers and strides are multiples of 16.
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith(("stride", "num_inputs"))
    }
    source = ASTSource(
        fn=shipped.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": shipped.num_warps, "num_stages": 3 if isinstance(shipped, Gemm) else 2}
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    (folder / "kernel.cubin").write_bytes(code.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run(
        [tool, "--dump-resource-usage", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", said)}
    return usage | {"shared": code.metadata.shared}
