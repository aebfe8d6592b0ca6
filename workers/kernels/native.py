"""The C++ library, loaded at its first use: its structures, functions and threads."""

import ctypes
import functools
import itertools
import mmap
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIBRARY = Path(__file__).with_name("libxykernels.so")


class WeightStruct(Structure):
    """`xy::Weight`."""

    _fields_ = [
        ("n", c_int32),
        ("k", c_int32),
        ("format", c_int32),
        ("gated", c_int32),
        ("panels", c_void_p),
        ("scales", c_void_p),
    ]


class GemmPlanStruct(Structure):
    """`xy::GemmPlan`."""

    _fields_ = [
        ("num_rows", c_int32),
        ("num_tiles", c_int32),
        ("heights", c_void_p),
        ("row_block", c_int32),
        ("panel_block", c_int32),
    ]


class AttentionShapeStruct(Structure):
    """`xy::AttentionShape`."""

    _fields_ = [
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_size", c_int32),
        ("block_size", c_int32),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("sliding_window", c_int32),
        ("kv_format", c_int32),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
    ]


class AttentionPlanStruct(Structure):
    """`xy::AttentionPlan`."""

    _fields_ = [
        ("num_spans", c_int32),
        ("num_tasks", c_int32),
        ("num_merges", c_int32),
        ("num_partials", c_int32),
        ("max_rows", c_int32),
        ("query_start_loc", c_void_p),
        ("seq_lens", c_void_p),
        ("mask_start", c_void_p),
        ("masks", c_void_p),
        ("heights", c_void_p),
        ("tasks", c_void_p),
        ("merges", c_void_p),
    ]


class AttentionDataStruct(Structure):
    """`xy::AttentionData`."""

    _fields_ = [
        ("query", c_void_p),
        ("query_stride", c_int64),
        ("kv_cache", c_void_p),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
    ]


class LayerStruct(Structure):
    """`xy::Layer`."""

    _fields_ = [
        ("input_norm", c_void_p),
        ("post_attention_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", c_void_p),
        ("o", c_void_p),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("qkv_bias", c_void_p),
        ("o_bias", c_void_p),
        ("gate_up_bias", c_void_p),
        ("down_bias", c_void_p),
        ("kv_cache", c_void_p),
    ]


class ModelStruct(Structure):
    """`xy::Model`."""

    _fields_ = [
        ("num_layers", c_int32),
        ("hidden_size", c_int32),
        ("intermediate_size", c_int32),
        ("rotary_dim", c_int32),
        ("eps", c_float),
        ("max_position", c_int32),
        ("cos_sin", c_void_p),
        ("final_norm", c_void_p),
        ("layers", c_void_p),
        ("attention", AttentionShapeStruct),
    ]


class StepStruct(Structure):
    """`xy::Step`."""

    _fields_ = [
        ("num_tokens", c_int32),
        ("positions", c_void_p),
        ("slot_mapping", c_void_p),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("attention", c_void_p),
        ("qkv", GemmPlanStruct),
        ("o", GemmPlanStruct),
        ("gate_up", GemmPlanStruct),
        ("down", GemmPlanStruct),
        ("hidden", c_void_p),
    ]


class Kernels(Structure):
    """`xy::Kernels`: the functions of one instruction set. A call releases the GIL."""

    _fields_ = [
        ("isa", c_char_p),
        ("lanes", c_int32),
        ("kv_chunk", c_int32),
        ("max_height", c_int32),
        ("max_bf16_height", c_int32),
        ("max_int8_height", c_int32),
        ("has_bf16_dot", c_int32),
        ("has_int8_dot", c_int32),
        ("packed_bytes", CFUNCTYPE(c_int64, c_int32, c_int32, c_int32, c_int32)),
        ("pack", CFUNCTYPE(None, POINTER(WeightStruct), c_void_p, c_void_p)),
        ("unpack", CFUNCTYPE(None, POINTER(WeightStruct), c_void_p)),
        (
            "linear",
            CFUNCTYPE(
                None,
                POINTER(WeightStruct),
                POINTER(GemmPlanStruct),
                c_void_p,
                c_int64,
                c_void_p,
                c_int32,
                c_void_p,
                c_int64,
            ),
        ),
        (
            "write_kv",
            CFUNCTYPE(
                None,
                POINTER(AttentionShapeStruct),
                c_void_p,
                c_int32,
                c_void_p,
                c_int64,
                c_void_p,
                c_int64,
                c_void_p,
            ),
        ),
        (
            "attend",
            CFUNCTYPE(
                None,
                POINTER(AttentionShapeStruct),
                POINTER(AttentionPlanStruct),
                POINTER(AttentionDataStruct),
            ),
        ),
        ("forward", CFUNCTYPE(None, POINTER(ModelStruct), POINTER(StepStruct))),
    ]


