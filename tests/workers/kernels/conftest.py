"""What the kernels' tests share: the instruction sets they run on, and the threads."""

from collections.abc import Iterator

import pytest

from workers.kernels import native


@pytest.fixture(scope="module", params=["best", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set that the tests of a module run on: the best one, and the plainest."""
    best, *others = native.available_isas()
    if request.param == "portable" and not others:
        pytest.skip("this CPU's best instruction set is the portable one")
    native.use_isa(best if request.param == "best" else "portable")
    yield native.isa()
    native.use_isa(best)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Begin and leave each test with one thread, whatever it sets."""
    native.set_num_threads(1)
    yield
    native.set_num_threads(1)
