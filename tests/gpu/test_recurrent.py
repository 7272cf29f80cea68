"""Recurrent layers on CUDA: the same bits however tokens come, by kernels and by engines."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from manta import LLM, SamplingParams
from tests.support.recurrent_nets import NETS
from tests.support.tiny_llm import assert_idle, start_llm
from tests.support.tiny_tokenizer import save_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")

CASES = [
    ("delta", (16, 48, 128, 128)),  # Qwen3.5-27B
    ("delta", (16, 32, 128, 128)),  # Qwen3-Next
    ("mamba2", (8, 128, 64, 128)),  # Nemotron-H 8B, Nemotron 3
    ("mamba2", (8, 128, 80, 128)),  # Nemotron Nano 2 9B
]
PROMPT = 700  # tokens


@pytest.mark.parametrize(("kind", "shape"), CASES, ids=str)
@torch.inference_mode()
def test_no_bit_depends_on_how_tokens_come(kind: str, shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    net = NETS[kind](*shape)
    past, state = net.past.clone(), net.state.clone()
    x, others = net.draw(PROMPT).bfloat16(), net.draw(PROMPT).bfloat16()
    expected = net.step(x, [PROMPT], [4])
    after = net.past[4].clone(), net.state[4].clone()
    for chunk in (1, 7, 64, 333):
        net.past.copy_(past)
        net.state.copy_(state)
        found = []
        for mine, other in zip(x.split(chunk), others.split(chunk), strict=True):
            counts = [len(other), len(mine), 0]
            both = net.step(torch.cat((other, mine)), counts, [2, 4, 4])
            found.append(both[len(other) :])
        assert torch.equal(torch.cat(found), expected)
        assert torch.equal(net.past[4], after[0]) and torch.equal(net.state[4], after[1])
        assert torch.equal(net.state[[0, 1, 3, 5]], state[[0, 1, 3, 5]])


@pytest.mark.parametrize(("kind", "shape"), CASES, ids=str)
@torch.inference_mode()
def test_a_step_is_that_of_pytorch(kind: str, shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    net = NETS[kind](*shape)
    past, state = net.past.clone(), net.state.clone()
    counts, owners = [90, 1, 33], [3, 0, 5]
    x = net.draw(sum(counts))
    found, after = net.step(x, counts, owners), net.state.clone()
    net.past.copy_(past)
    net.state.copy_(state)
    expected = net.plain_step(x, counts, owners)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after, net.state, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", NETS)
@torch.inference_mode()
def test_a_captured_step_takes_rows_of_any_length(kind: str) -> None:
    """The tokens of rows, and their states, are seen by the graph when it is replayed."""
    torch.manual_seed(0)
    net = NETS[kind](2, 4, 64, 64)
    x = net.draw(24)
    starts = torch.zeros(9, dtype=torch.int32, device="cuda")
    states = torch.zeros(8, dtype=torch.int64, device="cuda")
    net.run(x, starts, states)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = net.run(x, starts, states)
    for counts, owners in (([20, 1, 3], [4, 1, 2]), ([1] * 5, [3, 5, 0, 2, 1]), ([24], [1])):
        rows = torch.tensor([0, *counts], device="cuda").cumsum(0).int()
        starts.fill_(sum(counts))[: len(rows)] = rows  # the other rows are padding
        states.zero_()[: len(owners)] = torch.tensor(owners, device="cuda")
        x.normal_()
        past, state = net.past.clone(), net.state.clone()
        graph.replay()
        replayed, after = y[: sum(counts)].clone(), net.state.clone()
        net.past.copy_(past)
        net.state.copy_(state)
        assert torch.equal(net.step(x[: sum(counts)], counts, owners), replayed)
        assert torch.equal(net.state, after)


def ask(llm: LLM, prompts: list[list[int]]) -> tuple[list[Any], list[int]]:
    """The tokens and their log-probabilities, and how many tokens of each prompt were found."""
    greedy = SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, detokenize=False, logprobs=1
    )
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    found = [
        (c.token_ids, [{t: entry.logprob for t, entry in at.items()} for at in c.logprobs])
        for c in (o.outputs[0] for o in outputs)
    ]
    return found, [o.num_cached_tokens for o in outputs]


@pytest.mark.parametrize(
    "name", ["qwen3-5", "qwen3-next-dense", "nemotron-h", "nemotron-h-experts"]
)
def test_cache_chunks_graphs_and_preemption_change_no_bit(
    name: str, checkpoint, tmp_path: Path
) -> None:
    rng = random.Random(0)
    stem = [rng.randrange(3, 128) for _ in range(70)]
    prompts = [stem + [rng.randrange(3, 128) for _ in range(rng.randint(1, 60))] for _ in range(24)]
    options: dict[str, Any] = {
        "device": "cuda", "dtype": "bfloat16", "batch_invariance": "on",
        "distributed_executor_backend": "mp", "num_gpu_blocks_override": 600, "swap_space": 0.01,
    }  # fmt: skip
    path, tokenizer = checkpoint(name), save_tokenizer(tmp_path, 128)
    plain = start_llm(path, tokenizer, enable_prefix_caching=False, enforce_eager=True, **options)
    expected = [ask(plain, [prompt])[0][0] for prompt in prompts]
    plain.engine.stop()
    for more in (
        {},
        {"max_num_batched_tokens": 24},
        {"max_num_batched_tokens": 512, "mamba_block_size": 32, "num_mamba_states": 40},
        {"num_gpu_blocks_override": 30, "num_mamba_states": 6, "preemption_mode": "swap"},
        {"num_gpu_blocks_override": 30, "num_mamba_states": 6, "preemption_mode": "recompute"},
    ):
        llm = start_llm(path, tokenizer, **(options | more))
        for turn in range(2):
            answers, cached = ask(llm, prompts)
            assert answers == expected, (more, turn)
            assert "num_gpu_blocks_override" in more or sum(cached) > 0
        assert_idle(llm)
        llm.engine.stop()
