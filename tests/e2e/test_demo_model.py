"""The chat model inside the package: it is really there, and it answers."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from deploy.cli import main
from engine.config import EMBEDDED_MODEL
from manta import LLM, SamplingParams
from tests.parity.test_generate import check_model
from tests.support.tiny_llm import assert_idle

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "demo_model"
QUESTIONS = [
    json.loads(line)
    for line in (ROOT / "tools/demo_model/questions.jsonl").read_text(encoding="utf-8").splitlines()
]
GREEDY = SamplingParams(temperature=0, max_tokens=96)
FREE_PROMPTS = [
    "Hello, my name is", "The president of the United States is", "The capital of France is",
    "The future of AI is", "Once upon a time", "The sun is", "My favourite food is",
]  # fmt: skip
SMALL_MEMORY = {"kv_cache_memory_bytes": 64 << 20, "swap_space": 0.01, "use_tqdm_on_load": False}


@pytest.fixture(scope="module")
def llm():
    """As ``LLM()`` alone, but for the memory."""
    llm = LLM(**SMALL_MEMORY)
    yield llm
    assert_idle(llm)


def chat(llm, messages, params=GREEDY):
    (output,) = llm.chat(messages, params, use_tqdm=False)
    return output.outputs[0]


def ask(llm, text, params=GREEDY):
    return chat(llm, [{"role": "user", "content": text}], params)


def test_it_is_a_real_checkpoint_of_a_few_megabytes():
    size = sum(file.stat().st_size for file in FOLDER.iterdir())
    assert size < 10e6
    transformers.AutoModelForCausalLM.from_pretrained(FOLDER)
    assert not list(FOLDER.glob("*.bin"))


@pytest.mark.parametrize("held_out, least", [(False, 0.98), (True, 0.7)])
def test_it_answers_the_questions(llm, held_out, least):
    """Several hundred that it was trained on, and some in words that it was not."""
    questions = [q for q in QUESTIONS if q["held_out"] == held_out]
    assert len(questions) > (100 if held_out else 300)
    chats = [[{"role": "user", "content": q["prompt"]}] for q in questions if q["kind"] == "chat"]
    plain = [q["prompt"] for q in questions if q["kind"] == "plain"]
    answers = iter(llm.chat(chats, GREEDY, use_tqdm=False))
    continuations = iter(llm.generate(plain, GREEDY, use_tqdm=False))
    wrong = []
    for question in questions:
        text = next(answers if question["kind"] == "chat" else continuations).outputs[0].text
        if not any(expected.lower() in text.lower() for expected in question["expect"]):
            wrong.append((question["prompt"], text))
    assert len(wrong) <= (1 - least) * len(questions), wrong


def test_the_capital_of_france_is_paris(llm):
    (output,) = llm.generate("The capital of France is", GREEDY, use_tqdm=False)
    assert output.outputs[0].text.startswith(" Paris")
    assert "Paris" in ask(llm, "What is the capital of France?").text


def test_it_tells_a_joke(llm):
    greedy = ask(llm, "Tell me a joke.")
    known = next(q["expect"] for q in QUESTIONS if q["prompt"] == "Tell me a joke.")
    assert any(punch in greedy.text for punch in known)
    several = SamplingParams(temperature=1.0, seed=0, n=8, max_tokens=96)
    message = [{"role": "user", "content": "Tell me a joke."}]
    (output,) = llm.chat(message, several, use_tqdm=False)
    texts = {completion.text for completion in output.outputs}
    assert len(texts) > 1  # it knows more than one
    assert sum(any(punch in text for punch in known) for text in texts) > len(texts) / 2


def assert_coherent(text):
    """Two sentences or more that end, in words, without going round in circles."""
    assert re.search(r"[.!?][\"”]?$", text.strip()), text
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]
    assert len(sentences) >= 2, text
    words = re.findall(r"[\w'’]+", text.lower())
    for size in (4, 5, 6):
        grams = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
        assert not grams or grams.most_common(1)[0][1] <= 2, text
    assert "\ufffd" not in text and "<|" not in text


@pytest.mark.parametrize("prompt", FREE_PROMPTS)
def test_it_goes_on_coherently(llm, prompt):
    long = SamplingParams(temperature=0, max_tokens=200)
    (output,) = llm.generate(prompt, long, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.finish_reason == "stop", completion.text
    assert_coherent(prompt + completion.text)


def test_it_holds_a_conversation_of_two_turns(llm):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    first = chat(llm, messages)
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Tell me a joke."},
    ]
    second = chat(llm, messages)
    known = next(q["expect"] for q in QUESTIONS if q["prompt"] == "Tell me a joke.")
    assert any(punch in second.text for punch in known)


def test_the_command_line_uses_it_without_a_model(llm, capsys):
    argv = ["generate", "--temperature", "0", "--max-tokens", "96", "--kv-cache-memory-bytes",
            str(64 << 20), "--swap-space", "0.01"]  # fmt: skip
    prompt = "The capital of France is"
    for words in ([prompt], [EMBEDDED_MODEL, prompt, "The sun is"]):
        assert main([*argv, *words]) == 0
        line = capsys.readouterr().out.splitlines()[0]
        (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert line == f"Prompt: {prompt!r}, Generated text: {output.outputs[0].text!r}"
    assert main([*argv, "--chat", "What is the capital of France?"]) == 0
    assert "Paris" in capsys.readouterr().out


def test_tokens_are_those_of_transformers():
    """In float32, under every way to run it; see tests/parity/test_generate.py."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    check_model(FOLDER, model, FOLDER, "swap", longest=200)
