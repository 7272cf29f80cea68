"""Sampling parameters: each wrong value is refused by name, with what is allowed."""

import copy
import dataclasses
import math
import pickle

import msgspec
import numpy as np
import pytest

from engine.errors import RequestError
from engine.sampling_params import NEUTRAL, SamplingParams
from engine.structured_outputs import StructuredOutputsParams

FIELDS = [f.name for f in dataclasses.fields(SamplingParams)]
NO_NUMBER = ["1", True, math.nan, math.inf, -math.inf, 10**400, 1j, [1]]
NO_INTEGER = [1.5, True, "1", math.nan, math.inf, [1]]
NO_BOOL = [0, 1, "yes", None]
NO_IDS = [5, "12", [1, -1], [1.5], ["1"], [True], [None]]
NO_WORDS = [5, [""], "", ["a", ""], ["a", 1], [b"a"], [None]]
# field: (what is allowed, as the message says it; wrong values; right values)
CASES = {
    "n": ("an integer of at least 1", [0, -1, None, *NO_INTEGER], [1, 5]),
    "temperature": ("at least 0", [-0.1, None, *NO_NUMBER], [0, 0.0, 1e-9, 1, 100.0]),
    "top_p": ("over 0 and at most 1", [0, 0.0, 1.01, -1, None, *NO_NUMBER], [1e-9, 0.5, 1]),
    "top_k": ("an integer of at least -1", [-2, None, *NO_INTEGER], [0, 1, 10**6]),
    "min_p": ("from 0 to 1", [-0.01, 1.01, None, *NO_NUMBER], [0, 0.5, 1.0]),
    "repetition_penalty": ("over 0", [0, -1.0, None, *NO_NUMBER], [0.01, 1, 2.5]),
    "presence_penalty": ("from -2 to 2", [-2.01, 2.01, None, *NO_NUMBER], [-2, 0.5, 2.0]),
    "frequency_penalty": ("from -2 to 2", [-2.01, 2.01, None, *NO_NUMBER], [-2, 0.5, 2.0]),
    "logit_bias": (
        "",
        [5, [1], "x", {-1: 1}, {"a": 1}, {None: 1}, {math.inf: 1}, {1: "2"},
         {1: math.nan}, {1: None}],
        [None, {}, {0: -100, 3: 100.0}],
    ),
    "allowed_token_ids": ("", [[], *NO_IDS], [None, (3,), (1, 2)]),
    "bad_words": ("a non-empty string or a list of them", NO_WORDS, [(), ("a", "b c")]),
    "seed": ("a 64-bit integer or None", [2**64, -(2**63) - 1, *NO_INTEGER],
             [None, 0, -2, 2**64 - 1, -(2**63)]),
    "stop": ("a non-empty string or a list of them", NO_WORDS, [(), ("a", "\n")]),
    "stop_token_ids": ("a list of token ids", NO_IDS, [(), (0, 7)]),
    "ignore_eos": ("True or False", NO_BOOL, [True, False]),
    "min_tokens": ("an integer of at least 0", [-1, None, *NO_INTEGER], [0, 16]),
    "max_tokens": ("an integer of at least 1 or None", [0, -1, *NO_INTEGER], [None, 1, 10**9]),
    "logprobs": ("an integer of at least -1 or None", [-2, *NO_INTEGER], [None, -1, 0, 20]),
    "prompt_logprobs": ("an integer of at least -1 or None", [-2, *NO_INTEGER], [None, -1, 0, 20]),
    "detokenize": ("True or False", NO_BOOL, [True, False]),
    "skip_special_tokens": ("True or False", NO_BOOL, [True, False]),
    "spaces_between_special_tokens": ("True or False", NO_BOOL, [True, False]),
    "include_stop_str_in_output": ("True or False", NO_BOOL, [True, False]),
    "structured_outputs": ("", [5, "x", [1], {"regex": 5}, {"regex": "a", "json": {}}],
                           [None, StructuredOutputsParams(regex="a")]),
    "thinking_token_budget": (
        "an integer of at least 0 or None", [-2, *NO_INTEGER], [None, 0, 4096]
    ),
}  # fmt: skip


def test_every_field_has_its_cases():
    assert list(CASES) == FIELDS


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_values_are_refused_with_what_is_allowed(name):
    expected, wrong, _ = CASES[name]
    for value in wrong:
        with pytest.raises(RequestError) as error:
            SamplingParams(**{name: value})
        assert str(error.value).startswith(name), value
        assert " must " in str(error.value) and expected in str(error.value), value


@pytest.mark.parametrize("name", FIELDS)
def test_right_values_are_taken_as_they_are(name):
    for value in CASES[name][2]:
        assert getattr(SamplingParams(**{name: value}), name) == value


