"""The kernels' arithmetic, by Triton's interpreter, which knows no compiler.

bf16 is left out, of which it adds and multiplies the bits; and so are equal bits, as its products
are numpy's.
"""

import pytest
import torch

from tests.triton.scenes import (
    PRODUCTS,
    SCENES,
    TOLERANCE,
    Layer,
    Product,
    attention_error,
    product_error,
)

DTYPES = (torch.float32, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scene", SCENES)
def test_a_step_attends_as_its_slow_twin(scene: str, dtype: torch.dtype) -> None:
    assert attention_error(Layer(SCENES[scene], dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_products_are_those_of_the_slow_twin(product: dict[str, bool], dtype: torch.dtype) -> None:
    assert product_error(Product(dtype, **product)) < 3 * TOLERANCE[dtype]
