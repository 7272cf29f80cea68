"""GET /dashboard in a real browser: what it shows is what /metrics says, and it talks."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from playwright.sync_api import Browser, Page, Request, sync_playwright
from prometheus_client.parser import text_string_to_metric_families

from router.dashboard import HEADERS, files
from tests.support.server import Server, serving
from tests.support.waiting import PATIENCE, until

KEY = "sk-a-key-of-the-tests"
MODEL = "manta-demo"
AUTH = {"Authorization": f"Bearer {KEY}"}
PHONE = {"width": 390, "height": 844}
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    router = {"api_key": KEY, "served_model_name": MODEL}
    with serving(router, num_gpu_blocks_override=48, max_num_seqs=12, max_model_len=512) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    assert program, "Chromium is needed: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def wait_for(page: Page, expression: str) -> None:
    """Until it is true on the page, whose policy lets nobody but the browser's tools evaluate."""
    until(lambda: page.evaluate(expression), PATIENCE)


class Tab:
    """A page of a browser of its own, with what it asked for and complained of."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.page: Page = browser.new_context(**options).new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        self.errors: list[str] = []
        self.asked: list[Request] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: line.type == "error" and self.errors.append(line.text))
        self.page.on("request", lambda request: self.asked.append(request))

    def sign_in(self, server: Server, view: str = "") -> Page:
        self.page.goto(f"{server.url}/dashboard{view}")
        self.page.fill("#key", KEY)
        self.page.click("#login-form button")
        self.page.wait_for_selector("#login", state="hidden")
        return self.page


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    tab = Tab(browser, viewport={"width": 1280, "height": 900}, color_scheme="dark")
    yield tab
    tab.page.context.close()
    assert tab.errors == []


def load(server: Server) -> None:
    """12 long answers at once: more than there are blocks for."""
    body = {"model": MODEL, "prompt": "Once upon a time", "n": 12, "max_tokens": 90,
            "ignore_eos": True, "temperature": 1.0, "seed": 1}  # fmt: skip
    httpx.post(f"{server.url}/v1/completions", json=body, headers=AUTH, timeout=PATIENCE)


def counted(server: Server) -> dict[str, float]:
    """The sums of /metrics by name."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            name = sample.name.removeprefix("manta:").removesuffix("_total")
            sums[name] = sums.get(name, 0) + sample.value
    return sums


def test_the_page_asks_for_the_key_and_keeps_it_to_itself(server: Server, tab: Tab) -> None:
    page = tab.page
    page.goto(f"{server.url}/dashboard")
    page.wait_for_selector("#login[open]")
    assert (
        not page.query_selector(".engine") and "engines" not in page.content().split("<dialog")[1]
    )
    page.fill("#key", "sk-wrong")
    page.click("#login-form button")
    wait_for(page, "document.getElementById('login-error').textContent")
    assert page.text_content("#login-error") == "the API key is wrong"
    assert len(tab.errors) == 1 and "401" in tab.errors.pop()  # Chromium's own line
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.wait_for_selector(".engine")
    wait_for(page, "document.getElementById('state').textContent == '1 of 1 engine healthy'")
    (cookie,) = page.context.cookies()
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and KEY not in cookie["value"]
    page.reload()
    page.wait_for_selector(".engine")  # the session holds
    assert not page.query_selector("#login[open]")
    urls = [request.url for request in tab.asked]
    assert len(urls) > 8 and not [url for url in urls if KEY in url or "?" in url]
    stored = page.evaluate(
        "[JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie]"
    )
    assert KEY not in json.dumps(stored) and stored[2] == ""
    page.click("#logout")
    page.wait_for_selector("#login[open]")