def test_values_are_made_uniform():
    params = SamplingParams(
        stop="end", bad_words="bad", stop_token_ids=[1, 2], allowed_token_ids=range(3), top_k=-1,
        logit_bias={"7": 1},
    )  # fmt: skip
    assert params.stop == ("end",) and params.bad_words == ("bad",)
    assert params.stop_token_ids == (1, 2) and params.allowed_token_ids == (0, 1, 2)
    assert params.top_k == 0
    assert params.logit_bias == {7: 1.0}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"min_tokens": 17}, r"min_tokens \(17\) must not exceed max_tokens \(16\)"),
        ({"min_tokens": 3, "max_tokens": 2}, r"min_tokens \(3\) must not exceed max_tokens"),
        ({"stop": "a", "detokenize": False}, "stop needs detokenize=True"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 1}, "min_tokens must be 0 with str"),
        ({"structured_outputs": {"regex": "a"}, "allowed_token_ids": [1]}, "must be None with str"),
        (
            {"thinking_token_budget": 0, "allowed_token_ids": [1]},
            "allowed_token_ids must be None with thinking_token_budget",
        ),
        ({"temperature": 0, "n": 2}, r"n must be 1 when temperature is 0 \(greedy\), got 2"),
        ({"temperature": 1e-6, "n": 2}, "n must be 1 when temperature is 0"),
    ],
)
def test_contradictions_are_refused(values, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**values)


def test_what_is_no_contradiction():
    SamplingParams(min_tokens=16)
    SamplingParams(min_tokens=10**6, max_tokens=None)
    SamplingParams(temperature=0, stop="a")
    SamplingParams(temperature=1e-4, n=2)
    SamplingParams(detokenize=False, stop_token_ids=[1])


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError, match="max_new_tokens"):
        SamplingParams(max_new_tokens=3)


def test_token_ids_are_checked_against_the_vocabulary():
    for name, value in (
        ("logit_bias", {10: 1}),
        ("allowed_token_ids", [3, 10]),
        ("stop_token_ids", [10]),
    ):
        params = SamplingParams(**{name: value})
        params.check_vocabulary(11)
        with pytest.raises(RequestError, match=f"{name} has token id 10; .* ends at 9"):
            params.check_vocabulary(10)


def test_none_is_the_default_where_it_is_in_vllm():
    params = SamplingParams(stop=None, stop_token_ids=None, bad_words=None, logit_bias=None,
                            allowed_token_ids=None, seed=None)  # fmt: skip
    assert params == SamplingParams()
    assert (params.stop, params.stop_token_ids, params.bad_words) == ((), (), ())
    assert SamplingParams(seed=-1).seed is None


@pytest.mark.parametrize(
    "name, given, expected",
    [
        ("max_tokens", 5.0, 5),
        ("n", np.int64(2), 2),
        ("logprobs", np.float32(3), 3),
        ("top_k", -1.0, 0),
        ("seed", np.uint64(2**64 - 1), 2**64 - 1),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", 2, 2.0),
        ("stop_token_ids", [np.int32(4), 5.0], (4, 5)),
        ("allowed_token_ids", (6.0,), (6,)),
    ],
)
def test_numbers_that_are_whole_are_whole(name, given, expected):
    value = getattr(SamplingParams(**{name: given}), name)
    assert value == expected and type(value) is type(expected)
    assert msgspec.msgpack.encode(value)  # and so a number of Python's, which can be sent


def test_a_bias_beyond_a_hundred_is_a_hundred():
    params = SamplingParams(logit_bias={1: 1000, 2: -math.inf, "3": 100.5, 4: np.float32(-7)})
    assert params.logit_bias == {1: 100.0, 2: -100.0, 3: 100.0, 4: -7.0}


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_vllm_has_alone_may_ask_for_nothing(name):
    for value in (None, [], {}, *NEUTRAL[name]):
        assert SamplingParams(**{name: value}, max_tokens=3) == SamplingParams(max_tokens=3)
    for value in ({"regex": "a+"}, 7, "x"):
        with pytest.raises(RequestError, match=f"^{name} is not supported, got "):
            SamplingParams(**{name: value})


def test_a_parameter_can_be_changed():
    params = SamplingParams(max_tokens=5, stop="a")
    params.temperature = 0
    params.stop = None
    params.max_tokens = 7.0
    assert params == SamplingParams(max_tokens=7, temperature=0)
    before = params.clone()
    for name, value in (("n", 2), ("top_p", 0), ("min_tokens", 8), ("stop", [""])):
        with pytest.raises(RequestError, match=name):
            setattr(params, name, value)
    with pytest.raises(AttributeError, match="no 'max_new_tokens'"):
        params.max_new_tokens = 3
    assert params == before


def test_a_clone_shares_nothing():
    params = SamplingParams(logit_bias={1: 2.0}, stop=["a"])
    clone = params.clone()
    assert clone == params
    clone.max_tokens = 99
    clone.logit_bias[5] = 1.0
    assert params == SamplingParams(logit_bias={1: 2.0}, stop=["a"])
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
