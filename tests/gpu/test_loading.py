"""Weights on their way from files to a GPU. Skipped where there is none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manta import SamplingParams
from tests.parity.tiny_models import TINY_MODELS
from tests.support.file_parts import check_parts
from tests.support.tiny_llm import assert_idle, start_llm
from tests.support.tiny_tokenizer import save_tokenizer
from workers import reading, tensor_files

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.mark.parametrize("chunk", [1 << 20, 64])
def test_parts_come_to_the_gpu_as_they_are_in_the_file(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "CHUNK", chunk)
    monkeypatch.setattr(reading, "CHUNK", chunk)
    check_parts(tmp_path / "model.safetensors", torch.device("cuda", 0))


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gpt-oss"])
def test_a_model_in_many_shards_is_the_model_in_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(model for model in TINY_MODELS if model.name == name).save(tmp_path)
    save_tokenizer(path, 128)
    found = [_tokens(path)]
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {tensor: f"{i % 7}.safetensors" for i, tensor in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file(
            {t: tensors[t] for t, where in weight_map.items() if where == shard}, path / shard
        )
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    monkeypatch.setattr(tensor_files, "CHUNK", 4096)
    monkeypatch.setattr(reading, "CHUNK", 4096)
    found.append(_tokens(path))
    assert found[0] == found[1]


def _tokens(path: Path) -> list[tuple[tuple[int, ...], float | None]]:
    llm = start_llm(path, device="cuda", dtype="bfloat16", batch_invariance="on")
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=1)
    prompts = [{"prompt_token_ids": list(range(3, 3 + length))} for length in (1, 5, 90)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_idle(llm)
    return [(tuple(o.outputs[0].token_ids), o.outputs[0].cumulative_logprob) for o in outputs]
