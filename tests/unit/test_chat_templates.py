"""The templates of public checkpoints, rendered as transformers renders them, in every form that
clients' messages have."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from engine import chat
from engine.errors import RequestError
from engine.templates import compiled

FOLDER = Path(__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

# What the templates take. Those that go over parts: of users, and of the system.
PARTS = {
    "apriel-1.6", "gemma-3", "gemma-4", "glm-4.5", "glm-4.6", "glm-4.7-flash", "granite-4.0",
    "idefics3", "kimi-k2", "kimi-k2-thinking", "llava-next", "minimax-m1", "minimax-m2",
    "ministral-3", "mistral-small-3.2", "devstral-2507", "qwen2.5-vl", "qwen3-vl", "qwen3.5",
    "qwen3.6", "qwen3.8", "smolvlm", "step-3.5-flash",
}  # fmt: skip
# Of these roles they show the first part only, or none at all.
FIRST_PART = {
    "apriel-1.6": ("system", "assistant"), "devstral-2507": ("system", "assistant"),
    "gemma-3": ("system",), "llava-next": ("system", "assistant"), "minimax-m1": ("system",),
    "mistral-small-3.2": ("system",),
}  # fmt: skip
# Strings are walked letter by letter, so that nothing of them is shown.
PARTS_ONLY = {"idefics3", "llava-next", "smolvlm"}
# Arguments of tool calls are joined to strings.
STRING_ARGUMENTS = {"deepseek-v3", "functionary-3.2"}
# An assistant's message without content fails, or is not shown.
WANTS_CONTENT = {"deepseek-v3", "devstral-2507", "qwq"}
# Of several system messages one is shown, wherever it stands.
ONE_SYSTEM = {"deepseek-r1-distill", "rwkv-world"}

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": " Hello <b> & 'quotes' 你好 "}
ANSWER = {"role": "assistant", "content": "Hi  there."}
THOUGHT = {"role": "assistant", "content": "Four.", "reasoning_content": "2 + 2."}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look <there>.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string", "description": "é"}},
            "required": ["at"],
        },
    },
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, USER],
    "no system": [USER, ANSWER, USER, ANSWER],
    "reasoning": [USER, THOUGHT, USER],
}
OUT_OF_TURN = [USER, USER, SYSTEM]


def template_of(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def theirs(tokenizer: Any, name: str, messages: Any, **options: Any) -> str | None:
    """As transformers renders it; None if that fails."""
    try:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template_of(name), tokenize=False, **options
        )
    except Exception:
        return None
    return text


def ours(name: str, messages: Any, **options: Any) -> str | None:
    """As it is rendered here; None if it is refused."""
    given: dict[str, Any] = {
        "add_generation_prompt": False, "continue_final_message": False, "tools": None,
        "special_tokens": SPECIAL, "template_kwargs": {},
    }  # fmt: skip
    try:
        return chat.render(template_of(name), messages, **(given | options))
    except RequestError:
        return None


def with_content(messages: Any, form: Any) -> list[dict[str, Any]]:
    return [m | {"content": form(m["role"], m["content"])} for m in messages]


def tools_of(name: str) -> list[Any] | None:
    return [TOOL] if "tools" in compiled(template_of(name))[1] else None


def test_there_are_fifty() -> None:
    assert len(NAMES) > 50
    assert set(NAMES) >= PARTS | set(FIRST_PART) | PARTS_ONLY | STRING_ARGUMENTS | WANTS_CONTENT
    readme = (FOLDER / "README.md").read_text()
    assert [name for name in NAMES if f"| `{name}` |" not in readme] == []


def chats_of(name: str, tokenizer: Any) -> list[list[dict[str, Any]]]:
    """Those that the template takes as they are; see ``test_messages_of_agents_are_heard``."""
    text = theirs(tokenizer, name, OUT_OF_TURN) or ""
    taken = text.count("你好") == 2 and "Be brief." in text and name not in ONE_SYSTEM
    return [*CHATS.values(), *([OUT_OF_TURN] if taken else [])]


@pytest.mark.parametrize("name", NAMES)
def test_content_that_is_a_string(name: str, tokenizer: Any) -> None:
    def form(role: str, text: str) -> Any:
        return [{"type": "text", "text": text}] if name in PARTS_ONLY else text

    shown = 0
    for messages in chats_of(name, tokenizer):
        for options in ({"add_generation_prompt": True}, {"tools": tools_of(name)}):
            expected = theirs(tokenizer, name, with_content(messages, form), **options)
            assert ours(name, messages, **options) == expected
            shown += expected is not None and "你好" in expected
    assert shown >= 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("texts", [[" one"], [" one", "two "], ["one", "", " ", "two"]], ids=str)
def test_content_that_is_parts(name: str, texts: list[str], tokenizer: Any) -> None:
    parts = [{"type": "text", "text": text} for text in texts]

    def form(role: str, _: str) -> Any:
        if name not in PARTS:
            return "\n".join(texts)
        if len(texts) == 1 or role not in FIRST_PART.get(name, ()):
            return parts
        text = "\n".join(texts)
        return [{"type": "text", "text": text}] if name in PARTS_ONLY else text

    refused = 0
    for messages in chats_of(name, tokenizer):
        tools = tools_of(name)
        expected = theirs(tokenizer, name, with_content(messages, form), tools=tools)
        given = with_content(messages, lambda role, text: parts)
        rendered = ours(name, given, tools=tools)
        assert rendered == expected
        if rendered is None:
            refused += 1
            continue
        assert "'text'" not in rendered, "a list is printed as it is"
        users = sum(m["role"] == "user" for m in messages)
        for text in texts:  # nobody's words are lost
            assert rendered.count(text.strip()) >= users
    assert refused < len(CHATS)


@pytest.mark.parametrize("name", NAMES)
def test_tool_calls_without_content(name: str, tokenizer: Any) -> None:
    """As OpenAI's clients send them back: content is null, arguments are a string of JSON."""

    def chat_of(arguments: Any, **more: Any) -> list[dict[str, Any]]:
        function = {"name": "look", "arguments": arguments}
        call = {"id": "abcdefghi", "type": "function", "function": function}
        result = {"role": "tool", "content": "42", "tool_call_id": "abcdefghi", "name": "look"}
        asks = {"role": "user", "content": as_theirs("Look.")}
        return [asks, {"role": "assistant", **more, "tool_calls": [call]}, result]

    def as_theirs(text: str) -> Any:
        return [{"type": "text", "text": text}] if name in PARTS_ONLY else text

    text = '{"at":"the é, here"}'
    arguments = text if name in STRING_ARGUMENTS else {"at": "the é, here"}
    content = {"content": ""} if name in WANTS_CONTENT else {}
    for tools in (None, tools_of(name)):
        expected = theirs(tokenizer, name, chat_of(arguments, **content), tools=tools)
        for given in (text, {"at": "the é, here"}):
            if given is not text and name in STRING_ARGUMENTS:
                continue
            assert ours(name, chat_of(given, content=None), tools=tools) == expected
            assert ours(name, chat_of(given), tools=tools) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["The answer", "  The answer  ", "The\n", "\n\nThe", ""], ids=repr)