def test_numbers_are_those_of_metrics(server: Server, tab: Tab) -> None:
    page = tab.sign_in(server)
    page.wait_for_selector(".engine")
    load(server)

    def same() -> bool:
        page.wait_for_timeout(200)
        sums = counted(server)
        wanted = {name: f"{sums[name]:,.0f}" for name in (
            "num_requests_running", "num_requests_waiting", "generation_tokens", "prompt_tokens",
            "preemptions_by_kind",
        )}  # fmt: skip
        for name in ("kv_blocks", "cpu_kv_blocks"):
            wanted[name] = f"{sums[name + '_used']:,.0f} / {sums[name]:,.0f}"
        assert sums["preemptions_by_kind"] > 0 and sums["generation_tokens"] >= 1080
        return wanted == {name: page.text_content(f"[data-fact={name}]") for name in wanted}

    until(same, PATIENCE)
    plots = page.query_selector_all(".plot canvas")
    assert len(plots) == len(page.query_selector_all(".plot")) == 9
    speed = page.evaluate("document.querySelector('.plot .legend b').textContent")
    assert re.fullmatch(r"[\d.]+", speed) and float(speed) > 0  # within the last ten seconds
    shown = dict(t.inner_text().split("\n", 1) for t in page.query_selector_all(".tile"))
    assert shown["Running"] == shown["Waiting"] == "0"
    assert shown["Tokens in all"] == f"{counted(server)['generation_tokens']:.0f}"


def test_a_chat_is_streamed_with_its_probabilities(server: Server, tab: Tab) -> None:
    page = tab.sign_in(server, "#playground")
    page.fill("[name=temperature]", "0")
    page.fill("[name=max_tokens]", "24")
    page.evaluate("""() => { window.grown = new Set(); new MutationObserver(() => {
        window.grown.add(document.querySelector('.assistant .body')?.textContent.length);
    }).observe(document.getElementById('messages'), { subtree: true, childList: true }); }""")
    page.fill("#text", QUESTION)
    page.press("#text", "Enter")
    wait_for(page, "/ · (stop|length)$/.test(document.querySelector('.facts')?.textContent)")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0,
            max_tokens=24, logprobs=True, top_logprobs=5,
        )  # fmt: skip
    assert answer.usage is not None and answer.choices[0].logprobs is not None
    assert page.text_content(".assistant .body") == answer.choices[0].message.content
    assert len(page.evaluate("[...window.grown]")) >= 4
    facts = page.text_content(".facts") or ""
    assert f" {answer.usage.completion_tokens} tokens · {answer.usage.prompt_tokens} of" in facts
    token = (answer.choices[0].logprobs.content or [])[0]
    page.hover(".assistant .token >> nth=0")
    page.wait_for_selector("#hover:not([hidden])")
    rows = page.query_selector_all("#hover code")
    assert [r.text_content() for r in rows] == [top.token for top in token.top_logprobs]
    assert page.text_content("#hover span.chosen") == f"{math.exp(token.logprob) * 100:.1f}%"
    # The chat goes on: what was said before is part of the next request.
    page.fill("#text", "And of <b>Italy</b>?")
    page.click("#send")
    page.wait_for_selector(".assistant >> nth=1")
    assert page.text_content(".user >> nth=1") == "And of <b>Italy</b>?"  # text, never markup
    sent = [r.post_data_json for r in tab.asked if r.url.endswith("/v1/chat/completions")]
    assert [m["role"] for m in sent[1]["messages"]] == ["user", "assistant", "user"]
    assert (sent[0]["temperature"], sent[0]["max_tokens"]) == (0, 24) and "seed" not in sent[0]


def test_an_answer_can_be_stopped_and_a_mistake_is_shown(server: Server, tab: Tab) -> None:
    page = tab.sign_in(server, "#playground")
    page.fill("[name=max_tokens]", "100000")
    page.fill("#text", QUESTION)
    page.click("#send")
    page.wait_for_selector(".assistant .error")
    assert "maximum context length is 512" in (page.text_content(".assistant .error") or "")
    assert len(tab.errors) == 1 and "400" in tab.errors.pop()  # Chromium's own line
    page.fill("[name=max_tokens]", "")
    page.fill("[name=temperature]", "100")  # any token is as likely as another, the end too
    page.fill("#text", QUESTION)
    page.click("#send")
    wait_for(page, "document.querySelectorAll('.assistant .token').length > 5")
    page.click("#stop")
    page.wait_for_selector("#send:not([hidden])")
    assert (page.text_content(".assistant >> nth=1") or "").endswith("stopped")
    server.assert_idle()


