"""The tokenizer wrapper against transformers' AutoTokenizer, on tokenizers trained here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, BertGenerationTokenizer, PreTrainedTokenizerFast

from engine.config import EMBEDDED_MODEL
from engine.errors import CheckpointError, RequestError
from engine.tokenizer import Tokenizer
from engine.tokenizer_files import _read_plain, load_transformers
from tests.support.tiny_tokenizer import save_tokenizer
from tests.unit import text_checkpoints as checkpoints
from workers.checkpoint import resolve

TEXTS = [
    *checkpoints.TEXTS,
    "",
    " ",
    "a<|im_start|>user\n<think>né</think> <tool call><|end|> <|begin|>x",
    "</s><s> hello<unk><tool>[SEP] [CLS]  \u200d\ufeff\x00",
]
MESSAGES = [{"role": "user", "content": "Hello 你好"}, {"role": "assistant", "content": "Hi 😀"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def copy(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of a folder with other entries in tokenizer_config.json (None: without)."""
    shutil.copytree(folder, to)
    path = to / "tokenizer_config.json"
    merged = json.loads(path.read_text()) | config
    path.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
    return to


def assert_same(ours: Tokenizer, folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == expected
    assert ours.encode(TEXTS) == [theirs.encode(text) for text in TEXTS]
    assert ours.vocab_size == len(theirs) == max(theirs.get_vocab().values()) + 1
    assert ours.special_tokens == theirs.special_tokens_map
    assert sorted(ours.all_special_ids) == sorted(theirs.all_special_ids)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    pieces = theirs.convert_ids_to_tokens(list(range(len(theirs))))
    assert [ours.id_to_piece(i) for i in range(len(theirs))] == pieces
    if theirs.chat_template is not None:
        for prompt in (True, False):
            expected = theirs.apply_chat_template(
                MESSAGES, add_generation_prompt=prompt, return_dict=False
            )
            assert ours.apply_chat_template(MESSAGES, add_generation_prompt=prompt) == expected


def added_tokens(folder: Path) -> dict[str, Any]:
    entries = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return {str(entry.pop("id")): entry for entry in entries}


def plain_variants(folder: Path, name: str) -> dict[str, Any]:
    """tokenizer_config.json entries that leave tokenizer.json to say all."""
    return {
        "bare": {"chat_template": None},
        "added": {"added_tokens_decoder": added_tokens(folder)},
        "objects": {"eos_token": {"__type": "AddedToken", **added_tokens(folder)["1"]}},
        "old names": {
            "extra_special_tokens": None,
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        },
        "named templates": {
            "chat_template": [
                {"name": "default", "template": checkpoints.TEMPLATE},
                {"name": "tool_use", "template": "{{ tools }}"},
            ]
        },
    }[name]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "opt", "qwen3"])
@pytest.mark.parametrize("name", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_plain_folder_is_read_alone(model_type: str, name: str, tmp_path: Path) -> None:
    folder = copy(checkpoints.byte_level(), tmp_path / "it", tokenizer_class=name)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert _read_plain(folder) is not None
    assert_same(Tokenizer.load(folder), folder)


@pytest.mark.parametrize("variant", ["bare", "added", "objects", "old names", "named templates"])
def test_plain_variants(variant: str, tmp_path: Path) -> None:
    source = checkpoints.byte_level()
    folder = copy(source, tmp_path / "it", **plain_variants(source, variant))
    assert _read_plain(folder) is not None
    assert_same(Tokenizer.load(folder), folder)


@pytest.mark.parametrize("make", [checkpoints.t5, checkpoints.bert])
def test_other_plain_tokenizers(make: Any) -> None:
    assert _read_plain(make()) is not None
    assert_same(Tokenizer.load(make()), make())


def test_templates_in_files_come_first(tmp_path: Path) -> None:
    folder = copy(checkpoints.byte_level(), tmp_path / "it")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    tokenizer = Tokenizer.load(folder)
    assert_same(tokenizer, folder)
    assert tokenizer.chat_templates == {"default": "{{ messages[0]['content'] }}!", "rag": "rag"}
    assert tokenizer.render_chat(MESSAGES, chat_template="rag") == "rag"


THINK = {"content": "<extra>", "single_word": False, "lstrip": True, "rstrip": False,
         "normalized": False, "special": True}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"tokenizer_class": None},
        {"add_bos_token": False},
        {"added_tokens_decoder": {"403": THINK}},
        {"pad_token": "<not there>"},
        {"extra_special_tokens": ["<neither>"]},
        {"image_token": "<|im_end|>"},
        {"split_special_tokens": True},
    ],
    ids=str,
)
def test_other_folders_go_through_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    folder = copy(checkpoints.byte_level(), tmp_path / "it", **config)
    assert _read_plain(folder) is None
    assert_same(Tokenizer.load(folder), folder)
    assert_same(Tokenizer.load(folder), folder)  # the second time as it was kept


