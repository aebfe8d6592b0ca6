import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.workers.tiny_models import write_checkpoint
from workers.drafters.draft_head import EMBEDDING, DraftHead, read_config, read_tensor
from workers.drafters.training.config import HeadTraining, head_config
from workers.drafters.training.example import Example
from workers.drafters.training.vllm_head_corpus import PROMPT_WEIGHT, Corpus
from workers.drafters.training.vllm_head_trainer import Trainer
from workers.drafters.training.vllm_head_training import fit, read_prompts

WINDOW = 16
NUM_GUESSED = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint("llama", folder)
    return folder


def test_the_head_learns_to_guess_and_its_file_is_read(model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    training = make_training(model, tmp_path / "new" / "tiny.safetensors", epochs=6)

    evaluation = fit(training, [counting(model, start) for start in range(40)], said.append)

    assert said[-1].startswith("training: 100%")
    assert min(evaluation.right) > 0.9
    config = read_config(training.out)
    assert (config.window, config.num_guessed) == (WINDOW, NUM_GUESSED)
    assert config.temperature == evaluation.temperature
    assert len(DraftHead(training.out, model).vocabulary) == NUM_GUESSED


def test_the_loss_falls_and_the_same_seed_gives_the_same_losses(model: Path) -> None:
    examples = [counting(model, start) for start in range(10)]
    first, second = (
        [loss for _, loss in make_trainer(make_training(model, epochs=3), examples).train()]
        for _ in range(2)
    )

    assert first == second
    assert len(first) > 2
    assert first[-1] < 0.7 * first[0]


def test_the_loss_is_the_cross_entropy_to_the_targets_probabilities(model: Path) -> None:
    trainer = make_trainer(make_training(model), [counting(model, 0), counting(model, 9)])
    corpus = Corpus([counting(model, 0)], WINDOW)
    ((rows, owners),) = corpus.chunks(2 * WINDOW, random.Random(0))[:1]
    lm_head = torch.tensor(read_tensor(model, EMBEDDING))[trainer.vocabulary]

    loss = trainer.loss([(rows, owners)], depth=1)

    (out,) = trainer.passes(rows[None], owners[None], depth=1)
    right = (corpus.states[rows + 1].float() @ lm_head.T).softmax(1)
    losses = -(right * (out[0] @ lm_head.T).log_softmax(1)).sum(1)
    weights = corpus.weights[rows]
    assert loss.item() == pytest.approx(((losses * weights).sum() / weights.sum()).item(), rel=0.02)
    gradient = torch.autograd.grad(loss, trainer.head.down.weight, retain_graph=True)[0]
    expected = torch.autograd.grad(
        (losses * weights).sum() / weights.sum(), trainer.head.down.weight
    )[0]
    assert torch.cosine_similarity(gradient.flatten(), expected.flatten(), 0) > 0.99


def test_the_rows_to_learn_from_are_answers_and_the_end_of_the_prompt(model: Path) -> None:
    example = counting(model, 0)  # 20 of 60 tokens are the prompt
    corpus = Corpus([example, example], WINDOW)

    assert [(span[0].item(), span[-1].item()) for span in corpus.spans] == [(4, 57), (64, 117)]
    # From the row on that has the last token of the prompt: it gives the first token's state.
    assert corpus.weights[:60].tolist() == pytest.approx([PROMPT_WEIGHT] * 18 + [1.0] * 41 + [0.2])


def test_prompts_are_json_or_text(tmp_path: Path) -> None:
    chat = '[{"role": "user", "content": "c"}]'
    (tmp_path / "prompts").write_text(f'{{"prompt": "a"}}\n\nplain b\n{{"messages": {chat}}}\n')

    prompts = read_prompts(tmp_path / "prompts")

    assert [messages[0]["content"] for messages in prompts] == ["a", "plain b", "c"]


@pytest.mark.parametrize("line", ['{"question": "a"}', '{"prompt": '])
def test_a_line_that_is_no_prompt_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text(f"fine\n{line}\n")

    with pytest.raises(ValueError, match="prompts:2 has neither"):
        read_prompts(tmp_path / "prompts")


def make_training(
    model: Path, out: Path = Path("unused"), *, epochs: int = 1, depth: int = 2
) -> HeadTraining:
    return HeadTraining(
        model=str(model),
        prompts=Path("unused"),
        out=out,
        epochs=epochs,
        depth=depth,
        num_guessed=NUM_GUESSED,
        window=WINDOW,
        batch_rows=256,
    )


def make_trainer(training: HeadTraining, examples: list[Example]) -> Trainer:
    config = head_config(Path(training.model), WINDOW, NUM_GUESSED)
    return Trainer(training, config, Corpus(examples, WINDOW))


def counting(model: Path, start: int) -> Example:
    """Tokens in their order; the state at each makes the next one the likeliest."""
    token_ids = np.arange(start + 10, start + 70, dtype=np.int32)
    states = read_tensor(model, EMBEDDING)[token_ids[1:]]
    return Example(20, token_ids, states.astype(np.float16))