def test_thinking_and_tool_calls_are_shown(server: Server, tab: Tab) -> None:
    """The page has no fields for tools and thinking: both are added to its request on the way."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    more = {"tools": [tool], "chat_template_kwargs": {"enable_thinking": True}, "temperature": 0}
    page = tab.sign_in(server, "#playground")
    page.route("**/v1/chat/completions", lambda route: route.continue_(
        post_data=json.dumps(route.request.post_data_json | more)))  # fmt: skip
    page.fill("#text", "What is the weather in Paris?")
    page.click("#send")
    page.wait_for_selector(".assistant pre")
    page.wait_for_selector("#send:not([hidden])")
    thought = "The user wants the weather in Paris. I call get_weather."
    assert page.text_content(".assistant details span") == thought
    assert page.text_content(".assistant .body") == ""
    assert page.text_content(".assistant pre") == 'get_weather({"city": "Paris"})'


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_it_fits_a_phone_in_both_themes(server: Server, browser: Browser, scheme: Any) -> None:
    tab = Tab(browser, viewport=PHONE, color_scheme=scheme, is_mobile=True, has_touch=True)
    page = tab.sign_in(server)
    page.wait_for_selector(".engine")
    theme = "document.documentElement.dataset.theme"
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(theme) == scheme
    before = page.evaluate(ground)
    for view in ("live", "playground"):
        page.click(f"#tab-{view}")
        page.wait_for_selector(f"#{view}:not([hidden])")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.click("#theme")
    assert page.evaluate(theme) != scheme and page.evaluate(ground) != before
    page.reload()
    assert page.evaluate(theme) != scheme  # it is remembered
    page.context.close()
    assert tab.errors == []


def test_scripts_of_others_do_not_run(server: Server, tab: Tab) -> None:
    page = tab.sign_in(server)
    page.evaluate("""() => { const script = document.createElement('script');
        script.textContent = 'window.foreign = 1'; document.body.append(script); }""")
    assert page.evaluate("window.foreign === undefined")
    assert len(tab.errors) == 1 and "Content Security Policy" in tab.errors.pop()


def test_files_are_open_and_what_they_show_is_not(server: Server) -> None:
    url = f"{server.url}/dashboard"
    for path in ("", *(f"/{name}" for name in files())):
        answer = httpx.get(url + path)
        assert answer.status_code == 200
        assert HEADERS.items() <= dict(answer.headers).items()
        assert not re.search(r"https?://(?!www\.w3\.org|github\.com/leeoniya)", answer.text), path
    for path in ("/data", "/no-such-file"):
        assert httpx.get(url + path).status_code == 401
        status = 200 if path == "/data" else 404
        assert httpx.get(url + path, headers=AUTH).status_code == status
    for body in ("", "x", "[]", '{"key": 5}', '"\xff"'):
        assert httpx.post(f"{url}/login", content=body).status_code == 400
    assert httpx.post(f"{url}/login", json={"key": "k"}).status_code == 401
    session = httpx.post(f"{url}/login", json={"key": KEY}).headers["set-cookie"].partition(";")[0]
    ask = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    for site, status in (("same-origin", 200), ("same-site", 401), ("cross-site", 401)):
        headers = {"Cookie": session, "Sec-Fetch-Site": site}
        answer = httpx.post(f"{server.url}/v1/completions", json=ask, headers=headers)
        assert answer.status_code == status


def test_without_a_key_nobody_is_asked_and_the_page_can_be_left_out(browser: Browser) -> None:
    with serving({"root_path": "/llm"}) as server:
        tab = Tab(browser)
        tab.page.goto(f"{server.url}/llm/dashboard")
        tab.page.wait_for_selector(".engine")
        assert not tab.page.query_selector("#login[open]") and tab.page.is_hidden("#logout")
        tab.page.context.close()
        assert tab.errors == []
    with serving({"dashboard": False}) as server:
        assert httpx.get(f"{server.url}/dashboard").status_code == 404
