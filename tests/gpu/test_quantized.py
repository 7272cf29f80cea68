"""Quantized checkpoints on CUDA, where weights stay in codes. Skipped where there is no GPU."""

from pathlib import Path

import pytest
import torch

from manta import SamplingParams
from tests.parity.tiny_models import TINY_MODELS
from tests.support.quantized_checkpoints import FORMATS, ROUNDED, quantize
from tests.support.tiny_llm import assert_idle, start_llm
from tests.support.tiny_tokenizer import save_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")

PROMPTS = [list(range(3, 3 + length)) for length in (1, 5, 90)]
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=1)


CASES = [
    *(("llama", format) for format in FORMATS),
    ("qwen3-moe", "fp8 blocks"),
    ("gpt-oss", "mxfp4 experts"),
]


@pytest.mark.parametrize(("name", "format"), CASES)
def test_tokens_are_those_of_the_weights_that_the_codes_stand_for(
    name: str, format: str, tmp_path: Path
) -> None:
    """In every bit, in prompts and one by one: codes become the same numbers, and the sums over
    them have one order. Where activations are rounded, the same checkpoint stands for itself: in
    chunks and without graphs."""
    tiny = next(model for model in TINY_MODELS if model.name == name)
    found = []
    quantized, reference = quantize(tiny.save(tmp_path), tmp_path, format)
    others: tuple[Path, dict[str, object]] = (reference, {})
    if format in ROUNDED:
        others = quantized, {"max_num_batched_tokens": 16, "enforce_eager": True}
    for path, more in ((quantized, {}), others):
        save_tokenizer(path, 128)
        llm = start_llm(path, device="cuda", dtype="bfloat16", batch_invariance="on", **more)
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], GREEDY, use_tqdm=False)
        found.append([(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs])
        assert_idle(llm)
    assert found[0] == found[1]
