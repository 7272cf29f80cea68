"""Vectors are what transformers' hidden states give, for every way to pool and every kind of model;
a prompt's is the same in every bit, whatever shares its steps and however it is cut."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from engine.continuation import begin
from engine.errors import EngineError, RequestError
from engine.pooling import NO_SAMPLING
from manta import PoolingParams, SamplingParams
from tests.parity.tiny_models import FAMILIES, TINY_MODELS
from tests.support.tiny_llm import assert_idle, start_llm
from tests.support.tiny_tokenizer import save_tokenizer

LONGEST = 100
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)
BERT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": LONGEST + 2, "pad_token_id": 1,
}  # fmt: skip


def make_prompts() -> list[list[int]]:
    rng = random.Random(0)
    stem = [rng.randrange(3, 128) for _ in range(60)]
    lengths = [1, 2, 16, 17, LONGEST, *(rng.randint(1, LONGEST) for _ in range(15))]
    return [
        ((stem if i % 3 else []) + [rng.randrange(3, 128) for _ in range(n)])[:n]
        for i, n in enumerate(lengths)
    ]


PROMPTS = make_prompts()
SHORT = [prompt for prompt in PROMPTS if len(prompt) < 50]


def build(name: str) -> Any:
    return next(model for model in TINY_MODELS if model.name == name).build()


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("words"), 128)


@torch.inference_mode()
def pooled(network: Any, method: str, normalize: bool = True) -> np.ndarray:
    """[prompts, H]: what transformers' network gives, prompt by prompt."""
    found = []
    for prompt in PROMPTS:
        hidden = network(torch.tensor([prompt])).last_hidden_state[0]
        vector = {"last": hidden[-1], "mean": hidden.mean(0), "cls": hidden[0]}[method]
        found.append(vector / vector.norm() if normalize else vector)
    return torch.stack(found).numpy()


def embeddings(llm, prompts=PROMPTS, **params) -> np.ndarray:
    asked = PoolingParams(**params)
    outputs = llm.embed(prompts, use_tqdm=False, pooling_params=asked)
    assert [output.prompt_token_ids for output in outputs] == list(prompts)
    return np.array([output.outputs.embedding for output in outputs], np.float32)


