"""A scripted model that thinks and calls tools in Qwen3's format, for the protocols of agents."""

import json
from pathlib import Path
from typing import Any

from tests.support.scripted_model import save_scripted

MODEL = "scripted"
ARGUMENTS = {"city": "Paris", "days": [1, 2]}
PATCH = "*** Begin Patch\n+ é\n*** End Patch"
THOUGHT = "A greeting, so I greet."


def called(name: str, arguments: dict[str, Any]) -> str:
    """A call as the model writes it."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


# By the user's last words.
ANSWERS = {
    "hello": "Hello to you, who ask!",
    "think": f"<think>\n{THOUGHT}\n</think>\n\nGood morning.",
    "weather": "Let me look.\n" + called("get_weather", ARGUMENTS),
    "two": called("get_time", {}) + "\n" + called("get_weather", {"city": "Rome"}),
    "ponder": "<think>\nThe sky must be asked.\n</think>\n\n" + called("look_up", {"at": "sky"}),
    "patch": called("apply_patch", {"input": PATCH}),
    "agent": called("team__spawn", {"task": "dig"}),
    "json": '{"city": "Oslo"}',
    "Paris?": "Let me look.\n" + called("get_weather", {"city": "Paris"}),
    "result": "It is 21 degrees there.",
    "shell": called("exec_command", {"cmd": "echo manta was here"}),
    "bash": called("Bash", {"command": "echo manta was here", "description": "Say it"}),
}
_SCRIPTS = {f"<|say:{words}|>": text for words, text in ANSWERS.items()}
_TEMPLATE = """\
{%- set seen = namespace(words=[], last='') %}
{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set seen.words = message.content.split() %}{% endif %}
{%- if message.role != 'system' %}{% set seen.last = message.role %}{% endif %}
{{- '<|' + message.role + '|>' }}{{ '[' + message.name + ']' if message.name }}
{%- if message.reasoning_content %}{{ '<think>\\n' + message.reasoning_content + '\\n</think>' }}
{%- endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}
{%- if enable_thinking is defined %}<thinks>{{ enable_thinking }}</thinks>{% endif %}
{%- if reasoning_effort %}<effort>{{ reasoning_effort }}</effort>{% endif %}
{{- '<|say:' + ('result' if seen.last == 'tool' else seen.words[-1]) + '|>' }}
{%- endif %}"""


def save_chats(folder: Path) -> Path:
    """Save the checkpoint, which answers the user's last word as ``ANSWERS`` has it, and a tool's
    result as it has ``result``."""
    return save_scripted(folder, _SCRIPTS, _TEMPLATE, length=1 << 17)
