"""A draft head in torch, for training: its forward pass and its loss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from workers.drafters.draft_head import HeadConfig

LOSS_BLOCK = 256
"""Rows whose logits are computed at once: those of more rows would not stay in the cache."""
INIT_STD = 0.02
"""Standard deviation of the initial weights, as usual for transformers of this size."""
MASKED = -1e4
"""Score of a key that a row may not see: its weight is 0 in bf16 too, and, unlike with -inf, a row
that sees no key gets no NaN."""


class Norm(nn.RMSNorm):
    """RMSNorm that computes in float32, whatever its input."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class HeadModule(nn.Module):
    """The forward pass of `DraftHead`, for whole sequences."""

    def __init__(self, config: HeadConfig) -> None:
        """Begin with random weights: they learn faster than those of the target's last layer."""
        super().__init__()
        self.config = config
        size, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.embed_norm, self.input_norm, self.post_attention_norm, self.norm = (
            Norm(size, config.rms_norm_eps) for _ in range(4)
        )
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.qkv = nn.Linear(size, (heads + 2 * kv_heads) * dim, bias=False)
        self.o = nn.Linear(heads * dim, size, bias=False)
        self.gate_up = nn.Linear(size, 2 * inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)
        for linear in (self.fc, self.qkv, self.o, self.gate_up, self.down):
            nn.init.normal_(linear.weight, std=INIT_STD)
        half = torch.arange(0, dim, 2) / dim
        self._inverse_frequency = config.rope_theta**-half

    def forward(
        self, embedded: Tensor, states: Tensor, mask: Tensor, cache: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Output states of rows `[batch, num_rows, hidden_size]`.

        `cache` holds the keys and values of earlier passes; those of this pass are appended. In the
        first pass a row sees the rows that `mask [batch, num_rows, num_rows]` allows. In pass d,
        counted from 0, `states` are the output of the pass before, shifted by one row: a row stands
        for the d-th guess after true tokens. It sees the rows of the first pass up to d rows back,
        and one row of each later pass, the guess in between.
        """
        config, depth = self.config, len(cache)
        x = self.fc(torch.cat([self.embed_norm(embedded), states.float()], dim=2))
        qkv = self.qkv(self.input_norm(x)).unflatten(2, (-1, config.head_dim)).transpose(1, 2)
        query, key, value = qkv.split([config.num_heads, *[config.num_kv_heads] * 2], dim=1)
        query, key = self._rotate(query), self._rotate(key)
        group = config.num_heads // config.num_kv_heads
        cache.append((key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)))
        query = query * config.head_dim**-0.5
        scores = query @ cache[0][0].transpose(2, 3)
        num_rows = x.shape[1]
        back = torch.ones(num_rows, num_rows, dtype=torch.bool).tril(-depth)
        scores = scores.masked_fill(~(mask & back)[:, None], MASKED)
        # The row of pass j that is `depth - j` rows back is the j-th guess on the way to this one.
        own = [
            (query * _back(cache[j][0], depth - j)).sum(3, keepdim=True)
            for j in range(1, depth + 1)
        ]
        weights = torch.cat([scores.float(), *own], dim=3).softmax(3)
        attended = weights[..., :num_rows].to(value.dtype) @ cache[0][1]
        for j in range(1, depth + 1):
            attended = attended + weights[..., num_rows + j - 1, None] * _back(
                cache[j][1], depth - j
            )
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.post_attention_norm(x)).chunk(2, dim=2)
        out: Tensor = self.norm(x + self.down(F.silu(gate) * up))
        return out

    def _rotate(self, heads: Tensor) -> Tensor:
        angle = torch.arange(heads.shape[2])[:, None] * self._inverse_frequency
        cos, sin = angle.cos(), angle.sin()
        first, second = heads.float().chunk(2, dim=3)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], 3).to(
            heads.dtype
        )


def _back(rows: Tensor, distance: int) -> Tensor:
    """Rows `[batch, heads, num_rows, dim]` moved back: row i becomes row i - distance, or zero."""
    return F.pad(rows, (0, 0, distance, 0))[:, :, : rows.shape[2]]


class DistilLoss(torch.autograd.Function):
    """Cross entropy to the target's probabilities, by blocks of rows: never all logits at once."""

    @staticmethod
    def forward(
        ctx: Any, outs: Tensor, targets: Tensor, weights: Tensor, lm_head: Tensor
    ) -> Tensor:
        """Loss of `outs [depth, num_rows, hidden_size]`, with `weights [depth, num_rows]`."""
        grads = torch.empty_like(outs)
        loss = outs.new_zeros(())
        for start in range(0, outs.shape[1], LOSS_BLOCK):
            block = slice(start, start + LOSS_BLOCK)
            right = (targets[block] @ lm_head.T).float().softmax(1)
            for out, weight, grad in zip(outs, weights, grads, strict=True):
                log_probs = (out[block].to(lm_head.dtype) @ lm_head.T).float().log_softmax(1)
                loss -= ((right * log_probs).sum(1) * weight[block]).sum()
                wrong = (log_probs.exp_().sub_(right)).mul_(weight[block, None])
                grad[block] = wrong.to(lm_head.dtype) @ lm_head
        ctx.save_for_backward(grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of `outs`; the other inputs are constants."""
        (grads,) = ctx.saved_tensors
        return grads * grad_outputs[0], None, None, None
