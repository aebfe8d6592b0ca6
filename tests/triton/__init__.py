"""Tests of the Triton kernels without a GPU or an NPU, each file in an environment of its own."""
