"""Embeddings and scores, as ``LLM`` and the router ask for them: texts to requests, and outputs to
vectors."""

from collections.abc import Iterator, Sequence

from cluster.prompts import Tokenized
from engine.continuation import Continuation, begin
from engine.errors import EngineError, RequestError
from engine.outputs import RequestOutput
from engine.pooling import (
    NO_SAMPLING,
    Pooling,
    PoolingParams,
    Vector,
)
from engine.tokenizer import Tokenizer


def pooling_requests(
    prompts: Sequence[Tokenized],
    priorities: Sequence[int],
    timeout: float | None,
    request_ids: Iterator[str],
) -> list[Continuation]:
    """A request for a vector of each prompt."""
    return [
        begin(next(request_ids), ids, NO_SAMPLING, pools=True, priority=priority, timeout=timeout)
        for (_, ids), priority in zip(prompts, priorities, strict=True)
    ]


def pooled(pooling: Pooling, params: PoolingParams, output: RequestOutput) -> Vector:
    """The vector of a finished request. Raises EngineError, saying why, if it has none."""
    if output.vector is None:
        (end,) = output.outputs
        raise EngineError(f"no vector came of a prompt: {end.stop_reason or end.finish_reason}")
    return params.finish(pooling, output.vector)


def paired(queries: str | Sequence[str], documents: str | Sequence[str]) -> list[tuple[str, str]]:
    """Each query with its document, or one query with every document.

    Raises RequestError for other numbers of them.
    """
    firsts = [queries] if isinstance(queries, str) else list(queries)
    seconds = [documents] if isinstance(documents, str) else list(documents)
    if len(firsts) == 1:
        firsts *= len(seconds)
    if not seconds or len(firsts) != len(seconds):
        raise RequestError(
            f"text_2 must have a text for each of text_1's, or text_1 one for all: got"
            f" {len(firsts)} and {len(seconds)}"
        )
    return list(zip(firsts, seconds, strict=True))


def pair_template(tokenizer: Tokenizer, given: str | None) -> str | None:
    """The template for ``pair_text``: ``given``, else the checkpoint's own if it has the roles."""
    own = tokenizer.chat_template(given, with_tools=False)
    knows = own is not None and "query" in own and "document" in own
    return own if given is not None or knows else None


def pair_text(tokenizer: Tokenizer, query: str, document: str, template: str | None) -> str:
    """The prompt of which a score is made: as ``template`` has the messages of roles query and
    document, for ``Tokenizer.encode_chat``; else one after the other, as vLLM has it.

    Raises RequestError for what the template refuses.
    """
    if template is None:
        return query + document
    messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    return tokenizer.render_chat(messages, template, add_generation_prompt=False)


def pair_prompt(tokenizer: Tokenizer, query: str, document: str, template: str | None) -> Tokenized:
    """``pair_text`` as tokens."""
    text = pair_text(tokenizer, query, document, template)
    return (text, tokenizer.encode(text)) if template is None else tokenizer.encode_chat(text)
