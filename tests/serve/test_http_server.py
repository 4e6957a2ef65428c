"""Binding addresses, accepted Host headers, limits on connections, and logging."""

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest

from nanochat.errors import UserError
from nanochat.serve import http_server
from nanochat.serve.logs import RepeatFilter
from nanochat.tokenizer import Tokenizer
from tests.serve.serving import scripted


def test_port_in_use_names_another() -> None:
    with http_server.bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"{port}.*--port {port + 1}"):
            http_server.bind("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 99_999), ("127.0.0.1", -1), ("no such host", 0), ("192.0.2.1", 0)]
)
def test_invalid_address_is_a_user_error(host: str, port: int) -> None:
    with pytest.raises(UserError, match=f"{host}|{port}"):
        http_server.bind(host, port)


@pytest.mark.parametrize(
    ("host", "names"),
    [
        ("localhost", {"localhost", "127.0.0.1"}),
        ("127.0.0.2", {"localhost", "127.0.0.2"}),
        ("LocalHost", {"localhost"}),
    ],
)
def test_the_requested_host_is_allowed(host: str, names: set[str]) -> None:
    with http_server.bind(host, 0) as listener:
        allowed = http_server.allowed_hosts(listener, host)
    assert allowed is not None and names <= set(allowed) and "evil.example" not in allowed


def test_on_the_network_any_host_name_is_allowed() -> None:
    with http_server.bind("0.0.0.0", 0) as listener:
        assert http_server.allowed_hosts(listener, "0.0.0.0") is None


def test_only_loopback_counts_as_local() -> None:
    with http_server.bind("127.0.0.1", 0) as local, http_server.bind("0.0.0.0", 0) as everywhere:
        assert http_server.is_loopback(local) and not http_server.is_loopback(everywhere)
        assert http_server.url(everywhere, "0.0.0.0").startswith("http://127.0.0.1:")


@pytest.fixture
def connect(tokenizer: Tokenizer) -> Iterator[Callable[[bytes], socket.socket]]:
    """A function that opens a connection to a server and sends the first bytes of a request."""
    with scripted(tokenizer) as (served, _), contextlib.ExitStack() as stack:
        address = urlsplit(served.url)

        def connect(data: bytes = b"") -> socket.socket:
            opened = stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=20))
            opened.sendall(data)
            return opened

        yield connect


Connect = Callable[..., socket.socket]
PARTS = [b"", b"GET /health HTT", b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{"]


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def healthy(connection: socket.socket) -> bool:
    connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    response = b""
    while not response.endswith(b"}") and (received := connection.recv(1000)):
        response += received
    return b" 200 OK" in response


@pytest.mark.parametrize("part", PARTS)
def test_request_that_does_not_arrive_is_disconnected(
    connect: Connect, part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "STAGE_SECONDS", {"headers": 0.1, "body": 0.1})
    assert is_closed(connect(part))


def test_slow_second_request_is_disconnected_and_a_long_reply_is_not(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "STAGE_SECONDS", {"headers": 0.1, "body": 0.1})
    body = b'{"messages": [{"role": "user", "content": "wait"}], "stream": true}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    reply = connect(f"{head}content-type: application/json\r\n\r\n".encode() + body)
    second = connect()
    assert healthy(second)
    second.sendall(b"GET /hea")
    assert is_closed(second)
    assert b"chat.completion.chunk" in reply.recv(10_000)
    reply.settimeout(0.3)
    with pytest.raises(TimeoutError):
        while reply.recv(10_000):
            pass


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("limit", ["MAX_CONNECTIONS", "MAX_CONNECTIONS_PER_ADDRESS"])
def test_idle_connections_make_room_for_others(
    connect: Connect, part: bytes, limit: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_server, limit, 5)
    idle = [connect(part) for _ in range(30)]
    assert all(is_closed(connection) for connection in idle[:20])
    assert healthy(connect())
    assert "too many connections" in caplog.text


def test_repeated_log_lines_are_counted() -> None:
    repeats = RepeatFilter()

    def is_logged(seconds: float, message: str) -> str | None:
        record = logging.LogRecord("name", logging.ERROR, "path", 1, message, ("x",) if "%s" in message else None, None)
        record.created = 1e9 + seconds
        return record.getMessage() if repeats.filter(record) else None

    assert is_logged(0, "one %s") == "one x" and is_logged(0, "one y") == "one y"
    assert is_logged(1, "two %s\nlines") == "two x\nlines"
    assert [is_logged(second, "one %s") for second in range(2, 9)] == [None] * 7
    assert is_logged(61, "one %s") == "one x (7 more since the last time)"
    assert is_logged(62, "two %s\nlines") == "two x\nlines"
