"""Binding the server's socket and running uvicorn on it."""

import asyncio
import contextlib
import errno
import logging
import resource
import socket
from collections.abc import Awaitable, Callable, Sequence

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.errors import UserError
from nanochat.serve.logs import configure_logging

log = logging.getLogger(__name__)
LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]"]
SHUTDOWN_SECONDS = 2  # time for replies in progress when the server stops
MAX_CONNECTIONS = 1024
MAX_CONNECTIONS_PER_ADDRESS = 256
MAX_DESCRIPTORS = 4096
STAGE_SECONDS = {"headers": 10.0, "body": 30.0}
"""Time for a request's headers to arrive, and then for its body."""
TOO_MANY_CONNECTIONS = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 picks a free port. Raises UserError."""
    try:
        if not 0 <= port <= 65535:
            raise OverflowError  # getaddrinfo would use the low 16 bits
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, OverflowError, UnicodeError):
        raise UserError(f"cannot listen on {host}:{port}: pass --host 127.0.0.1 and a --port up to 65535") from None
    listener = socket.socket(family, kind, protocol)
    # A server that just stopped leaves its port in TIME_WAIT; without this option it could not restart.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use: pass --port {port + 1}, or stop the other program") from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} requires root: pass --port 8000") from None
        raise UserError(f"cannot listen on {host}:{port} ({error}): pass --host 127.0.0.1 --port 8000") from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    host = listener.getsockname()[0]
    return host.startswith("127.") or host == "::1"


def allowed_hosts(listener: socket.socket, host: str, others: Sequence[str] = ()) -> list[str] | None:
    """Return the accepted Host headers: loopback names, the bound address, `host` and `others`. None: any.

    `host` may be the machine's own name, which Debian resolves to 127.0.1.1.
    """
    if not is_loopback(listener):
        return None
    return [*LOOPBACK_NAMES, _bracketed(listener.getsockname()[0]), _bracketed(host.lower()), *map(str.lower, others)]


def url(listener: socket.socket, host: str) -> str:
    """Return the address to open in a browser on this machine."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, _bracketed(host))
    return f"http://{name}:{listener.getsockname()[1]}"


def lan_url(listener: socket.socket) -> str | None:
    """Return the address to open on another computer, None if it is unknown."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing, but selects the outgoing interface
            except OSError:
                return None
            host = probe.getsockname()[0]
    return f"http://{_bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def raise_descriptor_limit() -> None:
    """Raise the soft limit on open files to MAX_DESCRIPTORS, or as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(MAX_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def max_connections() -> int:
    """Return the limit on connections: at most a quarter of the descriptors, which files and engines need too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 4)


class Connection(H11Protocol):
    """An HTTP connection. It is closed if its request does not arrive in time, and sooner if there are too many."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in H11Protocol
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._enter("headers")
        if len(self.connections) > min(max_connections(), MAX_CONNECTIONS_PER_ADDRESS):
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_stage()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_stage()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._enter("closed")

    def _update_stage(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            stage = "headers"
        else:
            stage = "body" if self.cycle.more_body else "response"
        if stage != self.stage and not self.transport.is_closing():
            self._enter(stage)

    def _enter(self, stage: str) -> None:
        self.stage, self.stage_start = stage, self.loop.time()
        if self._timer:
            self._timer.cancel()
        seconds = STAGE_SECONDS.get(stage)
        self._timer = self.loop.call_later(seconds, self.transport.abort) if seconds else None

    def _make_room(self) -> None:
        """Close the connection that has waited longest for its request if there are too many; without one, this one."""
        others = [
            other
            for other in self.connections
            if isinstance(other, Connection) and other is not self and not other.transport.is_closing()
        ]
        same_address = [other for other in others if other.client and self.client and other.client[0] == self.client[0]]
        if len(same_address) >= MAX_CONNECTIONS_PER_ADDRESS:
            others = same_address
        elif len(others) < max_connections():
            return
        limits = (max_connections(), MAX_CONNECTIONS_PER_ADDRESS)
        log.warning("too many connections (limits: %d, %d per address): closing idle ones", *limits)
        waiting = [other for other in others if other.stage in STAGE_SECONDS]
        if waiting:
            min(waiting, key=lambda other: other.stage_start).transport.abort()
        else:
            self.transport.write(TOO_MANY_CONNECTIONS)
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn without access logs: requests and prompts are not logged, only failures."""

    error: UserError | None = None

    def __init__(self, app: FastAPI, finish_replies: Callable[[float], Awaitable[None]]) -> None:
        """finish_replies: ends all replies within that many seconds when the server stops."""
        self.finish_replies = finish_replies
        configure_logging()
        raise_descriptor_limit()
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=min(128, max_connections() // 4),  # asyncio accepts this many before any is closed
            timeout_graceful_shutdown=2 * SHUTDOWN_SECONDS,
        )
        super().__init__(config)

    def run_on(self, listener: socket.socket) -> None:
        """Serve until Ctrl-C, SIGTERM or `stop`. Raises the error passed to `stop`."""
        with contextlib.suppress(KeyboardInterrupt):
            self.run(sockets=[listener])
        if self.error:
            raise self.error

    def stop(self, error: UserError | None = None) -> None:
        if not self.should_exit:  # an error during a stop is a consequence of it
            self.error, self.should_exit = error, True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let replies finish for SHUTDOWN_SECONDS. Clients of the others receive an error."""
        await self.finish_replies(SHUTDOWN_SECONDS)
        asyncio.get_running_loop().call_later(SHUTDOWN_SECONDS, self._abort_connections)
        await super().shutdown(sockets)

    def _abort_connections(self) -> None:
        """Disconnect clients that do not read, for which uvicorn would cancel their tasks and log tracebacks."""
        for connection in list(self.server_state.connections):
            if connection.transport:
                connection.transport.abort()
