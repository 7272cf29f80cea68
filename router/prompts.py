"""Prompts as requests give them: a text, token ids, or a list of one of these."""

from router.errors import wrong
from router.generation import Prompt
from router.models import ServedModel
from router.schema import MOST_PROMPTS, Prompts
from router.service import Service


async def read_prompts(
    service: Service, model: ServedModel, given: Prompts, special: bool | None, param: str
) -> list[Prompt]:
    """The prompts that ``param`` has, as tokens. ``special``: add special tokens; None is yes.

    Raises ApiError, which blames ``param``, for a list of several sorts, or with too many or far
    too long texts.
    """
    if isinstance(given, str):
        given = [given]
    elif isinstance(given[0], int):
        given = [given]  # type: ignore[list-item]
    if len(given) > MOST_PROMPTS:
        raise wrong(f"{param}: a list may have at most {MOST_PROMPTS} prompts", param)
    kind = type(given[0])
    if any(type(one) is not kind for one in given) or kind is int:
        raise wrong(f"{param} must be a string, token ids, or a list of one of these", param)
    if kind is list:
        if any(type(i) is not int for one in given for i in one):  # type: ignore[union-attr]
            raise wrong(f"{param} must be a list of token ids, or a list of such", param)
        return [Prompt(ids) for ids in given]  # type: ignore[arg-type]
    texts: list[str] = given  # type: ignore[assignment]
    encoded = await service.encode(
        model, texts, special is not False, model.info.max_model_len, param
    )
    return [Prompt(ids, text) for text, ids in zip(texts, encoded, strict=True)]
