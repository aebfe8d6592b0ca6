"""The process that compiles grammars: apart from the engine, bounded, and stopped at any time.

A compilation can take minutes and gigabytes, and a thread cannot be stopped. So each one runs in a
fork of this process, which ends with it. The engine starts this file by its path.
"""

import contextlib
import ctypes
import gc
import os
import pickle
import re
import resource
import signal
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait

import xgrammar

TURN_S = 0.05
"""Time between two looks at what the compilations have used."""
POLITE_AFTER_S = 0.2
"""Processor time after which a compilation lets everyone else go first: next to a busy engine on
its only core it then gets a tenth of the time. Niceness would not do: Ray gives much to workers."""
SMALL_S = 0.1
"""Processor time up to which the engine repeats a compilation, as copying it would take longer."""
MAX_FORKS = 4
"""Compilations begun at a time; others wait."""
SOURCE = re.compile(r"\[[\d:]+\] \S+\.cc:\d+: (Warning: )?")
"""What xgrammar puts before its messages."""
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one compilation may take."""

    cpu_s: float
    memory_bytes: int
    compiled_bytes: int


Answer = tuple[str | None, str | None]
"""Why a grammar is refused, or None and the compiled grammar in xgrammar's JSON; none of both: it
is so quick that the engine can compile it."""


@dataclass(frozen=True, slots=True)
class _Fork:
    job: int
    pid: int
    answer: Connection

    def cpu_s(self) -> float:
        with open(f"/proc/{self.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.answer.close()


class GrammarProcess:
    """Takes pickled calls of xgrammar's compiler from `engine`; answers each by an `Answer`."""

    def __init__(
        self, engine: Connection, tokenizer: xgrammar.TokenizerInfo, bounds: Bounds, cpus: int
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._bounds = bounds
        self._cpus = cpus
        self._queue: deque[tuple[int, bytes]] = deque()
        self._forks: dict[int, _Fork] = {}

    def run(self) -> None:
        """Compile until the engine is gone."""
        with contextlib.suppress(EOFError, ConnectionError):  # also after a None
            while True:
                forks = list(self._forks.values())
                ready = wait([self._engine, *(f.answer for f in forks)], TURN_S if forks else None)
                if self._engine in ready:
                    if (message := self._engine.recv()) is None:
                        raise EOFError
                    self._take(*message)
                for fork in forks:
                    if fork.answer in ready and fork.job in self._forks:
                        self._end(fork.job, self._answer_of(fork))
                self._share_out()
        for fork in self._forks.values():
            fork.end()

    def _take(self, job: int, call: bytes | None) -> None:
        """Take a call, or without one the end of a job that nobody waits for any longer."""
        if call is not None:
            self._queue.append((job, call))
        elif fork := self._forks.pop(job, None):
            fork.end()
        else:
            self._queue = deque(item for item in self._queue if item[0] != job)

    def _share_out(self) -> None:
        """Begin compilations, end those that took too long, and let those run that had least."""
        while self._queue and len(self._forks) < MAX_FORKS:
            self._begin(*self._queue.popleft())
        used_s = {job: fork.cpu_s() for job, fork in self._forks.items()}
        for turn, job in enumerate(sorted(used_s, key=used_s.__getitem__)):
            pid = self._forks[job].pid
            if used_s[job] > self._bounds.cpu_s:
                limit = f"{self._bounds.cpu_s:g} s (worker.grammars.max_compile_s)"
                self._end(job, (f"compiling it takes more than {limit}", None))
                continue
            if used_s[job] > POLITE_AFTER_S:
                os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
            os.kill(pid, signal.SIGCONT if turn < self._cpus else signal.SIGSTOP)

    def _begin(self, job: int, call: bytes) -> None:
        answer, fork_end = Pipe(duplex=False)
        us = os.getpid()
        pid = os.fork()
        if pid:
            fork_end.close()
            self._forks[job] = _Fork(job, pid, answer)
            return
        try:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != us:
                return
            self._engine.close()
            fork_end.send(self._compiled(call))
        finally:
            os.kill(os.getpid(), signal.SIGKILL)  # nothing of the fork's origin is to end

    def _answer_of(self, fork: _Fork) -> Answer:
        os.kill(fork.pid, signal.SIGCONT)  # it may have been stopped in the middle of its answer
        try:
            answer: Answer = fork.answer.recv()
        except EOFError:  # xgrammar ends a process that gets no memory
            return self._too_large(), None
        return answer

    def _end(self, job: int, answer: Answer) -> None:
        self._forks.pop(job).end()
        self._engine.send((job, *answer))

    def _too_large(self) -> str:
        mib = self._bounds.memory_bytes >> 20
        return f"compiling it takes more than {mib} MiB (worker.grammars.max_compile_mib)"

    # What follows runs in a fork.

    def _compiled(self, call: bytes) -> Answer:
        with open("/proc/self/statm") as statm:
            own_bytes = int(statm.read().split()[0]) * resource.getpagesize()
        limit = own_bytes + self._bounds.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with tempfile.TemporaryFile() as messages:
            os.dup2(messages.fileno(), sys.stderr.fileno())
            try:
                compiled = self._compile(call)
            except MemoryError:
                return self._too_large(), None
            except Exception as error:  # of many kinds, for what is wrong with the grammar
                if "bad_alloc" in str(error):
                    return self._too_large(), None
                return SOURCE.sub("", str(error)).strip(), None
            # xgrammar says there what it leaves out, and goes on.
            messages.seek(0)
            left_out = SOURCE.sub("", messages.read().decode(errors="replace")).splitlines()
        return (left_out[0], None) if left_out else (None, compiled)

    def _compile(self, call: bytes) -> str | None:
        method, args, kwargs = pickle.loads(call)
        compiler = xgrammar.GrammarCompiler(self._tokenizer, max_threads=1, cache_enabled=False)
        began_s = time.process_time()
        compiled = getattr(compiler, method)(*args, **kwargs)
        took_s = time.process_time() - began_s
        mask = xgrammar.allocate_token_bitmask(1, self._tokenizer.vocab_size)
        xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(mask)
        if not mask.any():
            raise ValueError("no text matches it")
        if took_s < SMALL_S:
            return None
        text = str(compiled.serialize_json())
        if len(text) > self._bounds.compiled_bytes:
            mib = self._bounds.compiled_bytes >> 20
            raise ValueError(
                f"it compiles to more than {mib} MiB (worker.grammars.max_compiled_mib)"
            )
        return text


def main() -> None:
    """Serve the engine at the other end of the connection whose number is the argument."""
    engine = Connection(int(sys.argv[1]))
    tokenizer, bounds, cpus = engine.recv()
    gc.freeze()  # forks would copy what a collection touches
    info = xgrammar.TokenizerInfo.deserialize_json(tokenizer)
    GrammarProcess(engine, info, Bounds(*bounds), cpus).run()


if __name__ == "__main__":
    main()
