"""Names shared by the plugin and the engines that ask for it."""

QUANTIZATION = "xyserve"
"""vLLM's name of our quantization method."""
