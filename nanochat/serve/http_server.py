"""Where the server listens, and running it until it is told to stop."""

import contextlib
import errno
import logging
import socket

import uvicorn
from fastapi import FastAPI

from nanochat.errors import UserError

LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]"]
SECONDS_TO_FINISH = 2  # for replies under way when the server is stopped


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port`; port 0 takes a free one. Raises UserError where that cannot be."""
    try:
        if not 0 <= port <= 65535:
            raise OverflowError  # getaddrinfo would take the port's last 16 bits
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, OverflowError, UnicodeError):
        raise UserError(f"cannot listen on {host}:{port}: pass --host 127.0.0.1 and a --port up to 65535") from None
    listener = socket.socket(family, kind, protocol)
    # A server stopped a moment ago leaves its port in TIME_WAIT; without this it could not start again.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use: pass --port {port + 1}, or stop the program there") from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} needs root: pass --port 8000") from None
        raise UserError(f"cannot listen on {host}:{port} ({error}): pass --host 127.0.0.1 --port 8000") from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    host = listener.getsockname()[0]
    return host.startswith("127.") or host == "::1"


def allowed_hosts(listener: socket.socket, host: str) -> list[str] | None:
    """What a browser may call the server by; None for anything, where others reach it than this machine.

    Besides the loopback's names: the address it is bound to and `host`, which was asked for. That may well be the
    machine's own name, for Debian has it mean 127.0.1.1.
    """
    if not is_loopback(listener):
        return None
    return [*LOOPBACK_NAMES, _in_url(listener.getsockname()[0]), _in_url(host.lower())]


def _in_url(host: str) -> str:
    """A name or an address as it stands in a URL and in a Host header."""
    return f"[{host}]" if ":" in host else host


def url(listener: socket.socket, host: str) -> str:
    """The address to open in a browser on this machine."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, _in_url(host))
    return f"http://{name}:{listener.getsockname()[1]}"


def lan_address(listener: socket.socket) -> str | None:
    """The address to open on another computer of the network; None where only this one can reach the socket."""
    if is_loopback(listener):
        return None
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing: it only asks by which way one would go there
            except OSError:
                return None
            host = probe.getsockname()[0]
    return f"http://{_in_url(host)}:{port}"


class Server:
    """uvicorn, set up so that neither requests nor prompts are logged, only what fails."""

    def __init__(self) -> None:
        self._uvicorn: uvicorn.Server | None = None
        self._problem: UserError | None = None

    def run(self, app: FastAPI, listener: socket.socket) -> None:
        """Serve until Ctrl-C or SIGTERM, or until `stop`, whose problem is raised."""
        # A client that leaves in mid-sentence is ordinary here; asyncio would warn of every write that came too late.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        config = uvicorn.Config(
            app,
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=SECONDS_TO_FINISH,
        )
        self._uvicorn = uvicorn.Server(config)
        with contextlib.suppress(KeyboardInterrupt):
            self._uvicorn.run(sockets=[listener])
        if self._problem:
            raise self._problem

    def stop(self, problem: UserError | None = None) -> None:
        """End the server."""
        self._problem = problem
        if self._uvicorn:
            self._uvicorn.should_exit = True
