"""Computes: the worker actor, all contact with vLLM's engine, and the kernels."""
