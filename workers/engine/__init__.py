"""vLLM's engine core, stepped by our scheduler in the worker's process."""
