"""Triton kernels for Ascend NPUs where there is none: down to their last compiler, and on x86.

`linalg` is the first half of the compiler, which ends with loops and blocks of memory (MLIR's
Linalg). From there `hivm` goes on to the complete input of the NPU's own code generator, which only
comes with the NPU; and `OnX86` runs the same Linalg on this CPU instead. What that does not show is
all that comes after Linalg: the synchronisation of the NPU's units, its buffers and its rounding.

Needs triton-ascend, ascendnpu-ir and gcc.
"""

import ctypes
import functools
import hashlib
import importlib.resources
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.compiler.errors import MLIRCompilationError

TARGETS = ("Ascend910B3", "Ascend910_9392")
"""A 910B and a 910C."""
OPTIONS = ("num_warps", "num_stages")
"""Options of a launch that mean nothing to an NPU."""
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


ATTEMPTS, CRASHED = 3, "Stack dump"
"""The compiler crashes on one kernel in some hundred, whichever it is, and not when asked again."""


class NotCompiled(RuntimeError):
    """A kernel that a compiler refuses, with its words."""


@functools.cache
def _stop_at_linalg() -> None:
    """Have Triton's last stage keep its input: it would ask the NPU's driver for the chip."""
    compiler = backends["ascend"].compiler
    add_stages = compiler.add_stages

    def stages_without_npu(self: Any, stages: dict[str, Any], options: Any) -> None:
        add_stages(self, stages, options)

        def keep(source: str, metadata: dict[str, Any]) -> bytes:
            add_stages.__globals__["_parse_linalg_metadata"](source, metadata)
            return source.encode()

        stages["npubin"] = keep

    compiler.add_stages = stages_without_npu


def linalg(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str = TARGETS[0],
) -> str:
    """The Linalg of a kernel whose arguments have these types; NotCompiled if there is none."""
    _stop_at_linalg()
    constants = {name: value for name, value in constants.items() if name not in OPTIONS}
    source = ASTSource(fn=kernel, signature=dict(signature), constants=constants)
    for attempt in range(ATTEMPTS):
        try:
            return str(compile(source, target=GPUTarget("npu", target, 0)).asm["ttadapter"])
        except MLIRCompilationError as error:
            if CRASHED not in str(error) or attempt == ATTEMPTS - 1:
                raise NotCompiled(str(error)) from error
    raise AssertionError


def signature_of(
    kernel: Any, args: tuple[Any, ...], constants: Mapping[str, Any]
) -> dict[str, str]:
    """The types of a launch's arguments."""
    names = [name for name in kernel.arg_names if name not in constants]
    return {name: _type_of(arg) for name, arg in zip(names, args, strict=True)}


def _type_of(arg: Any) -> str:
    if isinstance(arg, torch.Tensor):
        return TYPES[arg.dtype]
    return "fp32" if isinstance(arg, float) else "i32"


def package() -> Path:
    """The folder of the NPU's compiler."""
    return Path(str(importlib.resources.files("ascendnpuir")))


def _tool(name: str) -> Path:
    return package() / "bin" / name


def hivm(text: str, folder: Path, target: str = TARGETS[0]) -> str:
    """The complete input of the NPU's code generator for some Linalg; NotCompiled if a tile is too
    large for the buffers, or anything else is wrong."""
    source, result = folder / "kernel.mlir", folder / "module.hivm.opt.mlir"
    source.write_text(re.sub(r', mix_mode = "\w+"', "", text))
    result.unlink(missing_ok=True)
    done = subprocess.run(
        [
            _tool("bishengir-compile"),
            source,
            f"--target={target}",
            *("--enable-auto-multi-buffer=True", "--enable-auto-bind-sub-block=True"),
            *("--enable-hfusion-compile=true", "--enable-hivm-compile=true"),
            *("--enable-triton-kernel-compile=true", f"--save-temps={folder}"),
            *("-o", folder / "kernel.o"),
        ],
        capture_output=True,
        text=True,
    )
    # It always ends with an error, as the code generator is not there.
    said = done.stdout + done.stderr
    errors = [
        line
        for line in said.splitlines()
        if "error" in line and "hivmc" not in line and "Failed to run BiShengIR" not in line
    ]
    if errors or not result.exists():
        raise NotCompiled("\n".join(errors) or said)
    return result.read_text()


PASSES = (
    "--allow-unregistered-dialect",
    "--convert-elementwise-to-linalg",
    "--eliminate-empty-tensors",
    "--empty-tensor-to-alloc-tensor",
    "--one-shot-bufferize=allow-return-allocs-from-loops=true",
    "--convert-linalg-to-loops",
    "--expand-strided-metadata",
    "--lower-affine",
    "--convert-scf-to-cf",
    "--convert-cf-to-llvm",
    "--arith-expand",
    "--convert-math-to-llvm",
    "--convert-math-to-libm",
    "--convert-arith-to-llvm",
    "--convert-vector-to-llvm",
    "--convert-index-to-llvm",
    "--memref-expand",
    "--finalize-memref-to-llvm",
    "--convert-func-to-llvm",
    "--lower-affine",
    "--convert-arith-to-llvm",
    "--reconcile-unrealized-casts",
)
TRIPLE, CPU = "x86_64-unknown-linux-gnu", "x86-64-v3"

