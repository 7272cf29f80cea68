"""/v1/embeddings, /v1/rerank and /v1/score through real clients."""

import base64
import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
import transformers
from langchain_openai import OpenAIEmbeddings

from cluster.vectors import pair_text
from engine.chat import load_template
from engine.config import EMBEDDED_MODEL
from engine.tokenizer import Tokenizer
from tests.parity.tiny_models import FAMILIES
from tests.support.served import ROOT
from tests.support.server import Server, serving
from tests.support.tiny_tokenizer import save_tokenizer
from workers.checkpoint import resolve

MODEL = "manta-demo"
TEXTS = ["The sky is blue.", "Ann has a cat.", "Hello"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(pooling="mean", max_num_seqs=8) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder: Path = tmp_path_factory.mktemp("reranker")
    config_class, _, base = FAMILIES["qwen3"]
    torch.manual_seed(0)
    config = config_class(**base, num_labels=1)
    model = transformers.Qwen3ForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(folder)
    save_tokenizer(folder, 128)
    options = {"served_model_name": ["reranker"]}
    with serving(options, model=str(folder), dtype="float32", max_num_seqs=8) as server:
        with httpx.Client(base_url=server.url) as client:
            yield client
        server.assert_idle()


def floats(client: openai.OpenAI, given: Any, **fields: Any) -> np.ndarray:
    answer = client.embeddings.create(model=MODEL, input=given, encoding_format="float", **fields)
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    return np.array([one.embedding for one in answer.data], np.float32)


def test_openais_client_gets_the_same_in_every_form(client: openai.OpenAI, http) -> None:
    found = floats(client, TEXTS)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(3), abs=1e-6)
    # Without an encoding_format this client asks for base64.
    coded = client.embeddings.create(model=MODEL, input=TEXTS)
    assert np.array_equal(found, np.array([one.embedding for one in coded.data], np.float32))
    tokens = [http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS]
    assert np.array_equal(floats(client, tokens), found)
    assert np.array_equal(floats(client, tokens[0]), found[:1])
    assert np.array_equal(floats(client, TEXTS[1]), found[1:2])
    cut = floats(client, TEXTS, dimensions=16)
    expected = found[:, :16] / np.linalg.norm(found[:, :16], axis=1, keepdims=True)
    assert np.abs(cut - expected).max() < 1e-6
    assert coded.usage.prompt_tokens == coded.usage.total_tokens == sum(map(len, tokens))
    assert coded.model == MODEL and coded.object == "list"


def test_embeddings_and_chats_share_the_engine(client: openai.OpenAI, server: Server) -> None:
    alone = floats(client, TEXTS)

    def chat(number: int) -> str:
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hello"}], temperature=0,
            max_tokens=8,
        )  # fmt: skip
        return answer.choices[0].message.content or ""

    with ThreadPoolExecutor(16) as pool:
        chats = pool.map(chat, range(16))
        vectors = pool.map(lambda _: floats(client, TEXTS * 5), range(8))
        assert len(set(chats)) == 1
        for found in vectors:
            assert np.array_equal(found, np.concatenate([alone] * 5))
    server.assert_idle()


def test_langchain(server: Server) -> None:
    embeddings = OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="none", model=MODEL, check_embedding_ctx_length=False
    )
    vectors = np.array(embeddings.embed_documents(TEXTS))
    assert vectors.shape == (3, 192)
    assert embeddings.embed_query(TEXTS[2]) == pytest.approx(vectors[2])


