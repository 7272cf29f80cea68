"""The ``openai`` package against the server: what applications written for OpenAI's API do."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from manta import LLM, SamplingParams
from tests.support.server import ENGINE_OPTIONS, Server, serving

MODEL = "manta-demo"
JOKE: list[Any] = [{"role": "user", "content": "Tell me a joke."}]
FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    router = {"api_key": ["sk-one", "sk-two"], "served_model_name": [MODEL, "alias"]}
    with serving(router, max_num_seqs=8, max_queued_requests=8) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-two", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(**ENGINE_OPTIONS)


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL, "alias"]
    assert client.models.retrieve("alias").owned_by == "manta"
    assert client.completions.create(model="alias", prompt=FRANCE).model == "alias"


def test_chat_equals_offline(client: openai.OpenAI, llm: LLM) -> None:
    (expected,) = llm.chat(JOKE, SamplingParams(temperature=0, max_tokens=50))
    answer = client.chat.completions.create(model=MODEL, messages=JOKE, temperature=0)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.outputs[0].text
    assert choice.finish_reason == expected.outputs[0].finish_reason == "stop"
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint and answer._request_id == answer.id
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens == len(expected.prompt_token_ids)
    assert usage.completion_tokens == len(expected.outputs[0].token_ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("seed", [7, 2**62])
def test_seeded_samples_equal_offline(seed: int, client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(n=3, seed=seed, temperature=1.5, top_p=0.95, top_k=50, max_tokens=12)
    (expected,) = llm.generate("Hello", params)
    fields: dict[str, Any] = dict(
        model=MODEL, prompt="Hello", n=3, seed=seed, temperature=1.5, top_p=0.95, max_tokens=12
    )
    answer = client.completions.create(**fields, extra_body={"top_k": 50})
    texts = [output.text for output in expected.outputs]
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in client.completions.create(**fields, stream=True, extra_body={"top_k": 50}):
        for part in chunk.choices:
            streamed[part.index] += part.text
    assert streamed == texts
    assert len(set(texts)) == 3


def test_streamed_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=JOKE, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=JOKE,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[0].object == "chat.completion.chunk"
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    assert all(chunk.choices[0].finish_reason is None for chunk in middle)
    assert last.choices[0].finish_reason == "stop"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert len(middle) > 5  # token by token, not all at the end
    assert usage.choices == [] and usage.usage is not None and whole.usage is not None
    assert usage.usage.completion_tokens == whole.usage.completion_tokens
    assert usage.usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_usage_in_every_chunk(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(
            model=MODEL, prompt=FRANCE, temperature=0, stream=True, stream_options=options,
            extra_body={"ignore_eos": True},
        )
    )  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert len(counts) == len(chunks) and counts == sorted(counts)
    assert counts[0] < counts[-1] == 16 == counts[-2]


def test_async_requests_side_by_side(server: Server, client: openai.OpenAI, llm: LLM) -> None:
    prompts = [f"{FRANCE} {word}" for word in ("not", "a", "big", "city", "and", "the")]
    params = SamplingParams(temperature=0, max_tokens=20)
    expected = [output.outputs[0].text for output in llm.generate(prompts, params)]

    async def complete(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=20, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def run() -> list[str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="sk-one", max_retries=0) as client:
            return await asyncio.gather(*(complete(client, prompt) for prompt in prompts))

    assert asyncio.run(run()) == expected
    answer = client.completions.create(
        model=MODEL, prompt=prompts, temperature=0, max_tokens=20
    )  # and as one request
    assert [choice.text for choice in answer.choices] == expected


def test_prompts_of_every_kind(client: openai.OpenAI, llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(FRANCE)
    texts = []
    kinds: list[Any] = [FRANCE, [FRANCE], ids, [ids], [FRANCE, FRANCE], [ids, ids]]
    for prompt in kinds:
        answer = client.completions.create(
            model=MODEL, prompt=prompt, temperature=0, extra_body={"return_token_ids": True}
        )
        for choice in answer.choices:
            texts.append(choice.text)
            extra = choice.model_extra or {}
            assert extra["prompt_token_ids"] == ids
            decoded = llm.get_tokenizer().decode(extra["token_ids"], skip_special_tokens=True)
            assert decoded == choice.text
    assert len(texts) == 8 and len(set(texts)) == 1


def test_cached_tokens(client: openai.OpenAI) -> None:
    prompt = "one two three four five six seven eight nine ten " * 20
    usages = [client.completions.create(model=MODEL, prompt=prompt).usage for _ in range(2)]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]  # type: ignore[union-attr]
    assert cached[0] == 0 and cached[1] >= 32


def test_stop(client: openai.OpenAI, server: Server) -> None:
    whole = client.completions.create(model=MODEL, prompt=FRANCE, temperature=0).choices[0].text
    stop = whole[6:9]
    for stream in (False, True):
        fields: dict[str, Any] = dict(model=MODEL, prompt=FRANCE, temperature=0, stop=[stop, "zz"])
        if stream:
            chunks = list(client.completions.create(**fields, stream=True))
            text = "".join(chunk.choices[0].text for chunk in chunks)
            end = chunks[-1].choices[0]
        else:
            end = client.completions.create(**fields).choices[0]
            text = end.text
        assert text == whole[: whole.index(stop)]
        assert end.finish_reason == "stop"
        assert (end.model_extra or {})["stop_reason"] == stop
    before = server.engine.stats.generation_tokens
    extra = {"ignore_eos": True}
    client.completions.create(
        model=MODEL, prompt=FRANCE, temperature=0, stop=stop, max_tokens=1900, extra_body=extra
    )
    server.assert_idle()
    assert server.engine.stats.generation_tokens - before < 200  # the engine was told
    included = client.completions.create(
        model=MODEL,
        prompt=FRANCE,
        temperature=0,
        stop=stop,
        extra_body={"include_stop_str_in_output": True},
    )
    assert included.choices[0].text == whole[: whole.index(stop) + len(stop)]


def test_chat_logprobs(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3)
    (expected,) = llm.chat(JOKE, params)
    entries = expected.outputs[0].logprobs
    assert entries is not None
    fields: dict[str, Any] = dict(
        model=MODEL, messages=JOKE, temperature=0, max_completion_tokens=8, logprobs=True,
        top_logprobs=3,
    )  # fmt: skip
    answer = client.chat.completions.create(**fields).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content is not None
    content = answer.logprobs.content
    streamed = []
    for chunk in client.chat.completions.create(**fields, stream=True):
        for part in chunk.choices:
            if part.logprobs is not None and part.logprobs.content is not None:
                streamed += part.logprobs.content
    assert streamed == content
    assert len(content) == len(entries) == 8
    for shown, token, position in zip(content, expected.outputs[0].token_ids, entries, strict=True):
        assert shown.token == position[token].decoded_token
        assert shown.bytes == list(shown.token.encode())
        assert shown.logprob == pytest.approx(position[token].logprob, abs=1e-5)
        top = sorted(position.values(), key=lambda entry: entry.rank)[:3]
        assert [one.token for one in shown.top_logprobs] == [one.decoded_token for one in top]
    assert "".join(one.token for one in content) == answer.message.content


def test_completion_logprobs_and_echo(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=2)
    (expected,) = llm.generate(FRANCE, params)
    fields: dict[str, Any] = dict(
        model=MODEL, prompt=FRANCE, temperature=0, max_tokens=4, logprobs=2, echo=True
    )
    choice = client.completions.create(**fields).choices[0]
    shown = choice.logprobs
    assert shown is not None
    assert shown.tokens is not None and shown.text_offset is not None
    assert shown.token_logprobs is not None and shown.top_logprobs is not None
    assert choice.text == FRANCE + expected.outputs[0].text == "".join(shown.tokens)
    for token, offset in zip(shown.tokens, shown.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)
    assert shown.token_logprobs[0] is None and shown.top_logprobs[0] is None
    ids = [*expected.prompt_token_ids, *expected.outputs[0].token_ids]
    positions = [*(expected.prompt_logprobs or []), *(expected.outputs[0].logprobs or [])]
    for i in range(1, len(ids)):
        position = positions[i]
        assert position is not None
        assert shown.token_logprobs[i] == pytest.approx(position[ids[i]].logprob, abs=1e-3)
        assert len(shown.top_logprobs[i]) == len(position)
    text, logprobs = "", []
    for chunk in client.completions.create(**fields, stream=True):
        part = chunk.choices[0]
        text += part.text
        assert part.logprobs is not None
        logprobs += part.logprobs.token_logprobs or []
    assert text == choice.text and logprobs == pytest.approx(shown.token_logprobs)
    plain = client.completions.create(
        model=MODEL, prompt=FRANCE, temperature=0, max_tokens=4, echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in plain) == choice.text


def test_scoring_a_prompt_without_output(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=FRANCE, max_tokens=0, echo=True, logprobs=0
    )
    choice = answer.choices[0]
    assert choice.text == FRANCE and choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == FRANCE
    assert answer.usage is not None and answer.usage.completion_tokens == 0


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    extra = {"prompt_logprobs": 1}
    completion = client.completions.create(model=MODEL, prompt=FRANCE, extra_body=extra)
    shown = (completion.choices[0].model_extra or {})["prompt_logprobs"]
    assert shown[0] is None
    entry = next(iter(shown[1].values()))
    assert set(entry) == {"logprob", "rank", "decoded_token"}
    chat = client.chat.completions.create(
        model=MODEL, messages=JOKE, max_completion_tokens=1, extra_body=extra
    )
    assert chat.usage is not None
    assert len((chat.model_extra or {})["prompt_logprobs"]) == chat.usage.prompt_tokens


def test_a_message_goes_on(client: openai.OpenAI) -> None:
    messages: list[Any] = [*JOKE, {"role": "assistant", "content": "Why did the"}]
    extra: dict[str, Any] = {"continue_final_message": True, "echo": True}
    fields: dict[str, Any] = dict(model=MODEL, messages=messages, temperature=0)
    answer = client.chat.completions.create(**fields, extra_body=extra)
    whole = client.chat.completions.create(model=MODEL, messages=JOKE, temperature=0)
    assert answer.choices[0].message.content == whole.choices[0].message.content
    stream = client.chat.completions.create(**fields, stream=True, extra_body=extra)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    answer = client.chat.completions.create(**fields, extra_body={"continue_final_message": True})
    assert answer.choices[0].message.content == (
        (whole.choices[0].message.content or "").removeprefix("Why did the")
    )


def test_text_parts_and_an_answer_sent_back(client: openai.OpenAI) -> None:
    parts: list[Any] = [{"role": "user", "content": [{"type": "text", "text": JOKE[0]["content"]}]}]
    first = client.chat.completions.create(model=MODEL, messages=JOKE, temperature=0)
    second = client.chat.completions.create(model=MODEL, messages=parts, temperature=0)
    assert first.choices[0].message.content == second.choices[0].message.content
    history: list[Any] = [*JOKE, first.choices[0].message, {"role": "user", "content": "Again!"}]
    assert client.chat.completions.create(model=MODEL, messages=history).choices[0].message.content


def test_sampling_fields_reach_the_engine(client: openai.OpenAI, llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    allowed = tokenizer.encode(" Paris London Rome")
    fields: dict[str, Any] = dict(model=MODEL, prompt=FRANCE, max_tokens=6, seed=1)

    def ids(**extra: Any) -> list[int]:
        answer = client.completions.create(
            **fields, extra_body={"return_token_ids": True, **extra}
        ).choices[0]
        return list((answer.model_extra or {})["token_ids"])

    assert set(ids(allowed_token_ids=allowed, ignore_eos=True)) <= set(allowed)
    (paris,) = tokenizer.encode(" Paris")
    assert ids(temperature=0)[0] == paris
    assert ids(temperature=0, logit_bias={str(paris): -100})[0] != paris
    assert ids(temperature=0, bad_words=["Paris"])[0] != paris
    assert ids(temperature=0, stop_token_ids=[paris]) == [paris]
    assert len(ids(temperature=0, stop_token_ids=[paris], min_tokens=3)) >= 3
    assert ids(top_k=1) == ids(temperature=0) == ids(min_p=1.0)
    assert ids(temperature=0, max_tokens=2) == ids(temperature=0)[:2]
    fields |= {"prompt": "Hello", "temperature": 0, "max_tokens": 40}
    for penalty in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
        assert ids(**{penalty: 2.0}) != ids() == ids()


ERRORS: list[tuple[type[openai.APIStatusError], dict[str, Any], str, str | None, str]] = [
    (openai.NotFoundError, {"model": "gpt"}, "model", "model_not_found", "does not exist"),
    (openai.BadRequestError, {"temperature": -1.0}, "temperature", None, "temperature"),
    (openai.BadRequestError, {"max_tokens": 0}, "max_tokens", None, "at least 1, but with echo"),
    (openai.BadRequestError, {"suffix": "x"}, "suffix", "unsupported_value", "not supported"),
    (openai.BadRequestError, {"extra_body": {"tempature": 1}}, "tempature", "unknown_field",
     "did you mean temperature"),
    (openai.BadRequestError, {"extra_body": {"min_tokens": 17}}, "min_tokens", None, "max_tokens"),
    (openai.BadRequestError, {"prompt": [5000]}, "prompt", None, "token id 5000"),
    (openai.BadRequestError, {"prompt": []}, "prompt", None, "length >= 1"),
    (openai.BadRequestError, {"prompt": ["a", 1]}, "prompt", None, "must be a string"),
    (openai.BadRequestError, {"prompt": [[1], [1, "a"]]}, "prompt[1][1]", None, "expected int"),
    (openai.BadRequestError, {"logprobs": 21}, "logprobs", None, "max_logprobs"),
    (openai.BadRequestError, {"n": 2, "temperature": 0}, "n", None, "greedy"),
    (openai.BadRequestError, {"stream": True, "extra_body": {"prompt_logprobs": 1}},
     "prompt_logprobs", None, "stream"),
    (openai.BadRequestError, {"stream_options": {"include_usage": True}}, "stream_options", None,
     "stream"),
    (openai.BadRequestError, {"prompt": "word " * 3000}, "prompt", "context_length_exceeded",
     "maximum context length is 2048"),
    (openai.BadRequestError, {"max_tokens": 2048}, "prompt", "context_length_exceeded",
     "2048 of output"),
    (openai.BadRequestError, {"extra_body": {"priority": 1}}, "priority", None, "priority"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fields", "param", "code", "words"), ERRORS, ids=[str(e[1])[:40] for e in ERRORS]
)
def test_errors_are_the_clients_own(
    kind: type[openai.APIStatusError],
    fields: dict[str, Any],
    param: str,
    code: str | None,
    words: str,
    client: openai.OpenAI,
) -> None:
    request: dict[str, Any] = {"model": MODEL, "prompt": FRANCE, **fields}
    with pytest.raises(kind) as caught:
        client.completions.create(**request)
    error = caught.value
    assert error.type == "invalid_request_error"
    assert (error.param, error.code) == (param, code)
    assert words in error.message


def test_chat_errors(client: openai.OpenAI) -> None:
    def refused(kind: type[openai.APIStatusError], **fields: Any) -> str:
        with pytest.raises(kind) as caught:
            client.chat.completions.create(**{"model": MODEL, "messages": JOKE, **fields})
        return caught.value.message

    judge = [*JOKE, {"role": "judge", "content": "x"}]
    assert "Unknown role" in refused(openai.UnprocessableEntityError, messages=judge)
    assert "messages[0]" in refused(openai.BadRequestError, messages=[{"role": "user"}])
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert "only text" in refused(
        openai.BadRequestError, messages=[{"role": "user", "content": image}]
    )
    assert "response_format" in refused(openai.BadRequestError, response_format={"type": "grammar"})
    assert "needs logprobs" in refused(openai.BadRequestError, top_logprobs=2)
    template = {"chat_template": "{{ messages[0].content }}"}
    assert "takes no templates" in refused(openai.BadRequestError, extra_body=template)
    documents = {"documents": [{"title": "a", "text": "b"}]}
    assert "documents: the chat template takes none" in refused(
        openai.UnprocessableEntityError, extra_body=documents
    )
    long = [{"role": "user", "content": "word " * 3000}]
    assert "maximum context length" in refused(openai.BadRequestError, messages=long)


def test_a_wrong_key(server: Server) -> None:
    for key in ("sk-three", "sk-on"):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        with client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"


def test_a_full_queue(client: openai.OpenAI, server: Server) -> None:
    """8 run, 8 wait; one more is refused, and all the others are answered."""
    fields: dict[str, Any] = dict(
        model=MODEL, prompt=FRANCE, n=8, max_tokens=200, stream=True, temperature=1,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    with (
        client.completions.create(**fields) as first,
        client.completions.create(**fields) as second,
    ):
        next(iter(first))
        for stream in (True, False):
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(model=MODEL, prompt=FRANCE, stream=stream)
            assert caught.value.code == "rate_limit_exceeded"
            assert caught.value.response.headers["retry-after"] == "1"
        for stream in (first, second):
            ends = [part.finish_reason for chunk in stream for part in chunk.choices]
            assert ends.count("length") == 8
    server.assert_idle()


def test_a_stream_that_is_closed_frees_everything(client: openai.OpenAI, server: Server) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=JOKE, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.engine.num_unfinished == 1
    stream.close()
    server.assert_idle()


def test_a_request_that_times_out_frees_everything(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(
            model=MODEL, messages=JOKE, extra_body={"ignore_eos": True}
        )
    server.assert_idle()
