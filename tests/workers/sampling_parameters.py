"""Every sampling parameter, by itself and at random next to others, with drafts and without.

    python -m tests.workers.sampling_parameters --combinations 2000 --seed 1

asks an engine of the tiny model for answers under random combinations of parameters, many in a
batch, first without drafts and then with drafts of which some are wrong. The exit code is 1 if any
answer differs in a token, a log probability or its end.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.workers.drafted_engine import Answer, Call, Ran, Setting, run_calls, tiny_config
from tests.workers.engine_process import EngineProcesses
from tests.workers.planned_engine import write_tokenizer
from tests.workers.tiny_models import write_checkpoint

THINK_START, THINK_END = 290, 291
NUM_TOKENS = 24
REASONING = {
    "reasoning_config": {
        "reasoning_start_str": f"<{THINK_START}>",
        "reasoning_end_str": f"<{THINK_END}>",
    }
}
CONFIG = tiny_config(max_num_seqs=128, num_blocks=500, extra_args=REASONING)
BATCH = 48
RUNS_PER_ENGINE = 34
"""Few enough to end within `CALL_TIMEOUT_S` on a busy machine."""
SEEDED = {"temperature": 0.8, "seed": 7}

Params = dict[str, Any]


def make_prompts(draw: random.Random, num: int) -> list[list[int]]:
    """Prompts that end in the middle of thinking, for those who count that."""
    return [
        [
            *(draw.randrange(3, THINK_START) for _ in range(draw.randrange(10, 60))),
            THINK_START,
            *(draw.randrange(3, THINK_START) for _ in range(4)),
        ]
        for _ in range(num)
    ]


def choices(answer: Sequence[int]) -> dict[str, list[Params]]:
    """Values of each kind of parameter under which an answer is another than `answer`.

    That is what the model says without parameters.
    """
    natural = max(place for place in range(16) if answer.index(answer[place]) == place) + 1
    stop = {"stop_token_ids": [answer[natural - 1]]}
    return {
        "logprobs": [{"logprobs": 0}, {"logprobs": 5}, {"logprobs": -1}],
        "flat_logprobs": [{"logprobs": 2, "flat_logprobs": True}],
        "logprob_token_ids": [
            {"logprob_token_ids": [5, 9, 200]},
            {"logprob_token_ids": [5]},
            {"logprob_token_ids": [9, answer[0], 7, 8], "logprobs": 4},
            {"logprob_token_ids": [5, 9, 200], "max_tokens": 1},
        ],
        "prompt_logprobs": [
            {"prompt_logprobs": 0},
            {"prompt_logprobs": 3},
            {"prompt_logprobs": -1},
        ],
        "max_tokens": [{"max_tokens": num} for num in (1, 2, 5, 9)],
        "stop_token_ids": [stop, {"stop_token_ids": [*answer[20:22], 4]}],
        "min_tokens": [stop | {"min_tokens": max(natural + offset, 1)} for offset in range(-4, 4)],
        "eos": [
            {"ignore_eos": False, "eos_token_id": answer[natural - 1]},
            {"ignore_eos": False, "eos_token_id": answer[natural - 1], "min_tokens": natural + 2},
        ],
        "bad_words": [
            {"bad_token_ids": [[answer[3]]]},
            {"bad_token_ids": [answer[6:8], answer[11:14], [answer[17]]]},
        ],
        "logit_bias": [
            {"logit_bias": {answer[4]: -100.0}},
            {"logit_bias": {answer[4]: 2.5, answer[9]: -3.0, 17: 4.0}},
        ],
        "allowed_token_ids": [
            {"allowed_token_ids": list(range(20, 90))},
            {"allowed_token_ids": [*answer[:6], *range(100, 140)]},
        ],
        "penalties": [
            {"repetition_penalty": 1.4},
            {"presence_penalty": 1.5},
            {"frequency_penalty": 0.7},
            {"presence_penalty": -1.0, "frequency_penalty": 0.4, "repetition_penalty": 0.8},
        ],
        "regex": [
            {"regex": "[a-f]{6}(gh|xy){3}", "ignore_eos": False},
            {"regex": "[a-z]{4,30}", "ignore_eos": False, "min_tokens": 8},
        ],
        "thinking_token_budget": [{"thinking_token_budget": num} for num in (0, 5, 9, 14, 60)],
        "repetition_detection": [
            {"repetition_detection": {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 2}}
        ],
        "extra_args": [{"extra_args": {"mine": 1}}],
        "seed": [SEEDED, SEEDED | {"seed": 8}, {"seed": 9}],
        "top_k": [SEEDED | {"top_k": 3}],
        "top_p": [SEEDED | {"top_p": 0.7}],
        "min_p": [SEEDED | {"min_p": 0.2}],
    }


NARROWING = {"bad_words", "logit_bias", "allowed_token_ids", "eos", "thinking_token_budget"}
"""What could leave a grammar no token at all."""


def one_by_one(answer: Sequence[int]) -> dict[str, Params]:
    """Each value of each parameter by itself, greedily and at random, under a name."""
    plain = {
        f"{kind}-{index}": params
        for kind, values in choices(answer).items()
        for index, params in enumerate(values)
    }
    return plain | {
        f"random-{name}": SEEDED | params
        for name, params in plain.items()
        if "temperature" not in params
    }


def at_random(draw: random.Random, answer: Sequence[int]) -> Params:
    """A combination of parameters that a caller may ask for."""
    by_kind = choices(answer)
    kinds = draw.sample(list(by_kind), draw.randrange(1, 7))
    if "regex" in kinds:
        kinds = [kind for kind in kinds if kind not in NARROWING]
    if "logprob_token_ids" in kinds:
        kinds = [kind for kind in kinds if kind not in ("logprobs", "flat_logprobs")]
    params: Params = {}
    for kind in kinds:
        params |= draw.choice(by_kind[kind])
    if params.get("min_tokens", 0) > params.get("max_tokens", NUM_TOKENS):
        del params["min_tokens"]
    if "temperature" in params:
        params["seed"] = draw.randrange(1000)
    return params


def differences(names: Sequence[str], ours: Sequence[Answer], theirs: Sequence[Answer]) -> str:
    """A line for each answer that is not the same, with what is not."""
    return "\n".join(
        f"{name}: {field} {getattr(one, field)} != {getattr(other, field)}"[:500]
        for name, one, other in zip(names, ours, theirs, strict=True)
        for field in ("tokens", "end", "logprobs", "prompt_logprobs")
        if getattr(one, field) != getattr(other, field)
    )


class Comparison:
    """Answers to the same calls without drafts and with drafts, of engines of the tiny model."""

    def __init__(self, processes: EngineProcesses, folder: Path) -> None:
        self._processes = processes
        self._folder = str(folder)

    def answers(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """What the model says without any parameter."""
        [ran] = self._run(([Call(prompt) for prompt in prompts], Setting()))
        return ran.tokens

    def run(self, *batches: Sequence[Call]) -> list[tuple[Ran, Ran]]:
        """What came of each batch without drafts, and with drafts of which a third are wrong."""
        plain = self._run(*((calls, Setting()) for calls in batches))
        drafted = self._run(
            *(
                (calls, Setting(ran.tokens, error_rate=0.3, is_trusted=True))
                for calls, ran in zip(batches, plain, strict=True)
            )
        )
        return list(zip(plain, drafted, strict=True))

    def _run(self, *runs: tuple[Sequence[Call], Setting]) -> list[Ran]:
        ran: list[Ran] = []
        for begin in range(0, len(runs), RUNS_PER_ENGINE):
            some = runs[begin : begin + RUNS_PER_ENGINE]
            ran += self._processes.call(run_calls, self._folder, CONFIG, *some)
        return ran


def random_batches(comparison: Comparison, draw: random.Random, num_calls: int) -> list[list[Call]]:
    """Batches of calls with random combinations of parameters."""
    prompts = make_prompts(draw, 8)
    answers = comparison.answers(prompts)
    calls = []
    for _ in range(num_calls):
        index = draw.randrange(len(prompts))
        calls.append(Call(prompts[index], at_random(draw, answers[index])))
    return [calls[begin : begin + BATCH] for begin in range(0, num_calls, BATCH)]


def main() -> None:
    """Compare random combinations."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--combinations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    processes = EngineProcesses()
    num_wrong = num_verified = num_accepted = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama"
        processes.call(write_checkpoint, "llama", path)
        processes.call(write_tokenizer, path)
        comparison = Comparison(processes, path)
        draw = random.Random(options.seed)
        batches = random_batches(comparison, draw, options.combinations)
        for begin in range(0, len(batches), RUNS_PER_ENGINE):
            of_engine = batches[begin : begin + RUNS_PER_ENGINE]
            for calls, (plain, drafted) in zip(of_engine, comparison.run(*of_engine), strict=True):
                names = [str(call.params) for call in calls]
                if wrong := differences(names, drafted.answers, plain.answers):
                    print(wrong)
                    num_wrong += 1
                assert drafted.counts is not None
                num_verified += drafted.counts.verified
                num_accepted += drafted.counts.accepted
    processes.close()
    print(
        f"{options.combinations} combinations, {num_wrong} batches with differences; "
        f"{num_accepted} of {num_verified} drafts accepted"
    )
    raise SystemExit(bool(num_wrong))


if __name__ == "__main__":
    main()
