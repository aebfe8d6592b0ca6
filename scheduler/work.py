"""Arithmetic and memory traffic of a step, by the dimensions of the model."""

from dataclasses import dataclass

from scheduler.cost_model import StepShape


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWork:
    """Operations and bytes of a model's parts on one device; `flops` and `memory_bytes` add up a
    step's.

    Counted as is usual for decoders (Chowdhery et al., PaLM, arXiv:2204.02311, appendix B): matrix
    products and attention. Norms, activations and embedding look-ups are left out.
    """

    body_flops_per_token: float
    """Operations: 2 for each parameter that a token is multiplied with, without the LM head."""
    head_flops_per_logit: float
    """Operations: 2 for each parameter of the LM head."""
    flops_per_pair: float
    """Operations: 4 * head_dim * num_heads * num_layers, as each query-key pair takes one product
    with the key and one with the value."""
    body_bytes: float
    """Size in memory of all weights except the LM head's and the embedding's."""
    head_bytes: float
    """Size in memory of the LM head's weights."""
    kv_bytes_per_token: float
    """Size of one token's keys and values in all layers."""

    def flops(self, shape: StepShape) -> float:
        """Floating-point operations of a step."""
        return (
            self.body_flops_per_token * shape.num_tokens
            + self.head_flops_per_logit * shape.num_logits
            + self.flops_per_pair * shape.num_pairs
        )

    def memory_bytes(self, shape: StepShape) -> float:
        """Bytes that a step reads and writes; 0 for an empty one.

        The weights are read once, the LM head's only if there are logits. The keys and values of
        each token are written once, those of its context read once per query tile.
        """
        if shape.num_tokens == 0:
            return 0.0
        num_moved = shape.num_tokens + shape.num_kv_reads
        head_bytes = self.head_bytes if shape.num_logits else 0.0
        return self.body_bytes + head_bytes + self.kv_bytes_per_token * num_moved
