"""Plans, results and requests keep their values, types and shapes as bytes."""

import msgspec
import numpy as np
import pytest

from engine import wire
from engine.continuation import Continuation, begin
from engine.plan import Admit, Copies, StepPlan, StepResult, TokenLogprobs, ints, pairs
from engine.sampling_params import SamplingParams


def test_a_plan_comes_back_the_same() -> None:
    sampling = SamplingParams(logit_bias={7: -1.5}, stop=["x"], stop_token_ids=[3], max_tokens=None)
    admit = Admit(2, ints([5, 6]), 1, sampling, 2**64 - 1, (9,), ((1, 2), (3,)))
    copies = Copies(out=pairs([(1, 2)]), in_=pairs([(3, 4), (5, 6)]))
    plan = StepPlan(
        8,
        ints([2]),
        ints([0]),
        ints([2]),
        ints([1]),
        ints([[2, 0, 11]]),
        (admit,),
        ints([1]),
        copies,
    )
    read = wire.Decoder(StepPlan).decode(wire.encode(plan))
    assert read.step == 8 and read.admits[0].sampling == sampling
    assert read.admits[0].seed == 2**64 - 1 and read.admits[0].bad_words == ((1, 2), (3,))
    for name in ("slots", "starts", "counts", "wants", "cells", "release"):
        mine, theirs = getattr(plan, name), getattr(read, name)
        assert theirs.dtype == np.int32 and theirs.flags.writeable
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(read.copies.in_, copies.in_)
    assert read.copies.out.shape == copies.out.shape


def test_a_result_comes_back_the_same() -> None:
    entry = TokenLogprobs(ints([4, 2]), np.float32([-0.5, -0.25]), ints([2, 1]))
    failed = np.array([True, False])
    result = StepResult(3, ints([0, 1]), ints([4, 5]), failed, {1: entry}, {0: [entry]}, 0.25)
    read = wire.Decoder(StepResult).decode(wire.encode(result))
    np.testing.assert_array_equal(read.failed, failed)
    np.testing.assert_array_equal(read.logprobs[1].logprobs, entry.logprobs)
    assert read.logprobs[1].logprobs.dtype == np.float32
    np.testing.assert_array_equal(read.prompt_logprobs[0][0].ranks, entry.ranks)


def test_a_wrong_value_is_refused_by_its_field() -> None:
    request = begin(request_id="a", prompt_token_ids=[1], sampling=SamplingParams(top_p=0.5))
    data = wire.encode(request)
    assert wire.Decoder(Continuation).decode(data) == request
    with pytest.raises(msgspec.ValidationError, match=r"top_p"):
        wire.Decoder(Continuation).decode(data.replace(b"top_p\xcb?\xe0", b"top_p\xcb?\xf8"))
    with pytest.raises(msgspec.ValidationError, match="slots"):
        wire.Decoder(StepPlan).decode(wire.encode({"step": 1}))
