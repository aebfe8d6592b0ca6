from typing import Any

import numpy as np
import pytest

from cluster.models.default_model import fetch_default_model, is_fetched
from tests.workers.tiny_heads import tiny_head, write_head
from tests.workers.tiny_models import write_checkpoint
from workers.drafters.draft_head import DEFAULT_HEAD, DraftHead, attend
from workers.drafters.drafter import ContextKey, Draft, HiddenStates
from workers.drafters.head_drafter import HeadDrafter, TreeLimits
from workers.kernels.gemm import Floats

WINDOW = 16
REQUEST = ContextKey("worker", "request")
OTHER = ContextKey("worker", "other")
TOKENS = [int(token) for token in np.random.default_rng(0).integers(3, 300, 60)]

QUESTION = [
    {
        "role": "user",
        "content": "Complete this function:\ndef longest_word(text: str) -> str:\n"
        '    """ Return the longest word.\n    """\n',
    }
]
ANSWER = """```python
def longest_word(text: str) -> str:
    return max(text.split()[::-1])
```

This function uses Python's slicing feature to find the longest word in the input text. \
The `max` function is used to find the maximum value in the list of words."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> DraftHead:
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint("llama", folder)
    file = folder.parent / "tiny.head"
    write_head(tiny_head(folder, WINDOW), file)
    return DraftHead(file, folder)


def test_the_first_step_gives_a_draft_and_later_ones_better_drafts(head: DraftHead) -> None:
    drafter = HeadDrafter(head, TreeLimits(max_nodes=12, max_depth=5, min_path_prob=0.0))
    drafter.extend(REQUEST, 0, TOKENS[:9], states(8))

    drafts = run(drafter)

    assert drafts[0].parents == (-1,) * 6
    assert all(draft.position == 9 for draft in drafts)
    assert all(max(map(len, paths(draft))) <= 5 for draft in drafts)
    assert [len(draft.token_ids) for draft in drafts[1:]] == [12] * (len(drafts) - 1)
    sums = [expected_length(draft) for draft in drafts]
    assert sums == sorted(sums)
    assert not drafter.has_work()
    assert drafter.step() == {}


def test_each_guess_has_the_probability_of_a_plain_run_of_its_path(head: DraftHead) -> None:
    drafter = HeadDrafter(head, TreeLimits(max_nodes=20, min_path_prob=0.0))
    drafter.extend(REQUEST, 0, TOKENS[:9], states(8))
    *_, draft = run(drafter)

    expected = [path_prob(head, TOKENS[:9], states(8), path) for path in paths(draft)]

    assert draft.probs == pytest.approx(expected, rel=1e-3)


def test_what_came_of_older_trees_does_not_show_in_new_ones(head: DraftHead) -> None:
    drafter, fresh = HeadDrafter(head), HeadDrafter(head)
    drafter.extend(REQUEST, 0, TOKENS[:9], states(8))
    run(drafter)
    drafter.extend(REQUEST, 9, TOKENS[9:12], states(11)[8:])
    fresh.extend(REQUEST, 0, TOKENS[:12], states(11))

    assert_alike(run(drafter)[-1], run(fresh)[-1])


def test_only_the_newest_rows_of_a_long_context_count(head: DraftHead) -> None:
    drafter, short = HeadDrafter(head), HeadDrafter(head)
    drafter.extend(REQUEST, 0, TOKENS[:40], states(39))
    drafter.extend(REQUEST, 40, TOKENS[40:45], states(44)[39:])
    run(drafter)
    drafter.extend(REQUEST, 45, TOKENS[45:50], states(49)[44:])
    short.extend(REQUEST, 0, TOKENS[:50], states(49)[-WINDOW:])

    assert_alike(run(drafter)[-1], run(short)[-1])


def test_requests_do_not_change_each_others_drafts(head: DraftHead) -> None:
    together, alone = (
        HeadDrafter(head, TreeLimits(min_path_prob=0.0)),
        HeadDrafter(head, TreeLimits(min_path_prob=0.0)),
    )
    together.extend(REQUEST, 0, TOKENS[:9], states(8))
    together.extend(OTHER, 0, TOKENS[:20], states(19))
    alone.extend(OTHER, 0, TOKENS[:20], states(19))

    last: dict[ContextKey, Draft] = {}
    while together.has_work():
        last |= together.step()

    assert_alike(last[OTHER], run(alone, OTHER)[-1])


def test_requests_that_have_just_come_go_first(head: DraftHead) -> None:
    drafter = HeadDrafter(head, TreeLimits(max_rows=2))
    drafter.extend(REQUEST, 0, TOKENS[:9], states(8))
    drafter.step()
    drafter.extend(OTHER, 0, TOKENS[:5], states(4))

    assert OTHER in drafter.step()


def test_a_new_tree_goes_on_with_what_is_left_of_the_old_one(head: DraftHead) -> None:
    drafter = HeadDrafter(head, TreeLimits(num_children=4, min_path_prob=0.0))
    drafter.extend(REQUEST, 0, TOKENS[:9], states(8))
    *_, old = run(drafter)
    guess = old.token_ids[0]
    below = {path[1:] for path in paths(old) if path[0] == guess}
    drafter.extend(REQUEST, 9, [guess], states(9)[8:])

    draft = drafter.step()[REQUEST]

    children = {path for path in paths(draft) if len(path) == 1}
    likely = {path for path in below if path[:1] in children}
    assert max(map(len, below)) > 2
    assert {path for path in paths(draft) if len(path) > 1} == {p for p in likely if len(p) > 1}


def test_without_the_last_states_nothing_is_drafted(head: DraftHead) -> None:
    drafter = HeadDrafter(head)
    drafter.extend(REQUEST, 0, TOKENS[:9])
    assert not drafter.has_work()

    drafter.extend(REQUEST, 9, TOKENS[9:10], states(9)[8:])

    assert run(drafter)[0].position == 10


def test_states_may_be_missing_at_the_beginning(head: DraftHead) -> None:
    drafter = HeadDrafter(head, TreeLimits(max_nodes=8))
    drafter.extend(REQUEST, 0, TOKENS[:9], states(8)[5:])
    *_, draft = run(drafter)

    expected = [path_prob(head, TOKENS[:9], states(8)[5:], path) for path in paths(draft)]

    assert draft.probs == pytest.approx(expected, rel=1e-3)


def test_a_request_can_start_again(head: DraftHead) -> None:
    drafter, fresh = HeadDrafter(head), HeadDrafter(head)
    drafter.extend(REQUEST, 0, TOKENS[:30], states(29))
    run(drafter)
    for one in (drafter, fresh):
        one.extend(REQUEST, 0, TOKENS[:9], states(8))

    assert run(drafter) == run(fresh)


def test_ended_requests_are_forgotten(head: DraftHead) -> None:
    drafter = HeadDrafter(head)
    drafter.extend(REQUEST, 0, TOKENS[:9], states(8))
    drafter.forget(REQUEST)
    drafter.forget(OTHER)
    assert not drafter.has_work()

    drafter.extend(REQUEST, 0, TOKENS[:9], states(8))
    drafter.shutdown()

    assert not drafter.has_work()


def test_of_too_many_requests_the_longest_silent_one_is_forgotten(head: DraftHead) -> None:
    drafter = HeadDrafter(head, TreeLimits(max_requests=2))
    keys = [ContextKey("worker", name) for name in "abc"]
    for key in keys[:2]:
        drafter.extend(key, 0, TOKENS[:9], states(8))
    drafter.extend(keys[0], 9, TOKENS[9:10], states(9)[8:])
    drafter.extend(keys[2], 0, TOKENS[:9], states(8))

    assert set(drafter.step()) == {keys[0], keys[2]}


@pytest.mark.skipif(not is_fetched(), reason="the default model is not on this machine")
def test_the_head_for_the_default_model_guesses_what_it_says() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch_default_model()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    num_prompt_tokens = len(tokenizer(prompt)["input_ids"])
    token_ids = tokenizer(prompt + ANSWER)["input_ids"]
    with torch.no_grad():
        target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        known = target.model(torch.tensor([token_ids])).last_hidden_state[0].numpy()
    drafter = HeadDrafter(DraftHead(DEFAULT_HEAD, folder))
    drafter.extend(
        REQUEST, 0, token_ids[:num_prompt_tokens], known[: num_prompt_tokens - 1].astype(np.float16)
    )

    right = []
    for end in range(num_prompt_tokens, len(token_ids)):
        draft = drafter.step()[REQUEST]
        likeliest = max(first_guesses(draft), key=lambda i: draft.probs[i])
        right.append(draft.token_ids[likeliest] == token_ids[end])
        drafter.extend(REQUEST, end, [token_ids[end]], known[end - 1 : end].astype(np.float16))

    assert len(right) > 50
    assert np.mean(right) > 0.5


def states(num_tokens: int) -> HiddenStates:
    """The target's final states at the first of `TOKENS`."""
    return np.random.default_rng(1).normal(size=(60, 96)).astype(np.float16)[:num_tokens]


