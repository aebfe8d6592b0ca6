"""vLLM's plug-in points, filled with our kernels."""
