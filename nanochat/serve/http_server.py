"""Binding the server's socket and running uvicorn on it."""

import contextlib
import errno
import logging
import socket

import uvicorn
from fastapi import FastAPI

from nanochat.errors import UserError

LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]"]
SHUTDOWN_SECONDS = 2  # time for replies in progress when the server stops


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


def allowed_hosts(listener: socket.socket, host: str) -> list[str] | None:
    """Return the accepted Host headers: loopback names, the bound address and `host`. None: any, on the network.

    `host` may be the machine's own name, which Debian resolves to 127.0.1.1.
    """
    if not is_loopback(listener):
        return None
    return [*LOOPBACK_NAMES, _bracketed(listener.getsockname()[0]), _bracketed(host.lower())]


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


class Server(uvicorn.Server):
    """uvicorn without access logs: requests and prompts are not logged, only failures."""

    error: UserError | None = None

    def __init__(self, app: FastAPI) -> None:
        # Clients often disconnect in the middle of a stream; asyncio would log a warning for every late write.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        config = uvicorn.Config(
            app, access_log=False, log_level="warning", server_header=False, timeout_graceful_shutdown=SHUTDOWN_SECONDS
        )
        super().__init__(config)

    def run_on(self, listener: socket.socket) -> None:
        """Serve until Ctrl-C, SIGTERM or `stop`. Raises the error passed to `stop`."""
        with contextlib.suppress(KeyboardInterrupt):
            self.run(sockets=[listener])
        if self.error:
            raise self.error

    def stop(self, error: UserError | None = None) -> None:
        self.error, self.should_exit = error, True
