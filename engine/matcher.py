"""Grammars at work: which tokens may come next. llguidance does it, by its derivative lexer and
Earley parser (docs of github.com/guidance-ai/llguidance), over a tokenizer's tokens as bytes."""

import functools
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError
from engine.grammar import Grammar
from engine.tokenizer import Tokenizer
from engine.tokenizer_files import FastBackend

if TYPE_CHECKING:
    import llguidance

Masks = NDArray[np.int32]
MOST_KEPT = 64  # compiled grammars
# What a mask or compiling may take (llguidance's units: some 20 items or 14 fuel a µs), and
# memory: 1 to 2 kB for a state.
_LIMITS = {
    "max_items_in_row": 1000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 10_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
}
_EXCERPT = re.compile(r"\n +\d+ \|")
_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")


def _with_end(backend: FastBackend, end: int) -> str:
    """The tokenizer as JSON, with special tokens that no model has up to token ``end``."""
    text = backend.to_json()
    if backend.byte_decoder is None or text is None:
        raise RequestError("this model's tokenizer has tokens that are not bytes of text")
    whole = json.loads(text)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    whole["added_tokens"] += [
        {"id": i, "content": f"<|manta-{i}|>", "special": True, **flags}
        for i in range(backend.size, end + 1)
    ]
    return json.dumps(whole)


class Matcher:
    """How far one output has come in its grammar. Not for several threads at once."""

    def __init__(self, inner: "llguidance.LLMatcher") -> None:
        self.inner = inner

    @property
    def error(self) -> str:
        """Why it can go no further, as for a grammar that turned out too complex; else ""."""
        return _reason(self.inner.get_error())

    @property
    def accepting(self) -> bool:
        """Whether the output may end here."""
        return self.inner.is_accepting()

    def consume(self, tokens: Sequence[int]) -> bool:
        """Take the output's next tokens; False, and an ``error``, if the grammar has none such."""
        return self.inner.consume_tokens(list(tokens))

    def forced_tokens(self) -> list[int]:
        """Tokens of text that must come next, as the tokenizer writes it after the last token; they
        are not consumed. The mask allows the first of them and nothing else (llguidance's
        TokenParser makes it of these); of further ones that is not sure."""
        return self.inner.compute_ff_tokens()


class Grammars:
    """Compiles grammars for one tokenizer and a model of ``vocab_size`` tokens, and keeps the last
    ones. For any number of threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        # That an output may end is a token of its own; which tokens end it each request says.
        self.end = max(vocab_size, tokenizer.backend.size)
        self.tokenizer = tokenizer
        self._kept: OrderedDict[Grammar, Matcher] = OrderedDict()
        self._lock = threading.Lock()

    @functools.cached_property
    def tokens(self) -> "llguidance.LLTokenizer":
        """The tokenizer as llguidance has it. Raises RequestError for one that it cannot have."""
        import llguidance

        backend = self.tokenizer.backend
        if not isinstance(backend, FastBackend):
            raise RequestError("this model's tokenizer is one that transformers runs in Python")
        return llguidance.LLTokenizer(_with_end(backend, self.end), eos_token=self.end)

    @functools.cached_property
    def special(self) -> dict[str, int]:
        """The added tokens that llguidance takes for no text: the special ones, and <such>."""
        backend = self.tokenizer.backend
        ids = {name: backend.token_to_id(name) for name in backend.added_tokens}
        return {n: i for n, i in ids.items() if i is not None and self.tokens.is_special_token(i)}

    @functools.cached_property
    def _executor(self) -> "llguidance.LLExecutor":
        import llguidance

        return llguidance.LLExecutor(num_threads=min(8, os.cpu_count() or 1))

    def matcher(self, grammar: Grammar) -> Matcher:
        """One for the start of an output.

        Raises RequestError for a grammar that is wrong or could not be enforced. One that nobody
        has tried (``engine.grammar_trial``) may take long, or the whole process with it.
        """
        with self._lock:
            kept = self._kept.pop(grammar, None)
        if kept is None:
            kept = self._compile(grammar)
        with self._lock:
            self._kept[grammar] = kept
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
            return Matcher(kept.inner.deep_copy())

    def _compile(self, grammar: Grammar) -> Matcher:
        import llguidance

        try:
            larks = grammar.larks(self.special).items()
            grammars = [{"name": name or None, "lark_grammar": lark} for name, lark in larks]
            text = json.dumps({"grammars": grammars})
            limits = llguidance.LLParserLimits(**_LIMITS, verbose_errors=False)  # type: ignore[arg-type]
            made = Matcher(llguidance.LLMatcher(self.tokens, text, log_level=0, limits=limits))
            if made.error:
                raise RequestError(made.error)
        except RequestError as error:
            raise RequestError(f"structured_outputs.{grammar.kind}: {error}") from None
        return made

    def masks(self, matchers: Sequence[Matcher]) -> Masks:
        """[n, words] int32: bit ``i % 32`` of word ``i // 32`` is 1 where token i may come next,
        and bit ``end`` where the output may end. All 0 for a matcher with an ``error``."""
        words = self.end // 32 + 1
        found = np.zeros((len(matchers), words), np.int32)
        at, size = found.ctypes.data, words * 4
        if len(matchers) == 1:
            matchers[0].inner.unsafe_compute_mask_ptr(at, size)
        elif matchers:
            rows = [(matcher.inner, row) for row, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(rows, at, size, len(rows))
        for row, matcher in enumerate(matchers):
            if matcher.inner.is_error():
                found[row] = 0
        return found


@functools.lru_cache(maxsize=4)
def grammars_of(tokenizer: str, revision: str | None, vocab_size: int) -> Grammars:
    """The process's only ones for a checkpoint's tokenizer: an engine that computes in its own
    process compiles a grammar once. Raises CheckpointError."""
    return Grammars(Tokenizer.load(tokenizer, revision), vocab_size)


def _reason(error: str) -> str:
    first = _PLACE.sub("", _EXCERPT.split(error)[0].replace("<non-verbose/>", ""))
    return " ".join(first.split("Enable 'coerce_one_of'")[0].split())[:400]
