"""Binding addresses, accepted Host headers, and errors."""

import pytest

from nanochat.errors import UserError
from nanochat.serve import http_server


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
