"""The dashboard's sessions: only what was made with the keys, has not ended and is the page's."""

import time
from typing import Any

import pytest

from router.sessions import COOKIE, SECONDS, Sessions


def value(sessions: Sessions) -> str:
    return sessions.cookie("/", secure=False).partition(";")[0]


def scope(cookie: str, site: str | None = "same-origin") -> dict[str, Any]:
    headers = [(b"cookie", cookie.encode())]
    if site is not None:
        headers.append((b"sec-fetch-site", site.encode()))
    return {"type": "http", "headers": headers}


def test_a_session_is_good_for_all_with_the_same_keys() -> None:
    made = value(Sessions(["a", "b"]))
    for site in ("same-origin", "none", None):
        assert Sessions(["b", "a"]).accepts(scope(f"x=y; {made}", site))
    for site in ("same-site", "cross-site"):
        assert not Sessions(["a", "b"]).accepts(scope(made, site))
    assert not Sessions(["a"]).accepts(scope(made))


def test_nothing_else_is_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(["a"])
    made = value(sessions)
    ends, mac = made.removeprefix(f"{COOKIE}=").split(".")
    wrong = ["", ends, f"{ends}.", f"{ends}.{mac}0", f"{int(ends) + 1}.{mac}", f"x.{mac}", "é.é"]
    for cookie in ("", COOKIE, *(f"{COOKIE}={value}" for value in wrong)):
        assert not sessions.accepts(scope(cookie))
    later = time.time() + SECONDS + 1
    assert sessions.accepts(scope(made))
    monkeypatch.setattr(time, "time", lambda: later)
    assert not sessions.accepts(scope(made))


def test_no_script_and_no_other_site_has_it() -> None:
    words = Sessions(["a"]).cookie("/llm/", secure=True).split("; ")
    assert words[1:] == [
        "Path=/llm/",
        f"Max-Age={SECONDS}",
        "HttpOnly",
        "SameSite=Strict",
        "Secure",
    ]
