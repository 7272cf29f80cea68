"""Ranks on GPUs: over NCCL with a GPU each, or sharing one, with tensors staged by the host."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.sampling_params import SamplingParams
from manta import LLM
from tests.support.tiny_tokenizer import save_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")

GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False, logprobs=1)
PROMPTS = [[3 + i, 4, 5 + i] * (2 * i + 1) for i in range(12)]
OPTIONS: dict[str, Any] = {
    "device": "cuda",
    "dtype": "float32",
    "distributed_executor_backend": "mp",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "num_gpu_blocks_override": 30,
    "preemption_mode": "swap",
    "swap_space": 0.01,
    "use_tqdm_on_load": False,
}


def check(path: Path, tokenizer: Path, tensor: int, pipeline: int, gpus: float) -> None:
    """Twice, the second time with a warm prefix cache."""
    one = LLM(path, tokenizer=tokenizer, **OPTIONS).generate(PROMPTS, GREEDY, use_tqdm=False)
    llm = LLM(
        path,
        tokenizer=tokenizer,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        worker_gpus=gpus,
        **OPTIONS,
    )
    for _ in range(2):
        many = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        for mine, expected in zip(many, one, strict=True):
            ours, theirs = mine.outputs[0], expected.outputs[0]
            assert ours.token_ids == theirs.token_ids
            for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert all(abs(a[token].logprob - b[token].logprob) < 1e-3 for token in a)
    llm.engine.stop()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("words"), 128)


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_two_ranks_share_one_gpu(
    name: str, tensor: int, pipeline: int, checkpoint, tokenizer: Path
) -> None:
    check(checkpoint(name), tokenizer, tensor, pipeline, 0.5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA GPU")
@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_two_ranks_over_nccl(
    name: str, tensor: int, pipeline: int, checkpoint, tokenizer: Path
) -> None:
    check(checkpoint(name), tokenizer, tensor, pipeline, 1.0)