def sentence_transformer(path: Path, method: str, normalize: bool) -> Path:
    """Make an embedding model of a checkpoint, as sentence-transformers saves one."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
         "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)
    ]  # fmt: skip
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    flags = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
    config = {f"pooling_mode_{flag}": name == method for name, flag in flags.items()}
    (path / "1_Pooling/config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("method", ["last", "mean", "cls"])
def test_a_model_that_generates_embeds_in_the_same_batches(method: str, checkpoint, words) -> None:
    name = {"last": "qwen3", "mean": "mistral", "cls": "opt"}[method]
    model = build(name)
    network = model.model.decoder if name == "opt" else model.model
    expected = pooled(network, method)
    llm = start_llm(checkpoint(name), words, pooling=method, max_num_batched_tokens=300)
    whole = embeddings(llm)
    assert np.abs(whole - expected).max() < 1e-5
    # Alone, from the prefix cache where that may be, in chunks among decodes, and under pressure.
    assert (embeddings(llm, PROMPTS[::-1])[::-1] == whole).all()
    outputs = llm.embed(PROMPTS, use_tqdm=False)
    assert (sum(output.num_cached_tokens for output in outputs) > 0) == (method == "last")
    llm = start_llm(
        checkpoint(name), words, pooling=method, max_num_batched_tokens=17, max_num_seqs=16,
        num_gpu_blocks_override=12, max_model_len=LONGEST + 20, enable_prefix_caching=False,
    )  # fmt: skip
    alone = llm.generate(SHORT, GREEDY, use_tqdm=False)
    tokens, vectors = mixed(llm)
    assert tokens == [output.outputs[0].token_ids for output in alone]
    assert (np.array(vectors) == whole).all()
    stats = llm.engine.scheduler.stats
    assert stats.preemptions_swap + stats.preemptions_recompute > 0
    assert_idle(llm)


def mixed(llm) -> tuple[list[list[int]], list[np.ndarray]]:
    """Completions and vectors, made together."""
    engine, pooling = llm.engine, llm.engine.facts.pooling
    tokens: dict[str, list[int]] = {}
    vectors: dict[int, np.ndarray] = {}
    for number, prompt in enumerate(PROMPTS):
        engine.add(begin(f"v{number}", prompt, NO_SAMPLING, pools=True))
        if prompt in SHORT:
            tokens[f"t{number}"] = []
            engine.add(begin(f"t{number}", prompt, GREEDY))
    while engine.has_work:
        for name, outcome in engine.step():
            if outcome.vector is not None:
                vectors[int(name[1:])] = PoolingParams().finish(pooling, outcome.vector)
            elif name in tokens:
                tokens[name] += outcome.tokens
    return list(tokens.values()), [vectors[i] for i in range(len(PROMPTS))]


def test_a_sentence_transformer_of_a_decoder(tmp_path, words) -> None:
    """As e5-mistral is saved: the network alone, without the names of a whole, and no head."""
    network = build("mistral").model
    network.save_pretrained(tmp_path)
    llm = start_llm(sentence_transformer(tmp_path, "last", normalize=True), words)
    assert np.abs(embeddings(llm) - pooled(network, "last")).max() < 1e-5
    cut = pooled(network, "last", normalize=False)[:, :10]
    expected = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    assert np.abs(embeddings(llm, dimensions=10) - expected).max() < 1e-5
    assert np.abs(embeddings(llm, dimensions=10, use_activation=False) - cut).max() < 1e-4
    full = llm.embed([[5] * 256], use_tqdm=False)  # nothing has to be left for an output
    assert len(full[0].outputs.embedding) == 64
    with pytest.raises(RequestError, match="generates no tokens"):
        llm.generate("w5")
    with pytest.raises(EngineError, match="no vector came of a prompt: timeout"):
        llm.embed("w5", timeout=0, use_tqdm=False)
    with pytest.raises(RequestError, match="dimensions must be at most 64, got 65"):
        llm.embed("w5", pooling_params=PoolingParams(dimensions=65))
    with pytest.raises(RequestError, match="the model gives embeddings, no scores"):
        llm.score("w5", "w6")


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta"])
def test_encoders(kind: str, tmp_path, words) -> None:
    config = getattr(transformers, f"{kind}Config")(**BERT)
    torch.manual_seed(0)
    network = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.1, 0.3)
    network.save_pretrained(tmp_path)
    method, normalize = ("cls", True) if kind == "Roberta" else ("mean", False)
    path = sentence_transformer(tmp_path, method, normalize)
    llm = start_llm(
        path, words, max_num_batched_tokens=LONGEST // 2
    )  # steps have room all the same
    found = embeddings(llm)
    expected = pooled(network, method, normalize)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert (embeddings(llm, PROMPTS[::-1])[::-1] == found).all()
    assert_idle(llm)


def test_a_classifier_with_one_label_scores(tmp_path, words) -> None:
    config_class, _, base = FAMILIES["qwen3"]
    torch.manual_seed(0)
    config = config_class(**base, num_labels=1)
    model = transformers.Qwen3ForSequenceClassification(config).eval()
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(tmp_path)
    llm = start_llm(tmp_path, words)
    queries, documents = ["w4 w5 "], ["w7", "w8 w9 w10", "w11 w12"]
    outputs = llm.score(queries, documents, use_tqdm=False)
    raw = PoolingParams(use_activation=False)
    logits = llm.score(queries * 3, documents, use_tqdm=False, pooling_params=raw)
    for document, output, logit in zip(documents, outputs, logits, strict=True):
        prompt = llm.tokenizer.encode(queries[0] + document)
        assert output.prompt_token_ids == prompt
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0, 0]
        assert logit.outputs.score == pytest.approx(float(expected), abs=1e-4)
        assert output.outputs.score == pytest.approx(float(expected.sigmoid()), abs=1e-4)
    with pytest.raises(RequestError, match="the model gives scores, no embeddings"):
        llm.embed("w5")
    with pytest.raises(RequestError, match="text_2 must have a text for each"):
        llm.score(["w5", "w6"], ["w7"] * 3)


def test_a_decoder_scores_by_yes_and_no(tmp_path) -> None:
    """As Qwen3-Reranker does, with the checkpoint's template for the two texts, or another."""
    model = build("qwen3-tied-biases")
    model.save_pretrained(tmp_path)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "query", "yes", "no", "doc"])}
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), 128)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m.role[:5] + ' ' + m.content + ' ' }}{% endfor %}doc"
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens)
    words.chat_template = template + "{# roles: query, document #}"
    words.save_pretrained(tmp_path)
    llm = start_llm(tmp_path, pooling="yes_no")
    (output,) = llm.score("w10 w11", "w20", use_tqdm=False)
    (other,) = llm.score("w10", "w20", use_tqdm=False, chat_template="{{ 'w30' }}")
    assert other.prompt_token_ids == [30]
    ids = [vocabulary.get(word, 0) for word in ["query", "w10", "w11", "docum", "w20", "doc"]]
    assert output.prompt_token_ids == ids
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    expected = logits[[2, 3]].softmax(0)[0]
    assert output.outputs.score == pytest.approx(float(expected), abs=1e-4)
    assert llm.generate("w10", GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def test_a_model_that_only_generates_makes_no_vectors(checkpoint, words) -> None:
    llm = start_llm(checkpoint("llama"), words)
    with pytest.raises(RequestError, match="it is no embedding model; the option pooling"):
        llm.embed("w5")
