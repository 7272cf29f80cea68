"""Checkpoints with random weights to measure speed with: python benchmarks/make_checkpoint.py DIR

Speed does not depend on what the weights are. DIR gets ``opt-125m``, of facebook/opt-125m's shape,
and ``llama-200m``, a grouped-query Llama of 213 M parameters, each whole: config, safetensors, and
a tokenizer trained on Python's own library. Rows of the output layer beyond the tokenizer's
vocabulary are zero, so that every greedy token has a text, as in a real model.
"""

import sys
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 16000
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MODELS = {
    "opt-125m": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=50272, hidden_size=768, num_hidden_layers=12, ffn_dim=3072,
            num_attention_heads=12, max_position_embeddings=2048, word_embed_proj_dim=768,
            eos_token_id=0, bos_token_id=0, pad_token_id=1,
        )
    ),
    "llama-200m": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16,
            num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=4096,
            rope_theta=500000.0, eos_token_id=0, bos_token_id=0, tie_word_embeddings=True,
        )
    ),
}  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=sorted(set(map(chr, range(33, 127))) | {"Ġ", "Ċ"}),
    )
    bpe.train([str(file) for file in files], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="</s>", bos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def main(out: Path) -> None:
    tokenizer = make_tokenizer()
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().to(torch.bfloat16)
        with torch.no_grad():
            model.get_output_embeddings().weight[len(tokenizer) :] = 0
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        print(out / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
