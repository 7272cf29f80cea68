"""The same code on CUDA. Skipped where there is no GPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.sampling_params import SamplingParams
from manta import LLM
from tests.parity.test_generate import check_model
from tests.parity.tiny_models import TINY_MODELS
from tests.support.tiny_tokenizer import save_tokenizer
from workers.checkpoint import EMBEDDED_PATH

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")

NAMES = [
    "llama", "llama-yarn", "mistral", "qwen2-sliding", "qwen3", "opt-post-norm",
    "olmo3", "granite", "ministral3", "gemma2", "gemma3", "glm4", "mixtral", "qwen3-moe",
    "glm4-moe", "gpt-oss", "minimax-m2",
]  # fmt: skip
QUESTIONS = ["What is manta?", "Tell me a joke.", "What is the capital of France?", "Count to 5."]


@pytest.mark.parametrize("name", NAMES)
def test_families_generate_what_transformers_does(name: str, tmp_path) -> None:
    tiny = next(t for t in TINY_MODELS if t.name == name)
    model = tiny.build()
    tokenizer = save_tokenizer(tmp_path / "tokenizer", model.config.vocab_size)
    check_model(tiny.save(tmp_path), model, tokenizer, "swap", device="cuda")


def test_the_embedded_model_in_bf16_gives_transformers_greedy_tokens() -> None:
    llm = LLM(dtype="bfloat16", device="cuda", use_tqdm_on_load=False, max_model_len=512)
    prompts = [
        llm.tokenizer.apply_chat_template([{"role": "user", "content": q}]) for q in QUESTIONS
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=48), use_tqdm=False)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_PATH, dtype=torch.bfloat16).cuda().eval()
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        expected = model.generate(ids, do_sample=False, max_new_tokens=48)[0, len(prompt) :]
        assert output.outputs[0].token_ids == expected.tolist()


def test_a_seed_gives_the_same_tokens_on_the_gpu_as_on_the_cpu() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=32)
    texts = []
    for device in ("cpu", "cuda"):
        llm = LLM(dtype="float32", device=device, use_tqdm_on_load=False, max_model_len=512)
        texts.append([o.outputs[0].token_ids for o in llm.generate(QUESTIONS, params)])
    assert texts[0] == texts[1]
