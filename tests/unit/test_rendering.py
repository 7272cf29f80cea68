"""Templates that would never end or take all memory, in the process that renders them."""

from collections.abc import Iterator
from typing import Any

import pytest

from engine import chat
from engine.errors import RequestError
from router import rendering
from router.rendering import Renderer

HELLO = [{"role": "user", "content": "Hello"}]
OPTIONS: dict[str, Any] = {
    "add_generation_prompt": True,
    "continue_final_message": False,
    "tools": None,
    "special_tokens": {"bos_token": "<s>"},
    "template_kwargs": {},
}
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    renderer = Renderer()
    yield renderer
    renderer.stop()


def test_it_renders_and_refuses_as_in_this_process(renderer: Renderer) -> None:
    assert renderer.render(PLAIN, HELLO, **OPTIONS) == chat.render(PLAIN, HELLO, **OPTIONS)
    large = [{**HELLO[0], "tool_calls": [{"function": {"name": "f", "arguments": 10**30}}]}]
    calls = "{{ messages[0].tool_calls | tojson }}"
    assert renderer.render(calls, large, **OPTIONS) == chat.render(calls, large, **OPTIONS)
    for template, messages in (
        ("{{ raise_exception('no') }}", HELLO),
        ("{% if %}", HELLO),
        (PLAIN, []),
        (PLAIN, [{"role": "user"}]),
    ):
        with pytest.raises(RequestError) as here:
            chat.render(template, messages, **OPTIONS)
        with pytest.raises(RequestError) as there:
            renderer.render(template, messages, **OPTIONS)
        assert str(there.value) == str(here.value)


def test_what_cannot_be_sent_or_shown_is_refused(renderer: Renderer) -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RequestError, match="messages: a value is nested too deeply"):
        renderer.render(PLAIN, [{**HELLO[0], "tool_calls": deep}], **OPTIONS)
    with pytest.raises(RequestError, match="no valid Unicode"):
        renderer.render(PLAIN, [{"role": "user", "content": "\ud800"}], **OPTIONS)
    assert renderer.render(PLAIN, HELLO, **OPTIONS) == "<s>user: Hello;"


LOOP = "{% for a in range(99999) %}"
ENDLESS = {
    "ranges in ranges": LOOP * 4 + "x" + "{% endfor %}" * 4,
    "a silent loop": LOOP * 4 + "{% set b = a %}" + "{% endfor %}" * 4,
    "a long string, known when it is compiled": "{{ ('a' * 10**10) | length }}",
    "a long string": "{{ (messages[0].content * 10**10) | length }}",
    "a long list": "{{ ([1] * 10**10) | length }}",
    "a wide field": "{{ '%9999999999d' % 1 }}",
    "doubling": "{% set n = namespace(s='ab') %}"
    "{% for i in range(50) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "a filter": "{{ messages[0].content | center(10**10) }}",
    "a long prompt": "{{ 'a' * 10**8 }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_takes_too_much_is_refused_and_the_next_is_served(
    name: str, renderer: Renderer
) -> None:
    with pytest.raises(RequestError, match=r"the chat template (takes|makes|refuses)"):
        renderer.render(ENDLESS[name], HELLO, **OPTIONS)
    assert renderer.render(PLAIN, HELLO, **OPTIONS) == "<s>user: Hello;"


def test_a_child_that_answers_nothing_is_killed_and_replaced(monkeypatch: Any) -> None:
    monkeypatch.setattr(rendering, "WALL_SECONDS", 1.0)
    renderer = Renderer()
    renderer.start()
    with pytest.raises(RequestError, match="more time or memory than it may"):
        renderer.render(
            "{{ (10 ** (10 ** 9)) % 7 }}", HELLO, **OPTIONS
        )  # no signal gets in between
    monkeypatch.undo()
    assert renderer.render(PLAIN, HELLO, **OPTIONS) == "<s>user: Hello;"
    renderer.stop()
