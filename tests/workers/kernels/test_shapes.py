import subprocess
import sys

WITHOUT_LIBRARY = """
import ctypes
def refuse(name, *args, load=ctypes.CDLL, **options):
    if name and name.endswith("libxykernels.so"):
        raise OSError(f"{name}: cannot open shared object file")
    return load(name, *args, **options)
ctypes.CDLL = refuse
from workers.kernels import attention, gemm, tiles
from workers.kernels.shapes import AttentionShape
shape = AttentionShape(num_heads=3, num_kv_heads=1, head_size=36, block_size=16, scale=0.1)
print(hash(shape) == hash(shape))
try:
    attention.shape_struct(shape)
except ImportError as error:
    print(error)
"""


def test_a_layer_is_described_without_the_library() -> None:
    described, error = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY], capture_output=True, text=True, check=True
    ).stdout.splitlines()

    assert described == "True"
    assert error.startswith("the native kernels cannot be loaded")
    assert "make install" in error