@pytest.mark.parametrize(
    "body, param, said",
    [
        ({}, "input", "input is missing"),
        ({"input": ""}, "input", "input must not be empty"),
        ({"input": []}, "input", "length >= 1"),
        ({"input": [[]]}, "input", "input must not be empty"),
        ({"input": ["a", [1]]}, "input", "a string, token ids, or a list of one of these"),
        ({"input": ["a"] * 2049}, "input", "at most 2048 prompts"),
        ({"input": [1, 9999999]}, "input", "token id 9999999; the model's end at 4095"),
        ({"input": [1] * 2049}, "input", "maximum context length is 2048 tokens"),
        ({"input": "a", "dimensions": 193}, "dimensions", "at most 192, got 193"),
        ({"input": "a", "dimensions": 0}, "dimensions", "int >= 1"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "int8"),
        ({"input": "a", "priority": 1}, "priority", "--scheduling-policy priority"),
        ({"input": "a", "messages": [{"role": "user"}]}, "messages", "unknown field"),
        ({"input": "a", "model": "other"}, "model", "does not exist"),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, body, param: str, said: str) -> None:
    response = http.post("/v1/embeddings", json=body)
    error = response.json()["error"]
    assert response.status_code == (404 if "exist" in said else 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert said in error["message"]


def test_a_model_of_another_kind_says_so(http: httpx.Client, reranker: httpx.Client) -> None:
    for client, path, body, said in (
        (http, "/v1/rerank", {"query": "a", "documents": ["b"]}, "embeddings, no scores"),
        (http, "/v1/score", {"text_1": "a", "text_2": "b"}, "embeddings, no scores"),
        (reranker, "/v1/embeddings", {"input": "a"}, "scores, no embeddings"),
        (reranker, "/v1/completions", {"prompt": "a"}, "generates no text"),
        (reranker, "/v1/chat/completions", {"messages": [{"role": "user"}]}, "generates no text"),
    ):
        response = client.post(path, json=body)
        error = response.json()["error"]
        assert response.status_code == 400 and error["param"] == "model"
        assert said in error["message"]


def test_reranking_and_scores(reranker: httpx.Client) -> None:
    documents = [f"w{i} w{i + 1}" for i in range(10, 20)]
    body: dict[str, Any] = {"text_1": "w4 ", "text_2": documents}
    scored = reranker.post("/v1/score", json=body).json()
    scores = [one["score"] for one in scored["data"]]
    assert scored["model"] == "reranker" and all(0 < score < 1 for score in scores)
    assert len(set(scores)) == 10 and scored["usage"]["prompt_tokens"] == 30
    raw = reranker.post("/v1/score", json=body | {"use_activation": False}).json()
    logits = np.array([one["score"] for one in raw["data"]])
    assert 1 / (1 + np.exp(-logits)) == pytest.approx(scores, abs=1e-6)
    body = {"model": "reranker", "query": "w4 ", "documents": documents}
    ranked = reranker.post("/v1/rerank", json=body).json()["results"]
    assert [one["relevance_score"] for one in ranked] == sorted(scores, reverse=True)
    for one in ranked:
        assert one["relevance_score"] == scores[one["index"]]
        assert one["document"]["text"] == documents[one["index"]]
    as_objects = [{"text": text} for text in documents]
    best = body | {"documents": as_objects, "top_n": 3, "return_documents": False}
    results = reranker.post("/v2/rerank", json=best).json()["results"]
    assert [one["index"] for one in results] == [one["index"] for one in ranked[:3]]
    assert all(one["document"] is None for one in results)
    wrong = reranker.post("/v1/score", json={"text_1": ["w1", "w2"], "text_2": ["w3"] * 3})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "text_2"


def test_metrics_count_vectors(http: httpx.Client) -> None:
    def counted(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"manta:{name}{{"))

    names = "vectors_total", "prompt_tokens_total", "generation_tokens_total"
    before = [counted(name) for name in names]
    request = {"input": TEXTS, "request_id": "mine", "encoding_format": "base64"}
    response = http.post("/v1/embeddings", json=request)
    answer = response.json()
    assert [counted(name) - value for name, value in zip(names, before, strict=True)] == [
        3, answer["usage"]["prompt_tokens"], 0,
    ]  # fmt: skip
    assert answer["id"] == "embd-mine" == response.headers["x-request-id"]
    assert len(base64.b64decode(answer["data"][0]["embedding"])) == 4 * 192
    assert json.loads(response.text)["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


# ---- the documentation ----

DOCS = (ROOT / "docs/api.md").read_text(encoding="utf-8").partition("## Embeddings")[2]


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


def test_the_python_examples(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for text in examples("python"):
        here = text.replace("http://localhost:8000", server.url).replace('"MODEL"', f'"{MODEL}"')
        exec(compile(here, "docs/api.md", "exec"), {})
        assert capsys.readouterr().out == "[192, 192]\n"


def test_the_example_for_curl(reranker: httpx.Client) -> None:
    (text,) = examples("bash")
    here = text.replace("http://localhost:8000", str(reranker.base_url).rstrip("/"))
    done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, check=True)
    assert {one["index"] for one in json.loads(done.stdout)["results"]} == {0, 1}


def test_the_template_of_qwen3_reranker(tmp_path: Path) -> None:
    """It gives the prompt that the model's card makes."""
    file = tmp_path / "template.jinja"
    file.write_text(examples("jinja")[0], encoding="utf-8")
    tokenizer = Tokenizer.load(resolve(EMBEDDED_MODEL))
    assert pair_text(tokenizer, "a query", "a document", load_template(str(file))) == (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query"
        ' and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n<Instruct>: Given a web search query, retrieve relevant passages that"
        " answer the query\n<Query>: a query\n<Document>: a document<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
