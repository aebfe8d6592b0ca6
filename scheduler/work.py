"""What a step asks of a device: arithmetic and memory, by the shape of the model."""

from dataclasses import dataclass

from scheduler.cost_model import StepShape


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWork:
    """What a model's parts take, on one device; `flops` and `memory_bytes` add them up for a step.

    Counted as is usual for decoders (Chowdhery et al., PaLM, arXiv:2204.02311, appendix B): matrix
    products and attention. Norms, activations and looking up embeddings are left out.
    """

    body_flops_per_token: float
    """2 for each parameter that a token is multiplied with, without the LM head."""
    head_flops_per_logit: float
    """2 for each parameter of the LM head."""
    flops_per_pair: float
    """4 * head_dim * num_heads * num_layers: each query-key pair takes a product with the key and
    one with the value."""
    body_bytes: float
    """All weights as they lie in memory, but for the LM head's and embeddings."""
    head_bytes: float
    """The LM head's."""
    kv_bytes_per_token: float
    """Keys and values of one token in all layers."""

    def flops(self, shape: StepShape) -> float:
        """Floating-point operations of a step: of its tokens, its logits and its pairs."""
        return (
            self.body_flops_per_token * shape.num_tokens
            + self.head_flops_per_logit * shape.num_logits
            + self.flops_per_pair * shape.num_pairs
        )

    def memory_bytes(self, shape: StepShape) -> float:
        """Bytes that a step moves; 0 for an empty one.

        The weights are read once, the LM head's if there are logits. Each token's keys and values
        are written once, and those of its context are read once for each query tile.
        """
        if shape.num_tokens == 0:
            return 0.0
        num_moved = shape.num_tokens + shape.num_kv_reads
        head_bytes = self.head_bytes if shape.num_logits else 0.0
        return self.body_bytes + head_bytes + self.kv_bytes_per_token * num_moved