def test_a_final_message_that_goes_on(name: str, text: str, tokenizer: Any) -> None:
    for form in (str, lambda text: [{"type": "text", "text": text}]):
        final = {"role": "assistant", "content": form(text)}
        as_parts = form is not str if name in PARTS - PARTS_ONLY else name in PARTS_ONLY

        def as_theirs(text: str, as_parts: bool = as_parts) -> Any:
            return [{"type": "text", "text": text}] if as_parts else text

        given = [USER, final]
        expected = theirs(
            tokenizer,
            name,
            with_content([USER, ANSWER | {"content": text}], lambda role, text: as_theirs(text)),
            continue_final_message=True,
        )
        assert ours(name, given, continue_final_message=True) == expected


@pytest.mark.parametrize("name", NAMES)
def test_results_of_tools_that_are_parts(name: str) -> None:
    """Whoever shows a result shows all of it, whatever form it has."""

    def rendered(content: Any) -> str:
        function = {"name": "look", "arguments": "{}"}
        call = {"id": "abcdefghi", "type": "function", "function": function}
        result = {"role": "tool", "content": content, "tool_call_id": "abcdefghi", "name": "look"}
        return ours(name, [USER, {"role": "assistant", "tool_calls": [call]}, result, USER]) or ""

    texts = ["north", "south"]
    if "north south" in rendered("north south"):
        parts = rendered([{"type": "text", "text": text} for text in texts])
        assert all(text in parts for text in texts) and "'text'" not in parts


@pytest.mark.parametrize("name", NAMES)
def test_a_developer_is_heard(name: str, tokenizer: Any) -> None:
    """As in transformers by templates that know the role, else as the system."""

    def heard(first: dict[str, Any]) -> str:
        def form(role: str, text: str) -> Any:
            return [{"type": "text", "text": text}] if name in PARTS_ONLY else text

        messages = with_content([first, USER], form)
        return theirs(tokenizer, name, messages, tools=tools_of(name)) or ""

    developer = SYSTEM | {"role": "developer"}
    expected = heard(developer) if "Be brief." in heard(developer) else heard(SYSTEM)
    assert (ours(name, [developer, USER], tools=tools_of(name)) or "") == expected


# They take no system message (Mistral 7B: then also no user's, as the roles do not alternate), show
# the last one that stands at the beginning, or want tools.
WITHOUT_SYSTEM = {"gemma-2", "mistral-7b-0.2", "phi-3-medium", "hermes-3-tools"}
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")
# As Codex sends messages, and as Claude Code does.
AGENTS = (
    ("developer", "developer", "user", "user"),
    ("system", "user", "system", "assistant", "user", "system"),
)


@pytest.mark.parametrize("roles", AGENTS, ids=["codex", "claude"])
@pytest.mark.parametrize("name", sorted(set(NAMES) - WITHOUT_SYSTEM))
def test_messages_of_agents_are_heard(name: str, roles: tuple[str, ...]) -> None:
    """Wherever those of the system stand, and whether or not the template lets them stand there."""
    said = [{"role": role, "content": word} for role, word in zip(roles, WORDS, strict=False)]
    text = ours(name, said) or ""
    missing = [message for message in said if message["content"] not in text]
    assert not missing, text
    places = [text.find(m["content"]) for m in said if m["role"] in ("user", "assistant")]
    assert places == sorted(places)