RUNTIME = r"""
// What the compiled kernels call. They never free their temporaries, which come from an arena that
// is emptied after each call.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct Block { struct Block *next; } Block;
static __thread Block *blocks;

void *arena_malloc(size_t size) {
  Block *block = malloc(64 + size);
  block->next = blocks;
  blocks = block;
  return (char *)block + 64;
}

void arena_free(void *p) { (void)p; }

void arena_clear(void) {
  while (blocks) {
    Block *next = blocks->next;
    free(blocks);
    blocks = next;
  }
}

typedef struct { char *base, *data; int64_t offset, sizes_and_strides[]; } Memref;
typedef struct { int64_t rank; Memref *memref; } AnyMemref;

static void copy(char *to, const int64_t *to_strides, const char *from, const int64_t *from_strides,
                 const int64_t *sizes, int64_t rank, int64_t size) {
  if (rank == 0) {
    memcpy(to, from, size);
  } else if (rank == 1 && *to_strides == 1 && *from_strides == 1) {
    memcpy(to, from, *sizes * size);
  } else {
    for (int64_t i = 0; i < *sizes; i++)
      copy(to + i * *to_strides * size, to_strides + 1, from + i * *from_strides * size,
           from_strides + 1, sizes + 1, rank - 1, size);
  }
}

void memrefCopy(int64_t size, AnyMemref *from, AnyMemref *to) {
  int64_t rank = from->rank, *sizes = from->memref->sizes_and_strides;
  copy(to->memref->data + to->memref->offset * size, to->memref->sizes_and_strides + rank,
       from->memref->data + from->memref->offset * size, sizes + rank, sizes, rank, size);
}

// A bf16 is returned in the low half of a vector register, as a float is.
float __truncsfbf2(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000)
    bits = bits >> 16 | 64;
  else
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  memcpy(&value, &bits, 4);
  return value;
}
"""


def x86_library(text: str, folder: Path) -> Path:
    """A shared library of some Linalg, in `folder`, which may have it already."""
    library = folder / f"{hashlib.sha256((text + RUNTIME).encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:  # others may be at it too
        _build_x86_library(text, Path(unfinished)).rename(library)
    return library


def _build_x86_library(text: str, folder: Path) -> Path:
    source, code, runtime = (folder / f"kernel{suffix}" for suffix in (".mlir", ".o", ".c"))
    # Attributes of Triton, which nobody else knows.
    text = re.sub(r" \{tt\.[^}]*\}", "", text)
    source.write_text(re.sub(r"(func\.func @\w+\(.*\)) attributes \{.*?\} \{", r"\1 {", text))
    done = subprocess.run([_tool("bishengir-opt"), source, *PASSES], capture_output=True, text=True)
    if done.returncode:
        raise NotCompiled(done.stderr)
    source.write_text(done.stdout)
    code.write_bytes(_x86_object(source))
    runtime.write_text(RUNTIME)
    renamed = [f"--redefine-sym={symbol}=arena_{symbol}" for symbol in ("malloc", "free")]
    subprocess.run(["objcopy", *renamed, str(code)], check=True)
    library = folder / "kernel.so"
    options = ["-O2", "-shared", "-fPIC", "-lm", "-o", str(library)]
    subprocess.run(["gcc", str(code), str(runtime), *options], check=True)
    return library


def _x86_object(source: Path) -> bytes:
    """Machine code of a file in MLIR's LLVM dialect."""
    from triton._C.libtriton import ir, llvm

    context = ir.context()
    ir.load_dialects(context)
    module = ir.parse_mlir_module(str(source), context)
    module.context = context
    llvm.init_targets()
    llvm_module = llvm.to_module(module, llvm.context())
    llvm.attach_datalayout(llvm_module, TRIPLE, CPU, "")
    llvm.optimize_module(llvm_module, llvm.OPTIMIZE_O3)
    code: bytes = llvm.translate_to_asm(str(llvm_module), TRIPLE, CPU, "", [], False, True)
    return code


class OnX86:
    """Launches kernels in their Ascend form on this CPU, one program after the other."""

    def __init__(self, folder: Path) -> None:
        """Keep what is compiled in `folder`."""
        self._folder = folder
        self._libraries: dict[tuple[Any, ...], ctypes.CDLL] = {}
        self._spare = (ctypes.c_char * 65536)()
        """For the NPU's own workspace and lock, which nothing here uses."""

    def __call__(
        self, kernel: Any, num_programs: int, args: tuple[Any, ...], constants: Mapping[str, Any]
    ) -> None:
        """Launch a kernel; NotCompiled if it cannot be compiled."""
        signature = signature_of(kernel, args, constants)
        key = kernel.__name__, *signature.items(), *constants.items()
        if key not in self._libraries:
            text = linalg(kernel, signature, constants)
            self._libraries[key] = ctypes.CDLL(str(x86_library(text, self._folder)))
        library = self._libraries[key]
        spare = _memref(ctypes.addressof(self._spare), len(self._spare))
        values = [*spare, *spare]
        for arg in args:
            if isinstance(arg, torch.Tensor):
                values += _memref(arg.data_ptr(), arg.numel())
            else:
                values.append(
                    ctypes.c_float(arg) if isinstance(arg, float) else ctypes.c_int32(arg)
                )
        run = getattr(library, kernel.__name__)
        for program in range(num_programs):
            run(*values, *map(ctypes.c_int32, (num_programs, 1, 1, program, 0, 0)))
            library.arena_clear()


def _memref(address: int, size: int) -> list[Any]:
    """A block of memory as MLIR passes it: twice its address, offset, size and stride."""
    return [ctypes.c_void_p(address), ctypes.c_void_p(address), *map(ctypes.c_int64, (0, size, 1))]
