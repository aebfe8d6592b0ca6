"""The kernels in the form that the NPU's compiler gives them, run on this CPU, and down to the
complete input of its code generator."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.triton.scenes import (
    PRODUCTS,
    SCENES,
    TOLERANCE,
    Layer,
    Product,
    attention_error,
    has_equal_bits_alone,
    product_error,
    rows_have_equal_bits_alone,
)
from tests.triton.shipped import ATTENTIONS, GEMMS, TOO_LARGE, Attention, Gemm
from workers.kernels import triton_ascend, triton_attention
from workers.kernels.triton_ascend import TARGETS, NotCompiled, OnX86, hivm, linalg
from workers.kernels.triton_launch import launching

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def on_x86(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with launching(OnX86(tmp_path_factory.mktemp("x86"))):
        yield


@pytest.mark.usefixtures("on_x86")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scene", SCENES)
def test_a_step_attends_as_its_slow_twin_with_bits_of_its_own(
    scene: str, dtype: torch.dtype
) -> None:
    layer = Layer(SCENES[scene], dtype)

    assert attention_error(layer) < TOLERANCE[dtype]
    assert has_equal_bits_alone(layer)


@pytest.mark.usefixtures("on_x86")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_products_are_those_of_the_slow_twin_with_bits_of_their_own(
    product: dict[str, bool], dtype: torch.dtype
) -> None:
    assert product_error(Product(dtype, **product)) < 3 * TOLERANCE[dtype]
    assert rows_have_equal_bits_alone(Product(dtype, **product))


def test_a_wrong_mask_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: a query that does not see its own key."""

    before = triton_ascend.linalg

    def mutated(*args: Any) -> str:
        return before(*args).replace("arith.cmpi sle", "arith.cmpi slt")

    monkeypatch.setattr(triton_ascend, "linalg", mutated)

    with launching(OnX86(tmp_path)):
        assert attention_error(Layer(SCENES["groups of 2"], torch.float32)) > 0.1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shipped", [*GEMMS, *ATTENTIONS], ids=str)
def test_a_shipped_tile_compiles_as_far_as_it_goes_without_the_npu(
    shipped: Gemm | Attention, target: str, tmp_path: Path
) -> None:
    text = linalg(shipped.kernel, shipped.signature, shipped.constants(is_npu=True), target)

    assert "ExtractedLoadOrStore" not in text  # blocks are copied, not elements
    assert [name for name in calls(hivm(text, tmp_path, target)) if not is_defined(name)] == []


@pytest.mark.parametrize("shipped", TOO_LARGE, ids=str)
def test_a_tile_that_is_too_large_is_refused(shipped: Gemm | Attention, tmp_path: Path) -> None:
    """A control."""
    text = linalg(shipped.kernel, shipped.signature, shipped.constants(is_npu=True))

    with pytest.raises(NotCompiled, match="overflow"):
        hivm(text, tmp_path)


def calls(text: str) -> set[str]:
    """Functions of the NPU's library that some code calls."""
    return set(re.findall(r"func\.func private @(\w+)", text))


@functools.cache
def library() -> bytes:
    """The NPU's library, of which the package has the bitcode."""
    files = sorted((triton_ascend.package() / "lib").glob("meta_op*.c220.bc"))
    return b"\n".join(file.read_bytes() for file in files)


def is_defined(name: str) -> bool:
    """Whether the library has a function. Names follow each other there without a sign between."""
    end = rb"(?=_mlir_ciface_|llvm\.|_Z|\W|$)"
    return re.search(rb"_mlir_ciface_" + name.encode() + end, library()) is not None


def test_the_library_has_some_functions_and_not_any() -> None:
    """A control."""
    assert is_defined("vsub_1d_float")
    assert not is_defined("vsub_1d_floa")


def test_rows_that_are_not_next_to_each_other_would_be_found() -> None:
    """A control: an NPU would load them one by one."""
    shipped = ATTENTIONS[1]
    constants = shipped.constants(is_npu=True) | {"IS_FLAT": False}

    assert "ExtractedLoadOrStore" in linalg(
        triton_attention.attend_kernel, shipped.signature, constants
    )
