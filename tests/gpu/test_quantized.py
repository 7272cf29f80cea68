"""Quantized checkpoints on CUDA, where weights stay in codes. Skipped where there is no GPU."""

from pathlib import Path

import pytest
import torch

from manta import SamplingParams
from tests.parity.tiny_models import TINY_MODELS
from tests.support.quantized_checkpoints import FORMATS, quantize
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
    them have one order."""
    tiny = next(model for model in TINY_MODELS if model.name == name)
    found = []
    for path in quantize(tiny.save(tmp_path), tmp_path, format):
        save_tokenizer(path, 128)
        llm = start_llm(path, device="cuda", dtype="bfloat16", batch_invariance="on")
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], GREEDY, use_tqdm=False)
        found.append([(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs])
        assert_idle(llm)
    assert found[0] == found[1]