def run(drafter: HeadDrafter, key: ContextKey = REQUEST) -> list[Draft]:
    drafts = []
    while drafter.has_work():
        drafts.append(drafter.step()[key])
    return drafts


def assert_alike(found: Draft, expected: Draft) -> None:
    assert (found.position, found.token_ids) == (expected.position, expected.token_ids)
    assert found.parents == expected.parents
    assert found.probs == pytest.approx(expected.probs, rel=1e-3)


def first_guesses(draft: Draft) -> list[int]:
    """Nodes right after the context."""
    return [node for node, parent in enumerate(draft.parents) if parent < 0]


def paths(draft: Draft) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token_id, parent in zip(draft.token_ids, draft.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token_id))
    return found


def expected_length(draft: Draft) -> float:
    """How many guesses come true on average, if the probabilities are right."""
    probs: list[float] = []
    for prob, parent in zip(draft.probs, draft.parents, strict=True):
        probs.append(prob * (probs[parent] if parent >= 0 else 1.0))
    return sum(probs)


def path_prob(
    head: DraftHead, tokens: list[int], known: HiddenStates, path: tuple[int, ...]
) -> float:
    """Probability of the last of some guesses after the context, run one by one."""
    start = len(tokens) - len(known)
    positions = list(range(start, len(tokens)))
    rows = head.project(tokens[start:], known.astype(np.float32), positions)
    keys, values = rows.key.transpose(1, 0, 2), rows.value.transpose(1, 0, 2)
    residual, query = rows.residual[-1:], rows.query[-1:]
    for position, token_id in enumerate(path, len(tokens)):
        state, logits = head.finish(residual, attend(query, keys, values))
        weights: Floats = np.exp(logits[0] - logits.max())
        prob = float((weights / weights.sum())[list(head.vocabulary).index(token_id)])
        residual, query, key, value = head.project([token_id], state, [position])
        keys = np.concatenate([keys, key.transpose(1, 0, 2)], axis=1)
        values = np.concatenate([values, value.transpose(1, 0, 2)], axis=1)
    return prob
