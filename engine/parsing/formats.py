"""The formats by name, and which of them a checkpoint has.

The names are vLLM's for ``--tool-call-parser`` and ``--reasoning-parser``.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache

from engine.parsing.answers import AnswerFormat, TaggedAnswer
from engine.parsing.calls import CallFormat
from engine.parsing.harmony import HarmonyAnswer
from engine.parsing.json_calls import (
    BareObjectCalls,
    DeepSeekCalls,
    KimiCalls,
    MistralCalls,
    ObjectCalls,
)
from engine.parsing.kimi_k3 import THINK, ElementCalls
from engine.parsing.notation_calls import NotationCalls, PythonCalls
from engine.parsing.tagged_calls import FunctionTags, InvokeTags, KeyValueTags
from engine.parsing.thinking import Thinking

AUTO, NONE = "auto", "none"
HARMONY = "openai"

_DSML = "｜DSML｜"
CALLS: Mapping[str, Callable[[], CallFormat]] = {
    "hermes": lambda: ObjectCalls({"<tool_call>": ("</tool_call>",)}),
    "qwen3_coder": FunctionTags,
    "seed_oss": lambda: FunctionTags(("<seed:tool_call>", "</seed:tool_call>")),
    "glm45": KeyValueTags,
    "llama3_json": BareObjectCalls,
    "pythonic": lambda: PythonCalls("<|python_start|>", "<|python_end|>"),
    "olmo3": lambda: PythonCalls("<function_calls>", "</function_calls>", lines=True),
    "mistral": MistralCalls,
    "mistral_list": lambda: MistralCalls(is_list=True),
    "deepseek_v3": lambda: DeepSeekCalls(code=True),
    "deepseek_v31": lambda: DeepSeekCalls(code=False),
    "deepseek_v32": lambda: InvokeTags(
        _DSML, (f"{_DSML}function_calls", f"{_DSML}tool_calls")
    ),
    "deepseek_v4": lambda: InvokeTags(_DSML, (f"{_DSML}tool_calls", f"{_DSML}function_calls")),
    "deepseek_v41": lambda: InvokeTags(_DSML, (f"{_DSML} calls",)),
    "minimax_m2": lambda: InvokeTags("", ("minimax:tool_call",)),
    "kimi_k2": KimiCalls,
    "kimi_k3": ElementCalls,
    "gemma4": lambda: NotationCalls("<|tool_call>", "<tool_call|>", '<|"|>'),
    "functiongemma": lambda: NotationCalls(
        "<start_function_call>", "<end_function_call>", "<escape>"
    ),
    "phi4": lambda: ObjectCalls({"<|tool_call|>": ("<|/tool_call|>",)}, is_list=True),
    "phi4_mini_json": lambda: ObjectCalls({"functools": ()}, is_list=True),
    "granite": lambda: ObjectCalls(
        {"<|tool_call|>": (), "<tool_call>": ("</tool_call>",)}, is_list=True
    ),
    "internlm": lambda: ObjectCalls(
        {"<|action_start|><|plugin|>": ("<|action_end|>",)}, key="parameters"
    ),
    "jamba": lambda: ObjectCalls({"<tool_calls>": ("</tool_calls>",)}, is_list=True),
    "minimax": lambda: ObjectCalls({"<tool_calls>": ("</tool_calls>",)}),
    "nemotron_json": lambda: ObjectCalls({"<TOOLCALL>": ("</TOOLCALL>",)}, is_list=True),
    "cohere_command3": lambda: ObjectCalls(
        {"<|START_ACTION|>": ("<|END_ACTION|>",)}, key="parameters", is_list=True,
        name="tool_name",
    ),
}  # fmt: skip
_THINK = Thinking(("<think>",), ("</think>",))
THINKING: Mapping[str, Thinking] = {
    "deepseek_r1": _THINK,
    "gemma4": Thinking(("<|channel>thought\n", "<|channel>thought"), ("<channel|>",)),
    "granite": Thinking(
        ("Here is my thought process:", "Here's my thought process:"),
        ("Here is my response:", "Here's my response:"),
    ),
    "kimi_k3": Thinking((THINK[0],), (THINK[1],)),
    "mistral": Thinking(("[THINK]", "<think>"), ("[/THINK]", "</think>")),
    "seed_oss": Thinking(("<seed:think>",), ("</seed:think>",)),
    "cohere_command3": Thinking(("<|START_THINKING|>",), ("<|END_THINKING|>",)),
}
# Other names that vLLM has for the same.
_SAME_CALLS = {
    "qwen3_xml": "qwen3_coder", "glm47": "glm45", "llama4_pythonic": "pythonic",
    "llama4_json": "llama3_json", "ernie45": "hermes", "hunyuan_a13b": "jamba",
    "granite-20b-fc": "granite", "granite4": "hermes", "step3p5": "qwen3_coder",
    "openai_gptoss": HARMONY, "gpt_oss": HARMONY,
}  # fmt: skip
_SAME_THINKING = {
    "qwen3": "deepseek_r1", "deepseek_v3": "deepseek_r1", "glm45": "deepseek_r1",
    "kimi_k2": "deepseek_r1", "minimax_m2": "deepseek_r1", "ernie45": "deepseek_r1",
    "hunyuan_a13b": "deepseek_r1", "step3": "deepseek_r1", "olmo3": "deepseek_r1",
    "openai_gptoss": HARMONY, "gpt_oss": HARMONY,
}  # fmt: skip
CALL_NAMES = sorted({*CALLS, *_SAME_CALLS, HARMONY})
THINKING_NAMES = sorted({*THINKING, *_SAME_THINKING, HARMONY})

# What a chat template writes, and what that says about the model: the first that fits.
_CALLS_BY_TEMPLATE = (
    (("<|channel|>", "<|message|>"), HARMONY),
    (("｜DSML｜", "function_calls>"), "deepseek_v32"),
    (("｜DSML｜", " calls>"), "deepseek_v41"),
    (("｜DSML｜",), "deepseek_v4"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<seed:tool_call>",), "seed_oss"),
    (("<|tool_call>call:",), "gemma4"),
    (("<start_function_call>",), "functiongemma"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<|open|>", "<|sep|>"), "kimi_k3"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("<arg_key>",), "glm45"),
    (("<function=", "<parameter="), "qwen3_coder"),
    (("[TOOL_CALLS]", "[ARGS]"), "mistral"),
    (("[TOOL_CALLS]",), "mistral_list"),
    (("<|START_ACTION|>",), "cohere_command3"),
    (("<TOOLCALL>",), "nemotron_json"),
    (("<|action_start|>",), "internlm"),
    (("<tool_calls>[",), "jamba"),
    (("<tool_calls>",), "minimax"),
    (("<tool_call>",), "hermes"),
    (("<function_calls>",), "olmo3"),
    (("<|/tool_call|>",), "phi4"),
    (("<|tool_call|>",), "granite"),
    (("functools",), "phi4_mini_json"),
    (("<|python_start|>",), "pythonic"),
    (('{"name": ', '"parameters": '), "llama3_json"),
)
_THINKING_BY_TEMPLATE = (
    (("<|channel|>", "<|message|>"), HARMONY),
    (("<|channel>thought",), "gemma4"),
    (("<|open|>", "<|sep|>"), "kimi_k3"),
    (("<seed:think>",), "seed_oss"),
    (("<|START_THINKING|>",), "cohere_command3"),
    (("[THINK]",), "mistral"),
    (("Here is my thought process:",), "granite"),
    (("<think>",), "deepseek_r1"),
    (("</think>",), "deepseek_r1"),
)


@lru_cache(maxsize=256)
def answer_format(
    calls: str, thinking: str, template: str, with_tools: bool
) -> AnswerFormat | None:
    """The format of a checkpoint's answers; None if they are text and no more.

    calls, thinking: names, or auto, which looks at the chat template, or none. with_tools: whether
    calls are looked for.
    """
    found = found_by(template)
    calls = found[0] if calls == AUTO else calls
    thinking = found[1] if thinking == AUTO else thinking
    calls, thinking = _SAME_CALLS.get(calls, calls), _SAME_THINKING.get(thinking, thinking)
    if HARMONY in (calls, thinking):
        return HarmonyAnswer()
    call_format = CALLS[calls]() if calls != NONE and with_tools else None
    thinks = THINKING[thinking] if thinking != NONE else None
    return TaggedAnswer(thinks, call_format) if call_format or thinks else None


def found_by(template: str) -> tuple[str, str]:
    """The names of the calls' and the thinking's format that a chat template writes, or none."""
    return _named_by(template, _CALLS_BY_TEMPLATE), _named_by(template, _THINKING_BY_TEMPLATE)


def _named_by(template: str, table: tuple[tuple[tuple[str, ...], str], ...]) -> str:
    for marks, name in table:
        if all(mark in template for mark in marks):
            return name
    return NONE
