"""What the embedded model is trained on: its chat template, the calls, JSON and thoughts in its
corpus, the tags in its tokenizer, and the judge of its answers."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from engine import chat
from engine.errors import RequestError
from engine.forms import calls_taken, content_taken
from engine.parsing.formats import found_by
from engine.tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "tools/demo_model"
sys.path.insert(0, str(FOLDER))

import corpus  # noqa: E402
import train  # noqa: E402
from agent_questions import agent_questions, is_right, prompt_of  # noqa: E402
from chats import CHAT_TEMPLATE, TAGS, assistant, rendered  # noqa: E402

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": " What is\nthe weather? "}
ANSWER = {"role": "assistant", "content": "\nFine. "}
LOOK = {"type": "function", "function": {"name": "look", "arguments": {"at": "é <b>", "n": 2}}}
CALLS = {"role": "assistant", "content": "Wait.", "tool_calls": [LOOK, LOOK],
         "reasoning_content": "Hm."}  # fmt: skip
RESULTS = [{"role": "tool", "content": "42"}, {"role": "tool", "content": '{"é": 1}'}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
PLAIN = [[USER], [SYSTEM, USER], [USER, ANSWER, USER], [SYSTEM, USER, ANSWER]]
CHATS = [*PLAIN, [USER, CALLS, *RESULTS], [SYSTEM, USER, CALLS, *RESULTS, ANSWER, USER],
         [USER, {"role": "assistant", "content": "Hm.</think>\n\nFine."}, USER]]  # fmt: skip


def render(messages: Any, tools: Any = None, prompt: bool = True, **variables: Any) -> str:
    return chat.render(
        CHAT_TEMPLATE, messages, add_generation_prompt=prompt, continue_final_message=False,
        tools=tools, special_tokens={}, template_kwargs=variables,
    )  # fmt: skip


# ---- the template ----


@pytest.mark.parametrize("messages", PLAIN)
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}], ids=str)
def test_a_plain_chat_is_turns_and_no_more(messages: Any, variables: Any) -> None:
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    assert render(messages, **variables) == "".join(turns) + "<|im_start|>assistant\n"
    assert render(messages, prompt=False, **variables) == "".join(turns)


def test_the_template_renders_as_in_transformers() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    theirs: Any = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE)
    for messages in CHATS:
        for tools in (None, [TOOL], [TOOL, TOOL | {"extra": "é"}]):
            for variables in ({}, {"enable_thinking": True}):
                expected = theirs.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=True, **variables
                )
                assert render(messages, tools, **variables) == expected


def test_calls_results_and_thoughts_in_the_template() -> None:
    call = '<tool_call>\n{"name": "look", "arguments": {"at": "é <b>", "n": 2}}\n</tool_call>'
    results = '\n<tool_response>\n42\n</tool_response>\n<tool_response>\n{"é": 1}\n</tool_response>'
    text = render([SYSTEM, USER, CALLS, *RESULTS], [TOOL], enable_thinking=True)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in text
    assert f"<think>\nHm.\n</think>\n\nWait.\n{call}\n{call}<|im_end|>\n" in text
    assert text.endswith(f"<|im_start|>user{results}<|im_end|>\n<|im_start|>assistant\n<think>\n")
    # What was thought of an earlier question is left out, also where it is in the text.
    later = render([USER, CALLS, *RESULTS, ANSWER, USER], [TOOL])
    assert "Hm." not in later and call in later
    assert "Hm." not in render(CHATS[-1]) and "\nFine.<|im_end|>" in render(CHATS[-1])


@pytest.mark.parametrize("messages, error", [
    ([{"role": "critic", "content": "x"}], "Unknown role critic; allowed are system, user, "),
])  # fmt: skip
def test_what_the_template_refuses(messages: Any, error: str) -> None:
    for tools in (None, [TOOL]):
        with pytest.raises(RequestError, match=error):
            render(messages, tools)


def test_manta_knows_the_template() -> None:
    assert found_by(CHAT_TEMPLATE) == ("hermes", "deepseek_r1")
    assert calls_taken(CHAT_TEMPLATE, True) == (True, True)
    for role in ("system", "user", "assistant", "tool"):
        for with_tools in (False, True):
            assert content_taken(CHAT_TEMPLATE, role, with_tools) == (True, 0)


# ---- the documents ----


def test_documents_are_what_the_template_and_the_parser_take_apart() -> None:
    """Every call of a document names a tool that it was shown, with arguments of that tool."""
    calls = 0
    for drawn in corpus.documents(5, 1000, kind="tools")[:300]:
        system, *turns = drawn.text.split("<|im_start|>")[1:]
        shown = re.search(r"<tools>\n(.*)\n</tools>", system, re.DOTALL)
        assert shown
        functions = {
            f["name"]: f for f in (json.loads(t)["function"] for t in shown[1].split("\n"))
        }
        answers = [turn for turn in turns if turn.startswith("assistant\n")]
        for text in re.findall(r"<tool_call>\n(.*)\n</tool_call>", "".join(answers)):
            call = json.loads(text)
            parameters = functions[call["name"]].get("parameters", {"properties": {}})
            assert parameters.get("required", []) == [
                name for name in call["arguments"] if name in parameters.get("required", [])
            ]
            for name, value in call["arguments"].items():
                allowed = {"string": str, "integer": int, "number": int}
                assert isinstance(value, allowed[parameters["properties"][name]["type"]])
            calls += 1
    assert calls > 200


@pytest.mark.parametrize("kind", ["tools", "json", "thinking"])
def test_documents_are_varied_and_short(kind: str) -> None:
    texts = [drawn.text for drawn in corpus.documents(6, 1000, kind=kind)]
    assert len(set(texts)) > 0.97 * len(texts)
    assert texts == [drawn.text for drawn in corpus.documents(6, 1000, processes=2, kind=kind)]
    assert sum(len(text) for text in texts) / len(texts) < 1200


# ---- the questions and their judge ----


def test_the_questions_are_those_of_the_corpus() -> None:
    lines = (FOLDER / "agent_questions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == agent_questions(0)


def right_answer(question: dict[str, Any]) -> str:
    """What a perfect model writes after the prompt, as the template has it."""
    calls = [{"type": "function", "function": call} for call in question.get("calls", [])]
    content = json.dumps(question["json"]) if "json" in question else ""
    content = content or question.get("expect", [""])[0]
    thought = "So." if question.get("thinks") else ""
    whole = rendered([*question["messages"], assistant(content, thought, calls)],
                     question.get("tools"))  # fmt: skip
    prompt, _ = prompt_of(question)
    assert whole.startswith(prompt)
    return whole.removeprefix(prompt).removesuffix("<|im_end|>\n")


def test_right_answers_are_right_and_others_are_not() -> None:
    """The prompts, forced calls among them, go on in the words of the documents."""
    for question in agent_questions(1):
        text = right_answer(question)
        assert is_right(question, text), (question, text)
        assert not is_right(question, text[: len(text) // 6]), (question, text)
        assert not is_right(question, "It is so."), question
        if "calls" in question:
            wrong = [call | {"arguments": {"other": 1}} for call in question["calls"]]
            assert not is_right(question, right_answer(question | {"calls": wrong}))
            assert not is_right(question | {"thinks": not question.get("thinks")}, text)


# ---- tokens ----


@pytest.fixture(scope="module")
def documents() -> list[Any]:
    return corpus.documents(2, 1000)


@pytest.fixture(scope="module")
def tokenizer(documents: list[Any]) -> Any:
    return train.train_tokenizer([drawn.text for drawn in documents])


def test_tags_are_whole_tokens_and_stay_in_the_text(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert len(tokenizer) == train.VOCAB
    for tag in TAGS:
        assert len(ours.encode(tag, add_special_tokens=False)) == 1
    text = f"é 你好 🚀\n{' '.join(TAGS)}\n<tool_cal" + "<tool_call>" * 2
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    pieces = set(tokenizer.get_vocab()) - {*TAGS, *train.SPECIAL}
    assert not [piece for piece in pieces if "tool_" in piece or "<|" in piece]
    assert ours.chat_template(None, True) == CHAT_TEMPLATE


def test_what_the_loss_counts(tokenizer: Any) -> None:
    """Answers in full, what users say little, and not at all what the prompt gives."""
    talk = corpus.Document("talk", "<|im_start|>user\nHi there<|im_end|>\n<|endoftext|>")
    thinks = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n<think>\n{}</think>\n\n"
    thought = corpus.Document("tools", thinks.format("So.\n") + "No<|im_end|>\n<|endoftext|>")
    forced = corpus.Document("tools", thinks.format("") + "<tool_call>\n<|endoftext|>")
    made = train.encode(tokenizer, [talk, thought, forced])
    tokens = [tokenizer.decode([i]) for i in made.ids.tolist()]
    weights = [round(weight, 3) for weight in made.weights.tolist()]
    assert [t for t, noisy in zip(tokens, made.noisy.tolist(), strict=True) if noisy][1:3] == [
        "\n", "Hi",
    ]  # fmt: skip
    assert not made.noisy[tokens.index("<|endoftext|>") :].any()
    first = tokens.index("<think>")
    second = tokens.index("<think>", first + 1)
    assert weights[first : first + 2] == [0, 0] and tokens[first + 1] == "\n"
    assert set(weights[first + 2 : tokens.index("<|endoftext|>", first)]) == {1}
    end = tokens.index("<tool_call>")
    assert not any(weights[second:end]) and tokens[second + 2] == "</think>"
    assert weights[end] == 1 and weights[tokens.index("Hi")] == 0.1
