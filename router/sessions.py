"""Cookies of the dashboard: they stand for an API key for a while, in a browser.

A session is the time at which it ends and a MAC of that (RFC 2104), made with a secret that follows
from the keys. So every ingress replica knows the sessions of the others, none is kept anywhere, and
changing the keys ends them all. No script of a page can read one, and no other site can use it.
"""

import hashlib
import hmac
import time
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie

from starlette.types import Scope

COOKIE = "manta_session"
SECONDS = 7 * 24 * 3600
_OWN_PAGES = (b"same-origin", b"none")  # of what browsers say in Sec-Fetch-Site


class Sessions:
    """Makes and checks the sessions of a server with these API keys."""

    def __init__(self, keys: Sequence[str]) -> None:
        digests = b"".join(sorted(hashlib.sha256(key.encode()).digest() for key in keys))
        self._secret = hashlib.sha256(b"manta dashboard" + digests).digest()

    def cookie(self, path: str, secure: bool) -> str:
        """A new session as the value of Set-Cookie, for what is under ``path``."""
        ends = str(int(time.time()) + SECONDS)
        return _set_cookie(f"{ends}.{self._mac(ends)}", path, secure, SECONDS)

    def accepts(self, scope: Scope) -> bool:
        """Whether a request has a session that has not ended, and comes from the server's page."""
        headers = dict(scope["headers"])
        if headers.get(b"sec-fetch-site", b"none") not in _OWN_PAGES:
            return False
        try:
            cookies = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1"))
        except CookieError:
            return False
        ends, _, mac = cookies[COOKIE].value.partition(".") if COOKIE in cookies else ("", "", "")
        known = hmac.compare_digest(mac.encode(), self._mac(ends).encode())
        return known and int(ends) > time.time()

    def _mac(self, ends: str) -> str:
        return hmac.new(self._secret, ends.encode(), hashlib.sha256).hexdigest()


def forget(path: str, secure: bool) -> str:
    """The value of Set-Cookie that ends a session in its browser."""
    return _set_cookie("", path, secure, 0)


def _set_cookie(value: str, path: str, secure: bool, seconds: int) -> str:
    flags = "; Secure" if secure else ""
    return f"{COOKIE}={value}; Path={path}; Max-Age={seconds}; HttpOnly; SameSite=Strict{flags}"
