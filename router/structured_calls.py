"""Tool calls of the form that their tools ask for, and structured outputs in answers that have
thinking and calls."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.errors import RequestError
from engine.parsing.answers import AnswerFormat
from engine.parsing.structure import Schema, after_thinking, answer
from engine.structural_tag import Format, format_of
from engine.structured_outputs import StructuredOutputsParams
from engine.values import asks_for_nothing
from router.errors import wrong
from router.models import ServedModel
from router.structured import tried
from router.tools import ToolUse

NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}


async def in_answers(
    model: ServedModel,
    form: AnswerFormat,
    use: ToolUse,
    opened: bool,
    goes_on: bool,
    outputs: StructuredOutputsParams | None,
) -> StructuredOutputsParams | None:
    """What answers must match so that calls are those of ``use``, and so that what is no call, and
    comes after the thinking, is of the form ``outputs``, if there is one. ``outputs`` itself if it
    can stay as it is.

    opened: whether the prompt has begun the thinking. goes_on: whether it ends with a part of the
    answer. Raises ApiError, naming the tool, for a strict one whose schema could not be enforced.
    """
    constrains = use.forced or use.strict or outputs is not None
    calls = bool(use.tools) and bool(form.layouts) and constrains
    thoughts = form.thoughts if opened or not goes_on else ()
    if not constrains or not (calls or thoughts):
        return outputs
    content = None if outputs is None else format_of(outputs)
    if content is not None and form.said and not goes_on:
        said = {"type": "const_string", "value": form.said}
        content = {"type": "sequence", "elements": [said, content]}
    if calls:
        tools = await _schemas(model, form, use)
        layouts = form.layouts if use.forced or content is not None else form.marked
        whole = answer(layouts, tools, use.forced, use.most_calls == 1, content)
    elif content is not None:
        whole = content
    else:
        return None
    found = _params(after_thinking(whole, thoughts, form.unthinkable, opened), outputs)
    try:
        await tried(model, found)
    except RequestError as error:
        if not use.strict and outputs is None:
            return None  # the prompt can begin the call
        raise wrong(f"tools: {_reason(error)}", "tools") from None
    return found


def _params(form: Format, like: StructuredOutputsParams | None = None) -> StructuredOutputsParams:
    made = StructuredOutputsParams(structural_tag={"format": form})
    if like is None:
        return made
    return replace(
        made,
        whitespace_pattern=like.whitespace_pattern,
        disable_any_whitespace=like.disable_any_whitespace,
    )


async def _schemas(
    model: ServedModel, form: AnswerFormat, use: ToolUse
) -> dict[str, Schema | None]:
    """The schemas of the tools that may be called; None for what could not be enforced of tools
    that are not strict."""
    found: dict[str, Schema | None] = {}
    for number, tool in enumerate(use.tools):
        function = tool["function"]
        if use.name not in (None, function["name"]):
            continue
        try:
            schema = _schema(function)
            await tried(model, _params(form.layouts[0].arguments(schema)))
        except RequestError as error:
            if function.get("strict") is True:
                where = f"tools[{number}].function.parameters"
                raise wrong(f"{where} of {function['name']}: {_reason(error)}", where) from None
            schema = None
        found[function["name"]] = schema
    return found


def _schema(function: Mapping[str, Any]) -> Schema:
    """That of a tool's arguments, which are an object. Raises RequestError."""
    schema = function.get("parameters")
    if asks_for_nothing(schema):
        return NO_ARGUMENTS
    assert isinstance(schema, Mapping)
    if schema.get("type", "object") != "object":
        raise RequestError("its type must be object")
    return {"type": "object", **schema}


def _reason(error: RequestError) -> str:
    return str(error).removeprefix("structured_outputs.structural_tag").lstrip(": ")
