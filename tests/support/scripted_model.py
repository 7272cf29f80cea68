"""A checkpoint that says what it is told, token for token, at any temperature.

Its attention and its MLPs give nothing, so that the next token depends on the last one alone; the
output layer leads from each token of a script to the next. A script begins after a token of its
own, which the chat template (or what a server adds to the prompt) ends with.
"""

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN = 1024
END = "<|im_end|>"


def save_scripted(
    folder: Path,
    scripts: Mapping[str, str],
    template: str,
    special: tuple[str, ...] = (),
    length: int = 8192,
    **tokenizer_config: Any,
) -> Path:
    """Save the checkpoint that says ``scripts[begin]`` after the token ``begin``.

    special: strings in scripts that are special tokens; each may stand once in all of them.
    length: of the model, in tokens.
    """
    tokenizer_config["chat_template"] = template
    taken, chains = set(scripts), dict[str, list[str]]()
    for begin, text in scripts.items():
        chains[begin] = _chunks(text, special, taken)
        taken.update(chains[begin])
    chunks = sorted(taken - {*scripts})
    ids = _save_tokenizer(folder, [*scripts], [*special], chunks, tokenizer_config)
    said = {begin: [ids[token] for token in (begin, *c, END)] for begin, c in chains.items()}
    _save_model(folder, said, ids[END], length)
    return folder


def _chunks(text: str, special: tuple[str, ...], taken: set[str]) -> list[str]:
    """The text in tokens of up to 14 characters, all different, and none of those ``taken``."""
    parts = re.split("|".join(f"({re.escape(mark)})" for mark in special) or "(?!)", text)
    draw = random.Random(text)
    for _ in range(1000):
        chunks = []
        for part in filter(None, parts):
            at = 0
            while at < len(part):
                size = len(part) if part in special else draw.randint(4, 14)
                chunks.append(part[at : at + size])
                at += size
        if len(set(chunks)) == len(chunks) and not taken & set(chunks):
            return chunks
    raise AssertionError(f"a token of {text!r} would come twice")


def _save_tokenizer(
    folder: Path, begins: list[str], special: list[str], chunks: list[str], own: dict[str, Any]
) -> dict[str, int]:
    """Tokens are bytes, but for special ones and those that begin a script. Those of scripts are in
    the vocabulary, without a merge that would make text such a token. The ids by their text."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    written = {chunk: split.pre_tokenize_str(chunk)[0][0] for chunk in chunks}
    vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *written.values()]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(dict.fromkeys(vocab))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = [END, *special, *(begin for begin in begins if begin.startswith("<|say"))]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in marks])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in begins if t not in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | own))
    known = tokenizer.get_vocab()
    return known | {chunk: known[written[chunk]] for chunk in chunks if chunk not in special}


def _save_model(folder: Path, chains: Mapping[str, list[int]], end: int, length: int) -> None:
    size = 1 + max(token for chain in chains.values() for token in chain)
    size = max(size, 300)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size,
        "hidden_size": HIDDEN, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8, "hidden_act": "silu",
        "max_position_embeddings": length, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": end,
        "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    embedding = torch.nn.functional.normalize(torch.randn(size, HIDDEN), dim=1)
    head = torch.zeros(size, HIDDEN)
    for chain in chains.values():
        for token, following in zip(chain, chain[1:], strict=False):
            head[following] += 10 * embedding[token]
    layer = "model.layers.0"
    weights = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": head,
        "model.norm.weight": torch.ones(HIDDEN),
        f"{layer}.input_layernorm.weight": torch.ones(HIDDEN),
        f"{layer}.post_attention_layernorm.weight": torch.ones(HIDDEN),
        f"{layer}.self_attn.q_proj.weight": torch.zeros(64, HIDDEN),
        f"{layer}.self_attn.k_proj.weight": torch.zeros(8, HIDDEN),
        f"{layer}.self_attn.v_proj.weight": torch.zeros(8, HIDDEN),
        f"{layer}.self_attn.o_proj.weight": torch.zeros(HIDDEN, 64),
        f"{layer}.mlp.gate_proj.weight": torch.zeros(8, HIDDEN),
        f"{layer}.mlp.up_proj.weight": torch.zeros(8, HIDDEN),
        f"{layer}.mlp.down_proj.weight": torch.zeros(HIDDEN, 8),
    }
    save_file(weights, folder / "model.safetensors")
