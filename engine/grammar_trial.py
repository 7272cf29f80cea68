"""A grammar is compiled and tried in a process of its own before an engine sees it.

Hostile grammars, and some that only look harmless, make llguidance take minutes or gigabytes, or
overflow the stack, which ends its process. The trial ends by the same means at bounds that leave
the engine room: what has passed it may be compiled anywhere.
"""

import asyncio
import contextlib
import functools
import json
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np

from engine.children import child_environment
from engine.errors import CheckpointError, RequestError
from engine.grammar import Grammar
from engine.matcher import Grammars, Matcher, grammars_of
from engine.structured_outputs import StructuredOutputsParams

MOST_SECONDS = 0.3  # of a CPU's time, for all of a trial
MOST_STEP_SECONDS = 0.03  # of a CPU's time, for a token
MOST_BYTES = 256 << 20
STACK_BYTES = 1 << 20  # other threads have at least twice as much
WALKS, STEPS = 2, 32
MOST_KEPT = 1024  # verdicts


class GrammarTrial:
    """Tries the grammars for one tokenizer and a model of ``vocab_size`` tokens, for any number of
    threads. Its process starts with the first one and ends with this one."""

    def __init__(self, tokenizer: str, revision: str | None, vocab_size: int) -> None:
        self._about = tokenizer, revision or "", str(vocab_size)
        self._process: subprocess.Popen[bytes] | None = None
        self._verdicts: OrderedDict[Grammar, str] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "manta-grammar-trial")

    def check(self, params: StructuredOutputsParams) -> None:
        """Raises RequestError, naming the field, for a grammar that is wrong, that could not be
        enforced whole, or that is too large or too slow."""
        grammar = Grammar.of(params)
        with self._lock:
            verdict = self._verdicts.get(grammar)
            if verdict is None:
                verdict = self._verdicts[grammar] = self._try(grammar)
            self._verdicts.move_to_end(grammar)
            if len(self._verdicts) > MOST_KEPT:
                self._verdicts.popitem(last=False)
        if verdict:
            raise RequestError(verdict)

    async def checked(self, params: StructuredOutputsParams) -> None:
        """``check``, for which no other task has to wait."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self.check, params)

    def _try(self, grammar: Grammar) -> str:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(asdict(grammar)).encode() + b"\n")
            process.stdin.flush()
        if answer := process.stdout.readline():
            verdict: str = json.loads(answer)
            return verdict
        process.stdin.close()
        process.stdout.close()
        if (code := process.wait()) >= 0:
            raise RequestError(f"structured_outputs: no grammar can be tried (exit code {code})")
        why = "it is too deep, or takes too much memory"
        if code == -signal.SIGPROF:
            why = f"compiling and trying it takes more than {MOST_SECONDS} s"
        return f"structured_outputs.{grammar.kind} is too complex: {why}"

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "engine.grammar_trial", *self._about],
            env=child_environment(TOKENIZERS_PARALLELISM="false"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not its business; it ends when its input does
        )


@functools.lru_cache(maxsize=4)
def trial_of(tokenizer: str, revision: str | None, vocab_size: int) -> GrammarTrial:
    """The process's only one for a checkpoint's tokenizer."""
    return GrammarTrial(tokenizer, revision, vocab_size)


# ---- in the process of its own ----


def _verdict(grammars: Grammars, grammar: Grammar) -> str:
    """What is wrong with a grammar; "" is nothing."""
    try:
        matcher = grammars.matcher(grammar)
        for walk in range(WALKS):
            why = _walk(grammars, Matcher(matcher.inner.deep_copy()), np.random.default_rng(walk))
            if why:
                raise RequestError(f"structured_outputs.{grammar.kind} is too complex: {why}")
    except RequestError as error:
        return str(error)
    return ""


def _walk(grammars: Grammars, matcher: Matcher, random: np.random.Generator) -> str:
    """What goes wrong in an output of random tokens; "" is nothing."""
    for step in range(STEPS):
        begun = time.thread_time()
        mask = grammars.masks([matcher])
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        tokens = allowed[allowed < grammars.vocab_size]
        if matcher.error:
            return matcher.error
        if not len(allowed):
            return f"no token of the model could follow the first {step}"
        if not len(tokens):
            break
        matcher.consume([int(random.choice(tokens))])
        if time.thread_time() - begun > MOST_STEP_SECONDS:
            return f"a token takes more than {MOST_STEP_SECONDS} s"
    return matcher.error


def _serve(tokenizer: str, revision: str, vocab_size: str) -> None:
    try:
        grammars = grammars_of(tokenizer, revision or None, int(vocab_size))
        _verdict(grammars, Grammar("json_object", '{"type": "object"}'))  # all is loaded then
    except CheckpointError as error:
        raise SystemExit(str(error)) from None
    with contextlib.suppress(FileNotFoundError):  # there is none but on Linux
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MOST_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    for line in sys.stdin.buffer:
        grammar, found = Grammar(**json.loads(line)), [""]

        def judge(grammar: Grammar = grammar, found: list[str] = found) -> None:
            found[0] = _verdict(grammars, grammar)

        thread = threading.Thread(target=judge)
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)  # the signal's default is to end
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(found[0]).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
