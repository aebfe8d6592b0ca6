"""Trains a draft head on what its target model itself writes, with the states it has meanwhile."""

import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from workers.drafters.draft_head import (
    EMBEDDING,
    HeadConfig,
    fingerprint,
    lm_head_name,
    metadata,
    read_tensor,
)
from workers.drafters.training.example import Example, Message

LOSS_BLOCK = 256
"""Rows whose logits are made at once: more would leave the cache."""
NUM_FREQUENT = 3072
NUM_OTHERS = 2048
DEPTH_WEIGHT = 0.9
"""Each guess deeper counts so much less: it is only of use if those before were right."""
PROMPT_WEIGHT = 0.2
"""Guesses inside prompts are not asked for, but teach something too."""
INIT_STD = 0.02
REPORT_INTERVAL_S = 10.0
HELD_OUT = 0.03
"""Share of the examples that the head is not trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTraining:
    """What to train on, how long, and how large a head."""

    model: str
    """Folder of the target: a llama-like checkpoint in safetensors."""
    prompts: Path
    """JSON lines with a `prompt` or `messages` each, or lines of text."""
    out: Path
    num_tokens: int = 400_000
    """Tokens to be written by the target."""
    max_tokens: int = 224
    """Longest answer."""
    epochs: int = 6
    depth: int = 4
    """Passes in training, each on the states that the one before guessed."""
    num_guessed: int = 8192
    """Tokens that the head can guess: the most frequent ones."""
    window: int = 128
    batch_rows: int = 1024
    learning_rate: float = 4e-3
    seed: int = 0
    cpus: int = 2


class Norm(nn.RMSNorm):
    """RMSNorm in float32 whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """Norm the last dimension."""
        return super().forward(x.float())


class HeadModule(nn.Module):
    """The forward of `DraftHead`, for whole sequences."""

    def __init__(self, config: HeadConfig) -> None:
        """Random weights: they learn faster than those of the target's last layer."""
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
        """States that follow the rows `[batch, num_rows, hidden_size]`.

        `cache` has the keys and values of the passes before, and gets those of this one. In the
        first pass a row sees the rows that `mask [batch, num_rows, num_rows]` lets through. In
        later ones `states` are the head's own, shifted to the rows they come before: of the first
        pass a row sees what lies as many rows further back, and of each pass since one row.
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
        scores = scores.masked_fill(~(mask & back)[:, None], -1e4)
        # The row of pass j that lies `depth - j` rows back is on the way to this one.
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
    """At each row of `[batch, heads, num_rows, dim]`, the one so many rows before."""
    return F.pad(rows, (0, 0, distance, 0))[:, :, : rows.shape[2]]


class DistilLoss(torch.autograd.Function):
    """Cross entropy to the target's own probabilities, block by block: no matrix of all logits."""

    @staticmethod
    def forward(
        ctx: Any, outs: Tensor, targets: Tensor, weights: Tensor, lm_head: Tensor
    ) -> Tensor:
        """Of `outs [depth, num_rows, hidden_size]`, weighted by `weights [depth, num_rows]`."""
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
        """Of the states only."""
        (grads,) = ctx.saved_tensors
        return grads * grad_outputs[0], None, None, None


class Corpus:
    """Examples end to end, and the rows to learn from."""

    def __init__(self, examples: list[Example], window: int) -> None:
        """Row i has the token at i + 1 and the state at i; what it shall give is that at i + 1."""
        pad = np.zeros((1, examples[0].states.shape[1]), np.float16)
        self.token_ids = torch.tensor(np.concatenate([e.token_ids for e in examples])).long()
        self.states = torch.tensor(
            np.concatenate([part for e in examples for part in (e.states, pad)])
        )
        starts = np.cumsum([0, *(len(e.token_ids) for e in examples)])
        # Of a long prompt only what the first answers attend to.
        self.spans = [
            torch.arange(start + max(0, e.num_prompt_tokens - window), start + len(e.states) - 1)
            for start, e in zip(starts, examples, strict=False)
        ]
        self.weights = torch.full((len(self.token_ids),), PROMPT_WEIGHT)
        for start, example in zip(starts, examples, strict=False):
            # The row of the token before the last of the prompt gives the first answer's state.
            self.weights[start + example.num_prompt_tokens - 2 : start + len(example.states)] = 1

    def chunks(self, num_rows: int, order: random.Random) -> list[tuple[Tensor, Tensor]]:
        """Rows in chunks of one size, and which example each is of; the rest is left out."""
        spans = list(enumerate(self.spans))
        order.shuffle(spans)
        rows = torch.cat([span for _, span in spans])
        owners = torch.cat([torch.full_like(span, number) for number, span in spans])
        end = len(rows) // num_rows * num_rows
        chunks = list(zip(rows[:end].split(num_rows), owners[:end].split(num_rows), strict=True))
        order.shuffle(chunks)
        return chunks