def test_model_type_and_old_files_go_through_transformers(tmp_path: Path) -> None:
    folder = copy(checkpoints.byte_level(), tmp_path / "it")
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    assert _read_plain(folder) is None
    assert_same(Tokenizer.load(folder), folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    assert _read_plain(folder) is None
    tokenizer = Tokenizer.load(folder)
    assert_same(tokenizer, folder)
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"


def test_sentencepiece_llama(cache: Path) -> None:
    folder = checkpoints.llama()
    for _ in range(2):
        assert_same(Tokenizer.load(folder), folder)
    assert len(list((cache / "manta" / "tokenizers").iterdir())) == 1


@pytest.mark.parametrize("make", [checkpoints.byte_level, checkpoints.llama])
def test_the_second_start_needs_neither_transformers_nor_torch(make: Any) -> None:
    Tokenizer.load(make())
    code = (
        "import sys; from engine.tokenizer import Tokenizer\n"
        f"t = Tokenizer.load({str(make())!r}); print(t.encode('Hello 你好'))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'slow to import'"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == AutoTokenizer.from_pretrained(make()).encode("Hello 你好")


def test_what_is_kept_follows_the_files(tmp_path: Path) -> None:
    folder = copy(checkpoints.llama(), tmp_path / "it", chat_template="one")
    assert Tokenizer.load(folder).render_chat(MESSAGES) == "one"
    (folder / "chat_template.jinja").write_text("two")
    assert Tokenizer.load(folder).render_chat(MESSAGES) == "two"


def test_home_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert_same(Tokenizer.load(checkpoints.llama()), checkpoints.llama())


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    folder = copy(checkpoints.byte_level(), tmp_path / "it")
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    saved["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_id": 4, "pad_token": "<|pad|>",
        "pad_to_multiple_of": None, "pad_type_id": 0,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    assert_same(Tokenizer.load(folder), folder)


def slow_tokenizer(tmp_path: Path) -> Tokenizer:
    model = checkpoints.sentencepiece_model("unigram")
    BertGenerationTokenizer(vocab_file=str(model)).save_pretrained(tmp_path / "slow")
    (tmp_path / "slow" / "config.json").write_text('{"model_type": "bert-generation"}')
    return Tokenizer.load(tmp_path / "slow")


def test_slow_tokenizer(tmp_path: Path) -> None:
    tokenizer = slow_tokenizer(tmp_path)
    assert tokenizer.backend.byte_decoder is None
    assert_same(tokenizer, tmp_path / "slow")
    assert tokenizer.decode([5, 10**6]) == tokenizer.decode([5])
    assert tokenizer.id_to_piece(10**6) is None


def test_bad_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no-such-folder"):
        Tokenizer.load(tmp_path / "no-such-folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        Tokenizer.load(tmp_path / "empty")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        folder = copy(checkpoints.byte_level(), tmp_path / name)
        whole = (folder / name).read_text()
        (folder / name).write_text(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match="cannot load a tokenizer"):
            Tokenizer.load(folder)


def test_bad_text() -> None:
    tokenizer = Tokenizer.load(checkpoints.byte_level())
    with pytest.raises(RequestError, match="valid Unicode"):
        tokenizer.encode("half a pair: \ud83d")
    wrong: Any = ["fine", 3]
    with pytest.raises(RequestError, match="must be a string or token ids, got 3"):
        tokenizer.encode(wrong)


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    tokenizer = Tokenizer.load(checkpoints.byte_level())
    ids = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.decode([*ids, 50_000, *ids]) == "HelloHello"
    assert tokenizer.id_to_piece(50_000) is None


def test_spaces_between_special_tokens() -> None:
    tokenizer = Tokenizer.load(checkpoints.bert())
    ids = [tokenizer.backend.token_to_id(t) for t in ("[CLS]", "[SEP]", "it", "[SEP]", "[CLS]")]
    ids = [i for i in ids if i is not None]
    assert tokenizer.decode(ids) == "[CLS] [SEP] it [SEP] [CLS]"
    assert tokenizer.decode(ids, spaces_between_special_tokens=False) == "[CLS][SEP] it [SEP][CLS]"
    assert tokenizer.decode(ids, True, spaces_between_special_tokens=False) == "it"


def test_bad_words() -> None:
    tokenizer = Tokenizer.load(checkpoints.byte_level())

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    assert tokenizer.bad_words_ids(["on", " on"]) == [ids("on"), ids(" on")] * 2
    assert len(ids("on")) == len(ids(" on"))
    # A space and the bare form: the bare form's ban is enough.
    assert ids(" Paris") == [*ids(" "), *ids("Paris")]
    assert tokenizer.bad_words_ids(["Paris"]) == [ids("Paris")]
    with pytest.raises(RequestError, match="bad_words has '  '"):
        tokenizer.bad_words_ids(["  "])
    # SentencePiece puts a space before every text, so that there is one form only.
    llama = Tokenizer.load(checkpoints.llama())
    assert llama.bad_words_ids(["France"]) == [llama.encode("France", add_special_tokens=False)]


def test_token_texts() -> None:
    tokenizer = Tokenizer.load(checkpoints.byte_level())
    family = tokenizer.encode("x👍🏽é", add_special_tokens=False)
    texts = [tokenizer.token_texts([i], family[:k])[0] for k, i in enumerate(family)]
    assert "".join(text.text for text in texts) == "x👍🏽é"
    assert b"".join(text.bytes for text in texts) == "x👍🏽é".encode()
    assert any(text.text == "" for text in texts)  # a part of a character
    [special] = tokenizer.token_texts([1], family)
    assert special == ("<|end|>", b"<|end|>")
    assert tokenizer.token_texts([50_000]) == [("", b"")]

    llama = Tokenizer.load(checkpoints.llama())
    ids = llama.encode("Paris is 世", add_special_tokens=False)
    texts = [llama.token_texts([i], ids[:k])[0] for k, i in enumerate(ids)]
    assert "".join(text.text for text in texts) == " Paris is 世"
    assert len(texts[-1].bytes) == 1

    t5 = Tokenizer.load(checkpoints.t5())
    ids = t5.encode("a cat", add_special_tokens=False)
    texts = [t5.token_texts([i], ids[:k])[0] for k, i in enumerate(ids)]
    assert "".join(text.text for text in texts) == "a cat"


def test_hub_id_passes_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub can be reached here, so only that the question is asked rightly."""
    asked: list[Any] = []

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.append((name, options))
        raise OSError("offline")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    for revision in ("v1", None):
        with pytest.raises(CheckpointError, match="'some/model': offline"):
            Tokenizer.load("some/model", revision=revision)
    assert asked == [
        ("some/model", {"trust_remote_code": False, "revision": "v1"}),
        ("some/model", {"trust_remote_code": False}),
    ]


def test_a_regular_expression_that_gives_up_is_an_error(tmp_path: Path) -> None:
    """The library panics, which is no Exception."""
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(a+)+b"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(RequestError, match="prompt: the tokenizer gives up on this text: "):
        tokenizer.encode(["ab", "a" * 40])
    assert tokenizer.encode("ab") == [0, 1]


def test_what_has_surely_more_tokens(tmp_path: Path) -> None:
    demo = Tokenizer.load(resolve(EMBEDDED_MODEL))
    assert demo.longest_token == max(len(demo.id_to_piece(i) or "") for i in range(4096))
    for text in ("hello " * 100, "x" * 100, " " * 1000, "", "manta"):
        count = len(demo.encode(text, add_special_tokens=False))
        assert not demo.surely_longer(text, count) and not demo.surely_longer(text, count + 1)
    assert demo.surely_longer("x" * 1000, 50)  # by its beginning
    assert demo.surely_longer(" " * 10_000, 50)  # by its characters
    words = Tokenizer.load(save_tokenizer(tmp_path, 10))
    assert not words.surely_longer("y" * 10_000, 5)  # one unknown word, one token
    assert words.surely_longer("w1 " * 10_000, 5)


def test_a_tokenizer_that_is_code_is_refused_with_what_is_so(tmp_path: Path) -> None:
    """Not with transformers' advice to set an option that would trust it."""
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    for load in (Tokenizer.load, lambda path: load_transformers(path, None)):
        with pytest.raises(
            CheckpointError, match=r"code of the checkpoint's own \(auto_map\), and"
        ):
            load(tmp_path)