STRUCTS: tuple[type[Structure], ...] = (
    WeightStruct,
    GemmPlanStruct,
    AttentionShapeStruct,
    AttentionPlanStruct,
    AttentionDataStruct,
    LayerStruct,
    ModelStruct,
    StepStruct,
    Kernels,
)
"""All structures, in the order of `xy_struct_sizes`."""

REMEDY = "build them with `make install`, or `python -m workers.kernels.build` in a checkout"


@functools.cache
def _library() -> Any:
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise ImportError(f"the native kernels cannot be loaded ({error}); {REMEDY}") from None
    if differences := size_differences(library):
        raise ImportError(
            f"the native kernels in {LIBRARY} were built from other sources ({differences}); "
            f"{REMEDY}"
        )
    library.xy_kernels.restype = POINTER(Kernels)
    library.xy_available_isa.restype = c_char_p
    return library


def size_differences(library: Any) -> str:
    """Which structures have another size in a library than here; empty if none.

    A library from before a change of a structure would read and write in the wrong places.
    """
    if not hasattr(library, "xy_struct_sizes"):
        return "it does not export xy_struct_sizes"
    library.xy_struct_sizes.restype = POINTER(c_int32)
    in_library = list(itertools.takewhile(lambda size: size >= 0, library.xy_struct_sizes()))
    if len(in_library) != len(STRUCTS):
        return f"{len(in_library)} structures, not {len(STRUCTS)}"
    return ", ".join(
        f"{struct.__name__}: {size} bytes, not {ctypes.sizeof(struct)}"
        for struct, size in zip(STRUCTS, in_library, strict=True)
        if size != ctypes.sizeof(struct)
    )


def kernels() -> Kernels:
    """The functions of the instruction set in use; ImportError if the library cannot be loaded."""
    table: Kernels = _library().xy_kernels().contents
    return table


def available_isas() -> tuple[str, ...]:
    """The instruction sets that both this CPU and the library have, best first."""
    found: list[str] = []
    while (name := _library().xy_available_isa(len(found))) is not None:
        found.append(name.decode())
    return tuple(found)


def isa() -> str:
    """The instruction set in use: the best one, until `use_isa` chooses another."""
    name: bytes = kernels().isa
    return name.decode()


def use_isa(name: str) -> None:
    """Switch to an instruction set; a `Weight` packed for another one must not be used with it."""
    if not _library().xy_use_isa(name.encode()):
        raise ValueError(f"isa ({name!r}) must be one of {', '.join(available_isas())}")


def set_num_threads(num_threads: int) -> None:
    """Share the work of each call among this many threads, including the caller's."""
    if num_threads < 1:
        raise ValueError(f"num_threads ({num_threads}) must be at least 1")
    if num_threads != _library().xy_num_threads():
        _library().xy_set_num_threads(num_threads)


def num_threads() -> int:
    """Threads that share the work of a call."""
    count: int = _library().xy_num_threads()
    return count


def pointer(array: NDArray[Any] | None) -> int | None:
    """Address of an array, which the caller keeps alive."""
    return None if array is None else array.ctypes.data


ARENA_BYTES = 64 << 20
"""Memory that is mapped at once: 32 huge pages of 2 MiB, so that little is left over at the end."""


class Arena:
    """Huge pages for weights, which every step reads from end to end.

    Weights of a few hundred kilobytes share a huge page. On 4 KiB pages reading them would miss the
    translation buffer, and stop the prefetcher, at each page.
    """

    def __init__(self) -> None:
        """Map nothing until memory is asked for."""
        self._free: NDArray[np.uint8] = np.empty(0, np.uint8)

    def empty(self, num_bytes: int) -> NDArray[np.uint8]:
        """Memory aligned to a cache line; a mapping is freed once none of its memory is in use."""
        needed = -(-num_bytes // 64) * 64
        if needed > self._free.size:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory gets no huge pages
            memory = mmap.mmap(-1, max(needed, ARENA_BYTES), flags)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._free = np.frombuffer(memory, np.uint8)
        taken, self._free = self._free[:num_bytes], self._free[needed:]
        return taken


weights_arena = Arena()
