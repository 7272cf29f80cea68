"""A real model with far too few blocks, and requests with little time."""

import random

import pytest

from deploy.cli import main
from engine.blocks import blocks_for
from engine.errors import RequestError
from manta import SamplingParams
from tests.support.tiny_llm import assert_idle, start_llm
from tests.support.tiny_tokenizer import save_tokenizer

VOCAB, BLOCK_SIZE, MAX_LEN = 128, 8, 150


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("words"), VOCAB)


@pytest.fixture(scope="module")
def start(checkpoint, tokenizer):
    def start(**options):
        return start_llm(
            checkpoint("llama"), tokenizer, block_size=BLOCK_SIZE, max_model_len=MAX_LEN, **options
        )

    return start


@pytest.fixture(scope="module")
def load(start):
    """Prompts, parameters, device blocks that all of them need at once, and what they bring."""
    rng = random.Random(0)
    stem = [rng.randrange(3, VOCAB) for _ in range(40)]
    prompts, params, needed = [], [], 0
    for number in range(24):
        prompt = stem[: rng.choice([0, 0, 20, 40])]
        prompt = prompt + [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 40))]
        max_tokens, n = rng.randint(10, 60), rng.choice([1, 1, 2, 3])
        prompts.append(prompt)
        params.append(
            SamplingParams(temperature=1.0, top_p=0.95, seed=number, n=n, max_tokens=max_tokens,
                           ignore_eos=True, logprobs=1 if number % 4 == 0 else None)
        )  # fmt: skip
        needed += n * blocks_for(len(prompt) + max_tokens, BLOCK_SIZE)
    llm = start(num_gpu_blocks_override=2 * needed, max_num_seqs=64)
    outputs = tokens(llm, prompts, params)
    stats = llm.engine.scheduler.stats
    assert stats.preemptions_swap + stats.preemptions_recompute == 0
    return prompts, params, needed, outputs


def tokens(llm, prompts, params):
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.mark.parametrize(
    "mode, caching",
    [("swap", True), ("recompute", True), ("auto", True), ("swap", False), ("recompute", False)],
)
def test_a_tenth_of_the_blocks_gives_the_same_tokens(start, load, mode, caching):
    prompts, params, needed, expected = load
    llm = start(
        num_gpu_blocks_override=needed // 10, max_num_seqs=64, preemption_mode=mode,
        enable_prefix_caching=caching,
    )  # fmt: skip
    assert tokens(llm, prompts, params) == expected
    stats = llm.engine.scheduler.stats
    if mode == "swap":
        assert stats.preemptions_swap > 5
    elif mode == "recompute":
        assert stats.preemptions_recompute > 5 and stats.preemptions_swap == 0
    else:
        assert stats.preemptions_swap + stats.preemptions_recompute > 5
    assert_idle(llm)


# ---- timeouts ----


@pytest.fixture(scope="module")
def llm(start):
    return start(num_gpu_blocks_override=200)


def test_a_timeout_ends_a_prompt_with_what_it_has(llm):
    long = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    first, *others = llm.generate([[3, 4]] * 30, long, use_tqdm=False, timeout=0.15)
    completion = first.outputs[0]
    every = [output.outputs[0] for output in (first, *others)]
    late = [c for c in every if c.finish_reason == "abort"]
    assert late and all(c.stop_reason == "timeout" for c in late)
    (whole,) = llm.generate([[3, 4]], long, use_tqdm=False)
    for completion in every:
        length = len(completion.token_ids)
        assert completion.token_ids == whole.outputs[0].token_ids[:length]
    assert_idle(llm)
    (done,) = llm.generate(
        [[3, 4]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False, timeout=100
    )
    assert done.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), True, "5"])
def test_a_timeout_that_makes_no_sense_is_refused(llm, timeout):
    with pytest.raises(RequestError, match="timeout must be a number of seconds of at least 0"):
        llm.generate([[3, 4]], use_tqdm=False, timeout=timeout)
    assert_idle(llm)


def test_the_command_line_has_a_timeout(checkpoint, tokenizer, capsys):
    argv = [
        "generate", "--tokenizer", str(tokenizer), "--device", "cpu", "--dtype", "float32",
        "--kv-cache-memory-bytes", "8000000", "--swap-space", "0", "--ignore-eos", "--max-tokens",
        "50", "--timeout",
    ]  # fmt: skip
    assert main([*argv, "0", str(checkpoint("llama")), "w3 w4"]) == 0
    assert capsys.readouterr().out == "Prompt: 'w3 w4', Generated text: ''\n"
    assert main([*argv, "100", str(checkpoint("llama")), "w3 w4"]) == 0
    assert len(capsys.readouterr().out.split()) > 50
    assert main([*argv, "-3", str(checkpoint("llama")), "w3 w4"]) == 2
    assert "timeout must be a number of seconds" in capsys.readouterr().err
