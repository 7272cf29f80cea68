"""Keys and values in 8-bit floats on CUDA. Skipped where there is no GPU."""

from typing import Any

import pytest
import torch

from manta import LLM, SamplingParams
from tests.support.tiny_llm import assert_idle
from workers.checkpoint import EMBEDDED_PATH

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")

TEXT = (EMBEDDED_PATH / "chat_template.jinja").read_text()
PROMPTS = [TEXT[i : i + n] for i, n in ((0, 40), (100, 900), (50, 1), (300, 1500), (0, 700))]
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=1)
PROMPT = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)


def start(**options: Any) -> LLM:
    defaults = {"dtype": "bfloat16", "device": "cuda", "kv_cache_dtype": "fp8"}
    return LLM(use_tqdm_on_load=False, max_model_len=2048, **(defaults | options))


def of_prompts(llm: LLM) -> torch.Tensor:
    """The log-probability of every token of the prompts."""
    found = []
    for output in llm.generate(PROMPTS, PROMPT, use_tqdm=False):
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        found += [logprobs[token].logprob for token, logprobs in pairs]
    return torch.tensor(found)


def test_log_probabilities_are_those_of_plain_pytorch() -> None:
    """Which reads the same numbers: the two differ by bf16's roundings alone."""
    ours = of_prompts(start())
    gathered = of_prompts(start(attention_backend="gather"))
    exact = of_prompts(start(kv_cache_dtype="auto"))
    assert (ours - gathered).abs().mean() < 0.5 * (ours - exact).abs().mean()


def test_bits_do_not_depend_on_the_batch_or_on_what_becomes_of_blocks() -> None:
    def found(llm: LLM, prompts: list[str]) -> list[Any]:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert_idle(llm)
        return [(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs]

    llm = start(batch_invariance="on", enable_prefix_caching=False)
    expected = [found(llm, [prompt])[0] for prompt in PROMPTS]
    assert found(llm, PROMPTS) == expected
    chunked = start(batch_invariance="on", max_num_batched_tokens=70, max_num_seqs=8)
    assert found(chunked, PROMPTS) == expected
    assert found(chunked, PROMPTS) == expected  # from the prefix cache
    for mode in ("swap", "recompute"):
        pressed = start(
            batch_invariance="on", num_gpu_blocks_override=140, swap_space=0.1,
            preemption_mode=mode, enable_prefix_caching=False,
        )  # fmt: skip
        assert found(pressed, PROMPTS * 4) == expected * 4
        stats = pressed.engine.scheduler.stats
        assert (stats.preemptions_swap if mode == "swap" else stats.preemptions_recompute) > 0