class Trainer:
    """One training of one head."""

    def __init__(self, training: HeadTraining, config: HeadConfig, corpus: Corpus) -> None:
        """Choose the vocabulary, and begin with random weights."""
        self._training, self._corpus = training, corpus
        model = Path(training.model)
        self._embedding = torch.tensor(read_tensor(model, EMBEDDING)).bfloat16()
        counts = torch.bincount(corpus.token_ids, minlength=config.vocab_size)
        # Of tokens that never came, those that were merged first are the most frequent.
        self.vocabulary = counts.argsort(descending=True, stable=True)[: config.num_guessed]
        """The most frequent first."""
        self._lm_head = torch.tensor(read_tensor(model, lm_head_name(model))).bfloat16()
        torch.manual_seed(training.seed)
        self.head = HeadModule(config)
        # The scale of the states, and so of the logits.
        self.head.norm.weight.data.copy_(torch.tensor(read_tensor(model, "model.norm.weight")))

    def train(self) -> Iterator[tuple[float, float]]:
        """Train, giving the share done and the loss per row and pass as it goes."""
        training, order = self._training, random.Random(self._training.seed)
        chunk_rows = 2 * training.window
        per_batch = max(1, training.batch_rows // chunk_rows)
        epochs = [self._corpus.chunks(chunk_rows, order) for _ in range(training.epochs)]
        chunks = [chunk for epoch in epochs for chunk in epoch]
        num_steps = max(1, len(chunks) // per_batch)
        matrices = [p for p in self.head.parameters() if p.ndim == 2]
        vectors = [p for p in self.head.parameters() if p.ndim == 1]
        rate = training.learning_rate
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(vectors, rate, weight_decay=0.0),
        ]
        for step in range(num_steps):
            share = step / num_steps
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate * min(1.0, 20 * share + 0.05) * (1 - share)
                optimizer.zero_grad()
            # First to guess from true states, then, once that is any good, from guessed ones.
            depth = 1 + int(share * training.depth)
            loss = self.loss(chunks[step * per_batch : (step + 1) * per_batch], depth)
            loss.backward()
            nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            yield (step + 1) / num_steps, loss.item()

    def loss(self, chunks: list[tuple[Tensor, Tensor]], depth: int) -> Tensor:
        """Mean over the rows and passes, by their weight."""
        rows, owners = (torch.stack(part) for part in zip(*chunks, strict=True))
        outs, weights = [], []
        targets = self._corpus.states[rows + 1].bfloat16().flatten(0, 1)
        for number, out in enumerate(self.passes(rows, owners, depth)):
            known = F.pad(owners, (number, 0), value=-1)[:, : owners.shape[1]] == owners
            weights.append(self._corpus.weights[rows] * known * DEPTH_WEIGHT**number)
            outs.append(out.flatten(0, 1))
        weight = torch.stack(weights).flatten(1)
        lm_head = self._lm_head[self._compared(rows)]
        loss: Tensor = DistilLoss.apply(  # type: ignore[no-untyped-call]
            torch.stack(outs), targets, weight / weight.sum(), lm_head
        )
        return loss

    def _compared(self, rows: Tensor) -> Tensor:
        """Tokens to tell apart in one batch: all would take half the time of the training.

        They are the most frequent ones, those that are right in the batch, and some of the others.
        """
        rest = self.vocabulary[NUM_FREQUENT:]
        some = rest[torch.randperm(len(rest))[:NUM_OTHERS]]
        right = self._corpus.token_ids[rows + 2].flatten()
        tokens: Tensor = torch.cat([self.vocabulary[:NUM_FREQUENT], some, right]).unique()
        return tokens

    def passes(self, rows: Tensor, owners: Tensor, depth: int) -> Iterator[Tensor]:
        """What the head gives for the rows: on true states, and then on its own again and again."""
        distance = torch.arange(rows.shape[1])[:, None] - torch.arange(rows.shape[1])
        near = (distance >= 0) & (distance < self._training.window)
        mask = near & (owners[:, :, None] == owners[:, None])
        embedded = self._embedding[self._corpus.token_ids[rows + 1]].float()
        states = self._corpus.states[rows].float()
        cache: list[tuple[Tensor, Tensor]] = []
        for _ in range(depth):
            with torch.autocast("cpu", torch.bfloat16):
                out = self.head(embedded, states, mask, cache)
            yield out
            states = F.pad(out, (0, 0, 1, 0))[:, :-1]

    @torch.no_grad()
    def evaluate(self, corpus: Corpus, temperatures: Iterable[float]) -> "Evaluation":
        """Let the head guess the answers of examples that it was not trained on."""
        own, self._corpus = self._corpus, corpus
        chunks = corpus.chunks(2 * self._training.window, random.Random(self._training.seed))
        number = torch.full((len(self._embedding),), -1)
        number[self.vocabulary] = torch.arange(len(self.vocabulary))
        lm_head = self._lm_head[self.vocabulary]
        right = torch.zeros(self._training.depth)
        loss = {temperature: 0.0 for temperature in temperatures}
        num_rows = 0.0
        for chunk_rows, chunk_owners in chunks:
            rows, owners = chunk_rows[None], chunk_owners[None]
            asked = (corpus.weights[rows] == 1)[0]
            asked[: self._training.depth] = False
            num_rows += asked.sum().item()
            answers = number[corpus.token_ids[rows + 2]][0, asked]
            for depth, out in enumerate(self.passes(rows, owners, self._training.depth)):
                logits = (out[0, asked].bfloat16() @ lm_head.T).float()
                right[depth] += (logits.argmax(1) == answers).sum()
                for temperature in loss:
                    loss[temperature] += F.cross_entropy(
                        logits / temperature, answers, ignore_index=-1, reduction="sum"
                    ).item()
        self._corpus = own
        return Evaluation(
            tuple((right / max(1.0, num_rows)).tolist()), min(loss, key=lambda t: loss[t])
        )

    def save(self, file: Path, temperature: float) -> None:
        """Write the head, rounded to bf16."""
        tensors = {
            name: value.detach().bfloat16().contiguous()
            for name, value in self.head.named_parameters()
        }
        config = replace(self.head.config, temperature=temperature)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors | {"vocabulary": self.vocabulary.int()}, file, metadata(config))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good a head is."""

    right: tuple[float, ...]
    """By pass, the share of guesses that the target agrees with; those before taken as right."""
    temperature: float
    """With it the probabilities fit best."""


def fit(training: HeadTraining, examples: list[Example], say: Callable[[str], None]) -> Evaluation:
    """Train a head on examples and write it."""
    num_held_out = max(1, int(HELD_OUT * len(examples)))
    corpus = Corpus(examples[num_held_out:], training.window)
    config = head_config(Path(training.model), training.window, training.num_guessed)
    trainer = Trainer(training, config, corpus)
    said = start = time.monotonic()
    losses: list[float] = []
    for share, loss in trainer.train():
        losses.append(loss)
        if share == 1 or time.monotonic() > said + REPORT_INTERVAL_S:
            said = time.monotonic()
            say(f"training: {share:.0%}, loss {np.mean(losses):.3f}, {said - start:.0f} s")
            losses.clear()
    held_out = Corpus(examples[:num_held_out], training.window)
    evaluation = trainer.evaluate(held_out, [0.7 + 0.1 * i for i in range(9)])
    trainer.save(training.out, evaluation.temperature)
    return evaluation


def head_config(model: Path, window: int, num_guessed: int) -> HeadConfig:
    """A head of the size of one layer of the target."""
    target = json.loads((model / "config.json").read_text())
    size, num_heads = target["hidden_size"], target["num_attention_heads"]
    return HeadConfig(
        target=fingerprint(model),
        vocab_size=target["vocab_size"],
        num_guessed=min(num_guessed, target["vocab_size"]),
        hidden_size=size,
        intermediate_size=target["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=target.get("num_key_value_heads", num_heads),
        head_dim=target.get("head_dim") or size // num_heads,
        rms_norm_eps=target.get("rms_norm_eps", 1e-5),
        rope_theta=target.get("rope_theta", 1e4),
        window=window,
    )


def train_head(training: HeadTraining, say: Callable[[str], None]) -> Evaluation:
    """Have the target write, train a head on that, and write the head to `training.out`."""
    from workers.drafters.training.vllm_head_examples import (
        generate,  # imports vLLM, which takes ten seconds
    )

    prompts = read_prompts(training.prompts)
    random.Random(training.seed).shuffle(prompts)
    examples: list[Example] = []
    num_tokens, said = 0, time.monotonic()
    for example in generate(training.model, prompts, training.max_tokens, training.cpus):
        examples.append(example)
        num_tokens += len(example.token_ids) - example.num_prompt_tokens
        if num_tokens >= training.num_tokens:
            break
        if time.monotonic() > said + REPORT_INTERVAL_S:
            said = time.monotonic()
            say(f"writing: {num_tokens} of {training.num_tokens} tokens")
    say(f"written: {num_tokens} tokens after {len(examples)} of {len(prompts)} prompts")
    if len(examples) < 2:
        raise ValueError(f"{training.prompts} has too few prompts that fit the model")
    return fit(training, examples, say)


def read_prompts(file: Path) -> list[list[Message]]:
    """Chats from JSON lines with a `prompt` or `messages` each, or from lines of text."""
    chats: list[list[Message]] = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line) if line.startswith("{") else {"prompt": line}
            chats.append(row.get("messages") or [{"role": "user", "content": row["prompt"]}])
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(
                f"{file}:{number} has neither `prompt` nor `messages`, or is no JSON: {error!r}"
            ) from None
    return chats


def main() -> None:
    """Train as the JSON in the first argument says: the fields of `HeadTraining`."""
    options = json.loads(sys.argv[1])
    paths = {name: Path(options[name]) for name in ("prompts", "out")}
    training = HeadTraining(**options | paths)
    torch.set_num_threads(training.cpus)
    evaluation = train_head(training, lambda line: print(line, flush=True))
    right = ", ".join(f"{share:.1%}" for share in evaluation.right)
    print(f"right on held-out answers, by depth: {right}\nwritten to {training.out}")


if __name__ == "__main__":
    main()
