"""How one request's tokens are chosen and when it ends."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from engine.errors import RequestError
from engine.structured_outputs import StructuredOutputsParams
from engine.values import asks_for_nothing, real, whole

T = TypeVar("T")

GREEDY_BELOW = 1e-5  # temperatures under this are greedy, as in vLLM
MOST_BIAS = 100.0  # OpenAI's bound: more than this decides no more, as logits differ by less

# Sampling parameters of vLLM's that manta has not, with the values at which they ask for nothing
# (None and what is empty always do).
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "early_stopping": (False,),
    "extra_args": (),
    "flat_logprobs": (False,),
    "guided_decoding": (),
    "length_penalty": (1.0,),
    "logits_processors": (),
    "logprob_token_ids": (),
    "prompt_logprob_start": (),
    "prompt_logprob_token_ids": (),
    "repetition_detection": (),
    "routed_experts_prompt_start": (0,),
    "skip_clone": (False, True),
    "skip_reading_prefix_cache": (False,),
    "stream_interval": (1,),
    "trace_decode_token_ids": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}


def _number(name: str, value: Any, allowed: str, ok: Callable[[float], bool]) -> float:
    number = real(value)
    if number is None or not math.isfinite(number) or not ok(number):
        raise RequestError(f"{name} must be {allowed}, got {value!r}")
    return number


def _integer(name: str, value: Any, least: int, *, optional: bool = False) -> int | None:
    if value is None and optional:
        return None
    number = whole(value)
    if number is None or number < least:
        none = " or None" if optional else ""
        raise RequestError(f"{name} must be an integer of at least {least}{none}, got {value!r}")
    return number


def _ids(name: str, values: Any) -> tuple[int, ...]:
    wrong = isinstance(values, str | bytes) or not isinstance(values, Sequence)
    ids = () if wrong else tuple(map(whole, values))
    if wrong or any(i is None or i < 0 for i in ids):
        raise RequestError(f"{name} must be a list of token ids, got {values!r}")
    return cast(tuple[int, ...], ids)


def _words(name: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, str):
        values = (values,)
    if not isinstance(values, Sequence) or any(not isinstance(v, str) or not v for v in values):
        raise RequestError(f"{name} must be a non-empty string or a list of them, got {values!r}")
    return tuple(values)


def _budget(value: Any) -> int | None:
    return None if value == -1 else _integer("thinking_token_budget", value, 0, optional=True)


def _seed(value: Any) -> int | None:
    if value is None or value == -1:  # as in vLLM
        return None
    number = whole(value)
    if number is None or not -(2**63) <= number < 2**64:
        raise RequestError(f"seed must be a 64-bit integer or None, got {value!r}")
    return number


def _bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, got {bias!r}")
    clean = {}
    for token, value in bias.items():
        try:
            token = int(token)  # JSON's keys are strings
        except (TypeError, ValueError, OverflowError):
            token = -1
        if token < 0:
            raise RequestError(f"logit_bias must have token ids as keys, got {bias!r}")
        number = real(value)
        if number is None:
            raise RequestError(f"logit_bias[{token}] must be a number, got {value!r}")
        clean[token] = min(max(number, -MOST_BIAS), MOST_BIAS)
    return clean


def _with_neutral_values(cls: type[T]) -> type[T]:
    """The class, made to accept the parameters of ``NEUTRAL`` where they ask for nothing."""
    make = cls.__init__

    @functools.wraps(make)
    def init(self: T, **values: Any) -> None:
        for name in [name for name in values if name in NEUTRAL]:
            if not asks_for_nothing(value := values.pop(name), NEUTRAL[name]):
                raise RequestError(f"{name} is not supported, got {value!r}")
        make(self, **values)

    setattr(cls, "__init__", init)  # noqa: B010  # mypy lets no method be assigned to
    return cls


@_with_neutral_values
@dataclass(kw_only=True)
class SamplingParams:
    """Sampling parameters, with the names and meanings of vLLM's (and so of the OpenAI API's).

    n: how many completions of the prompt to return.
    temperature: 0 is greedy. top_k: 0 or -1 is off. top_p in (0, 1]. min_p in [0, 1]: least
        probability relative to the most likely token's.
    repetition_penalty: over 1 discourages tokens of the prompt and output (Keskar et al. 2019).
    presence_penalty, frequency_penalty in [-2, 2]: over the output, as the OpenAI API has them.
    logit_bias: token id to what is added to its logit; beyond ±100 it is ±100, which decides alone.
    allowed_token_ids: only these may be chosen. bad_words: none of these is ever completed.
    seed: makes the request's tokens a function of the prompt and these parameters alone; -1 is
        the same as None.
    stop: strings that end the output. stop_token_ids: tokens that do. ignore_eos: the model's
        own end tokens do not. min_tokens: none of the end tokens is chosen before this many.
    max_tokens: most tokens of output; None is as many as the model's length allows.
    logprobs: return the chosen token's log-probability and that many of the likeliest; -1 is the
        whole vocabulary. prompt_logprobs: the same for the prompt.
    detokenize: make text; False leaves it empty (stop strings then cannot be used).
    structured_outputs: what the output must match; it ends where that may end, at an end token.
    thinking_token_budget: most tokens of thinking, after which its end is written for the model;
        0 leaves it no thinking, and -1 is the same as None: no bound.

    Parameters of vLLM's that are none here (``NEUTRAL``) are accepted where they ask for nothing.
    Raises RequestError, naming the field, for a wrong value or a contradiction, when it is made
    and when a parameter is changed.
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
    bad_words: Sequence[str] | str | None = None
    seed: int | None = None
    stop: Sequence[str] | str | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    thinking_token_budget: int | None = None

    def __post_init__(self) -> None:
        clean: dict[str, Any] = {"seed": _seed(self.seed)}
        clean["thinking_token_budget"] = _budget(self.thinking_token_budget)
        for name, least, optional in _INTEGERS:
            clean[name] = _integer(name, getattr(self, name), least, optional=optional)
        for name, allowed, ok in _NUMBERS:
            clean[name] = _number(name, getattr(self, name), allowed, ok)
        for name in _BOOLEANS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, got {getattr(self, name)!r}")
        clean["top_k"] = max(clean["top_k"], 0)
        for name in ("stop", "bad_words"):
            clean[name] = _words(name, () if getattr(self, name) is None else getattr(self, name))
        clean["stop_token_ids"] = _ids("stop_token_ids", self.stop_token_ids or ())
        if self.allowed_token_ids is not None:
            clean["allowed_token_ids"] = _ids("allowed_token_ids", self.allowed_token_ids)
        if self.logit_bias is not None:
            clean["logit_bias"] = _bias(self.logit_bias)
        clean["structured_outputs"] = StructuredOutputsParams.of(self.structured_outputs)
        self.__dict__.update(clean)
        self._check_together()

    def _check_together(self) -> None:
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids must not be empty: no token could be chosen")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})"
            )
        if self.stop and not self.detokenize:
            raise RequestError("stop needs detokenize=True: stop strings are found in the text")
        if self.structured_outputs is not None and self.min_tokens:
            raise RequestError(
                "min_tokens must be 0 with structured_outputs, which say where the output may end;"
                f" got {self.min_tokens}"
            )
        if self.structured_outputs is not None and self.allowed_token_ids is not None:
            raise RequestError(
                "allowed_token_ids must be None with structured_outputs, which say what may come"
            )
        if self.thinking_token_budget is not None and self.allowed_token_ids is not None:
            raise RequestError(
                "allowed_token_ids must be None with thinking_token_budget, which writes the end of"
                " the thinking"
            )
        if self.greedy and self.n > 1:
            raise RequestError(
                f"n must be 1 when temperature is 0 (greedy), got {self.n}: all would be the same"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """Change one parameter, checked as the constructor checks it; a refused value leaves all
        as it was. What runs already is not changed: requests have copies of their own."""
        if len(self.__dict__) < len(self.__dataclass_fields__):  # the constructor sets them
            object.__setattr__(self, name, value)
        elif name in self.__dict__:
            self.__dict__.update(dataclasses.replace(self, **{name: value}).__dict__)
        else:
            raise AttributeError(f"SamplingParams has no {name!r}")

    def clone(self) -> "SamplingParams":
        """A copy that shares nothing with this one."""
        return copy.deepcopy(self)

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
            "stop_token_ids": self.stop_token_ids or (),
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


_INTEGERS = (  # name, least, whether it may be None
    ("n", 1, False),
    ("top_k", -1, False),
    ("min_tokens", 0, False),
    ("max_tokens", 1, True),
    ("logprobs", -1, True),
    ("prompt_logprobs", -1, True),
)
_NUMBERS: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("temperature", "at least 0", lambda v: v >= 0),
    ("top_p", "over 0 and at most 1", lambda v: 0 < v <= 1),
    ("min_p", "from 0 to 1", lambda v: 0 <= v <= 1),
    ("repetition_penalty", "over 0", lambda v: v > 0),
    ("presence_penalty", "from -2 to 2", lambda v: -2 <= v <= 2),
    ("frequency_penalty", "from -2 to 2", lambda v: -2 <= v <= 2),
)
_BOOLEANS = (
    "ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
    "include_stop_str_in_output",
)  # fmt: skip
