"""A tokenizer of whole words, for checkpoints whose tokens mean nothing."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def save_tokenizer(folder: Path, vocab_size: int) -> Path:
    """Save a tokenizer of the words w0, w1, … in ``folder``."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def save_byte_tokenizer(folder: Path, sentencepiece: bool = False) -> Path:
    """Save a tokenizer of 121 tokens, <pad>, <s> and </s> among them, for any text of ASCII: of
    the kind of byte-level BPE, or of SentencePiece's with byte fallback."""
    merges = ['{ "', '" :', '" ,', '" }', "} ,", "t r", "u e", "tr ue", "l l", "n u", "nu ll"]
    merges += ["0 0", "1 2", "a b", "ab c", "[ ]", "{ }", "Ġ Ġ", "\\ n", "- 1"]
    space, newline, tab = ("▁", "\n", "\t") if sentencepiece else ("Ġ", "Ċ", "ĉ")
    pairs = [merge.replace("Ġ", space).split(" ") for merge in merges]
    tokens = ["<pad>", "<s>", "</s>", *map(chr, range(33, 127)), space, newline, tab, "<x>"]
    if sentencepiece:
        tokens[-3:] = ["<0x0A>", "<0x09>", "<x>"]
    tokens += ["".join(pair) for pair in pairs]
    vocab = {token: number for number, token in enumerate(tokens)}
    merged = [(a, b) for a, b in pairs]
    model = models.BPE(vocab, merged, byte_fallback=sentencepiece, unk_token="<x>")
    backend = Tokenizer(model)
    if sentencepiece:
        backend.normalizer = normalizers.Replace(" ", space)
        steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder
