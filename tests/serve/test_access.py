"""Who may use the server: keys, hosts and origins; and what it does not disclose."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from nanochat.tokenizer import Tokenizer
from tests.serve.serving import CHAT, say, scripted


@pytest.fixture(scope="module")
def client(tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    with scripted(tokenizer) as (served, _):
        yield served.client


def test_page_and_static_files_load_nothing_from_other_hosts(client: httpx.Client) -> None:
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for path in ("/", "/static/chat.css", "/static/chat.js", "/static/icon.svg", "/code.css"):
        response = client.get(path)
        assert response.status_code == 200 and response.headers["x-content-type-options"] == "nosniff"
        hosts = re.findall(r"(?:https?:|[\"'(=])//([^\s\"'/)]+)", response.text)
        assert set(hosts) <= {"www.w3.org"}  # the namespace of SVG, which is not loaded


def test_pages_of_other_sites_get_nothing(client: httpx.Client) -> None:
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
    assert "access-control-allow-origin" not in client.get("/health", headers={"origin": "http://evil.example"}).headers
    # A form or a simple fetch of another site may send text/plain without asking; it must not reach the model.
    headers = {"content-type": "text/plain", "origin": "http://evil.example"}
    plain = client.post(CHAT, content=json.dumps(say("hello")), headers=headers)
    assert plain.status_code == 400


def test_pages_that_were_allowed_may_use_the_api(tokenizer: Tokenizer) -> None:
    with scripted(tokenizer, allowed_origins=["https://friend.example"], api_key="secret") as (served, _):
        # as OpenAI's client for browsers asks
        names = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
        asked = {"access-control-request-method": "POST", "access-control-request-headers": names}
        friend = served.client.options(CHAT, headers={"origin": "https://friend.example", **asked})
        assert friend.status_code == 200 and "x-stainless-lang" in friend.headers["access-control-allow-headers"]
        assert friend.headers["access-control-allow-origin"] == "https://friend.example"
        assert "access-control-allow-credentials" not in friend.headers
        other = served.client.options(CHAT, headers={"origin": "https://evil.example", **asked})
        assert "access-control-allow-origin" not in other.headers


def test_api_key_is_asked_for_everywhere_but_at_the_page(tokenizer: Tokenizer) -> None:
    with scripted(tokenizer, api_key="sëcret") as (served, _):
        for path in ("/", "/static/chat.js", "/code.css", "/health"):
            assert served.client.get(path).status_code == 200
        for path in ("/v1/models", "/models", "/metrics", "/openapi.json", "/nowhere", "/static/../metrics"):
            assert served.client.get(path).status_code == 401
        for path in (CHAT, "/v1/completions", "/tokenize", "/render"):
            refused = served.client.post(path, json={})
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        key = {b"authorization": "Bearer sëcret".encode()}
        assert 'path="other",status="401"' in served.client.get("/metrics", headers=key).text
        wrong: dict[str, Any] = {"headers": {"authorization": "Bearer secre"}}
        assert served.client.get("/v1/models", **wrong).status_code == 401
        right = {b"authorization": "Bearer sëcret".encode()}
        assert served.client.post(CHAT, json=say("hello"), headers=right).status_code == 200
    with scripted(tokenizer, api_key="secret") as (served, _):
        for name, value, status in (
            ("authorization", "bearer secret", 200),
            ("x-api-key", "secret", 200),
            ("x-api-key", "secre", 401),
            ("authorization", "Basic secret", 401),
        ):
            assert served.client.get("/v1/models", headers={name: value}).status_code == status


def test_another_name_is_refused_unless_it_is_allowed(tokenizer: Tokenizer) -> None:
    name = {"host": "Spark.tail1234.ts.net:443"}
    with scripted(tokenizer) as (served, _):
        error = served.client.get("/health", headers=name).json()["error"]
        assert "--allow-host" in error["message"] and "spark.tail1234.ts.net" in error["message"]
    with scripted(tokenizer, other_hosts=["spark.Tail1234.ts.net"]) as (served, _):
        assert served.client.get("/health", headers=name).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost"])
def test_loopback_hosts_are_allowed(tokenizer: Tokenizer, host: str) -> None:
    with scripted(tokenizer, host=host) as (served, _):
        assert served.client.get("/health", headers={"host": "LOCALHOST:80"}).status_code == 200


def test_prompts_are_not_logged(client: httpx.Client, capfd: pytest.CaptureFixture[str]) -> None:
    client.post(CHAT, json=say("my secret"))
    client.post(CHAT, json=say("my secret", temperature=9))
    captured = capfd.readouterr()
    assert "secret" not in captured.out + captured.err
