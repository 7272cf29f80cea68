"""Keys and values in 8-bit floats: the numbers that transformers finds with the same rounding, and
the same tokens whatever becomes of the blocks."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manta import SamplingParams
from tests.parity.paged import Paged, build
from tests.parity.test_models import RAGGED, SEQUENCES, assert_close
from tests.parity.tiny_models import TINY_MODELS
from tests.support.tiny_llm import assert_idle, start_llm
from tests.support.tiny_tokenizer import save_tokenizer
from workers.attention.cpu import CpuAttention
from workers.attention.gather import GatherAttention
from workers.kernels.fp8_cache import decode, encode

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=1)


def rounded(model: Any, patch: pytest.MonkeyPatch) -> Any:
    """transformers' ``model`` with keys and values rounded where attention reads them."""
    module = sys.modules[type(model).__module__]
    attend = module.eager_attention_forward

    def attend_rounded(layer, query, key, value, *args, **kwargs):
        key, value = (decode(encode(x), x.dtype) for x in (key, value))
        return attend(layer, query, key, value, *args, **kwargs)

    patch.setattr(module, "eager_attention_forward", attend_rounded)
    return model


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", CpuAttention),
        ("llama", GatherAttention),
        ("gpt-oss", CpuAttention),  # sinks and windows
        ("gemma2", GatherAttention),  # soft caps
        ("gemma4", None),  # heads of two sizes, and layers that share keys and values
        ("qwen3-next", None),  # recurrent layers, and gates
    ],
)
def test_logits_are_those_of_rounded_keys_and_values(
    name: str,
    backend: Any,
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = checkpoint(name)
    ours = Paged([build(path, backend=backend, fp8=True)], SEQUENCES).logits(RAGGED)
    tiny = next(model for model in TINY_MODELS if model.name == name)
    model = rounded(tiny.build(), monkeypatch)
    with torch.no_grad():
        expected = [model(torch.tensor([tokens])).logits[0] for tokens in SEQUENCES]
    assert_close(ours, expected, 1e-3)
    exact = Paged([build(path, backend=backend)], SEQUENCES).logits(RAGGED)
    assert (exact[-1] - ours[-1]).abs().max() > 1e-2  # it was rounded


def make_prompts() -> list[list[int]]:
    """Of any length, most of them with a common beginning."""
    rng = random.Random(0)
    stem = [rng.randrange(3, 128) for _ in range(50)]
    lengths = [1, 16, 33, *(rng.randrange(1, 60) for _ in range(9))]
    return [
        stem * (i > 2) + [rng.randrange(3, 128) for _ in range(n)] for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("name", ["llama", "deepseek-v2"])
def test_bits_do_not_depend_on_what_becomes_of_blocks(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Whole prompts alone, and then chunks in a batch, prefixes from the cache, and blocks that are
    copied to the CPU and back or computed again."""
    prompts = make_prompts()
    tokenizer = save_tokenizer(tmp_path, 128)

    def found(llm: Any, prompts: list[list[int]]) -> list[Any]:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], GREEDY, use_tqdm=False)
        assert_idle(llm)
        return [(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs]

    def start(**options: Any) -> Any:
        return start_llm(checkpoint(name), tokenizer, kv_cache_dtype="fp8", **options)

    alone = start(max_num_batched_tokens=256, enable_prefix_caching=False)
    assert alone.engine.capacity.kv_cache_dtype == "fp8"
    expected = [found(alone, [prompt])[0] for prompt in prompts]
    llm = start(max_num_batched_tokens=19)
    assert found(llm, prompts) == expected
    assert found(llm, prompts) == expected
    assert llm.engine.scheduler.kv.stats.prefix_hits > 50 * len(prompts)
    for mode in ("swap", "recompute"):
        llm = start(num_gpu_blocks_override=14, preemption_mode=mode, max_model_len=160)
        assert found(llm, prompts) == expected
        stats = llm.engine.scheduler.stats
        assert (stats.preemptions_swap if mode == "swap" else stats.preemptions_recompute) > 0
