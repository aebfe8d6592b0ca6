"""Names that our plugin and who asks vLLM for it share."""

QUANTIZATION = "xyserve"
