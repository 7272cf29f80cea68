"""How one request's tokens are chosen and when it ends."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError

GREEDY_BELOW = 1e-5  # temperatures under this are greedy, as in vLLM


def _number(name: str, value: Any, allowed: str, ok: Callable[[float], bool]) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not ok(value):
        raise RequestError(f"{name} must be {allowed}, got {value!r}")


def _integer(name: str, value: Any, least: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        none = " or None" if optional else ""
        raise RequestError(f"{name} must be an integer of at least {least}{none}, got {value!r}")


def _ids(name: str, values: Any) -> tuple[int, ...]:
    wrong = isinstance(values, str) or not isinstance(values, Sequence)
    if wrong or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in values):
        raise RequestError(f"{name} must be a list of token ids, got {values!r}")
    return tuple(values)


def _words(name: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, str):
        values = (values,)
    if not isinstance(values, Sequence) or any(not isinstance(v, str) or not v for v in values):
        raise RequestError(f"{name} must be a non-empty string or a list of them, got {values!r}")
    return tuple(values)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters, with the names and meanings of vLLM's (and so of the OpenAI API's).

    n: how many completions of the prompt to return.
    temperature: 0 is greedy. top_k: 0 or -1 is off. top_p in (0, 1]. min_p in [0, 1]: least
        probability relative to the most likely token's.
    repetition_penalty: over 1 discourages tokens of the prompt and output (Keskar et al. 2019).
    presence_penalty, frequency_penalty in [-2, 2]: over the output, as the OpenAI API has them.
    logit_bias: token id to a bias in [-100, 100], added to the logits.
    allowed_token_ids: only these may be chosen. bad_words: none of these is ever completed.
    seed: makes the request's tokens a function of the prompt and these parameters alone.
    stop: strings that end the output. stop_token_ids: tokens that do. ignore_eos: the model's
        own end tokens do not. min_tokens: none of the end tokens is chosen before this many.
    max_tokens: most tokens of output; None is as many as the model's length allows.
    logprobs: return the chosen token's log-probability and that many of the likeliest; -1 is the
        whole vocabulary. prompt_logprobs: the same for the prompt.
    detokenize: make text; False leaves it empty (stop strings then cannot be used).

    Raises RequestError, naming the field, for a wrong value or a contradiction.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    seed: int | None = None
    stop: Sequence[str] | str = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _integer("n", self.n, 1)
        _number("temperature", self.temperature, "at least 0", lambda v: v >= 0)
        _number("top_p", self.top_p, "over 0 and at most 1", lambda v: 0 < v <= 1)
        _integer("top_k", self.top_k, -1)
        _number("min_p", self.min_p, "from 0 to 1", lambda v: 0 <= v <= 1)
        _number("repetition_penalty", self.repetition_penalty, "over 0", lambda v: v > 0)
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), "from -2 to 2", lambda v: -2 <= v <= 2)
        _integer("min_tokens", self.min_tokens, 0)
        _integer("max_tokens", self.max_tokens, 1, optional=True)
        _integer("logprobs", self.logprobs, -1, optional=True)
        _integer("prompt_logprobs", self.prompt_logprobs, -1, optional=True)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens",
                     "spaces_between_special_tokens", "include_stop_str_in_output"):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)
                                      or not -(2**63) <= self.seed < 2**64):  # fmt: skip
            raise RequestError(f"seed must be a 64-bit integer or None, got {self.seed!r}")
        set_ = object.__setattr__
        set_(self, "top_k", max(self.top_k, 0))
        set_(self, "stop", _words("stop", self.stop))
        set_(self, "bad_words", _words("bad_words", self.bad_words))
        set_(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            set_(self, "allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids must not be empty: no token could be chosen")
        if self.logit_bias is not None:
            set_(self, "logit_bias", self._bias(self.logit_bias))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})"
            )
        if self.stop and not self.detokenize:
            raise RequestError("stop needs detokenize=True: stop strings are found in the text")
        if self.greedy and self.n > 1:
            raise RequestError(
                f"n must be 1 when temperature is 0 (greedy), got {self.n}: all would be the same"
            )

    @staticmethod
    def _bias(bias: Any) -> dict[int, float]:
        if not isinstance(bias, Mapping):
            raise RequestError(f"logit_bias must map token ids to numbers, got {bias!r}")
        clean = {}
        for token, value in bias.items():
            try:
                token = int(token)  # JSON's keys are strings
            except (TypeError, ValueError):
                token = -1
            if token < 0:
                raise RequestError(f"logit_bias must have token ids as keys, got {bias!r}")
            _number(f"logit_bias[{token}]", value, "from -100 to 100", lambda v: -100 <= v <= 100)
            clean[token] = float(value)
        return clean

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises RequestError if a token id in these parameters is not below ``vocab_size``."""
        named = {
            "logit_bias": self.logit_bias or (),
            "allowed_token_ids": self.allowed_token_ids or (),
            "stop_token_ids": self.stop_token_ids,
        }
        for name, ids in named.items():
            if wrong := [i for i in ids if i >= vocab_size]:
                raise RequestError(
                    f"{name} has token id {wrong[0]}; the vocabulary ends at {vocab_size - 1}"
                )
            if len(ids) > vocab_size:
                raise RequestError(
                    f"{name} has {len(ids)} token ids; the vocabulary has {vocab_size}"
                )
