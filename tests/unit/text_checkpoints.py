"""Small real tokenizers, trained here, for the tests of tokenizing, detokenizing and chats."""

import functools
import json
import tempfile
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "The capital of France is Paris, and it's a city on the Seine. Hello, world!",
    "  Two leading spaces,\ttabs\n\nand newlines.  Numbers: 3.14159, 2026-11-23.",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # comment",
    "你好，世界。這是一個測試。日本語のテキスト、カタカナ。한국어 문장입니다.",
    "Ünïcödé ﬁne; naïve café: e\u0301 a\u0308 n\u0303 (combining marks) — “quotes” …",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumbs, 🇫🇷 France, 😀😃😄 smileys, 🤷‍♀️ shrug",
    "Здравствуй, мир! Γειά σου Κόσμε. مرحبا بالعالم שלום עולם नमस्ते दुनिया",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content']"
    " + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


_ALL = tempfile.TemporaryDirectory(prefix="manta-test-")  # removed at the end of the process


def folder() -> Path:
    return Path(tempfile.mkdtemp(dir=_ALL.name))


def save(backend: tokenizers.Tokenizer, config: dict, model_type: str | None = "llama") -> Path:
    path = folder()
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type is not None:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


@functools.cache
def byte_level_backend() -> tokenizers.Tokenizer:
    """Byte-level BPE as in Llama 3 and Qwen, with special and other added tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_tokens(["<think>", "<tool call>", "né"])
    begin = ("<|begin|>", backend.token_to_id("<|begin|>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[begin]
    )
    return backend


PLAIN_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin|>",
    "eos_token": "<|end|>",
    "pad_token": "<|pad|>",
    "extra_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "clean_up_tokenization_spaces": True,  # as Llama 3's, where BPE makes it void
    "chat_template": TEMPLATE,
}


@functools.cache
def byte_level() -> Path:
    return save(byte_level_backend(), PLAIN_CONFIG)


@functools.cache
def sentencepiece_model(kind: str) -> Path:
    """The tokenizer.model of a SentencePiece tokenizer with byte fallback."""
    path = folder()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20 + TEXTS[:3] * 200), model_prefix=str(path / "tokenizer"),
        model_type=kind, vocab_size=520, byte_fallback=True, character_coverage=0.98,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity",
        remove_extra_whitespaces=False, user_defined_symbols=["<tool>"],
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return path / "tokenizer.model"


@functools.cache
def llama() -> Path:
    """SentencePiece BPE as Llama 2's, with nothing but tokenizer.model."""
    path = folder()
    (path / "tokenizer.model").write_bytes(sentencepiece_model("bpe").read_bytes())
    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "add_bos_token": True,
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


@functools.cache
def t5() -> Path:
    """Unigram with a Metaspace decoder, as T5's."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(TEXTS * 3, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    return save(backend, config | {"pad_token": "<pad>", "unk_token": "<unk>"})


@functools.cache
def bert() -> Path:
    """WordPiece, whose decoder puts the spaces in."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[UNK]", "[SEP]", "[CLS]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXTS * 3, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[SEP]"}
    return save(backend, config | {"unk_token": "[UNK]", "cls_token": "[CLS]"})


@functools.cache
def gemma() -> Path:
    """SentencePiece BPE that puts no space before a text, as Gemma's."""
    from transformers import LlamaTokenizer

    backend = LlamaTokenizer.from_pretrained(llama()).backend_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    return save(backend, {"tokenizer_class": "TokenizersBackend", "eos_token": "</s>"})


@functools.cache
def byte_level_and_more() -> Path:
    """Byte-level BPE with a further step of decoding, so that it is no matter of bytes alone."""
    backend = tokenizers.Tokenizer.from_str(byte_level_backend().to_str())
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("zz", "Z")])
    return save(backend, PLAIN_CONFIG)
