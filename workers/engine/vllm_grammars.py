"""Grammars of structured output and tools, compiled apart from the engine and within bounds."""

import asyncio
import contextlib
import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe
from typing import Any

import vllm.envs
import xgrammar
from vllm.config import VllmConfig
from vllm.v1.request import Request as VllmRequest
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

from workers.config import WorkerConfig
from workers.engine import vllm_grammar_process
from workers.engine_request import Grammar
from workers.errors import GrammarRefused

MIB = 1 << 20


@dataclass(slots=True)
class _Job:
    """A compilation that requests wait for."""

    number: int
    call: bytes
    num_waiting: int = 0
    done: "Future[xgrammar.CompiledGrammar]" = field(default_factory=Future)


class _Process:
    """A `GrammarProcess`, which starts in the background."""

    def __init__(self, hello: object) -> None:
        self._connection, theirs = Pipe()
        self._popen = subprocess.Popen(
            [sys.executable, "-P", vllm_grammar_process.__file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        # It takes seconds until it reads.
        self._sending = ThreadPoolExecutor(1, thread_name_prefix="grammar calls")
        self.send(hello)

    def send(self, message: object) -> None:
        """Send a message; if the process has ended, `answers` says so."""
        with contextlib.suppress(RuntimeError):  # it has just ended, as those who wait will learn
            self._sending.submit(self._connection.send, message)

    def answers(self) -> Iterator[tuple[int, str | None, str | None]]:
        """The answers until the process ends."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                yield self._connection.recv()
        self._sending.shutdown()
        self._connection.close()
        self._popen.wait()


class GrammarCompiler:
    """Compiles in a `GrammarProcess`; has the methods of xgrammar's compiler.

    What was compiled is kept, as much as `VLLM_XGRAMMAR_CACHE_MB` allows.
    """

    def __init__(self, tokenizer: xgrammar.TokenizerInfo, config: WorkerConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._own = xgrammar.GrammarCompiler(tokenizer, max_threads=1, cache_enabled=False)
        self._kept: dict[bytes, xgrammar.CompiledGrammar] = {}
        """Last used ones at the end."""
        self._lock = threading.Lock()
        self._jobs: dict[bytes, _Job] = {}
        self._num_jobs = 0
        self._process: _Process | None = None

    def __getattr__(self, method: str) -> Callable[..., "xgrammar.CompiledGrammar"]:
        return lambda *args, **kwargs: self._compile(pickle.dumps((method, args, kwargs)))

    async def prepare(self, call: bytes) -> None:
        """Compile what `call` asks for; GrammarRefused. Cancelled, it ends the compilation."""
        job = self._join(call)
        try:
            await asyncio.shield(asyncio.wrap_future(job.done))
        finally:
            self._leave(job)

    def start(self) -> None:
        """Start the process, which takes seconds, before there is something to compile."""
        with self._lock:
            self._started()

    def close(self) -> None:
        """End the process and what it compiles."""
        with self._lock:
            if self._process:
                self._process.send(None)

    def _compile(self, call: bytes) -> "xgrammar.CompiledGrammar":
        job = self._join(call)
        try:
            return job.done.result()
        finally:
            self._leave(job)

    def _join(self, call: bytes) -> _Job:
        with self._lock:
            job = self._jobs.get(call)
            if job is None:
                job = _Job(self._num_jobs, call)
                self._num_jobs += 1
                if (kept := self._kept.pop(call, None)) is not None:
                    self._kept[call] = kept
                    job.done.set_result(kept)
                    return job
                self._started().send((job.number, call))
                self._jobs[call] = job
            job.num_waiting += 1
            return job

    def _leave(self, job: _Job) -> None:
        with self._lock:
            job.num_waiting -= 1
            if not job.num_waiting and self._jobs.get(job.call) is job:
                del self._jobs[job.call]
                self._started().send((job.number, None))

    def _started(self) -> _Process:
        if self._process is None:
            bounds = self._config.grammars
            memory = (bounds.max_compile_mib * MIB, bounds.max_compiled_mib * MIB)
            hello = (
                self._tokenizer.serialize_json(),
                (bounds.max_compile_s, *memory),
                self._config.cpus,
            )
            self._process = _Process(hello)
            threading.Thread(
                target=self._receive, args=(self._process,), name="grammars", daemon=True
            ).start()
        return self._process

    def _receive(self, process: _Process) -> None:
        for number, reason, compiled in process.answers():
            with self._lock:
                job = next((job for job in self._jobs.values() if job.number == number), None)
            if job is not None:  # else its requests have left
                self._finish(job, reason, compiled)
        with self._lock:
            lost, self._jobs, self._process = self._jobs, {}, None
        for job in lost.values():
            job.done.set_exception(RuntimeError("the process that compiles grammars has ended"))

    def _finish(self, job: _Job, reason: str | None, text: str | None) -> None:
        result: xgrammar.CompiledGrammar | Exception
        try:
            result = GrammarRefused(reason) if reason is not None else self._load(job.call, text)
        except Exception as error:  # any kind: nothing else would answer those that wait
            result = error
        with self._lock:
            if self._jobs.get(job.call) is job:
                del self._jobs[job.call]
            if not isinstance(result, Exception):
                self._keep(job.call, result)
        if isinstance(result, Exception):
            job.done.set_exception(result)
        else:
            job.done.set_result(result)

    def _load(self, call: bytes, text: str | None) -> "xgrammar.CompiledGrammar":
        if text is not None:
            return xgrammar.CompiledGrammar.deserialize_json(text, self._tokenizer)
        method, args, kwargs = pickle.loads(call)
        compiled: xgrammar.CompiledGrammar = getattr(self._own, method)(*args, **kwargs)
        return compiled

    def _keep(self, call: bytes, compiled: "xgrammar.CompiledGrammar") -> None:
        self._kept[call] = compiled
        num_bytes = sum(one.memory_size_bytes for one in self._kept.values())
        while num_bytes > vllm.envs.VLLM_XGRAMMAR_CACHE_MB * MIB:
            num_bytes -= self._kept.pop(next(iter(self._kept))).memory_size_bytes


class _Call(Exception):
    """What vLLM would call xgrammar's compiler with."""


class _Recorder:
    def __getattr__(self, method: str) -> Any:
        def record(*args: Any, **kwargs: Any) -> None:
            raise _Call(pickle.dumps((method, args, kwargs)))

        return record


class BoundedXgrammar(XgrammarBackend):
    """vLLM's backend with a `GrammarCompiler`."""

    compiler: Any

    def bound(self, config: WorkerConfig) -> GrammarCompiler:
        """Replace the compiler."""
        tokenizer = self.compiler.compile_grammar('root ::= ""').tokenizer_info
        self.compiler = compiler = GrammarCompiler(tokenizer, config)
        return compiler

    def call_for(self, grammar: Grammar) -> bytes:
        """The call with which vLLM compiles `grammar`; GrammarRefused if it cannot be read."""
        recording = copy.copy(self)
        recording.compiler = _Recorder()
        try:
            recording.compile_grammar(StructuredOutputOptions[grammar.kind], grammar.spec)
        except _Call as call:
            return bytes(call.args[0])
        except (ValueError, LookupError, TypeError) as error:
            raise GrammarRefused(f"it cannot be read: {error!r}") from None
        raise AssertionError("vLLM compiled a grammar without its compiler")

    def destroy(self) -> None:
        """End the process that compiles."""
        self.compiler.close()


class BoundedGrammars(StructuredOutputManager):
    """vLLM's grammars of all requests, with one backend whatever comes first."""

    def __init__(self, vllm_config: VllmConfig, config: WorkerConfig) -> None:
        super().__init__(vllm_config)
        self.compiler: GrammarCompiler | None = None
        """None: there is no tokenizer, and so there are no grammars."""
        if not vllm_config.model_config.skip_tokenizer_init:
            vocab_size = vllm_config.model_config.get_vocab_size()
            self._xgrammar = BoundedXgrammar(vllm_config, self.tokenizer, vocab_size)
            self.compiler = self._xgrammar.bound(config)
            self.backend = self._xgrammar
        self._dead_ends: set[str] = set()

    def warm_up(self) -> None:
        """Start what compiles, which takes seconds, in the background."""
        if self.compiler is not None:
            self.compiler.start()

    async def prepare(self, grammar: Grammar) -> None:
        """Compile a grammar, which its requests then find; GrammarRefused."""
        if self.compiler is not None:
            try:
                await self.compiler.prepare(self._xgrammar.call_for(grammar))
            except GrammarRefused as error:
                kind = grammar.kind.lower()
                message = f"The {kind} of structured output is refused: {error}"
                raise GrammarRefused(message) from None

    def accept_tokens(self, request: VllmRequest, new_token_ids: list[int]) -> bool:
        """Advance a grammar; False if it does not allow the tokens, which ends the request."""
        accepted = super().accept_tokens(request, new_token_ids)
        if not accepted:
            self._dead_ends.add(request.request_id)
        return accepted

    def dead_end(self, request_id: str) -> GrammarRefused | None:
        """Why a request that has just ended could not go on, if its grammar is the reason."""
        if request_id not in self._dead_ends:
            return None
        self._dead_ends.remove(request_id)
        return GrammarRefused(
            "The grammar of structured output left no token to go on with: what it allowed is "
            "forbidden by the request's bad_words, allowed_token_ids, min_tokens or logit_bias, or "
            "no text matches it."
        )
