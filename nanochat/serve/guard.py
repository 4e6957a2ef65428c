"""What holds for every request and every response, whatever route it takes."""

import hmac
import logging
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.serve.protocol import error_body

log = logging.getLogger(__name__)
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
OPEN_PATHS = ("/", "/health", "/code.css")
"""what anyone may have, as well as /static: the page has to be there to ask for the key"""


class Guard:
    """Adds the security headers; refuses bodies that are too large, a wrong key, and names that are not this server's.

    A route that fails unexpectedly is logged and answered for here, with status 500: what Starlette has for that lies
    outside all middleware, so the answer would bear no header of theirs and not be counted.

    The check of names is against DNS rebinding: a page elsewhere whose own name suddenly points at 127.0.0.1 could
    otherwise talk to the model as if it were ours.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        allowed_hosts: list[str] | None = None,
        api_key: str | None = None,
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.allowed_hosts = allowed_hosts
        self.api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope["path"], Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        try:
            await self.app(scope, _Metered(receive, self.max_body_bytes), send_with_headers)
        except _TooLarge:
            await self._too_large()(scope, receive, send_with_headers)
        except Exception:
            if started:  # too late for another answer: the connection breaks off
                raise
            log.exception("%s %s failed", scope["method"], getattr(scope.get("route"), "path", "a request"))
            body = error_body(500, "the server failed to answer")
            await JSONResponse(body, 500)(scope, receive, send_with_headers)

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        if self.allowed_hosts is not None and _host_name(headers.get("host", "")) not in self.allowed_hosts:
            message = "this server does not answer to that host name: start it with --host to open it to others"
            return JSONResponse(error_body(400, message), 400)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body_bytes:
            return self._too_large()
        if self.api_key is not None and path not in OPEN_PATHS and not path.startswith("/static/"):
            given = headers.get("authorization", "").removeprefix("Bearer ")
            # In constant time, so that nobody finds the key letter by letter with a stopwatch.
            if not hmac.compare_digest(given.encode("latin-1"), self.api_key.encode()):
                body = error_body(401, "the API key is missing or wrong", code="invalid_api_key")
                return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
        return None

    def _too_large(self) -> JSONResponse:
        return JSONResponse(error_body(413, f"the request is larger than {self.max_body_bytes} bytes"), 413)


class _TooLarge(BaseException):
    """Passes through the application untouched: it is no error of a route, and no route may answer it."""


class _Metered:
    """A request's body, up to a limit, also where the client did not announce how much would come."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self.receive = receive
        self.left = limit

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self.receive()
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            raise _TooLarge
        return message


def _host_name(host: str) -> str:
    """The name in a Host header, in lower case and without its port: `[::1]:8000` is `[::1]`."""
    return (host if host.endswith("]") else host.rpartition(":")[0] or host).lower()
