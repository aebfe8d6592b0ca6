"""Grammars are compiled in a process of their own, within bounds, as long as somebody waits."""

import asyncio
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from tests.workers.byte_grammars import TOKENIZER, matches
from workers.config import GrammarConfig, WorkerConfig
from workers.engine.vllm_grammars import GrammarCompiler
from workers.errors import GrammarRefused

ENDLESS = "(abc|def)?" * 3000
"""Regex that takes minutes to compile."""

MakeCompiler = Callable[..., GrammarCompiler]


@pytest.fixture
def make_compiler() -> Iterator[MakeCompiler]:
    made: list[GrammarCompiler] = []

    def make(**bounds: Any) -> GrammarCompiler:
        made.append(GrammarCompiler(TOKENIZER, WorkerConfig(grammars=GrammarConfig(**bounds))))
        return made[-1]

    yield make
    for compiler in made:
        compiler.close()
    asyncio.run(num_forks(0))


def regex(pattern: str) -> bytes:
    return pickle.dumps(("compile_regex", (pattern,), {}))


def descendants() -> list[psutil.Process]:
    """The process that forks, and its forks."""
    return [
        below
        for child in psutil.Process().children()  # other tests leave some too
        if "vllm_grammar_process" in str(child.cmdline())
        for below in (child, *child.children())
    ]


async def num_forks(wanted: int) -> None:
    """Wait until so many processes are below this one."""
    while len(descendants()) != wanted:
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("bounds", "key"),
    [
        ({"max_compile_s": 0.3}, "more than 0.3 s (worker.grammars.max_compile_s)"),
        ({"max_compile_mib": 1}, "more than 1 MiB (worker.grammars.max_compile_mib)"),
    ],
)
def test_a_grammar_beyond_a_bound_is_refused_and_leaves_nothing(
    make_compiler: MakeCompiler, bounds: dict[str, Any], key: str
) -> None:
    compiler = make_compiler(**bounds)

    with pytest.raises(GrammarRefused) as refused:
        compiler.compile_regex(ENDLESS)

    assert key in str(refused.value)
    assert len(descendants()) == 1  # the process that forks
    assert matches(compiler.compile_regex("ab"), "ab")


def test_a_compilation_ends_when_the_last_that_waits_for_it_leaves(
    make_compiler: MakeCompiler,
) -> None:
    compiler = make_compiler()

    async def leave() -> None:
        waiting = [asyncio.create_task(compiler.prepare(regex(ENDLESS))) for _ in range(2)]
        await num_forks(2)
        waiting[0].cancel()
        await compiler.prepare(regex("ab"))  # meanwhile others are served
        assert len(descendants()) == 2
        waiting[1].cancel()
        await num_forks(1)

    asyncio.run(leave())


def test_compilations_run_on_no_more_cores_than_the_worker_has(
    make_compiler: MakeCompiler,
) -> None:
    compiler = make_compiler()

    async def watch() -> None:
        waiting = [
            asyncio.create_task(compiler.prepare(regex(ENDLESS + "x" * index)))
            for index in range(3)
        ]
        await num_forks(4)
        stopped = 0
        while stopped != 2:  # of three, at a time
            states = [child.status() for child in descendants()]
            stopped = states.count(psutil.STATUS_STOPPED)
            assert all(child.num_threads() == 1 for child in descendants()[1:])
            await asyncio.sleep(0.05)
        for task in waiting:
            task.cancel()
        await num_forks(1)

    asyncio.run(watch())


def test_a_process_that_ends_is_replaced(make_compiler: MakeCompiler) -> None:
    compiler = make_compiler()

    async def lose() -> None:
        waiting = asyncio.create_task(compiler.prepare(regex(ENDLESS)))
        await num_forks(2)
        os.kill(descendants()[0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="process that compiles grammars has ended"):
            await waiting
        await num_forks(0)
        await compiler.prepare(regex("ab"))

    asyncio.run(lose())


def test_a_closed_compiler_leaves_no_process(make_compiler: MakeCompiler) -> None:
    compiler = make_compiler()
    compiler.compile_regex("ab")

    compiler.close()

    asyncio.run(num_forks(0))
