"""What an answer must match: from a request's fields to grammars that were tried."""

from engine.errors import RequestError
from engine.grammar_trial import trial_of
from engine.structured_outputs import StructuredOutputsParams
from router.errors import wrong
from router.fields import without_nulls
from router.models import ServedModel
from router.schema import Sampling


def outputs_of(body: Sampling) -> StructuredOutputsParams | None:
    """What ``response_format`` or ``structured_outputs`` ask for.

    Raises ApiError and RequestError, naming the field.
    """
    given = body.structured_outputs
    outputs = None if given is None else StructuredOutputsParams.of(without_nulls(given))
    form = _format_of(body)
    if form is not None and outputs is not None:
        raise wrong("response_format and structured_outputs cannot be had together")
    return outputs if form is None else form


def _format_of(body: Sampling) -> StructuredOutputsParams | None:
    form = body.response_format
    if form is None:
        return None
    if (form.type == "json_schema") != (form.json_schema is not None):
        raise wrong(
            "response_format must have json_schema if its type is json_schema, and only then",
            "response_format",
        )
    if form.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if form.json_schema is not None:
        return StructuredOutputsParams(json=form.json_schema.definition or {})
    return None


async def tried(model: ServedModel, outputs: StructuredOutputsParams) -> None:
    """Raises RequestError for what could not be enforced."""
    info = model.info
    await trial_of(info.tokenizer, info.revision, info.vocab_size).checked(outputs)


async def check_outputs(
    model: ServedModel, body: Sampling, outputs: StructuredOutputsParams | None
) -> None:
    """Raises ApiError and RequestError, naming the field, for what could not be enforced."""
    if outputs is None:
        return
    try:
        await tried(model, outputs)
    except RequestError as error:
        if body.structured_outputs is not None:
            raise
        why = str(error).removeprefix("structured_outputs.json")
        raise wrong(f"response_format{why}", "response_format") from None
