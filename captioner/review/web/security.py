"""Restricts the review page to its reviewer: host check, token, security headers."""

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

__all__ = ["HEADERS", "Guard", "is_loopback"]

#: Sent with every response: the page loads nothing from, and reveals nothing to, another site.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_COOKIE = "captioner-review"
_WRITE_HEADER = "X-Captioner-Token"
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether a server on ``host`` is reached from this machine alone."""
    return host in ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Guard:
    """Decides which requests are answered.

    Args:
        port: the server's port.
        token: the token that a browser must present before any other request. None on loopback:
            the ``Host`` header must then name this machine, which prevents DNS rebinding.
    """

    port: int
    token: str | None = None
    #: Required in a header of every request that changes something, against CSRF.
    write_token: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    def refusal(self, request: Request) -> Response | None:
        """Returns the response that refuses a request; None for a request that is allowed."""
        if self.token is None:
            if request.headers.get("host", "") not in self._hosts():
                return PlainTextResponse("The Host header does not name this machine.", 421)
        elif (given := request.query_params.get("token")) is not None:
            return self._log_in(request, given)
        elif not _same(request.cookies.get(_COOKIE, ""), self._cookie()):
            return PlainTextResponse("Open the address with the token that captioner printed.", 403)
        if request.method not in ("GET", "HEAD") and not _same(
            request.headers.get(_WRITE_HEADER, ""), self.write_token
        ):
            return PlainTextResponse("The page is out of date: reload it.", 403)
        return None

    def _hosts(self) -> set[str]:
        hosts = {f"{name}:{self.port}" for name in _LOOPBACK}
        return hosts | set(_LOOPBACK) if self.port == 80 else hosts  # browsers leave out port 80

    def _cookie(self) -> str:
        """The cookie's value: a digest, since a token may have characters that no cookie has."""
        assert self.token is not None
        return hashlib.sha256(self.token.encode()).hexdigest()

    def _log_in(self, request: Request, given: str) -> Response:
        """Moves the token from the address to a cookie, to keep it out of histories and logs."""
        assert self.token is not None
        if not _same(given, self.token):
            return PlainTextResponse("The token is not the one that captioner printed.", 403)
        rest = [
            (name, value) for name, value in request.query_params.multi_items() if name != "token"
        ]
        path = "/" + request.url.path.lstrip("/")  # two slashes would begin another host's address
        response = RedirectResponse(f"{path}?{urlencode(rest)}", 303)
        response.set_cookie(_COOKIE, self._cookie(), httponly=True, samesite="strict")
        return response


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())
