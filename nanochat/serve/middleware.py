"""ASGI middleware: security headers, host and API key checks, a limit on the size of requests, and their metrics."""

import hmac
import logging

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.serve.errors import ApiError
from nanochat.serve.metrics import Metrics

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
PUBLIC_PATHS = ("/", "/health", "/code.css")
"""Need no API key, as well as /static: the page has to load before it can ask for the key."""
V1_PATHS = ("models", "chat", "completions", "responses", "messages", "embeddings")
MAX_BODY_BYTES = 1_000_000


class SecurityMiddleware:
    """Adds security headers; rejects large bodies, wrong API keys and unknown hosts; responds to failed requests.

    Counts responses by route and status, including rejections.

    Exceptions in routes become status 500 here: Starlette's own handler is outside all middleware, so its response
    would lack these headers and not be counted in the metrics.

    The Host check prevents DNS rebinding: otherwise, a web page whose domain suddenly resolves to 127.0.0.1 could use
    the API from the browser.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, allowed_hosts: list[str] | None, api_key: str | None) -> None:
        self.app = app
        self.metrics = metrics
        self.allowed_hosts = allowed_hosts
        self.api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = _normalized(scope)
        started = False
        received = 0

        async def receive_limited() -> Message:  # counts, because a client may send no Content-Length
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise _BodyTooLargeError
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                path = getattr(scope.get("route"), "path", "other")  # not the requested path, which can be anything
                self.metrics.requests.labels(path, message["status"]).inc()
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        error = self._rejection(scope["path"], Headers(scope=scope))
        if error is None:
            try:
                await self.app(scope, receive_limited, send_with_headers)
                return
            except _BodyTooLargeError:
                error = ApiError(413, f"the request body must be at most {MAX_BODY_BYTES} bytes")
            except Exception:
                if started:  # too late for another response: the connection is closed
                    raise
                log.exception("%s %s failed", scope["method"], getattr(scope.get("route"), "path", "a request"))
                error = ApiError(500, "internal server error")
        await error.response_to(scope["path"])(scope, receive, send_with_headers)

    def _rejection(self, path: str, headers: Headers) -> ApiError | None:
        host = _host_name(headers.get("host", ""))
        if self.allowed_hosts is not None and host not in self.allowed_hosts:
            return ApiError(400, f"host {host[:100]!r} is not allowed: start the server with --allow-host NAME")
        if self.api_key is not None and path not in PUBLIC_PATHS and not path.startswith("/static/"):
            scheme, _, token = headers.get("authorization", "").partition(" ")
            given = (token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", ""))
            # In constant time, so that response times do not reveal the key.
            if not any(hmac.compare_digest(key.encode("latin-1"), self.api_key.encode()) for key in given):
                challenge = {"WWW-Authenticate": "Bearer"}
                return ApiError(401, "missing or incorrect API key", code="invalid_api_key", headers=challenge)
        return None


class _BodyTooLargeError(BaseException):
    """Not an Exception, so that it passes through the application without being handled by a route."""


def _normalized(scope: Scope) -> Scope:
    """Accept HEAD wherever GET is, paths without /v1, and JSON of any Content-Type, such as that of `curl -d`.

    Browsers, which send an Origin, must send the right Content-Type: otherwise, another site could post without a CORS
    preflight request.
    """
    method, path, headers = scope["method"], scope["path"], list(scope["headers"])
    if path.strip("/").partition("/")[0] in V1_PATHS:
        path = f"/v1{path}"
    if method == "POST" and not any(name == b"origin" for name, _ in headers):
        headers = [(name, value) for name, value in headers if name != b"content-type"]
        headers.append((b"content-type", b"application/json"))
    # uvicorn sends no body in response to HEAD.
    return {**scope, "method": "GET" if method == "HEAD" else method, "path": path, "headers": headers}


def _host_name(host: str) -> str:
    """Return the name in a Host header in lower case, without the port: `[::1]:8000` -> `[::1]`."""
    return (host if host.endswith("]") else host.rpartition(":")[0] or host).lower()
