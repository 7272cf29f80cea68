"""From a body's bytes to a checked request: no field is ever ignored unless it is said here."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import msgspec.inspect

from engine.chat import MESSAGE_FIELDS
from engine.sampling_params import NEUTRAL as SAMPLING_NEUTRAL
from engine.values import asks_for_nothing
from router.errors import ApiError, wrong
from router.schema import StreamOptions

T = TypeVar("T")
TEXT = {"type": "text"}

# Fields of OpenAI's API that cannot change an answer here: any value is accepted.
HARMLESS = (
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "session_id",
    "store",
    "verbosity",
)

# Fields of OpenAI's and vLLM's APIs that are not supported, with the values at which they ask for
# nothing (null and what is empty always do).
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **SAMPLING_NEUTRAL,
    # OpenAI's
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "modalities": (["text"],),
    "moderation": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": (),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "web_search_options": (),
    # vLLM's
    "cache_salt": (),
    "ec_transfer_params": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True, False),
    "kv_transfer_params": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "prompt_embeds": (),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "structural_tag": (),
    "thinking_token_budget": (-1,),
    "truncation_side": (),
    "vllm_xargs": (),
    "watermarking": (False,),
}
# Where what vLLM no longer has can be asked for.
_SUCCESSORS = {
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_whitespace_pattern": "structured_outputs.whitespace_pattern",
    "structural_tag": "structured_outputs.structural_tag",
}
_NUMBER = re.compile(r"-?[0-9]{1,30}(\.[0-9]{1,30})?")


def read(body: bytes, kind: type[T], allow_unknown: bool) -> T:
    """The request of type ``kind`` that ``body`` is.

    Raises ApiError 400, naming the field and what is allowed.
    """
    try:
        values = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise wrong(f"the body is no valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise wrong("the body must be a JSON object")
    known = getattr(kind, "__struct_fields__")  # noqa: B009  # of every Struct
    for name in NEUTRAL.keys() & values.keys() & set(known):
        if asks_for_nothing(values[name]):
            values[name] = None
    for name in [name for name in values if name not in known]:
        value = values.pop(name)
        if name in NEUTRAL:
            _check_neutral(name, value)
        elif value is not None and name not in HARMLESS and not allow_unknown:
            raise _unknown(name, known)
    if allow_unknown:
        _drop_unknown(values)
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError:
        values = _with_numbers(values, msgspec.inspect.type_info(kind))
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None


def without_nulls(given: msgspec.Struct | None) -> dict[str, Any]:
    """The entries of a part of a body that are not null; none of what is not there."""
    values = {} if given is None else msgspec.structs.asdict(given)
    return {name: value for name, value in values.items() if value is not None}


def _with_numbers(value: Any, kind: msgspec.inspect.Type, *, text: bool = True) -> Any:
    """The value with its numbers as numbers where they are written in another way, as some clients
    do and pydantic takes them: 5.0 for an integer and, unless ``text`` is False, "5" or "0.7"."""
    if isinstance(kind, msgspec.inspect.Metadata):
        value = _with_numbers(value, kind.type, text=text)
    elif isinstance(kind, msgspec.inspect.UnionType):
        for one in kind.types:
            is_text = any(isinstance(other, msgspec.inspect.StrType) for other in kind.types)
            value = _with_numbers(value, one, text=text and not is_text)
    elif isinstance(kind, msgspec.inspect.IntType | msgspec.inspect.FloatType):
        if text and isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value) if "." in value else int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
    elif isinstance(kind, msgspec.inspect.ListType) and isinstance(value, list):
        value = [_with_numbers(one, kind.item_type, text=False) for one in value]
    elif isinstance(kind, msgspec.inspect.StructType) and isinstance(value, dict):
        kinds = {field.encode_name: field.type for field in kind.fields}
        value = {n: _with_numbers(v, kinds[n]) if n in kinds else v for n, v in value.items()}
    return value


def _drop_unknown(values: dict[str, Any]) -> None:
    """Leave out unknown fields of inner objects."""

    def only(value: Any, known: Sequence[str]) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: inner for name, inner in value.items() if name in known}

    if "stream_options" in values:
        values["stream_options"] = only(values["stream_options"], StreamOptions.__struct_fields__)
    messages = values.get("messages")
    if isinstance(messages, list):
        values["messages"] = messages = [only(message, MESSAGE_FIELDS) for message in messages]
        for message in messages:
            if isinstance(message, dict) and isinstance(message.get("content"), list):
                parts = message["content"]
                message["content"] = [
                    only(part, ("type", "text")) if only(part, ("type",)) == TEXT else part
                    for part in parts
                ]


def _check_neutral(name: str, value: Any) -> None:
    if asks_for_nothing(value, NEUTRAL[name]):
        return
    values = [*map(_json, NEUTRAL[name]), "null"]
    instead = f"; {_SUCCESSORS[name]} takes its place" if name in _SUCCESSORS else ""
    message = f"{name} is not supported{instead}; it may only be {' or '.join(values)}"
    raise wrong(message, name, "unsupported_value")


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _unknown(name: str, known: tuple[str, ...]) -> ApiError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return wrong(f"unknown field {name[:100]!r}{hint}", name[:100], "unknown_field")


def _invalid(message: str) -> ApiError:
    """msgspec's message in our words, with the field first."""
    what, _, path = message.partition(" - at `$")
    path = path.strip("`").lstrip(".")
    if match := re.fullmatch(r"Object (missing required|contains unknown) field `(.*)`", what):
        name = f"{path}.{match[2]}" if path else match[2]
        if match[1] == "contains unknown":
            return wrong(f"unknown field {name!r}", name, "unknown_field")
        return wrong(f"{name} is missing", name, "missing_required_parameter")
    name = path.replace("[...]", "")
    return wrong(f"{name}: {what[0].lower()}{what[1:]}".replace("`", ""), name or None)
