"""Trains and evaluates a draft head on a corpus."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from workers.drafters.draft_head import (
    EMBEDDING,
    HeadConfig,
    lm_head_name,
    metadata,
    read_tensor,
)
from workers.drafters.training.config import HeadTraining
from workers.drafters.training.vllm_head_corpus import Corpus
from workers.drafters.training.vllm_head_module import DistilLoss, HeadModule

NUM_FREQUENT, NUM_OTHERS = 3072, 2048
"""Tokens that the loss of a batch compares: the most frequent ones, which make up most text, and a
random choice of the others, so that rare tokens are learnt too. Comparing with the whole vocabulary
would take half the time of the training."""
DEPTH_WEIGHT = 0.9
"""Weight of each pass relative to the one before: a guess is of use only if all before it are
right."""
WARM_UP = 0.05
"""Fraction of the steps in which the learning rate rises from a twentieth to its full value; large
steps from random weights would diverge. Then it falls linearly to 0, so that the end is steady."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Quality of a head on held-out examples."""

    right: tuple[float, ...]
    """Per pass, the fraction of right guesses, given true tokens before them."""
    temperature: float
    """The temperature at which probabilities fit best."""


class Trainer:
    """One training of one head."""

    def __init__(self, training: HeadTraining, config: HeadConfig, corpus: Corpus) -> None:
        """Choose the vocabulary and initialise the weights."""
        self._training, self._corpus = training, corpus
        model = Path(training.model)
        self._embedding = torch.tensor(read_tensor(model, EMBEDDING)).bfloat16()
        counts = torch.bincount(corpus.token_ids, minlength=config.vocab_size)
        # Tokens that do not occur stay in order of their ids, and low ids are more frequent: the
        # tokenizer merged them earlier.
        self.vocabulary = counts.argsort(descending=True, stable=True)[: config.num_guessed]
        """Tokens that the head can guess, most frequent first."""
        self._lm_head = torch.tensor(read_tensor(model, lm_head_name(model))).bfloat16()
        torch.manual_seed(training.seed)
        self.head = HeadModule(config)
        # So that states, and with them logits, begin at the right scale.
        self.head.norm.weight.data.copy_(torch.tensor(read_tensor(model, "model.norm.weight")))

    def train(self) -> Iterator[tuple[float, float]]:
        """Train; yields the fraction done and the loss per row and pass, step by step."""
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
            lr = rate * min(1.0, share / WARM_UP + 0.05) * (1 - share)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = lr
                optimizer.zero_grad()
            # Learn to guess from true states first, and from guessed ones once these are useful.
            depth = 1 + int(share * training.depth)
            loss = self.loss(chunks[step * per_batch : (step + 1) * per_batch], depth)
            loss.backward()
            nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            yield (step + 1) / num_steps, loss.item()

    def loss(self, chunks: list[tuple[Tensor, Tensor]], depth: int) -> Tensor:
        """Weighted mean of the loss over rows and passes."""
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
        """Tokens that the loss compares: frequent ones, some others, right ones of the batch."""
        rest = self.vocabulary[NUM_FREQUENT:]
        some = rest[torch.randperm(len(rest))[:NUM_OTHERS]]
        right = self._corpus.token_ids[rows + 2].flatten()
        tokens: Tensor = torch.cat([self.vocabulary[:NUM_FREQUENT], some, right]).unique()
        return tokens

    def passes(self, rows: Tensor, owners: Tensor, depth: int) -> Iterator[Tensor]:
        """The head's outputs for the rows: on true states, then on its own previous outputs."""
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
    def evaluate(self, corpus: Corpus, temperatures: Iterable[float]) -> Evaluation:
        """Measure the head's guesses at the answers in a corpus that it was not trained on."""
        own, self._corpus = self._corpus, corpus
        chunks = corpus.chunks(2 * self._training.window, random.Random(self._training.seed))
        number = torch.full((len(self._embedding),), -1)
        number[self.vocabulary] = torch.arange(len(self.vocabulary))
        lm_head = self._lm_head[self.vocabulary]
        right = torch.zeros(self._training.depth)
        loss = dict.fromkeys(temperatures, 0.0)
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
        """Write the head to a file, rounded to bf16."""
        tensors = {
            name: value.detach().bfloat16().contiguous()
            for name, value in self.head.named_parameters()
        }
        config = replace(self.head.config, temperature=temperature)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors | {"vocabulary": self.vocabulary.int()}, file, metadata(config))
