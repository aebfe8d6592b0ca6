"""The GEMM and the attention kernel: planned once a step in Python, run per layer in C++."""
