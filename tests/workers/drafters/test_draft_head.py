from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.workers.tiny_heads import TEMPERATURE, tiny_head, write_head
from tests.workers.tiny_models import write_checkpoint
from workers.drafters.draft_head import (
    DraftHead,
    attend,
    fingerprint,
    metadata,
    read_config,
    read_tensor,
)
from workers.drafters.training.vllm_head_module import HeadModule
from workers.kernels.gemm import Floats

NUM_ROWS = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint("llama", folder)
    return folder


@pytest.fixture(scope="module")
def module(model: Path) -> HeadModule:
    return tiny_head(model)


@pytest.fixture(scope="module")
def file(module: HeadModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("head") / "tiny.safetensors"
    write_head(module, file)
    return file


@torch.no_grad()
def test_the_forward_is_that_of_training(model: Path, module: HeadModule, file: Path) -> None:
    head = DraftHead(file, model)
    embedding = torch.tensor(read_tensor(model, "model.embed_tokens.weight"))
    token_ids = list(range(20, 20 + NUM_ROWS))
    states = torch.randn(1, NUM_ROWS, head.config.hidden_size)
    causal = torch.ones(1, NUM_ROWS, NUM_ROWS, dtype=torch.bool).tril()
    expected = module(embedding[token_ids][None], states, causal, [])[0]
    logits = expected @ embedding[head.vocabulary].T / TEMPERATURE

    rows = head.project(token_ids, states[0].numpy(), list(range(NUM_ROWS)))
    attended = attend(rows.query, *by_head(rows.key, rows.value), causal[0].numpy())
    found_states, found_logits = head.finish(rows.residual, attended)

    np.testing.assert_allclose(found_states, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found_logits, logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_guesses_on_guesses_see_what_they_see_in_training(
    model: Path, module: HeadModule, file: Path
) -> None:
    head = DraftHead(file, model)
    embedding = torch.tensor(read_tensor(model, "model.embed_tokens.weight"))
    token_ids = list(range(20, 20 + NUM_ROWS))
    states = torch.randn(1, NUM_ROWS, head.config.hidden_size)
    causal = torch.ones(1, NUM_ROWS, NUM_ROWS, dtype=torch.bool).tril()
    cache: list[tuple[torch.Tensor, torch.Tensor]] = []
    shifted = states
    for _ in range(3):
        out = module(embedding[token_ids][None], shifted, causal, cache)
        shifted = torch.nn.functional.pad(out, (0, 0, 1, 0))[:, :-1]

    # The last row of the third pass: true states up to two rows before it, then two guesses.
    known = head.project(token_ids[:-2], states[0, :-2].numpy(), list(range(NUM_ROWS - 2)))
    keys, values = by_head(known.key, known.value)
    last = attend(known.query[-1:], keys, values)
    state = head.finish(known.residual[-1:], last)[0]
    for position in (NUM_ROWS - 2, NUM_ROWS - 1):
        row = head.project([token_ids[position]], state, [position])
        keys = np.concatenate([keys, row.key.transpose(1, 0, 2)], axis=1)
        values = np.concatenate([values, row.value.transpose(1, 0, 2)], axis=1)
        state = head.finish(row.residual, attend(row.query, keys, values))[0]

    np.testing.assert_allclose(state[0], out[0, -1], rtol=1e-4, atol=1e-4)


def test_a_head_of_another_model_is_refused(
    file: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    write_checkpoint("mistral", other)

    with pytest.raises(ValueError, match=f"{fingerprint(model)}, but .* is {fingerprint(other)}"):
        DraftHead(file, other)


def test_a_file_that_is_no_head_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no weights at all")

    with pytest.raises(ValueError, match="holds no draft head"):
        read_config(model / "model.safetensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_config(tmp_path / "text")


def test_a_missing_tensor_is_named(file: Path, model: Path, tmp_path: Path) -> None:
    tensors = load_file(file)
    del tensors["o.weight"]
    save_file(tensors, tmp_path / "cut.safetensors", metadata(read_config(file)))

    with pytest.raises(ValueError, match=r"no tensor o\.weight"):
        DraftHead(tmp_path / "cut.safetensors", model)


def by_head(key: Floats, value: Floats) -> tuple[Floats, Floats]:
    return key.transpose(1, 0, 2), value.transpose(1, 0, 2)
