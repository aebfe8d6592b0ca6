"""The sizes of a layer, the same for every back end: nothing here needs a compiled library."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """One attention layer.

    Its KV cache is `[num_blocks, num_kv_heads, block_size, 2 * head_size]`.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    scale: float
    sliding_window: int | None = None
    """Newest keys that a query sees, its own included."""
    soft_cap: float | None = None
    """Scores become `soft_cap * tanh(score / soft_cap)`."""
    kv_bf16: bool = False
    """Whether our CPU kernel keeps keys and values in bf16, and rounds queries and weights to bf16
    before they are multiplied; otherwise all are float32."""

    def __post_init__(self) -> None:
        problem = unsupported(self.num_heads, self.num_kv_heads, self.head_size, self.block_size)
        if problem:
            raise ValueError(problem)
        for name in ("sliding_window", "soft_cap"):
            value = getattr(self, name)
            if value is not None and not value > 0:  # NaN is not either
                raise ValueError(f"{name} ({value}) must be positive, or None")


def unsupported(
    num_heads: int, num_kv_heads: int, head_size: int, block_size: int, *, multiple: int = 1
) -> str | None:
    """Why a back end that works in steps of `multiple` cannot serve these sizes; None if it can."""
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        return f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})"
    for name, size in (("head_size", head_size), ("block_size", block_size)):
        if size < 1 or size % multiple:
            return f"{name} ({size}) must be a positive multiple of {multiple}"
    return None
