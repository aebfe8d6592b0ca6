"""The GEMM and the attention kernel: planned once per step in Python, run per layer in C++."""
